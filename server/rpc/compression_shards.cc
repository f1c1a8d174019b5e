// SPDX-License-Identifier: Apache-2.0
//
// Calls whose request comes as several streams: how those join.
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/rpc/begin_adapter.h"
#include "server/rpc/compression_call.h"

namespace dynsplit::rpc {

absl::Status CompressionCall::OpenToShards(RequestSpec spec) {
  const ShardKey key = {.method = method_, .tenant = spec.tenant, .request_id = spec.request_id};
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kJoining;
    num_missing_ = spec.num_shards - 1;
    shards_.resize(static_cast<size_t>(spec.num_shards));
    joining_ = std::move(spec);
  }
  WaitForJoin();
  auto waiting = services_.shards.Open(key, shared_from_this());
  if (!waiting.ok()) return waiting.status();
  bool over = false;
  {
    absl::MutexLock lock(&mu_);
    over = settled_.has_value();
    if (!over) key_ = key;
  }
  if (over) services_.shards.Leave(key, this);  // settled before the key was known
  for (const std::shared_ptr<CompressionCall>& later : *waiting) later->HandOver(*this);
  return absl::OkStatus();
}

absl::Status CompressionCall::HandleLaterShard(const v1::Begin& begin) {
  absl::StatusOr<ShardNames> names = LaterShardFromBegin(begin);
  if (!names.ok()) return names.status();
  const ShardKey key = {
      .method = method_, .tenant = names->tenant, .request_id = names->request_id};
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kJoining;
    request_id_ = key.request_id;
    tenant_ = key.tenant;
    own_shard_ = begin.shard_index();
    own_num_shards_ = begin.num_shards();
    key_ = key;
  }
  WaitForJoin();
  const std::shared_ptr<CompressionCall> first = services_.shards.Join(key, shared_from_this());
  if (first != nullptr) {
    HandOver(*first);
    return absl::OkStatus();
  }
  bool over = false;
  {
    absl::MutexLock lock(&mu_);
    over = settled_.has_value();
  }
  if (over) services_.shards.Leave(key, this);  // settled before it waited
  return absl::OkStatus();
}

void CompressionCall::HandOver(CompressionCall& first) {
  absl::Status status;
  {
    absl::MutexLock lock(&mu_);
    if (settled_.has_value()) return;
    status = first.Adopt(shards_.front().stream, own_shard_, own_num_shards_);
    if (status.ok()) {
      settled_ = absl::OkStatus();  // nothing more happens here
      shards_.front().stream = nullptr;
    }
  }
  join_alarm_.Cancel();
  if (!status.ok()) Fail(status);
}

absl::Status CompressionCall::Adopt(const std::shared_ptr<FrameStream>& stream, int32_t shard,
                                    int32_t num_shards) {
  std::optional<RequestSpec> complete;
  {
    absl::MutexLock lock(&mu_);
    if (settled_.has_value()) return NotFound("request", request_id_);
    if (std::cmp_not_equal(num_shards, shards_.size())) {
      return InvalidField("num_shards",
                          absl::StrCat("is ", num_shards, "; the request's is ", shards_.size()));
    }
    Shard& joined = shards_[static_cast<size_t>(shard)];
    if (joined.stream != nullptr) {
      return InvalidField("shard_index",
                          absl::StrCat("is ", shard, "; that shard has joined already"));
    }
    joined.stream = stream;
    if (--num_missing_ == 0) {
      phase_ = Phase::kWaiting;
      complete = std::exchange(joining_, std::nullopt);
    }
  }
  stream->SetOwner(shared_from_this(), shard);
  if (!complete.has_value()) return absl::OkStatus();
  join_alarm_.Cancel();
  Admit(*std::move(complete));
  return absl::OkStatus();
}

void CompressionCall::WaitForJoin() {
  join_alarm_.Set(absl::ToChronoTime(absl::Now() + kJoinTimeout),
                  [weak = weak_from_this()](bool expired) {
                    if (!expired) return;
                    if (const auto self = weak.lock(); self != nullptr) self->OnJoinTimeout();
                  });
}

void CompressionCall::OnJoinTimeout() {
  std::string request_id;
  int32_t missing = 0;
  {
    absl::MutexLock lock(&mu_);
    if (phase_ != Phase::kJoining || settled_.has_value()) return;
    request_id = request_id_;
    missing = num_missing_;
  }
  if (missing == 0) return Fail(NotFound("request", request_id));
  Fail(PreconditionFailed("SHARDS_MISSING", "num_shards",
                          absl::StrCat(missing, " shards have not joined within ",
                                       absl::FormatDuration(kJoinTimeout))));
}

}  // namespace dynsplit::rpc
