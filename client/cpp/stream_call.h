// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/client_callback.h>

#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/request_frames.h"

namespace dynsplit {

// One bidirectional call that writes by itself, on gRPC's threads, while its owner reads: so
// neither side's flow control can stop both. Owned and driven by one thread:
//
//     StreamCall call(...);  while (call.Read(buffer)) {... SendChunks() once ...}  call.Finish();
class StreamCall final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  // Starts the call and sends `begin`. All references outlive Finish.
  StreamCall(grpc::GenericStub& stub, grpc::ClientContext& context, const std::string& method,
             const grpc::ByteBuffer& begin, RequestFrames& frames);

  // Waits for the next message; false when no more will come.
  bool Read(grpc::ByteBuffer& message);
  // Sends the frames, then half-closes. At most once.
  void SendChunks();
  // Waits for the end of the call. Requires that Read returned false; exactly once.
  grpc::Status Finish();

 private:
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;
  // Writes the next frame or half-closes. Only while no other write is under way.
  void WriteNext();

  RequestFrames& frames_;
  // Each belongs to gRPC while a read or write is under way, else to the owner or the writer.
  grpc::ByteBuffer incoming_;
  grpc::ByteBuffer outgoing_;

  absl::Mutex mu_;
  bool read_done_ ABSL_GUARDED_BY(mu_) = false;
  bool read_ok_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = true;
  bool write_failed_ ABSL_GUARDED_BY(mu_) = false;
  bool send_chunks_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  grpc::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
