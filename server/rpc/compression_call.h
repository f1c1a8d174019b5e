// SPDX-License-Identifier: Apache-2.0
//
// One stream of any method of Compression, or of Sessions' Open, Append and Fetch: frames in,
// request, frames out.
//
// Two objects. The reactor is gRPC's: it lives from the start of the call to OnDone. The call is
// shared with the request and outlives the reactor while jobs run; it forgets the reactor when the
// call is over. Everything that touches the reactor does so under mu_, and nothing is started
// after Finish; gRPC never runs our callbacks from within Start* or Finish, so no lock is taken
// twice.
//
// Back-pressure. One read is outstanding at a time, none while a request waits for memory, and
// none while a chunk waits for a layer's place.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dynsplit/v1/compression.pb.h"
#include "grpcpp/grpcpp.h"
#include "proto/wire/frame.h"
#include "server/rpc/outbox.h"
#include "server/rpc/services.h"
#include "server/runtime/request.h"

namespace dynsplit::rpc {

using CompressionReactor = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

// Starts a stream; the result deletes itself when the call is over.
CompressionReactor* StartCompressionCall(Services& services, Method method,
                                         grpc::CallbackServerContext& context);

class CompressionCall final : public ResultSink,
                              public std::enable_shared_from_this<CompressionCall> {
 public:
  CompressionCall(Services& services, Method method, const grpc::CallbackServerContext& context);
  ~CompressionCall() override = default;

  // From the reactor.
  void Start(CompressionReactor* reactor);
  void OnRead(bool ok);
  void OnWritten(bool ok);
  void OnCancel();
  void OnDone();

  // From the request.
  void OnSequence(SequenceOutput output) override;
  void OnLayer(ComputedLayer output) override;
  void OnEnd(EndOutput output) override;
  void OnError(absl::Status status) override;
  void OnRoom() override;

 private:
  enum class Phase : uint8_t { kBegin, kWaiting, kReceiving, kEnded };

  absl::Status HandleMessage(wire::Frame frame);
  absl::Status HandleBegin(const v1::Begin& begin);
  void OnAdmitted(RequestSpec spec, absl::StatusOr<Reservation> reservation);
  absl::Status HandleChunks(wire::Frame frame);
  absl::Status ReceiveChunk(const wire::Frame& frame, const Chunk& chunk,
                            const Request::ChunkPlace& place, Request& request);
  absl::Status HandleEnd(const v1::End& end);

  void ReadNext() ABSL_LOCKS_EXCLUDED(mu_);
  void Enqueue(std::vector<Outgoing> messages) ABSL_LOCKS_EXCLUDED(mu_);
  // `rejection` is the reason when the request is turned away before any work.
  void Fail(absl::Status status, const char* rejection = nullptr) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends the call with `status` once no write is in flight. False if its end is settled already.
  bool Settle(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  grpc::ByteBuffer EncodeEnd() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecordResult(const v1::CompressEnd& end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecordFinish(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::shared_ptr<Request> request() ABSL_LOCKS_EXCLUDED(mu_);

  // Constant after construction.
  Services& services_;
  const Method method_;
  const absl::Time started_;
  const absl::Time deadline_;
  const std::string trace_parent_;

  // Used by the one read at a time.
  std::vector<uint32_t> tensor_crcs_;  // so far, by tensor index

  // Used by the one result at a time.
  std::optional<ResultEncoder> encoder_;

  absl::Mutex mu_;
  CompressionReactor* reactor_ ABSL_GUARDED_BY(mu_) = nullptr;  // null: over
  Phase phase_ ABSL_GUARDED_BY(mu_) = Phase::kBegin;
  std::string request_id_ ABSL_GUARDED_BY(mu_);
  std::string tenant_ ABSL_GUARDED_BY(mu_);
  Admission::Ticket ticket_ ABSL_GUARDED_BY(mu_) = 0;
  Admission* admission_ ABSL_GUARDED_BY(mu_) = nullptr;  // that gave the ticket
  std::shared_ptr<Request> request_ ABSL_GUARDED_BY(mu_);
  std::optional<wire::Frame> parked_ ABSL_GUARDED_BY(mu_);  // waits for room
  bool room_ ABSL_GUARDED_BY(mu_) = false;  // OnRoom came before the frame was parked
  std::deque<Outgoing> queue_ ABSL_GUARDED_BY(mu_);
  std::optional<EndOutput> end_ ABSL_GUARDED_BY(mu_);  // follows the queue
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time write_started_ ABSL_GUARDED_BY(mu_);
  absl::Duration sending_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> settled_ ABSL_GUARDED_BY(mu_);
  std::string published_ ABSL_GUARDED_BY(mu_);  // session that the end tells of
  bool let_go_ ABSL_GUARDED_BY(mu_) = false;    // of the request, so that Finish may be called
  bool finished_ ABSL_GUARDED_BY(mu_) = false;  // Finish was called

 public:
  // gRPC's ends of the messages in flight; touched by it between Start* and On*.
  grpc::ByteBuffer incoming;
  grpc::ByteBuffer outgoing;
};

}  // namespace dynsplit::rpc
