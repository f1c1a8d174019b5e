// SPDX-License-Identifier: Apache-2.0
//
// One gRPC stream: reads and writes frames, and knows nothing of what they say.
//
// Two objects. The reactor is gRPC's: it lives from the start of the call to OnDone. The stream is
// shared with its owner and may outlive the reactor; it forgets the reactor when the call is over.
// Nothing is started after Finish; gRPC never runs our reactions from within Start* or Finish.
//
// Reads. While one frame is with the owner the next is on its way: at most two are held, the second
// only once the first Resume has said that frames are welcome. Writes. While one message is on its
// way the next is made, and its checksum taken.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"
#include "proto/wire/frame.h"
#include "server/rpc/outbox.h"

namespace dynsplit::rpc {

using FrameReactor = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

// Thread-safe.
class FrameStream : public std::enable_shared_from_this<FrameStream> {
 public:
  enum class Handled : uint8_t {
    kDone,   // give the next
    kPause,  // give the next after Resume
    kRetry,  // give this one again after Resume
  };

  // Who takes the frames. `shard` is the number that the owner gave the stream. No lock is held.
  class Owner {
   public:
    virtual ~Owner() = default;
    // One at a time for a stream.
    virtual Handled OnFrame(int32_t shard, const wire::Frame& frame) = 0;
    // What came is no frame.
    virtual void OnMalformed(int32_t shard, absl::Status status) = 0;
    // The client will send no more, behind all it has sent.
    virtual void OnHalfClosed(int32_t shard) = 0;
    // All that was to be sent has left.
    virtual void OnIdle(int32_t shard) = 0;
    // The caller is gone, or `late`: the deadline has passed.
    virtual void OnCancelled(int32_t shard, bool late) = 0;
  };

  FrameStream(size_t max_data_bytes, absl::Time deadline)
      : max_data_bytes_(max_data_bytes), deadline_(deadline) {}

  // Gives the stream to another. Only while it is paused, or from within OnFrame.
  void SetOwner(std::shared_ptr<Owner> owner, int32_t shard) ABSL_LOCKS_EXCLUDED(mu_);
  // Reads the first frame.
  void Start(FrameReactor* reactor) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends a pause; where there is none, the next one.
  void Resume() ABSL_LOCKS_EXCLUDED(mu_);
  void Send(std::vector<Outgoing> messages) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends the call once no write is under way, and forgets what was not sent. The first one counts.
  void Finish(const grpc::Status& status) ABSL_LOCKS_EXCLUDED(mu_);

  // Nothing is to be sent or on its way.
  bool idle() const ABSL_LOCKS_EXCLUDED(mu_);
  // Time that writes took so far.
  absl::Duration sending() const ABSL_LOCKS_EXCLUDED(mu_);
  absl::Time deadline() const { return deadline_; }

  // From the reactor.
  void OnRead(bool ok) ABSL_LOCKS_EXCLUDED(mu_);
  void OnWritten(bool ok) ABSL_LOCKS_EXCLUDED(mu_);
  void OnCancel() ABSL_LOCKS_EXCLUDED(mu_);
  void OnDone() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Message {
    grpc::ByteBuffer bytes;
    std::shared_ptr<const void> part_of;
  };

  // Hands out what has been read, until a pause or until there is no more.
  void Deliver() ABSL_LOCKS_EXCLUDED(mu_);
  void ReadAhead() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes the frame to hand out next. False where there is none.
  bool TakeReceived(grpc::ByteBuffer& received) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Writes what can be written, and prepares what comes next; finishes.
  void Pump() ABSL_LOCKS_EXCLUDED(mu_);
  bool is_idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return queue_.empty() && !encoding_ && !prepared_.has_value() && !writing_;
  }

  const size_t max_data_bytes_;
  const absl::Time deadline_;

  mutable absl::Mutex mu_;
  FrameReactor* reactor_ ABSL_GUARDED_BY(mu_) = nullptr;  // null: over
  std::shared_ptr<Owner> owner_ ABSL_GUARDED_BY(mu_);
  int32_t shard_ ABSL_GUARDED_BY(mu_) = 0;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<grpc::Status> finish_ ABSL_GUARDED_BY(mu_);
  bool finished_ ABSL_GUARDED_BY(mu_) = false;  // reactor_->Finish was called

  bool reading_ ABSL_GUARDED_BY(mu_) = false;
  bool half_closed_ ABSL_GUARDED_BY(mu_) = false;
  bool told_closed_ ABSL_GUARDED_BY(mu_) = false;
  bool welcome_ ABSL_GUARDED_BY(mu_) = false;  // the first Resume has been
  bool delivering_ ABSL_GUARDED_BY(mu_) = false;
  bool paused_ ABSL_GUARDED_BY(mu_) = false;
  bool resumed_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<grpc::ByteBuffer> received_ ABSL_GUARDED_BY(mu_);
  std::optional<wire::Frame> retried_ ABSL_GUARDED_BY(mu_);

  std::deque<Outgoing> queue_ ABSL_GUARDED_BY(mu_);
  bool pumping_ ABSL_GUARDED_BY(mu_) = false;
  bool encoding_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<Message> prepared_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time write_started_ ABSL_GUARDED_BY(mu_);
  absl::Duration sending_ ABSL_GUARDED_BY(mu_);

  // gRPC's from Start* to On*, ours otherwise.
  grpc::ByteBuffer incoming_;
  Message outgoing_;
};

}  // namespace dynsplit::rpc
