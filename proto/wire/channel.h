// SPDX-License-Identifier: Apache-2.0
//
// How both programs set up gRPC and their process for bulk data.
#pragma once

#include <grpcpp/support/channel_arguments.h>

#include <string_view>
#include <vector>

namespace dynsplit::wire {

// Largest message either side takes, bytes: a 3 MiB chunk and a generous control message.
inline constexpr int kMaxMessageBytes = 8 << 20;

enum class Locality {
  kSameHost,  // unix socket or loopback: windows are bounded, frames large
  kRemote,    // round trips matter: gRPC sizes its windows by the measured bandwidth-delay product
};

// Same host for unix:, unix-abstract:, localhost, 127.0.0.0/8 and [::1] (with or without a dns:,
// ipv4: or ipv6: scheme); remote for all else. Takes gRPC targets and listening addresses.
Locality LocalityOf(std::string_view target);

// One integer channel argument.
struct TransportSetting {
  const char* key;
  int value;
};
// For grpc::ServerBuilder::AddChannelArgument and clients alike; both ends should use the same.
std::vector<TransportSetting> TransportSettings(Locality locality);

grpc::ChannelArguments ClientChannelArguments(std::string_view target);

// Keeps freed memory in the process and turns Abseil's lock-order detector off. Fresh pages cost
// more than everything gRPC does with them. Call first in main, before any thread starts.
void InitProcessMemoryPolicy();

}  // namespace dynsplit::wire
