// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/info_service.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/advise_adapter.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/unary.h"
#include "server/runtime/log.h"

namespace dynsplit::rpc {
namespace {

void FillLimits(const ServerConfig& config, v1::Limits& limits) {
  limits.set_max_message_bytes(config.max_message_bytes);
  limits.set_max_chunk_bytes(config.max_chunk_bytes);
  limits.set_max_request_bytes(config.max_request_bytes);
  limits.set_max_in_flight_bytes(config.max_in_flight_bytes);
  limits.set_max_queue(config.max_queue);
  limits.set_queue_timeout_seconds(absl::ToDoubleSeconds(config.queue_timeout));
  limits.set_max_streams(config.max_streams);
}

void FillCapabilities(const ServerConfig& config, const BackendInfo& backend,
                      v1::Capabilities& capabilities) {
  for (const v1::DType dtype : {v1::DTYPE_FLOAT32, v1::DTYPE_FLOAT16, v1::DTYPE_BFLOAT16,
                                v1::DTYPE_FLOAT8_E4M3, v1::DTYPE_FLOAT8_E5M2, v1::DTYPE_INT8}) {
    capabilities.add_input_dtypes(dtype);
  }
  for (const auto method :
       {v1::Segmentation::METHOD_NONE, v1::Segmentation::METHOD_FIXED,
        v1::Segmentation::METHOD_DELIMITER_SET, v1::Segmentation::METHOD_DYNAMIC}) {
    capabilities.add_segmentations(method);
  }
  for (const auto method : {v1::Scoring::METHOD_RECENCY, v1::Scoring::METHOD_KEY_NORM,
                            v1::Scoring::METHOD_KEY_DIFFERENCE, v1::Scoring::METHOD_WINDOW_QUERIES,
                            v1::Scoring::METHOD_ACCUMULATED, v1::Scoring::METHOD_BLOCK_BOUND,
                            v1::Scoring::METHOD_BLOCK_MEAN_KEY}) {
    capabilities.add_scorings(method);
  }
  capabilities.add_budgets(v1::Budget::METHOD_UNIFORM);
  capabilities.add_transforms(v1::TRANSFORM_INDEX);
  capabilities.add_transforms(v1::TRANSFORM_EVICT);
  for (const auto format :
       {v1::Encoding::FORMAT_AS_IS, v1::Encoding::FORMAT_FLOAT8_E4M3, v1::Encoding::FORMAT_INT8}) {
    capabilities.add_encodings(format);
  }
  for (const auto scope : {v1::SCOPE_GLOBAL, v1::SCOPE_LAYER, v1::SCOPE_LAYER_HEAD}) {
    capabilities.add_scopes(scope);
  }
  capabilities.add_positions(v1::POSITIONS_ORIGINAL);
  capabilities.add_positions(v1::POSITIONS_CONTIGUOUS);
  for (const int32_t slots : {16, 32, 64, 128}) capabilities.add_page_sizes(slots);
  capabilities.add_data_planes(v1::Capabilities::DATA_PLANE_STREAM);
  if (config.regions == "shm" || config.regions == "all") {
    capabilities.add_data_planes(v1::Capabilities::DATA_PLANE_SHM);
    if (!config.region_socket.empty()) {
      capabilities.add_data_planes(v1::Capabilities::DATA_PLANE_MEMFD);
    }
  }
  const bool has_device = !backend.uuid.empty();
  if (has_device && (config.regions == "cuda-ipc" || config.regions == "all")) {
    capabilities.add_data_planes(v1::Capabilities::DATA_PLANE_CUDA_IPC);
  }
  capabilities.set_max_shards(kMaxShards);
  capabilities.set_sessions(true);
}

absl::StatusOr<DelimiterProfile> ProfileFromProto(const v1::DelimiterProfile& wire) {
  std::vector<DelimiterWeight> weights;
  if (wire.weights_size() == 0) return InvalidField("profile.weights", "is empty");
  for (int i = 0; i < wire.weights_size(); ++i) {
    const v1::DelimiterWeight& weight = wire.weights(i);
    if (i > 0 && weight.token_id() <= wire.weights(i - 1).token_id()) {
      return InvalidField(absl::StrCat("profile.weights[", i, "].token_id"),
                          absl::StrCat("is ", weight.token_id(), "; ids must ascend"));
    }
    weights.push_back({.token_id = weight.token_id(),
                       .weight = static_cast<float>(weight.weight()),
                       .sentence_end = weight.sentence_end(),
                       .text = weight.text(),
                       .num_occurrences = weight.num_occurrences(),
                       .score = weight.score()});
  }
  return DelimiterProfile::Create(wire.name(), wire.description(), std::move(weights));
}

}  // namespace

grpc::ServerUnaryReactor* InfoService::GetServerInfo(grpc::CallbackServerContext* context,
                                                     const v1::GetServerInfoRequest* /*request*/,
                                                     v1::ServerInfo* response) {
  response->set_version(services_.version);
  response->set_backend(services_.backend().name);
  response->set_device(services_.backend().device);
  response->set_device_memory_bytes(services_.backend().memory_bytes);
  response->set_policy_version(kPolicyVersion);
  response->set_default_profile(services_.profiles.default_name());
  FillLimits(services_.config, *response->mutable_limits());
  FillCapabilities(services_.config, services_.backend(), *response->mutable_capabilities());
  response->set_draining(services_.draining);
  response->set_uptime_seconds(absl::ToDoubleSeconds(absl::Now() - services_.started));
  for (const std::unique_ptr<Device>& device : services_.devices.all()) {
    const Backend& backend = device->backend();
    v1::DeviceInfo& info = *response->add_devices();
    info.set_name(device->name());
    info.set_memory_bytes(backend.info().memory_bytes);
    info.set_used_bytes(backend.device_bytes_in_use());
    info.set_uuid(backend.info().uuid);
    info.set_healthy(backend.Healthy().ok());
  }
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InfoService::ListPolicies(grpc::CallbackServerContext* context,
                                                    const v1::ListPoliciesRequest* /*request*/,
                                                    v1::ListPoliciesResponse* response) {
  for (const Preset& preset : Presets()) {
    v1::PolicyInfo& info = *response->add_policies();
    *info.mutable_policy() = PolicyToProto(preset.policy);
    info.set_summary(std::string(preset.summary));
    info.set_source(std::string(preset.source));
    info.set_fallback_preset(std::string(preset.fallback));
    const Evidence required = RequiredEvidence(preset.policy);
    info.set_required_evidence(EvidenceToProto(required));
    info.add_usable_evidence(EvidenceToProto(required));
    if (required == Evidence::kWindowQueries) {
      info.add_usable_evidence(v1::EVIDENCE_WINDOW_QUERIES_WITH_LSE);
    }
  }
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InfoService::ListDelimiterProfiles(
    grpc::CallbackServerContext* context, const v1::ListDelimiterProfilesRequest* /*request*/,
    v1::ListDelimiterProfilesResponse* response) {
  for (const ProfileStore::Entry& entry : services_.profiles.List()) {
    v1::DelimiterProfileInfo& info = *response->add_profiles();
    info.set_name(entry.profile->name());
    info.set_description(entry.profile->description());
    info.set_num_weights(static_cast<int32_t>(entry.profile->weights().size()));
    info.set_builtin(entry.builtin);
    info.set_is_default(entry.profile->name() == services_.profiles.default_name());
  }
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InfoService::GetDelimiterProfile(
    grpc::CallbackServerContext* context, const v1::GetDelimiterProfileRequest* request,
    v1::DelimiterProfile* response) {
  const absl::StatusOr<std::shared_ptr<const DelimiterProfile>> profile =
      services_.profiles.Find(request->name());
  if (profile.ok()) *response = ProfileToProto(**profile);
  return Reply(context, profile.status());
}

grpc::ServerUnaryReactor* InfoService::PutDelimiterProfile(
    grpc::CallbackServerContext* context, const v1::PutDelimiterProfileRequest* request,
    v1::PutDelimiterProfileResponse* response) {
  if (services_.draining) {
    return Reply(context, RetryLater(absl::StatusCode::kUnavailable, "the server is draining",
                                     kDrainRetryAfterMs));
  }
  absl::StatusOr<DelimiterProfile> profile = ProfileFromProto(request->profile());
  if (!profile.ok()) return Reply(context, profile.status());
  const absl::StatusOr<ProfileStore::PutResult> result =
      services_.profiles.Put(*std::move(profile), request->replace());
  if (!result.ok()) return Reply(context, result.status());
  response->set_replaced(result->replaced);
  response->set_persisted(result->persisted);
  Log(LogLevel::kInfo, "delimiter profile stored",
      {{"profile", std::string_view(request->profile().name())},
       {"replaced", result->replaced},
       {"persisted", result->persisted}});
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InfoService::Advise(grpc::CallbackServerContext* context,
                                              const v1::AdviseRequest* request,
                                              v1::AdviseResponse* response) {
  return Reply(context, AdviseFromProto(*request, services_, *response));
}

}  // namespace dynsplit::rpc
