// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/conversation.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/frame.h"
#include "proto/wire/status.h"

namespace dynsplit {

Conversation::Conversation(const CompressJob& job, Options options,
                           std::shared_ptr<const void> lease)
    : job_(job), options_(std::move(options)), lease_(std::move(lease)) {}

void Conversation::AddShard(const std::shared_ptr<grpc::Channel>& channel,
                            grpc::ClientContext& context) {
  const ShardOf of = {.index = static_cast<int32_t>(shards_.size()), .count = options_.num_shards};
  Shard& shard = *shards_.emplace_back(std::make_unique<Shard>(job_, lease_, of, channel, context));
  shard.call.emplace(shard.stub, context, options_.method,
                     shard.frames.Begin(options_.chunk_bytes, options_.request_id), shard.frames,
                     read_mu_);
}

absl::StatusOr<CompressResult> Conversation::Run() {
  assembler_.emplace(job_, options_.max_result_bytes);
  while (Shard* const shard = NextReadable()) Listen(*shard);
  if (status_.ok() && !call_status_.ok()) status_ = wire::ToAbsl(call_status_);
  if (status_.ok()) {
    absl::StatusOr<CompressResult> result = assembler_->Finish();
    if (result.ok()) {
      result->sent_bytes = sent_bytes();
      return result;
    }
    status_ = result.status();
  }
  assembler_->SavePartial();
  return status_;
}

Conversation::Shard* Conversation::NextReadable() {
  Shard* found = nullptr;
  const auto look = [&] {
    bool any_open = false;
    for (size_t i = 0; i < shards_.size(); ++i) {
      Shard& shard = *shards_[(next_ + i) % shards_.size()];
      if (shard.closed || shard.early.has_value()) continue;
      any_open = true;
      if (!shard.call->readable()) continue;
      found = &shard;
      next_ = (next_ + i + 1) % shards_.size();
      return true;
    }
    return !any_open;
  };
  {
    absl::MutexLock lock(&read_mu_);
    read_mu_.Await(absl::Condition(&look));
  }
  if (found != nullptr) return found;
  // All that are open wait for what will not come: the first that is taken says so.
  for (const std::unique_ptr<Shard>& shard : shards_) {
    if (!shard->early.has_value()) continue;
    Accept(*std::exchange(shard->early, std::nullopt));
    return NextReadable();
  }
  return nullptr;
}

void Conversation::Listen(Shard& shard) {
  grpc::ByteBuffer message;
  if (!shard.call->Read(message)) return Close(shard);
  if (!status_.ok() || !call_status_.ok()) return;  // cancelled: only drains
  absl::StatusOr<wire::Frame> frame =
      wire::ParseFrame(std::move(message), wire::kMaxChunkDataBytes);
  if (!frame.ok()) {
    return Fail(
        absl::InternalError(absl::StrCat("server broke the protocol: ", frame.status().message())));
  }
  if (shards_.size() > 1 && !assembler_->Expects(*frame)) {
    shard.early = *std::move(frame);
    return;
  }
  Accept(*frame);
  TakeEarly();
}

void Conversation::Accept(const wire::Frame& frame) {
  const bool was_accepted = assembler_->accepted();
  absl::Status status = assembler_->Take(frame);
  if (!status.ok()) return Fail(std::move(status));
  if (!was_accepted) {
    const int32_t limit = assembler_->result().accepted.max_chunk_bytes();
    const size_t chunk_bytes = limit > 0
                                   ? std::min(options_.chunk_bytes, static_cast<size_t>(limit))
                                   : options_.chunk_bytes;
    for (const std::unique_ptr<Shard>& shard : shards_) {
      shard->frames.set_chunk_bytes(chunk_bytes);
      if (!shard->closed) shard->call->SendChunks();
    }
  }
  if (job_.on_progress) {
    job_.on_progress({sent_bytes(), shards_.front()->frames.total_bytes(),
                      assembler_->result().received_bytes, assembler_->num_layers()});
  }
}

void Conversation::TakeEarly() {
  for (bool taken = true; taken && status_.ok();) {
    taken = false;
    for (const std::unique_ptr<Shard>& shard : shards_) {
      if (!shard->early.has_value() || !assembler_->Expects(*shard->early)) continue;
      Accept(*std::exchange(shard->early, std::nullopt));
      taken = true;
      if (!status_.ok()) return;
    }
  }
}

void Conversation::Close(Shard& shard) {
  shard.closed = true;
  const grpc::Status status = shard.call->Finish();
  if (status.ok() || !call_status_.ok()) return;
  call_status_ = status;
  // The server ends all streams alike; one that broke by itself it may not have heard of yet.
  for (const std::unique_ptr<Shard>& other : shards_) {
    other->early.reset();
    if (!other->closed) other->context.TryCancel();
  }
}

void Conversation::Fail(absl::Status status) {
  status_ = std::move(status);
  for (const std::unique_ptr<Shard>& shard : shards_) {
    shard->early.reset();
    shard->context.TryCancel();
  }
}

int64_t Conversation::sent_bytes() const {
  int64_t bytes = 0;
  for (const std::unique_ptr<Shard>& shard : shards_) bytes += shard->frames.sent_bytes();
  return bytes;
}

}  // namespace dynsplit
