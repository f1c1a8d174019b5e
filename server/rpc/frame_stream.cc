// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/frame_stream.h"

#include <utility>

#include "absl/time/clock.h"

namespace dynsplit::rpc {

void FrameStream::SetOwner(std::shared_ptr<Owner> owner, int32_t shard) {
  bool cancelled = false;
  {
    absl::MutexLock lock(&mu_);
    owner_.swap(owner);
    shard_ = shard;
    cancelled = cancelled_;
  }
  if (cancelled) OnCancel();  // the last owner may have passed it over
}

void FrameStream::Start(FrameReactor* reactor) {
  absl::MutexLock lock(&mu_);
  reactor_ = reactor;
  if (finish_.has_value()) {
    finished_ = true;
    reactor_->Finish(*finish_);
  } else {
    reading_ = true;
    reactor_->StartRead(&incoming_);
  }
}

// -- in -------------------------------------------------------------------------------------------

void FrameStream::Resume() {
  {
    absl::MutexLock lock(&mu_);
    welcome_ = true;
    resumed_ = true;
  }
  Deliver();
}

void FrameStream::OnRead(bool ok) {
  {
    absl::MutexLock lock(&mu_);
    reading_ = false;
    if (ok) {
      received_.emplace().Swap(&incoming_);
    } else {
      half_closed_ = true;
    }
  }
  Deliver();
}

void FrameStream::ReadAhead() {
  if (reading_ || half_closed_ || received_.has_value() || finish_.has_value()) return;
  if (reactor_ == nullptr || (!welcome_ && (paused_ || delivering_))) return;
  reading_ = true;
  reactor_->StartRead(&incoming_);
}

bool FrameStream::TakeReceived(grpc::ByteBuffer& received) {
  if (finish_.has_value() || !received_.has_value()) return false;
  received.Swap(&*received_);
  received_.reset();
  ReadAhead();
  return true;
}

void FrameStream::Deliver() {
  mu_.Lock();
  if (delivering_) {  // whoever delivers looks again
    mu_.Unlock();
    return;
  }
  delivering_ = true;
  while (!finish_.has_value()) {
    if (paused_ && !std::exchange(resumed_, false)) break;
    paused_ = false;
    std::optional<wire::Frame> frame = std::exchange(retried_, std::nullopt);
    grpc::ByteBuffer received;
    const bool fresh = !frame.has_value() && TakeReceived(received);
    if (!fresh && !frame.has_value() && !half_closed_) break;
    const bool closed = !fresh && !frame.has_value();
    if (closed && std::exchange(told_closed_, true)) break;
    const std::shared_ptr<Owner> owner = owner_;
    const int32_t shard = shard_;
    mu_.Unlock();
    Handled handled = Handled::kDone;
    absl::Status status;
    if (fresh) {
      absl::StatusOr<wire::Frame> parsed = wire::ParseFrame(std::move(received), max_data_bytes_);
      status = parsed.status();
      if (parsed.ok()) frame = *std::move(parsed);
    }
    if (!status.ok()) {
      owner->OnMalformed(shard, std::move(status));
    } else if (closed) {
      owner->OnHalfClosed(shard);
    } else {
      handled = owner->OnFrame(shard, *frame);
    }
    if (handled != Handled::kRetry) frame.reset();
    mu_.Lock();
    paused_ = handled != Handled::kDone;
    if (!finish_.has_value()) retried_ = std::move(frame);
  }
  delivering_ = false;
  if (!paused_) ReadAhead();
  mu_.Unlock();
}

// -- out ------------------------------------------------------------------------------------------

void FrameStream::Send(std::vector<Outgoing> messages) {
  {
    absl::MutexLock lock(&mu_);
    if (finish_.has_value()) return;
    for (Outgoing& message : messages) {
      if (!message.exhausted()) queue_.push_back(std::move(message));
    }
  }
  Pump();
}

void FrameStream::Pump() {
  mu_.Lock();
  if (pumping_) {  // whoever pumps looks again
    mu_.Unlock();
    return;
  }
  pumping_ = true;
  while (!finish_.has_value() && reactor_ != nullptr) {
    if (prepared_.has_value() && !writing_) {
      outgoing_ = *std::exchange(prepared_, std::nullopt);
      writing_ = true;  // no Finish meanwhile, so that the reactor stays
      write_started_ = absl::Now();
      FrameReactor* const reactor = reactor_;
      mu_.Unlock();
      reactor->StartWrite(&outgoing_.bytes);
      mu_.Lock();
    } else if (!prepared_.has_value() && !queue_.empty()) {
      std::optional<Outgoing> next(std::move(queue_.front()));
      queue_.pop_front();
      encoding_ = true;
      mu_.Unlock();
      Message message{.bytes = next->Next(), .part_of = next->part_of};
      if (next->exhausted()) next.reset();
      mu_.Lock();
      encoding_ = false;
      if (finish_.has_value()) {
        mu_.Unlock();  // what is given up must not go under the lock
        message = {};
        next.reset();
        mu_.Lock();
        break;
      }
      if (next.has_value()) queue_.push_front(*std::move(next));
      prepared_ = std::move(message);
    } else {
      break;
    }
  }
  pumping_ = false;
  if (finish_.has_value() && reactor_ != nullptr && !writing_ && !finished_) {
    finished_ = true;
    reactor_->Finish(*finish_);
  }
  mu_.Unlock();
}

void FrameStream::OnWritten(bool ok) {
  {
    const Message sent = std::exchange(outgoing_, {});
    absl::MutexLock lock(&mu_);
    writing_ = false;
    sending_ += absl::Now() - write_started_;
  }
  if (!ok) OnCancel();
  Pump();
  std::shared_ptr<Owner> owner;
  int32_t shard = 0;
  {
    absl::MutexLock lock(&mu_);
    if (finish_.has_value() || !is_idle()) return;
    owner = owner_;
    shard = shard_;
  }
  if (owner != nullptr) owner->OnIdle(shard);
}

// -- over -----------------------------------------------------------------------------------------

void FrameStream::Finish(const grpc::Status& status) {
  std::deque<Outgoing> unsent;  // freed outside the lock, before the caller hears of the end
  std::optional<Message> prepared;
  std::optional<grpc::ByteBuffer> received;
  std::optional<wire::Frame> retried;
  {
    absl::MutexLock lock(&mu_);
    if (finish_.has_value()) return;
    finish_ = status;
    unsent.swap(queue_);
    prepared.swap(prepared_);
    received.swap(received_);
    retried.swap(retried_);
  }
  unsent.clear();
  prepared.reset();
  Pump();
}

void FrameStream::OnCancel() {
  std::shared_ptr<Owner> owner;
  int32_t shard = 0;
  {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
    owner = owner_;
    shard = shard_;
  }
  if (owner != nullptr) owner->OnCancelled(shard, absl::Now() >= deadline_);
}

void FrameStream::OnDone() {
  std::shared_ptr<Owner> owner;
  absl::MutexLock lock(&mu_);
  reactor_ = nullptr;
  owner.swap(owner_);
}

bool FrameStream::idle() const {
  absl::MutexLock lock(&mu_);
  return is_idle();
}

absl::Duration FrameStream::sending() const {
  absl::MutexLock lock(&mu_);
  return sending_;
}

}  // namespace dynsplit::rpc
