// SPDX-License-Identifier: Apache-2.0
//
// C++ client of dynsplitd. Connections are neither encrypted nor authenticated, as the server's
// are.
//
//     auto client = dynsplit::Client::Connect("unix:/run/dynsplit.sock", {});
//     dynsplit::CompressJob job;
//     job.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.25);
//     job.tensors = ...;
//     absl::StatusOr<dynsplit::CompressResult> result = (*client)->Compress(job);
//
// Errors are the server's, with its details (field violations, retry delay, ...) in the status's
// payloads: wire::ReadError(status) reads them. DATA_LOSS means that what arrived here does not
// have its checksum; INTERNAL with "protocol" in the message that the server did not keep to the
// stream's grammar.
#pragma once

#include <grpcpp/channel.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/job.h"
#include "client/cpp/region_owner.h"
#include "dynsplit/v1/info.pb.h"
#include "dynsplit/v1/memory.pb.h"
#include "dynsplit/v1/sessions.pb.h"
#include "proto/wire/frame.h"

namespace grpc {
class ClientContext;
class Status;
}  // namespace grpc

namespace dynsplit {

struct ClientOptions {
  // Longest duration of the streams: Compress, Plan, Apply, Calibrate, and sessions' Open, Append,
  // Fetch.
  absl::Duration timeout = absl::Minutes(5);
  // Longest duration of every other call.
  absl::Duration control_timeout = absl::Seconds(10);
  // Data bytes of one chunk, sent and asked for. Range [4096, 3 MiB]; the server may demand less.
  size_t chunk_bytes = wire::kDefaultChunkDataBytes;
  // Connections that calls are spread over. Range [1, 64]. A stream call with much to send is
  // itself spread, as one stream a connection, where the server takes that; begin.request_id, if
  // set, must then be unlike that of any call under way. One is best on the server's host, 4 across
  // hosts.
  int num_channels = 1;
  // Most tensor bytes accepted in one response.
  int64_t max_result_bytes = int64_t{64} << 30;
};

// Cancels the calls that carry it, now and later. Thread-safe.
class Cancellation {
 public:
  void Cancel();

 private:
  friend class Client;
  void Attach(grpc::ClientContext* context);
  void Detach(grpc::ClientContext* context);

  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::set<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mu_);
};

// Thread-safe; calls block their thread and may run side by side. Must outlive its calls.
class Client {
 public:
  // Does not wait for the connection. `target` is a gRPC target: "host:port", "unix:/path",
  // "dns:///name:port".
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const std::string& target,
                                                         const ClientOptions& options = {});

  // The Compression service; see its proto for what each needs and returns.
  absl::StatusOr<CompressResult> Compress(const CompressJob& job);
  absl::StatusOr<CompressResult> Plan(const CompressJob& job);
  absl::StatusOr<CompressResult> Apply(const CompressJob& job);
  // The profile is in CompressResult.end.
  absl::StatusOr<CompressResult> Calibrate(const CompressJob& job);

  // The Info service.
  absl::StatusOr<v1::ServerInfo> GetServerInfo();
  absl::StatusOr<v1::ListPoliciesResponse> ListPolicies();
  absl::StatusOr<v1::ListDelimiterProfilesResponse> ListDelimiterProfiles();
  absl::StatusOr<v1::DelimiterProfile> GetDelimiterProfile(const std::string& name);
  absl::StatusOr<v1::PutDelimiterProfileResponse> PutDelimiterProfile(
      const v1::DelimiterProfile& profile, bool replace);

  // Whether compressing between prefill and decode pays, and how; with request.session: what such a
  // session will weigh, bytes.
  absl::StatusOr<v1::AdviseResponse> Advise(const v1::AdviseRequest& request);

  // The Sessions service; see sessions.proto for what each needs, returns and refuses. The three
  // streams take and give what Compress does; the session as it is afterwards is in
  // result.end.session. Open: begin.shape, begin.session, begin.policy; token ids, keys and values
  // of every layer.
  absl::StatusOr<CompressResult> OpenSession(const CompressJob& job);
  // Append: begin.target with session_id and position (the length the caller believes in),
  // begin.shape with num_tokens = those added; the added tokens' ids, keys and values.
  absl::StatusOr<CompressResult> AppendSession(const CompressJob& job);
  // Fetch: begin.target, begin.policy's encoding, positions and page size; KEPT_TOKENS tensors of
  // layers that are not wanted whole. job.partial makes it resumable.
  absl::StatusOr<CompressResult> FetchSession(const CompressJob& job);
  // One decode step. A call whose answer is lost may be made again: rows then move again (gather).
  absl::StatusOr<v1::SelectResponse> Select(const v1::SelectRequest& request);
  absl::StatusOr<v1::SessionInfo> RenewSession(const v1::RenewSessionRequest& request);
  absl::StatusOr<v1::ReleaseSessionResponse> ReleaseSession(
      const v1::ReleaseSessionRequest& request);
  absl::StatusOr<v1::SessionInfo> GetSession(const v1::GetSessionRequest& request);
  absl::StatusOr<v1::SessionMapping> MapSession(const v1::MapSessionRequest& request);
  absl::StatusOr<v1::SessionInfo> UnmapSession(const v1::UnmapSessionRequest& request);

  // The Memory service: memory that this process shares with a server of its host. SharedMemory
  // makes such memory.
  absl::StatusOr<v1::RegisterRegionResponse> RegisterRegion(
      const v1::RegisterRegionRequest& request);
  absl::Status UnregisterRegion(const v1::UnregisterRegionRequest& request);
  // What regions can be bound to; holds a stream open.
  absl::StatusOr<std::unique_ptr<RegionOwner>> AttachRegionOwner();
  absl::StatusOr<v1::ListRegionsResponse> ListRegions();

  // grpc.health.v1 Check of the whole server: OK when it serves, UNAVAILABLE when it answers
  // otherwise.
  absl::Status CheckHealth();

  const std::string& target() const { return target_; }

 private:
  Client(std::string target, const ClientOptions& options)
      : target_(std::move(target)), options_(options) {}

  std::shared_ptr<grpc::Channel> NextChannel();
  void Prepare(grpc::ClientContext& context, absl::Time deadline) const;
  // Streams that the job is sent as.
  int32_t ChooseShards(const std::string& method, const CompressJob& job);
  absl::StatusOr<CompressResult> Run(const std::string& method, const CompressJob& job);
  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Unary(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                              Response*),
                                 const Request& request);

  const std::string target_;
  const ClientOptions options_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;  // constant after Connect
  std::atomic<uint32_t> next_channel_{0};
  std::atomic<int32_t> max_shards_{0};  // that the server takes; 0 = not asked yet
};

}  // namespace dynsplit
