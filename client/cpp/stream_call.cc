// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/stream_call.h"

namespace dynsplit {

StreamCall::StreamCall(grpc::GenericStub& stub, grpc::ClientContext& context,
                       const std::string& method, const grpc::ByteBuffer& begin,
                       RequestFrames& frames)
    : frames_(frames), outgoing_(begin) {
  stub.PrepareBidiStreamingCall(&context, method, grpc::StubOptions(), this);
  // The owner starts reads, and the first chunk, from outside of the reactions; Finish lets go.
  AddHold();
  StartRead(&incoming_);
  StartWrite(&outgoing_);
  StartCall();
}

bool StreamCall::Read(grpc::ByteBuffer& message) {
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&read_done_));
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
    if (writing_ || write_failed_) return;  // OnWriteDone goes on
    writing_ = true;
  }
  WriteNext();
}

void StreamCall::WriteNext() {
  outgoing_.Clear();
  if (frames_.Next(outgoing_)) {
    StartWrite(&outgoing_);
  } else {
    StartWritesDone();
  }
}

grpc::Status StreamCall::Finish() {
  RemoveHold();
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(&done_));
  return status_;
}

void StreamCall::OnReadDone(bool ok) {
  absl::MutexLock lock(&mu_);
  read_ok_ = ok;
  read_done_ = true;
}

void StreamCall::OnWriteDone(bool ok) {
  {
    absl::MutexLock lock(&mu_);
    writing_ = ok && send_chunks_;
    write_failed_ = !ok;
    if (!writing_) return;
  }
  WriteNext();
}

void StreamCall::OnDone(const grpc::Status& status) {
  absl::MutexLock lock(&mu_);
  status_ = status;
  done_ = true;
}

}  // namespace dynsplit
