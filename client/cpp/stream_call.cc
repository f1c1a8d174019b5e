// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/stream_call.h"

#include <utility>

namespace dynsplit {

StreamCall::StreamCall(grpc::GenericStub& stub, grpc::ClientContext& context,
                       const std::string& method, const grpc::ByteBuffer& begin,
                       RequestFrames& frames, absl::Mutex& read_mu)
    : frames_(frames), outgoing_(begin), read_mu_(read_mu) {
  stub.PrepareBidiStreamingCall(&context, method, grpc::StubOptions(), this);
  // The owner starts reads, and the first chunk, from outside of the reactions; Finish lets go.
  AddHold();
  StartRead(&incoming_);
  StartWrite(&outgoing_);
  StartCall();
}

bool StreamCall::Read(grpc::ByteBuffer& message) {
  {
    absl::MutexLock lock(&read_mu_);
    read_mu_.Await(absl::Condition(&read_done_));
    if (!read_ok_) return false;
    read_done_ = false;
  }
  message.Clear();
  message.Swap(&incoming_);
  StartRead(&incoming_);
  return true;
}

void StreamCall::SendChunks() {
  {
    absl::MutexLock lock(&mu_);
    send_chunks_ = true;
  }
  Advance();
}

void StreamCall::Advance() {
  mu_.Lock();
  if (std::exchange(advancing_, true)) {  // whoever advances looks again
    mu_.Unlock();
    return;
  }
  while (send_chunks_ && !write_failed_) {
    if (!writing_ && prepared_.has_value()) {
      outgoing_ = *std::exchange(prepared_, std::nullopt);
      writing_ = true;
      mu_.Unlock();
      StartWrite(&outgoing_);
    } else if (!prepared_.has_value() && !exhausted_) {
      mu_.Unlock();
      grpc::ByteBuffer frame;
      const bool more = frames_.Next(frame);
      mu_.Lock();
      exhausted_ = !more;
      if (more) prepared_ = std::move(frame);
      continue;
    } else if (!writing_ && exhausted_) {
      writing_ = true;  // for good
      mu_.Unlock();
      StartWritesDone();
    } else {
      break;
    }
    mu_.Lock();
  }
  advancing_ = false;
  mu_.Unlock();
}

grpc::Status StreamCall::Finish() {
  RemoveHold();
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(&done_));
  prepared_.reset();
  return status_;
}

void StreamCall::OnReadDone(bool ok) {
  absl::MutexLock lock(&read_mu_);
  read_ok_ = ok;
  read_done_ = true;
}

void StreamCall::OnWriteDone(bool ok) {
  {
    absl::MutexLock lock(&mu_);
    outgoing_.Clear();
    writing_ = false;
    write_failed_ = !ok;
  }
  Advance();
}

void StreamCall::OnDone(const grpc::Status& status) {
  absl::MutexLock lock(&mu_);
  status_ = status;
  done_ = true;
}

}  // namespace dynsplit
