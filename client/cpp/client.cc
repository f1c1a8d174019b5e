// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/client.h"

#include <grpc/grpc.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/conversation.h"
#include "dynsplit/v1/info.grpc.pb.h"
#include "dynsplit/v1/memory.grpc.pb.h"
#include "dynsplit/v1/sessions.grpc.pb.h"
#include "proto/wire/channel.h"
#include "proto/wire/status.h"

namespace dynsplit {
namespace {

constexpr size_t kMinChunkBytes = 4096;
constexpr int kMaxChannels = 64;
constexpr int32_t kMaxShards = 16;
// Fewer bytes are not worth another stream.
constexpr int64_t kMinShardBytes = int64_t{4} << 20;
constexpr char kFetchMethod[] = "/dynsplit.v1.Sessions/Fetch";

// gRPC shuts down with its last object, and then waits for a poller of its own that sleeps up to
// 10 s once a write has had to wait for the socket (seen with 1.51). So it stays initialised until
// the process ends.
void KeepGrpcInitialized() {
  [[maybe_unused]] static const bool initialized = [] {
    grpc_init();
    return true;
  }();
}

// Tells when the last slice that points into a job's tensors is gone.
class SliceGuard {
 public:
  // What slices keep: `owner`, and word to this guard when they are gone.
  std::shared_ptr<const void> MakeLease(std::shared_ptr<const void> owner) {
    if (owner != nullptr) return owner;
    {
      absl::MutexLock lock(&mu_);
      released_ = false;
    }
    return {this, [](SliceGuard* guard) {
              absl::MutexLock lock(&guard->mu_);
              guard->released_ = true;
            }};
  }

  // The mutex is released by whoever set the flag before this can return.
  void WaitUntilReleased() {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&released_));
  }

 private:
  absl::Mutex mu_;
  bool released_ ABSL_GUARDED_BY(mu_) = true;
};

absl::Status CheckJob(const CompressJob& job) {
  if (job.partial != nullptr && job.begin.has_output()) {
    return absl::InvalidArgumentError(
        "partial and begin.output are set; results in a region are "
        "not lost with the stream");
  }
  for (size_t i = 0; i < job.tensors.size(); ++i) {
    if (job.tensors[i].bytes.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("tensors[", i, "] has no bytes"));
    }
  }
  return absl::OkStatus();
}

// A name that no other request has, for joining its shards.
std::string RandomRequestId() {
  std::random_device random;
  std::string id;
  for (int i = 0; i < 4; ++i) absl::StrAppend(&id, absl::Hex(random(), absl::kZeroPad8));
  return id;
}

int64_t StreamedBytes(const CompressJob& job) {
  int64_t bytes = 0;
  for (const InputTensor& tensor : job.tensors) {
    if (!tensor.region.has_value()) bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  return bytes;
}

}  // namespace

void Cancellation::Cancel() {
  absl::MutexLock lock(&mu_);
  cancelled_ = true;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
}

void Cancellation::Attach(grpc::ClientContext* context) {
  absl::MutexLock lock(&mu_);
  contexts_.insert(context);
  if (cancelled_) context->TryCancel();
}

void Cancellation::Detach(grpc::ClientContext* context) {
  absl::MutexLock lock(&mu_);
  contexts_.erase(context);
}

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& target,
                                                        const ClientOptions& options) {
  if (options.chunk_bytes < kMinChunkBytes || options.chunk_bytes > wire::kMaxChunkDataBytes) {
    return absl::InvalidArgumentError(absl::StrCat("chunk_bytes is ", options.chunk_bytes,
                                                   "; must be in [", kMinChunkBytes, ", ",
                                                   wire::kMaxChunkDataBytes, "]"));
  }
  if (options.num_channels < 1 || options.num_channels > kMaxChannels) {
    return absl::InvalidArgumentError(absl::StrCat("num_channels is ", options.num_channels,
                                                   "; must be in [1, ", kMaxChannels, "]"));
  }
  if (target.empty()) return absl::InvalidArgumentError("target is empty");
  KeepGrpcInitialized();
  std::unique_ptr<Client> client(new Client(target, options));
  for (int i = 0; i < client->options_.num_channels; ++i) {
    grpc::ChannelArguments arguments = wire::ClientChannelArguments(target);
    // Else equal channels share one connection.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    client->channels_.push_back(
        grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments));
  }
  return client;
}

