// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/client_callback.h>

#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/request_frames.h"

namespace dynsplit {

// One bidirectional call that writes by itself, on gRPC's threads, while its owner reads: so
// neither side's flow control can stop both. While a message travels the next one is made. Owned
// and driven by one thread:
//
//     StreamCall call(...);
//     wait under read_mu until call.readable(); while (call.Read(buffer)) {... SendChunks() once
//     ...} call.Finish();
class StreamCall final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  // Starts the call and sends `begin`. All references outlive Finish. `read_mu` guards what has
  // arrived; several calls may share it, so that their owner can wait for any of them.
  StreamCall(grpc::GenericStub& stub, grpc::ClientContext& context, const std::string& method,
             const grpc::ByteBuffer& begin, RequestFrames& frames, absl::Mutex& read_mu);

  // Read would not wait. Requires that read_mu is held.
  bool readable() const {
    read_mu_.AssertReaderHeld();
    return read_done_;
  }
  // Waits for the next message; false when no more will come.
  bool Read(grpc::ByteBuffer& message) ABSL_LOCKS_EXCLUDED(read_mu_);
  // Sends the frames, then half-closes. At most once.
  void SendChunks();
  // Waits for the end of the call. Requires that Read returned false; exactly once.
  grpc::Status Finish();

 private:
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;
  // Writes what is ready and makes the next frame; by one thread at a time. Ends when a write is
  // under way and the frame behind it is made.
  void Advance() ABSL_LOCKS_EXCLUDED(mu_);

  RequestFrames& frames_;
  // Each belongs to gRPC while a read or write is under way, else to the owner or the writer.
  grpc::ByteBuffer incoming_;
  grpc::ByteBuffer outgoing_;

  absl::Mutex& read_mu_;
  bool read_done_ ABSL_GUARDED_BY(read_mu_) = false;
  bool read_ok_ ABSL_GUARDED_BY(read_mu_) = false;

  absl::Mutex mu_;
  bool writing_ ABSL_GUARDED_BY(mu_) = true;
  bool write_failed_ ABSL_GUARDED_BY(mu_) = false;
  bool send_chunks_ ABSL_GUARDED_BY(mu_) = false;
  bool advancing_ ABSL_GUARDED_BY(mu_) = false;
  bool exhausted_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<grpc::ByteBuffer> prepared_ ABSL_GUARDED_BY(mu_);
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  grpc::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
