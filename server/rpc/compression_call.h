// SPDX-License-Identifier: Apache-2.0
//
// One request of any method of Compression, or of Sessions' Open, Append and Fetch: frames in,
// request, frames out.
//
// A request is one stream or several. Each stream begins with a call of its own; where its begin
// says that it is a later shard of a request, it is handed over to the call of the first, and the
// call it came with is forgotten. All streams end with the same status.
//
// The call is shared with the request and outlives its streams while jobs run. mu_ may be held
// where methods of a FrameStream take its lock, never the other way round.
//
// Back-pressure. No frame is taken while a request waits for its shards or for memory, nor from a
// stream whose chunk waits for a layer's place.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dynsplit/v1/compression.pb.h"
#include "grpcpp/alarm.h"
#include "grpcpp/grpcpp.h"
#include "proto/wire/frame.h"
#include "server/rpc/frame_stream.h"
#include "server/rpc/outbox.h"
#include "server/rpc/services.h"
#include "server/rpc/shard_table.h"
#include "server/runtime/request.h"

namespace dynsplit::rpc {

// Starts a stream; the result deletes itself when the call is over.
FrameReactor* StartCompressionCall(Services& services, Method method,
                                   grpc::CallbackServerContext& context);

class CompressionCall final : public ResultSink,
                              public FrameStream::Owner,
                              public std::enable_shared_from_this<CompressionCall> {
 public:
  CompressionCall(Services& services, Method method, const grpc::CallbackServerContext& context);
  ~CompressionCall() override = default;

  // The stream that it came with. Before anything of that stream is read.
  void Begin(std::shared_ptr<FrameStream> stream) ABSL_LOCKS_EXCLUDED(mu_);
  // Gives the stream of this call to the one of the request's first shard.
  void HandOver(CompressionCall& first) ABSL_LOCKS_EXCLUDED(mu_);

  // From the streams.
  FrameStream::Handled OnFrame(int32_t shard, const wire::Frame& frame) override;
  void OnMalformed(int32_t shard, absl::Status status) override;
  void OnHalfClosed(int32_t shard) override;
  void OnIdle(int32_t shard) override;
  void OnCancelled(int32_t shard, bool late) override;

  // From the request.
  void OnSequence(SequenceOutput output) override;
  void OnLayer(ComputedLayer output) override;
  void OnEnd(EndOutput output) override;
  void OnError(absl::Status status) override;
  void OnRoom() override;

 private:
  using Handled = FrameStream::Handled;
  enum class Phase : uint8_t { kBegin, kJoining, kWaiting, kReceiving, kEnded };
  struct Shard {
    std::shared_ptr<FrameStream> stream;  // null: has not joined
    bool ended = false;
  };

  absl::StatusOr<Handled> HandleFrame(int32_t shard, const wire::Frame& frame);
  absl::Status HandleBegin(const v1::Begin& begin);
  // A later shard: it is handed over, or waits for the first.
  absl::Status HandleLaterShard(const v1::Begin& begin);
  // The first of several: the others may join now.
  absl::Status OpenToShards(RequestSpec spec) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Adopt(const std::shared_ptr<FrameStream>& stream, int32_t shard, int32_t num_shards)
      ABSL_LOCKS_EXCLUDED(mu_);
  void WaitForJoin() ABSL_LOCKS_EXCLUDED(mu_);
  void OnJoinTimeout() ABSL_LOCKS_EXCLUDED(mu_);
  void Admit(RequestSpec spec) ABSL_LOCKS_EXCLUDED(mu_);
  void OnAdmitted(RequestSpec spec, absl::StatusOr<Reservation> reservation);
  absl::StatusOr<Handled> HandleChunk(int32_t shard, const wire::Frame& frame);
  absl::Status ReceiveChunk(const wire::Frame& frame, const Chunk& chunk,
                            const Request::ChunkPlace& place, Request& request);
  absl::Status HandleEnd(int32_t shard, const v1::End& end);

  // The first message goes to the first shard, the tensors to whichever has sent least.
  void Enqueue(std::vector<Outgoing> messages) ABSL_LOCKS_EXCLUDED(mu_);
  // Sends the end once all else has left; settles once that has.
  void MaybeEnd() ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<std::shared_ptr<FrameStream>> Streams() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `rejection` is the reason when the request is turned away before any work.
  void Fail(const absl::Status& status, const char* rejection = nullptr) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends all streams with `status`. False if their end is settled already.
  bool Settle(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  grpc::ByteBuffer EncodeEnd() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecordResult(const v1::CompressEnd& end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What Advise learns from.
  void RecordExperience(const v1::CompressEnd& end, double kept_ratio)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecordFinish(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::shared_ptr<Request> request() ABSL_LOCKS_EXCLUDED(mu_);

  // Constant after construction.
  Services& services_;
  const Method method_;
  const absl::Time started_;
  const absl::Time deadline_;
  const std::string trace_parent_;

  // An element belongs to the shard that brings the tensor. Sized before any chunk is taken.
  std::vector<uint32_t> tensor_crcs_;  // so far, by tensor index

  // Used by the one result at a time.
  std::optional<ResultEncoder> encoder_;
  std::vector<int64_t> assigned_bytes_;  // of results, by shard

  absl::Mutex mu_;
  Phase phase_ ABSL_GUARDED_BY(mu_) = Phase::kBegin;
  std::vector<Shard> shards_ ABSL_GUARDED_BY(mu_);  // by number
  int32_t num_missing_ ABSL_GUARDED_BY(mu_) = 0;    // shards that have not joined
  int32_t own_shard_ ABSL_GUARDED_BY(mu_) = 0;      // what begin says of the stream it came with
  int32_t own_num_shards_ ABSL_GUARDED_BY(mu_) = 1;
  std::optional<ShardKey> key_ ABSL_GUARDED_BY(mu_);         // in the table of shards
  std::optional<RequestSpec> joining_ ABSL_GUARDED_BY(mu_);  // until all have joined
  std::string request_id_ ABSL_GUARDED_BY(mu_);
  std::string tenant_ ABSL_GUARDED_BY(mu_);
  Admission::Ticket ticket_ ABSL_GUARDED_BY(mu_) = 0;
  Admission* admission_ ABSL_GUARDED_BY(mu_) = nullptr;  // that gave the ticket
  std::shared_ptr<Request> request_ ABSL_GUARDED_BY(mu_);
  absl::Duration waited_ ABSL_GUARDED_BY(mu_);         // for memory
  std::optional<EndOutput> end_ ABSL_GUARDED_BY(mu_);  // follows all else
  bool end_sent_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> settled_ ABSL_GUARDED_BY(mu_);
  std::string published_ ABSL_GUARDED_BY(mu_);  // session that the end tells of

  bool closed_early_ ABSL_GUARDED_BY(mu_) = false;  // a stream, before its end message

  grpc::Alarm join_alarm_;
  grpc::Alarm close_alarm_;
};

}  // namespace dynsplit::rpc
