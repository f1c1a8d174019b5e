// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/shard_table.h"

#include <utility>

#include "server/pipeline/errors.h"
#include "server/rpc/compression_call.h"

namespace dynsplit::rpc {

absl::StatusOr<std::vector<std::shared_ptr<CompressionCall>>> ShardTable::Open(
    const ShardKey& key, const std::shared_ptr<CompressionCall>& first) {
  absl::MutexLock lock(&mu_);
  Entry& entry = entries_[key];
  if (entry.first != nullptr) {
    return AlreadyExists("request", key.request_id,
                         "is open; streams of several requests would be mistaken for one another");
  }
  entry.first = first;
  return std::exchange(entry.waiting, {});
}

std::shared_ptr<CompressionCall> ShardTable::Join(const ShardKey& key,
                                                  const std::shared_ptr<CompressionCall>& later) {
  absl::MutexLock lock(&mu_);
  Entry& entry = entries_[key];
  if (entry.first == nullptr) entry.waiting.push_back(later);
  return entry.first;
}

void ShardTable::Leave(const ShardKey& key, const CompressionCall* call) {
  std::shared_ptr<CompressionCall> left;  // may end here, outside the lock
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(key);
  if (found == entries_.end()) return;
  Entry& entry = found->second;
  if (entry.first.get() == call) left = std::move(entry.first);
  for (auto waiting = entry.waiting.begin(); waiting != entry.waiting.end(); ++waiting) {
    if (waiting->get() != call) continue;
    left = std::move(*waiting);
    entry.waiting.erase(waiting);
    break;
  }
  if (entry.first == nullptr && entry.waiting.empty()) entries_.erase(found);
}

}  // namespace dynsplit::rpc
