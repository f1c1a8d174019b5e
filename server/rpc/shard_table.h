// SPDX-License-Identifier: Apache-2.0
//
// Requests that come as several streams, while streams may still join them.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

class CompressionCall;

// Most streams of one request.
inline constexpr int32_t kMaxShards = 16;
// Longest wait of a request's first stream for the others, and of those for the first.
inline constexpr absl::Duration kJoinTimeout = absl::Seconds(10);

// What the streams of one request have in common.
struct ShardKey {
  Method method = Method::kCompress;
  std::string tenant;
  std::string request_id;
  auto operator<=>(const ShardKey&) const = default;
};

// Thread-safe.
class ShardTable {
 public:
  // Streams of that key now join `first`; those that came before it are returned, and are to be
  // handed over. ALREADY_EXISTS while another request has the key.
  absl::StatusOr<std::vector<std::shared_ptr<CompressionCall>>> Open(
      const ShardKey& key, const std::shared_ptr<CompressionCall>& first);
  // The request to join, or null: then `later` waits for it.
  std::shared_ptr<CompressionCall> Join(const ShardKey& key,
                                        const std::shared_ptr<CompressionCall>& later);
  // The call neither is joined nor waits any more.
  void Leave(const ShardKey& key, const CompressionCall* call);

 private:
  struct Entry {
    std::shared_ptr<CompressionCall> first;
    std::vector<std::shared_ptr<CompressionCall>> waiting;
  };

  absl::Mutex mu_;
  std::map<ShardKey, Entry> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit::rpc
