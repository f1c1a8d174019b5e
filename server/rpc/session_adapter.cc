// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/session_adapter.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/enum_map.h"
#include "server/rpc/policy_adapter.h"
#include "server/runtime/session_work.h"

namespace dynsplit::rpc {
namespace {

using Placement = SessionSettings::Placement;

constexpr size_t kMaxTenantBytes = 64;
constexpr char kDefaultPreset[] = "dynsplit_index";

constexpr EnumMap<v1::SessionOptions::Residence, Placement, 2> kPlacements = {
    {{v1::SessionOptions::RESIDENCE_DEVICE, Placement::kDevice},
     {v1::SessionOptions::RESIDENCE_HOST, Placement::kHost}}};

constexpr EnumMap<v1::SessionOptions::Summaries, bool, 2> kSummaries = {
    {{v1::SessionOptions::SUMMARIES_AS_KEYS, true},
     {v1::SessionOptions::SUMMARIES_FLOAT8_E4M3, false}}};

absl::Status Misplaced(const char* field, const char* takers) {
  return InvalidField(field, absl::StrCat("is set; only ", takers, " takes one"));
}

// Domain errors speak of "policy": here it has another name.
absl::Status Under(const std::string& field, const absl::Status& status) {
  const ErrorDetails details = GetErrorDetails(status);
  constexpr size_t kOwnPath = sizeof("policy") - 1;
  if (field == "policy" || details.kind != "field" || details.subject.rfind("policy", 0) != 0) {
    return status;
  }
  return InvalidField(field + details.subject.substr(kOwnPath), details.problem);
}

absl::StatusOr<Policy> ResidentPolicyFromProto(const v1::Policy& wire, const std::string& field,
                                               const SequenceShape& capacity, const Rope* rope) {
  absl::StatusOr<Policy> policy;
  if (wire.preset().empty()) {
    v1::Policy named = wire;
    named.set_preset(kDefaultPreset);
    policy = PolicyFromProto(named, field);
  } else {
    policy = PolicyFromProto(wire, field);
  }
  if (!policy.ok()) return policy.status();
  absl::Status status = ValidateResidentPolicy(*policy);
  if (status.ok()) status = ValidatePolicy(*policy, capacity, rope);
  if (!status.ok()) return Under(field, status);
  if (policy->encoding.scale_granularity == ScaleGranularity::kHead) {
    return InvalidField(field + ".encoding.scale_granularity",
                        "is SCALE_GRANULARITY_HEAD; sessions grow, and have scales by token and "
                        "head");
  }
  if (policy->scoring.num_window_queries != 0) {
    return InvalidField(field + ".scoring.num_window_queries",
                        "is set; Select says how many queries it brings");
  }
  return policy;
}

void FillPlace(const ResidentLayout& layout, Residence residence, v1::SessionBytes& wire) {
  const bool device = residence == Residence::kDevice;
  wire.set_key_value(layout.key_value_bytes);
  wire.set_index(layout.index_bytes);
  wire.set_device(layout.index_bytes + (device ? layout.key_value_bytes : 0));
  wire.set_host(device ? 0 : layout.key_value_bytes);
}

}  // namespace

absl::Status CheckSessionFields(const v1::Begin& begin, Method method) {
  const bool targeted = method == Method::kAppend || method == Method::kFetch;
  if (begin.has_session() && method != Method::kOpen && method != Method::kCompress) {
    return Misplaced("session", "Open or Compress");
  }
  if (begin.has_session_policy() && !(method == Method::kCompress && begin.has_session())) {
    return Misplaced("session_policy", "Compress with session");
  }
  if (!targeted)
    return begin.has_target() ? Misplaced("target", "Append or Fetch") : absl::OkStatus();
  const v1::SessionTarget& target = begin.target();
  if (target.session_id().empty()) return InvalidField("target.session_id", "is missing");
  if (method == Method::kFetch) {
    return target.position() == 0 ? absl::OkStatus() : Misplaced("target.position", "Append");
  }
  if (target.layers_size() > 0) return Misplaced("target.layers", "Fetch");
  if (target.has_resume()) return Misplaced("target.resume", "Fetch");
  if (target.position() < 0) {
    return InvalidField("target.position",
                        absl::StrCat("is ", target.position(), "; must be >= 0"));
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Duration> LeaseFromProto(int32_t seconds, absl::Duration otherwise,
                                              const std::string& field) {
  if (seconds == 0) return otherwise;
  if (seconds >= 1 && seconds <= kMaxLeaseSeconds) return absl::Seconds(seconds);
  return InvalidField(field,
                      absl::StrCat("is ", seconds, "; must be in [1, ", kMaxLeaseSeconds, "]"));
}

absl::StatusOr<std::string> TenantFromProto(const std::string& tenant, const std::string& field) {
  const bool printable =
      std::all_of(tenant.begin(), tenant.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (tenant.size() > kMaxTenantBytes || !printable) {
    return InvalidField(field, absl::StrCat("has ", tenant.size(), " bytes; must be at most ",
                                            kMaxTenantBytes, " printable ASCII characters"));
  }
  return tenant.empty() ? std::string("default") : tenant;
}

absl::StatusOr<SessionOpening> OpeningFromProto(const v1::SessionOptions& options,
                                                const v1::Policy& policy, const std::string& field,
                                                const SequenceShape& shape,
                                                const std::optional<Rope>& rope,
                                                const std::string& tenant) {
  SessionOpening opening;
  opening.settings.tenant = tenant;
  absl::StatusOr<absl::Duration> lease =
      LeaseFromProto(options.lease_seconds(), opening.settings.lease, "session.lease_seconds");
  if (!lease.ok()) return lease.status();
  opening.settings.lease = *lease;
  const int64_t most = std::numeric_limits<int32_t>::max() - shape.num_tokens;
  if (options.reserve_tokens() < 0 || options.reserve_tokens() > most) {
    return InvalidField("session.reserve_tokens", absl::StrCat("is ", options.reserve_tokens(),
                                                               "; must be in [0, ", most, "]"));
  }
  opening.settings.reserve_tokens = options.reserve_tokens();
  bool as_keys = false;
  absl::Status status =
      Assign(kPlacements, options.residence(), &v1::SessionOptions::Residence_IsValid,
             "session.residence", opening.settings.placement);
  status.Update(Assign(kSummaries, options.summaries(), &v1::SessionOptions::Summaries_IsValid,
                       "session.summaries", as_keys));
  if (!status.ok()) return status;
  SequenceShape capacity = shape;
  capacity.num_tokens += options.reserve_tokens();
  if (status = ValidateShape(capacity); !status.ok()) {
    return InvalidField("session.reserve_tokens",
                        absl::StrCat("is ", options.reserve_tokens(), ", with which ",
                                     std::string(status.message())));
  }
  absl::StatusOr<Policy> decoded =
      ResidentPolicyFromProto(policy, field, capacity, rope.has_value() ? &*rope : nullptr);
  if (!decoded.ok()) return decoded.status();
  opening.resident.shape = shape;
  opening.resident.rope = rope;
  opening.resident.policy = *std::move(decoded);
  opening.resident.capacity_tokens = capacity.num_tokens;
  return opening;
}

void SetTypes(const v1::SessionOptions& options, DType key_dtype, DType value_dtype,
              ResidentSpec& resident) {
  resident.key_dtype = key_dtype;
  resident.value_dtype = value_dtype;
  resident.summary_dtype = options.summaries() == v1::SessionOptions::SUMMARIES_AS_KEYS
                               ? SummaryDTypeOf(resident)
                               : DType::kFloat8E4M3;
}

absl::Status DecodeFetch(const v1::Begin& begin, RequestSpec& spec) {
  v1::Policy output;
  *output.mutable_encoding() = begin.policy().encoding();
  output.set_positions(begin.policy().positions());
  output.set_page_size(begin.policy().page_size());
  const absl::StatusOr<Policy> decoded = PolicyFromProto(output, "policy");
  if (!decoded.ok()) return decoded.status();
  spec.sequence.policy = FetchPolicy(spec.sequence.policy, *decoded);
  const int32_t num_layers = spec.sequence.shape.num_layers;
  const auto& layers = begin.target().layers();
  if (layers.empty()) {
    spec.fetch_layers.resize(static_cast<size_t>(num_layers));
    std::iota(spec.fetch_layers.begin(), spec.fetch_layers.end(), 0);
  }
  for (int i = 0; i < layers.size(); ++i) {
    if (layers[i] < (i == 0 ? 0 : layers[i - 1] + 1) || layers[i] >= num_layers) {
      return InvalidField(
          absl::StrCat("target.layers[", i, "]"),
          absl::StrCat("is ", layers[i], "; layers ascend within [0, ", num_layers, ")"));
    }
    spec.fetch_layers.push_back(layers[i]);
  }
  if (!begin.target().has_resume()) return absl::OkStatus();
  const v1::SessionTarget::Resume& resume = begin.target().resume();
  const auto place =
      std::lower_bound(spec.fetch_layers.begin(), spec.fetch_layers.end(), resume.layer());
  if (place == spec.fetch_layers.end() || *place != resume.layer()) {
    return InvalidField("target.resume.layer",
                        absl::StrCat("is ", resume.layer(), "; must be one of target.layers"));
  }
  if (resume.tensor_index() < 0) {
    return InvalidField("target.resume.tensor_index",
                        absl::StrCat("is ", resume.tensor_index(), "; must be >= 0"));
  }
  if (resume.offset() < 0) {
    return InvalidField("target.resume.offset",
                        absl::StrCat("is ", resume.offset(), "; must be >= 0"));
  }
  spec.fetch_resume = {
      .layer = resume.layer(),
      .tensor_index = resume.tensor_index(),
      .offset = resume.offset(),
      .num_skipped_layers = static_cast<int32_t>(place - spec.fetch_layers.begin())};
  return absl::OkStatus();
}

v1::SessionBytes BytesToProto(const ResidentLayout& layout, Residence residence) {
  v1::SessionBytes wire;
  FillPlace(layout, residence, wire);
  return wire;
}

v1::SessionInfo SessionToProto(const SessionSnapshot& snapshot, const std::string& endpoint) {
  v1::SessionInfo wire;
  wire.set_session_id(snapshot.id);
  wire.set_endpoint(endpoint);
  *wire.mutable_shape() = ShapeToProto(snapshot.spec.shape);
  *wire.mutable_policy() = PolicyToProto(snapshot.spec.policy);
  v1::SessionOptions& options = *wire.mutable_options();
  options.set_lease_seconds(static_cast<int32_t>(absl::ToInt64Seconds(snapshot.state.lease)));
  options.set_residence(kPlacements.ToWire(snapshot.settings.placement));
  options.set_reserve_tokens(snapshot.settings.reserve_tokens);
  options.set_summaries(kSummaries.ToWire(snapshot.spec.summary_dtype != DType::kFloat8E4M3));
  wire.set_tenant(snapshot.settings.tenant);
  wire.set_num_blocks(snapshot.num_blocks);
  wire.set_open_block_begin(snapshot.open_block_begin);
  wire.set_capacity_tokens(snapshot.layout.capacity_tokens);
  wire.set_residence(snapshot.residence == Residence::kDevice ? v1::SessionOptions::RESIDENCE_DEVICE
                                                              : v1::SessionOptions::RESIDENCE_HOST);
  v1::SessionBytes& bytes = *wire.mutable_bytes();
  FillPlace(snapshot.layout, snapshot.residence, bytes);
  bytes.set_reuse(snapshot.reuse_bytes);
  bytes.set_device(snapshot.device_bytes);
  bytes.set_host(snapshot.host_bytes);
  wire.set_lease_seconds_left(absl::ToDoubleSeconds(snapshot.state.lease_left));
  wire.set_num_demotions(snapshot.num_demotions);
  wire.set_num_restorations(snapshot.num_restorations);
  wire.set_num_mappings(snapshot.state.num_mappings);
  return wire;
}

}  // namespace dynsplit::rpc
