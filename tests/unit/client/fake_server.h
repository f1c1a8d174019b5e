// SPDX-License-Identifier: Apache-2.0
//
// A server that keeps to the stream's grammar and compresses by a trivial rule, written with the
// generated API so that the client's hand-made frames meet protobuf's. Faults can be asked for.
#pragma once

#include <grpcpp/server.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "dynsplit/v1/compression.grpc.pb.h"
#include "dynsplit/v1/sessions.grpc.pb.h"

namespace dynsplit {

// How the fake departs from good behaviour.
struct FakeFaults {
  // Refuse right after begin, or after everything was received, with this status.
  grpc::Status refuse_begin, refuse_end;
  bool never_answer = false;  // reads begin, then waits for the call to be cancelled
  bool corrupt_chunk = false;
  bool corrupt_tensor_crc = false;
  bool skip_bytes = false;  // a gap between chunks
  bool forget_accepted = false;
  bool forget_end = false;
  bool layers_descend = false;
  bool unknown_tensor = false;
  bool huge_tensor = false;  // announces 2^39 bytes
  bool early_end = false;    // end while a tensor is incomplete
  int32_t max_chunk_bytes = 3 << 20;
};

// Returns every KEY tensor of layer l as KEY_PAGES of layer l, byte by byte, and checks what it
// receives.
class FakeCompression final : public v1::Compression::Service {
 public:
  using Stream = grpc::ServerReaderWriter<v1::CompressResponse, v1::CompressRequest>;

  grpc::Status Compress(grpc::ServerContext* context, Stream* stream) override;

  void set_faults(const FakeFaults& faults) {
    absl::MutexLock lock(&mu_);
    faults_ = faults;
  }
  // What the last complete request carried.
  v1::Begin begin() const {
    absl::MutexLock lock(&mu_);
    return begin_;
  }
  std::map<uint32_t, std::string> tensors() const {
    absl::MutexLock lock(&mu_);
    return tensors_;
  }
  size_t largest_chunk() const {
    absl::MutexLock lock(&mu_);
    return largest_chunk_;
  }

 private:
  mutable absl::Mutex mu_;
  FakeFaults faults_ ABSL_GUARDED_BY(mu_);
  v1::Begin begin_ ABSL_GUARDED_BY(mu_);
  std::map<uint32_t, std::string> tensors_ ABSL_GUARDED_BY(mu_);
  size_t largest_chunk_ ABSL_GUARDED_BY(mu_) = 0;
};

// Sends what it was given as layers of two tensors each, and loses the connection at will.
class FakeSessions final : public v1::Sessions::Service {
 public:
  using Stream = FakeCompression::Stream;

  // Honours begin.target.resume. Ends with UNAVAILABLE once `break_after_bytes` (of this call) have
  // been sent, a chunk at a time; beyond all bytes: before the end message. -1 = never.
  grpc::Status Fetch(grpc::ServerContext* context, Stream* stream) override;

  void set_layers(std::vector<std::vector<std::string>> layers) {
    absl::MutexLock lock(&mu_);
    layers_ = std::move(layers);
  }
  void set_break_after_bytes(int64_t bytes) {
    absl::MutexLock lock(&mu_);
    break_after_bytes_ = bytes;
  }
  // Of all calls.
  int64_t sent_bytes() const {
    absl::MutexLock lock(&mu_);
    return sent_bytes_;
  }

 private:
  mutable absl::Mutex mu_;
  std::vector<std::vector<std::string>> layers_ ABSL_GUARDED_BY(mu_);
  int64_t break_after_bytes_ ABSL_GUARDED_BY(mu_) = -1;
  int64_t sent_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

// A server on a free loopback port.
class FakeServer {
 public:
  FakeServer();
  ~FakeServer();

  std::string target() const;
  FakeCompression& compression() { return compression_; }
  FakeSessions& sessions() { return sessions_; }

 private:
  FakeCompression compression_;
  FakeSessions sessions_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace dynsplit
