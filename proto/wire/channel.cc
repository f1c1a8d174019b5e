// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/channel.h"

#include <grpc/impl/codegen/grpc_types.h>
#include <malloc.h>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"

namespace dynsplit::wire {

Locality LocalityOf(std::string_view target) {
  absl::string_view rest(target.data(), target.size());
  if (absl::StartsWith(rest, "unix:") || absl::StartsWith(rest, "unix-abstract:")) {
    return Locality::kSameHost;
  }
  for (const absl::string_view scheme : {"dns:///", "dns:", "ipv4:", "ipv6:"}) {
    if (absl::ConsumePrefix(&rest, scheme)) break;
  }
  const bool loopback = rest == "localhost" || absl::StartsWith(rest, "localhost:") ||
                        absl::StartsWith(rest, "127.") || absl::StartsWith(rest, "[::1]") ||
                        rest == "::1";
  return loopback ? Locality::kSameHost : Locality::kRemote;
}

std::vector<TransportSetting> TransportSettings(Locality locality) {
  std::vector<TransportSetting> settings = {
      {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, kMaxMessageBytes},
      {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, kMaxMessageBytes},
  };
  if (locality == Locality::kSameHost) {
    settings.push_back({GRPC_ARG_HTTP2_BDP_PROBE, 0});
    settings.push_back({GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20});
  }
  return settings;
}

grpc::ChannelArguments ClientChannelArguments(std::string_view target) {
  grpc::ChannelArguments arguments;
  for (const TransportSetting& setting : TransportSettings(LocalityOf(target))) {
    arguments.SetInt(setting.key, setting.value);
  }
  return arguments;
}

void InitProcessMemoryPolicy() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most glibc takes
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
  // One arena for all threads: message slices are freed by other threads than allocate them, and an
  // arena a thread would keep as many fresh pages each as one needs in all.
  mallopt(M_ARENA_MAX, 1);
#endif
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
}

}  // namespace dynsplit::wire