std::shared_ptr<grpc::Channel> Client::NextChannel() {
  return channels_[next_channel_.fetch_add(1, std::memory_order_relaxed) % channels_.size()];
}

void Client::Prepare(grpc::ClientContext& context, absl::Time deadline) const {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

int32_t Client::ChooseShards(const std::string& method, const CompressJob& job) {
  // What Fetch brings back is not known here, but is why it is called.
  const int64_t worth = method == kFetchMethod ? kMaxShards : StreamedBytes(job) / kMinShardBytes;
  const int64_t wanted = std::min<int64_t>({options_.num_channels, worth, kMaxShards});
  if (wanted <= 1) return 1;
  int32_t most = max_shards_.load(std::memory_order_relaxed);
  if (most == 0) {
    const absl::StatusOr<v1::ServerInfo> info = GetServerInfo();
    if (!info.ok()) return 1;  // the call itself will tell what is wrong
    most = std::max(1, info->capabilities().max_shards());
    max_shards_.store(most, std::memory_order_relaxed);
  }
  return static_cast<int32_t>(std::min<int64_t>(wanted, most));
}

absl::StatusOr<CompressResult> Client::Run(const std::string& method, const CompressJob& job) {
  if (absl::Status status = CheckJob(job); !status.ok()) return status;
  const absl::Time start = absl::Now();
  SliceGuard guard;
  absl::StatusOr<CompressResult> result;
  {
    const int32_t num_shards = ChooseShards(method, job);
    std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
    Conversation conversation(
        job,
        {.method = method,
         .request_id = job.begin.request_id().empty() ? RandomRequestId() : job.begin.request_id(),
         .num_shards = num_shards,
         .chunk_bytes = options_.chunk_bytes,
         .max_result_bytes = options_.max_result_bytes},
        guard.MakeLease(job.owner));
    // Side by side, whatever other calls take meanwhile.
    const uint32_t first_channel =
        next_channel_.fetch_add(static_cast<uint32_t>(num_shards), std::memory_order_relaxed);
    for (int32_t i = 0; i < num_shards; ++i) {
      grpc::ClientContext& context =
          *contexts.emplace_back(std::make_unique<grpc::ClientContext>());
      Prepare(context, start + job.timeout.value_or(options_.timeout));
      conversation.AddShard(
          channels_[(first_channel + static_cast<uint32_t>(i)) % channels_.size()], context);
      if (job.cancellation != nullptr) job.cancellation->Attach(&context);
    }
    result = conversation.Run();
    for (const auto& context : contexts) {
      if (job.cancellation != nullptr) job.cancellation->Detach(context.get());
    }
  }
  guard.WaitUntilReleased();
  if (result.ok()) result->elapsed = absl::Now() - start;
  return result;
}

absl::StatusOr<CompressResult> Client::Compress(const CompressJob& job) {
  return Run("/dynsplit.v1.Compression/Compress", job);
}

absl::StatusOr<CompressResult> Client::Plan(const CompressJob& job) {
  return Run("/dynsplit.v1.Compression/Plan", job);
}

absl::StatusOr<CompressResult> Client::Apply(const CompressJob& job) {
  return Run("/dynsplit.v1.Compression/Apply", job);
}

absl::StatusOr<CompressResult> Client::Calibrate(const CompressJob& job) {
  return Run("/dynsplit.v1.Compression/Calibrate", job);
}

template <typename Stub, typename Request, typename Response>
absl::StatusOr<Response> Client::Unary(grpc::Status (Stub::*method)(grpc::ClientContext*,
                                                                    const Request&, Response*),
                                       const Request& request) {
  Stub stub(NextChannel());
  grpc::ClientContext context;
  Prepare(context, absl::Now() + options_.control_timeout);
  Response response;
  const grpc::Status status = (stub.*method)(&context, request, &response);
  if (!status.ok()) return wire::ToAbsl(status);
  return response;
}

absl::StatusOr<v1::ServerInfo> Client::GetServerInfo() {
  return Unary(&v1::Info::Stub::GetServerInfo, v1::GetServerInfoRequest());
}

absl::StatusOr<v1::ListPoliciesResponse> Client::ListPolicies() {
  return Unary(&v1::Info::Stub::ListPolicies, v1::ListPoliciesRequest());
}

absl::StatusOr<v1::ListDelimiterProfilesResponse> Client::ListDelimiterProfiles() {
  return Unary(&v1::Info::Stub::ListDelimiterProfiles, v1::ListDelimiterProfilesRequest());
}

absl::StatusOr<v1::DelimiterProfile> Client::GetDelimiterProfile(const std::string& name) {
  v1::GetDelimiterProfileRequest request;
  request.set_name(name);
  return Unary(&v1::Info::Stub::GetDelimiterProfile, request);
}

absl::StatusOr<v1::PutDelimiterProfileResponse> Client::PutDelimiterProfile(
    const v1::DelimiterProfile& profile, bool replace) {
  v1::PutDelimiterProfileRequest request;
  *request.mutable_profile() = profile;
  request.set_replace(replace);
  return Unary(&v1::Info::Stub::PutDelimiterProfile, request);
}

absl::StatusOr<v1::AdviseResponse> Client::Advise(const v1::AdviseRequest& request) {
  return Unary(&v1::Info::Stub::Advise, request);
}

absl::StatusOr<CompressResult> Client::OpenSession(const CompressJob& job) {
  return Run("/dynsplit.v1.Sessions/Open", job);
}

absl::StatusOr<CompressResult> Client::AppendSession(const CompressJob& job) {
  return Run("/dynsplit.v1.Sessions/Append", job);
}

absl::StatusOr<CompressResult> Client::FetchSession(const CompressJob& job) {
  return Run(kFetchMethod, job);
}

absl::StatusOr<v1::SelectResponse> Client::Select(const v1::SelectRequest& request) {
  return Unary(&v1::Sessions::Stub::Select, request);
}

absl::StatusOr<v1::SessionInfo> Client::RenewSession(const v1::RenewSessionRequest& request) {
  return Unary(&v1::Sessions::Stub::Renew, request);
}

absl::StatusOr<v1::ReleaseSessionResponse> Client::ReleaseSession(
    const v1::ReleaseSessionRequest& request) {
  return Unary(&v1::Sessions::Stub::Release, request);
}

absl::StatusOr<v1::SessionInfo> Client::GetSession(const v1::GetSessionRequest& request) {
  return Unary(&v1::Sessions::Stub::Get, request);
}

absl::StatusOr<v1::SessionMapping> Client::MapSession(const v1::MapSessionRequest& request) {
  return Unary(&v1::Sessions::Stub::Map, request);
}

absl::StatusOr<v1::SessionInfo> Client::UnmapSession(const v1::UnmapSessionRequest& request) {
  return Unary(&v1::Sessions::Stub::Unmap, request);
}

absl::StatusOr<v1::RegisterRegionResponse> Client::RegisterRegion(
    const v1::RegisterRegionRequest& request) {
  return Unary(&v1::Memory::Stub::Register, request);
}

absl::Status Client::UnregisterRegion(const v1::UnregisterRegionRequest& request) {
  return Unary(&v1::Memory::Stub::Unregister, request).status();
}

absl::StatusOr<std::unique_ptr<RegionOwner>> Client::AttachRegionOwner() {
  return RegionOwner::Attach(NextChannel(), options_.control_timeout);
}

absl::StatusOr<v1::ListRegionsResponse> Client::ListRegions() {
  return Unary(&v1::Memory::Stub::List, v1::ListRegionsRequest());
}

absl::Status Client::CheckHealth() {
  // HealthCheckRequest without a service is empty; HealthCheckResponse {status = 1; SERVING = 1}.
  constexpr std::string_view kServing = "\x08\x01";
  grpc::GenericStub stub(NextChannel());
  grpc::ClientContext context;
  Prepare(context, absl::Now() + options_.control_timeout);
  grpc::CompletionQueue queue;
  const grpc::Slice nothing;
  const grpc::ByteBuffer request(&nothing, 1);
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  if (!status.ok()) return wire::ToAbsl(status);
  grpc::Slice slice;
  if (response.DumpToSingleSlice(&slice).ok() &&
      std::string_view(reinterpret_cast<const char*>(slice.begin()), slice.size()) == kServing) {
    return absl::OkStatus();
  }
  return absl::UnavailableError("server answers, but does not serve");
}

}  // namespace dynsplit
