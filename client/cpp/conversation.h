// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/job.h"
#include "client/cpp/request_frames.h"
#include "client/cpp/result_assembler.h"
#include "client/cpp/stream_call.h"

namespace dynsplit {

// One request over one stream or several. Whole tensors are spread over the streams, either way;
// the first stream also carries everything else. Used by one thread.
//
//     Conversation conversation(job, ...);  for (...) conversation.AddShard(channel, context);
//     result = conversation.Run(...);
class Conversation {
 public:
  struct Options {
    std::string method;
    std::string request_id;  // with several shards: joins them
    int32_t num_shards = 1;
    size_t chunk_bytes = 0;
    int64_t max_result_bytes = 0;
  };
  // `job` outlives the object. `lease` is what slices in flight keep.
  Conversation(const CompressJob& job, Options options, std::shared_ptr<const void> lease);

  // The next shard's stream; as many as options say, before Run. The context outlives the object.
  void AddShard(const std::shared_ptr<grpc::Channel>& channel, grpc::ClientContext& context);
  // Reads to the end of all streams; the result's own errors come before the call's.
  absl::StatusOr<CompressResult> Run();

 private:
  struct Shard {
    Shard(const CompressJob& job, std::shared_ptr<const void> lease, ShardOf shard,
          const std::shared_ptr<grpc::Channel>& channel, grpc::ClientContext& client_context)
        : context(client_context), frames(job, std::move(lease), shard), stub(channel) {}

    grpc::ClientContext& context;
    RequestFrames frames;
    grpc::GenericStub stub;
    std::optional<StreamCall> call;
    std::optional<wire::Frame> early;  // waits for what another shard brings
    bool closed = false;
  };

  // Waits for a shard that has something to say and does not wait itself; null when there is none.
  Shard* NextReadable() ABSL_LOCKS_EXCLUDED(read_mu_);
  void Listen(Shard& shard);
  void Accept(const wire::Frame& frame);
  // Takes the early frames whose time has come.
  void TakeEarly();
  void Close(Shard& shard);
  void Fail(absl::Status status);
  int64_t sent_bytes() const;

  const CompressJob& job_;
  const Options options_;
  const std::shared_ptr<const void> lease_;
  absl::Mutex read_mu_;
  std::vector<std::unique_ptr<Shard>> shards_;
  // From Run on: it takes over job.partial, which the begin of shard 0 is made from.
  std::optional<ResultAssembler> assembler_;
  absl::Status status_;       // of what was received
  grpc::Status call_status_;  // first that is not OK
  size_t next_ = 0;           // shard to look at first: none is left waiting
};

}  // namespace dynsplit
