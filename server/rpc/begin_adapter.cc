// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/begin_adapter.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/tensor_adapter.h"

namespace dynsplit::rpc {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr int32_t kMaxTensorsPerLayer = 8;
constexpr int32_t kMaxSequenceTensors = 16;
constexpr int kHashDigits = 32;

absl::Status CheckRange(const std::string& field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; must be in [", low, ", ", high, "]"));
}

absl::Status CheckText(const std::string& field, const std::string& text, size_t most) {
  const bool printable =
      std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (text.size() <= most && printable) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", text.size(), " bytes; must be at most ", most,
                                          " printable ASCII characters"));
}

absl::Status DecodeNames(const v1::Begin& begin, const std::string& fallback_request_id,
                         RequestSpec& spec) {
  absl::Status status = CheckText("request_id", begin.request_id(), kMaxRequestIdBytes);
  if (!status.ok()) return status;
  spec.request_id = begin.request_id().empty() ? fallback_request_id : begin.request_id();
  absl::StatusOr<std::string> tenant = TenantFromProto(begin.tenant(), "tenant");
  if (!tenant.ok()) return tenant.status();
  spec.tenant = *std::move(tenant);
  return absl::OkStatus();
}

absl::Status DecodeNumbers(const v1::Begin& begin, RequestSpec& spec) {
  const int32_t num_layers = spec.sequence.shape.num_layers;
  spec.max_open_layers =
      begin.max_open_layers() == 0 ? std::min(2, num_layers) : begin.max_open_layers();
  absl::Status status = CheckRange("max_open_layers", spec.max_open_layers, 1, num_layers);
  if (begin.max_chunk_bytes() != 0) spec.max_chunk_bytes = begin.max_chunk_bytes();
  status.Update(
      CheckRange("max_chunk_bytes", spec.max_chunk_bytes, kMinChunkBytes, kMaxChunkBytes));
  const int32_t num_shards = begin.num_shards() == 0 ? 1 : begin.num_shards();
  status.Update(CheckRange("num_shards", num_shards, 1, 1024));
  status.Update(CheckRange("shard_index", begin.shard_index(), 0, num_shards - 1));
  if (status.ok() && num_shards > 1) {
    return WithReason(
        absl::StatusCode::kUnimplemented, "UNSUPPORTED_SHARDS",
        absl::StrCat("num_shards is ", num_shards, "; this server takes a request as one stream"));
  }
  return status;
}

// Tensors by kind of one layer, or of the whole sequence.
using Kinds = std::map<TensorKind, const DecodedTensor*>;

const DecodedTensor* Find(const Kinds& kinds, TensorKind kind) {
  const auto found = kinds.find(kind);
  return found == kinds.end() ? nullptr : found->second;
}

struct Tensors {
  std::vector<DecodedTensor> all;
  Kinds sequence;
  std::vector<Kinds> layers;
};

// The tensor's bytes where they lie in a region.
absl::Status Locate(const v1::TensorDescriptor& descriptor, const RegionStore& regions,
                    RequestTensor& tensor) {
  if (descriptor.location().where_case() != v1::Location::kRegion) return absl::OkStatus();
  const v1::RegionSlice& slice = descriptor.location().region();
  const std::string field = tensor.field + ".location.region";
  absl::StatusOr<RegionPart> part =
      regions.Find(slice.name(), slice.generation(), slice.offset_bytes(), tensor.byte_size,
                   /*writable=*/false, field);
  if (!part.ok()) return part.status();
  const auto address = reinterpret_cast<uintptr_t>(part->data);
  const auto element_bytes = static_cast<uintptr_t>(DTypeBytes(tensor.view.dtype));
  if (address % element_bytes != 0) {
    return InvalidField(
        field + ".offset_bytes",
        absl::StrCat("is ", slice.offset_bytes(), ", which is no multiple of the element size, ",
                     element_bytes));
  }
  tensor.place = *std::move(part);
  return absl::OkStatus();
}

absl::StatusOr<Tensors> DecodeTensors(const v1::Begin& begin, const SequenceShape& shape,
                                      const BeginContext& limits) {
  if (begin.tensors_size() > limits.max_total_tensors) {
    return InvalidField(
        "tensors", absl::StrCat("has ", begin.tensors_size(), " entries; the server takes at most ",
                                limits.max_total_tensors));
  }
  Tensors tensors;
  tensors.layers.resize(static_cast<size_t>(shape.num_layers));
  tensors.all.reserve(static_cast<size_t>(begin.tensors_size()));
  absl::flat_hash_set<uint32_t> ids;
  for (int i = 0; i < begin.tensors_size(); ++i) {
    const std::string field = absl::StrCat("tensors[", i, "]");
    absl::StatusOr<DecodedTensor> decoded = TensorFromProto(begin.tensors(i), shape, field);
    if (!decoded.ok()) return decoded.status();
    absl::Status located = Locate(begin.tensors(i), limits.regions, decoded->tensor);
    if (!located.ok()) return located;
    if (!ids.insert(decoded->tensor.id).second) {
      return InvalidField(field + ".id",
                          absl::StrCat("is ", decoded->tensor.id, "; that id is taken"));
    }
    tensors.all.push_back(*std::move(decoded));
    const RequestTensor& tensor = tensors.all.back().tensor;
    const bool whole = tensor.layer == RequestTensor::kWholeSequence;
    Kinds& kinds = whole ? tensors.sequence : tensors.layers[static_cast<size_t>(tensor.layer)];
    if (!kinds.emplace(tensor.kind, &tensors.all.back()).second) {
      return InvalidField(
          field + ".kind",
          absl::StrCat("is ", TensorKindName(tensor.kind), "; ",
                       whole ? std::string("the sequence") : absl::StrCat("layer ", tensor.layer),
                       " has one already"));
    }
    const int32_t most = whole ? kMaxSequenceTensors : kMaxTensorsPerLayer;
    if (static_cast<int32_t>(kinds.size()) > most) {
      return InvalidField(field, absl::StrCat("is one more than ", most, " tensors"));
    }
  }
  return tensors;
}

absl::Status CheckBytes(const DecodedTensor& decoded, int64_t wanted) {
  if (decoded.tensor.byte_size == wanted) return absl::OkStatus();
  return InvalidField(decoded.tensor.field + ".byte_size",
                      absl::StrCat("is ", decoded.tensor.byte_size, "; ",
                                   TensorKindName(decoded.tensor.kind), " must have ", wanted));
}

// Scales go with quantised data, and only with it.
absl::Status PairScales(const Kinds& kinds, TensorKind data_kind, TensorKind scales_kind,
                        const SequenceShape& shape, std::optional<ScaleGranularity>& granularity) {
  const DecodedTensor* data = Find(kinds, data_kind);
  if (data == nullptr) data = Find(kinds, TensorKind::kKeyValue);
  const DecodedTensor* scales = Find(kinds, scales_kind);
  const bool quantized = data != nullptr && IsQuantized(data->tensor.view.dtype);
  if (!quantized) {
    if (scales == nullptr) return absl::OkStatus();
    return InvalidField(scales->tensor.field + ".kind",
                        absl::StrCat("is ", TensorKindName(scales_kind),
                                     "; there is no quantised tensor that it could belong to"));
  }
  if (scales == nullptr) {
    return InvalidField(data->tensor.field,
                        absl::StrCat("is ", std::string(DTypeName(data->tensor.view.dtype)),
                                     " and needs ", TensorKindName(scales_kind)));
  }
  const bool int8 = data->tensor.view.dtype == DType::kInt8;
  const ScaleGranularity stated =
      scales->scale_granularity.value_or(data->scale_granularity.value_or(
          int8 ? ScaleGranularity::kTokenHead : ScaleGranularity::kHead));
  if (granularity.value_or(stated) != stated) {
    return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_LAYOUT",
                      absl::StrCat(scales->tensor.field,
                                   ".scale_granularity differs between tensors; this server takes "
                                   "one granularity a request"));
  }
  granularity = stated;
  const int64_t rows = stated == ScaleGranularity::kHead ? 1 : shape.num_tokens;
  return CheckBytes(*scales, 4 * rows * shape.num_kv_heads);
}

// Tensors whose sizes follow from others of the same layer.
absl::Status CheckLayerSizes(const Kinds& kinds, const SequenceShape& shape,
                             std::optional<ScaleGranularity>& granularity) {
  absl::Status status =
      PairScales(kinds, TensorKind::kKey, TensorKind::kKeyScales, shape, granularity);
  status.Update(
      PairScales(kinds, TensorKind::kValue, TensorKind::kValueScales, shape, granularity));
  if (const DecodedTensor* lse = Find(kinds, TensorKind::kLogSumExp); lse != nullptr) {
    const DecodedTensor* queries = Find(kinds, TensorKind::kQueries);
    if (queries == nullptr) {
      status.Update(InvalidField(lse->tensor.field + ".kind",
                                 "is LOG_SUM_EXP; there are no QUERIES that it could belong to"));
    } else {
      status.Update(CheckBytes(*lse, 4 * queries->tensor.view.num_tokens * shape.num_query_heads));
    }
  }
  if (Find(kinds, TensorKind::kKeyValue) != nullptr) {
    for (const TensorKind other : {TensorKind::kKey, TensorKind::kValue}) {
      const DecodedTensor* twice = Find(kinds, other);
      if (twice == nullptr) continue;
      status.Update(InvalidField(
          twice->tensor.field + ".kind",
          absl::StrCat("is ", TensorKindName(other), "; KEY_VALUE supplies it already")));
    }
  }
  return status;
}

// Every layer brings what layer 0 brings: kinds, types and numbers of rows.
absl::Status CheckUniform(const Tensors& tensors) {
  const Kinds& first = tensors.layers.front();
  for (size_t layer = 1; layer < tensors.layers.size(); ++layer) {
    const Kinds& kinds = tensors.layers[layer];
    for (const auto& [kind, decoded] : first) {
      const DecodedTensor* own = Find(kinds, kind);
      if (own == nullptr) {
        return InvalidField("tensors", absl::StrCat("has no ", TensorKindName(kind), " of layer ",
                                                    layer, "; layer 0 has one"));
      }
      if (own->tensor.view.dtype != decoded->tensor.view.dtype) {
        return InvalidField(
            own->tensor.field + ".dtype",
            absl::StrCat("is ", std::string(DTypeName(own->tensor.view.dtype)), "; layer 0 has ",
                         std::string(DTypeName(decoded->tensor.view.dtype))));
      }
      const bool sized = kind == TensorKind::kQueries || kind == TensorKind::kAccumulatedScores;
      if (sized && (own->tensor.view.num_tokens != decoded->tensor.view.num_tokens ||
                    (kind == TensorKind::kAccumulatedScores &&
                     own->tensor.byte_size != decoded->tensor.byte_size))) {
        return InvalidField(
            own->tensor.field + ".byte_size",
            absl::StrCat("has another number of rows than ", TensorKindName(kind), " of layer 0"));
      }
    }
    for (const auto& [kind, decoded] : kinds) {
      if (Find(first, kind) != nullptr) continue;
      return InvalidField(decoded->tensor.field + ".kind",
                          absl::StrCat("is ", TensorKindName(kind), "; layer 0 has none"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPaging(const Tensors& tensors, const SequenceShape& shape) {
  int32_t page_size = 0;
  for (const DecodedTensor& decoded : tensors.all) {
    const int32_t own = decoded.tensor.view.page_size;
    if (own == 0) continue;
    if (page_size != 0 && own != page_size) {
      return InvalidField(decoded.tensor.field + ".dims",
                          absl::StrCat("have pages of ", own, " slots; others have ", page_size));
    }
    page_size = own;
  }
  const DecodedTensor* table = Find(tensors.sequence, TensorKind::kBlockTable);
  if (page_size == 0) {
    if (table == nullptr) return absl::OkStatus();
    return InvalidField(table->tensor.field + ".kind", "is BLOCK_TABLE; no tensor names AXIS_PAGE");
  }
  if (table == nullptr) {
    return InvalidField("tensors", "has no BLOCK_TABLE; paged tensors are addressed through it");
  }
  return CheckBytes(*table, 4 * ((shape.num_tokens + page_size - 1) / page_size));
}

struct Demand {
  bool keys = false;
  bool values = false;
  bool queries = false;
  bool kept_tokens = false;
  bool token_ids = false;
  bool query_positions = false;
  bool block_starts = false;
};

Demand DemandOf(const RequestSpec& spec) {
  switch (spec.method) {
    case Method::kCompress:
    case Method::kOpen:
    case Method::kAppend:
      return {.keys = true,
              .values = true,
              .token_ids = ReadsTokenIds(spec.sequence.policy.segmentation) ||
                           (spec.opening.has_value() &&
                            ReadsTokenIds(spec.opening->resident.policy.segmentation))};
    case Method::kPlan:
      return {.token_ids = ReadsTokenIds(spec.sequence.policy.segmentation)};
    case Method::kApply:
      return {.keys = true, .values = true, .kept_tokens = true, .block_starts = true};
    case Method::kCalibrate:
      return {.keys = true, .queries = true, .token_ids = true, .query_positions = true};
    case Method::kFetch:
      return {.kept_tokens = true};
  }
  return {};
}

absl::Status Lacks(const char* kind, const char* why) {
  return InvalidField("tensors", absl::StrCat("has no ", kind, "; ", why));
}

absl::Status CheckDemand(const RequestSpec& spec, const Tensors& tensors) {
  const Demand demand = DemandOf(spec);
  const Kinds& layer = tensors.layers.front();
  const Kinds& sequence = tensors.sequence;
  const bool packed = Find(layer, TensorKind::kKeyValue) != nullptr;
  const char* why = "the method needs it";
  if (demand.keys && !packed && Find(layer, TensorKind::kKey) == nullptr) return Lacks("KEY", why);
  if (demand.values && !packed && Find(layer, TensorKind::kValue) == nullptr) {
    return Lacks("VALUE", why);
  }
  if (demand.queries && Find(layer, TensorKind::kQueries) == nullptr) return Lacks("QUERIES", why);
  if (demand.kept_tokens && Find(layer, TensorKind::kKeptTokens) == nullptr) {
    return Lacks("KEPT_TOKENS", why);
  }
  if (demand.block_starts && Find(sequence, TensorKind::kBlockStarts) == nullptr) {
    return Lacks("BLOCK_STARTS", why);
  }
  if (demand.query_positions && Find(sequence, TensorKind::kQueryPositions) == nullptr) {
    return Lacks("QUERY_POSITIONS", why);
  }
  if (demand.token_ids && Find(sequence, TensorKind::kTokenIds) == nullptr) {
    return Lacks("TOKEN_IDS", "the segmentation reads it");
  }
  // What has no place in the method is refused rather than carried along.
  const std::pair<TensorKind, bool> misplaced[] = {
      {TensorKind::kKeptTokens, demand.kept_tokens},
      {TensorKind::kBlockStarts, demand.block_starts},
      {TensorKind::kQueryPositions, demand.query_positions}};
  for (const auto& [kind, wanted] : misplaced) {
    const DecodedTensor* tensor = Find(kind == TensorKind::kKeptTokens ? layer : sequence, kind);
    if (tensor == nullptr || wanted) continue;
    return InvalidField(tensor->tensor.field + ".kind",
                        absl::StrCat("is ", TensorKindName(kind), ", which ",
                                     MethodName(spec.method), " does not take"));
  }
  if (spec.method != Method::kOpen && spec.method != Method::kAppend) return absl::OkStatus();
  for (const DecodedTensor& decoded : tensors.all) {
    const TensorKind kind = decoded.tensor.kind;
    if (kind != TensorKind::kQueries && kind != TensorKind::kLogSumExp &&
        kind != TensorKind::kAccumulatedScores) {
      continue;
    }
    return InvalidField(decoded.tensor.field + ".kind",
                        absl::StrCat("is ", TensorKindName(kind), ", which ",
                                     MethodName(spec.method), " does not take"));
  }
  return absl::OkStatus();
}

// Of what Fetch takes: sets of tokens for some of the layers, as the session's scope has them.
absl::Status CheckFetchTensors(const RequestSpec& spec, const Tensors& tensors) {
  const SequenceShape& shape = spec.sequence.shape;
  const int64_t groups = spec.sequence.policy.scope == Scope::kLayerHead ? shape.num_kv_heads : 1;
  for (const DecodedTensor& decoded : tensors.all) {
    const RequestTensor& tensor = decoded.tensor;
    if (tensor.kind != TensorKind::kKeptTokens) {
      return InvalidField(tensor.field + ".kind", absl::StrCat("is ", TensorKindName(tensor.kind),
                                                               ", which Fetch does not take"));
    }
    if (!std::binary_search(spec.fetch_layers.begin(), spec.fetch_layers.end(), tensor.layer)) {
      return InvalidField(tensor.field + ".layer",
                          absl::StrCat("is ", tensor.layer, "; must be one of target.layers"));
    }
    if (tensor.byte_size % (4 * groups) != 0 ||
        tensor.byte_size / (4 * groups) > shape.num_tokens) {
      return InvalidField(tensor.field + ".byte_size",
                          absl::StrCat("is ", tensor.byte_size, "; must be int32 of ", groups,
                                       " groups of 1 to ", shape.num_tokens, " tokens"));
    }
  }
  return absl::OkStatus();
}

// K and V come in the types of the session's.
absl::Status CheckAppendTypes(const RequestSpec& spec, const ResidentSpec& session) {
  const SequenceSpec& sequence = spec.sequence;
  if (sequence.key_dtype == session.key_dtype && sequence.value_dtype == session.value_dtype) {
    return absl::OkStatus();
  }
  return InvalidField(
      "tensors",
      absl::StrCat("have K of ", std::string(DTypeName(sequence.key_dtype)), " and V of ",
                   std::string(DTypeName(sequence.value_dtype)), "; the session was opened with ",
                   std::string(DTypeName(session.key_dtype)), " and ",
                   std::string(DTypeName(session.value_dtype))));
}

absl::Status CheckCalibration(const RequestSpec& spec, const Tensors& tensors) {
  const CalibrationOptions& options = spec.calibration;
  absl::Status status =
      CheckRange("calibration.num_future_queries", options.num_future_queries, 1, 64);
  status.Update(CheckRange("calibration.overlap_size", options.overlap_size, 1, 65536));
  status.Update(CheckRange("calibration.min_occurrences", options.min_occurrences, 1, INT32_MAX));
  status.Update(CheckRange("calibration.max_occurrences", options.max_occurrences, 1, INT32_MAX));
  if (!(options.alpha >= 0 && options.alpha <= 16)) {
    status.Update(InvalidField("calibration.alpha",
                               absl::StrCat("is ", options.alpha, "; must be in [0, 16]")));
  }
  for (const int32_t id : options.candidates) {
    if (id < 0) {
      status.Update(InvalidField("calibration.candidate_token_ids",
                                 absl::StrCat("has ", id, "; must be >= 0")));
    }
  }
  const int64_t num_queries =
      Find(tensors.layers.front(), TensorKind::kQueries)->tensor.view.num_tokens;
  status.Update(CheckBytes(*Find(tensors.sequence, TensorKind::kQueryPositions), 4 * num_queries));
  return status;
}

void DecodeCalibration(const v1::CalibrationOptions& wire, CalibrationOptions& options) {
  options.candidates.assign(wire.candidate_token_ids().begin(), wire.candidate_token_ids().end());
  if (wire.num_future_queries() != 0) options.num_future_queries = wire.num_future_queries();
  if (wire.overlap_size() != 0) options.overlap_size = wire.overlap_size();
  if (wire.has_alpha()) options.alpha = wire.alpha();
  if (wire.min_occurrences() != 0) options.min_occurrences = wire.min_occurrences();
  if (wire.max_occurrences() != 0) options.max_occurrences = wire.max_occurrences();
}

bool IsHash(const std::string& hex) {
  return hex.size() == kHashDigits && std::all_of(hex.begin(), hex.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

// Everything of begin.plan but the bulk, which arrives as tensors.
absl::Status DecodePlan(const v1::Plan& wire, RequestSpec& spec) {
  const SequenceShape& shape = spec.sequence.shape;
  if (ShapeFromProto(wire.shape()) != shape) {
    return InvalidField("plan.shape", "differs from shape");
  }
  if (wire.policy_version() != kPolicyVersion) {
    return PreconditionFailed(
        "PLAN_MISMATCH", "plan.policy_version",
        absl::StrCat("is ", wire.policy_version(), "; this server has ", kPolicyVersion));
  }
  if (!IsHash(wire.hash())) return InvalidField("plan.hash", "must be 32 lower-case hex digits");
  if (wire.layers_size() != shape.num_layers) {
    return InvalidField(
        "plan.layers", absl::StrCat("has ", wire.layers_size(), " entries; must have one a layer, ",
                                    shape.num_layers));
  }
  Plan plan;
  plan.shape = shape;
  plan.policy = spec.sequence.policy;
  plan.fallback_preset = wire.fallback_preset();
  absl::StatusOr<Evidence> evidence = EvidenceFromProto(wire.evidence(), "plan.evidence");
  if (!evidence.ok()) return evidence.status();
  plan.evidence = *evidence;
  for (int i = 0; i < wire.layers_size(); ++i) {
    const v1::LayerPlan& layer = wire.layers(i);
    const std::string field = absl::StrCat("plan.layers[", i, "]");
    absl::Status status = CheckRange(field + ".layer", layer.layer(), i, i);
    status.Update(
        CheckRange(field + ".num_kept_tokens", layer.num_kept_tokens(), 1, shape.num_tokens));
    if (status.ok() && layer.num_groups() != 1 && layer.num_groups() != shape.num_kv_heads) {
      status = InvalidField(
          field + ".num_groups",
          absl::StrCat("is ", layer.num_groups(), "; must be 1 or ", shape.num_kv_heads));
    }
    if (status.ok() && !IsHash(layer.hash())) {
      status = InvalidField(field + ".hash", "must be 32 lower-case hex digits");
    }
    if (!status.ok()) return status;
    plan.layers.push_back({.layer = i,
                           .groups = layer.num_groups(),
                           .num_kept = layer.num_kept_tokens(),
                           .dense = layer.dense(),
                           .raised_by_protection = layer.budget_raised_by_protection(),
                           .raised_by_quality_floor = layer.budget_raised_by_quality_floor(),
                           .kept = {}});
    spec.layer_hashes.push_back(layer.hash());
  }
  spec.plan_hash = wire.hash();
  spec.sequence.fallback_preset = wire.fallback_preset();
  spec.plan = std::move(plan);
  return absl::OkStatus();
}

absl::Status CheckPlanTensors(const RequestSpec& spec, const Tensors& tensors, int64_t num_blocks) {
  for (size_t layer = 0; layer < tensors.layers.size(); ++layer) {
    const LayerPlan& plan = spec.plan->layers[layer];
    absl::Status status = CheckBytes(*Find(tensors.layers[layer], TensorKind::kKeptTokens),
                                     4 * plan.groups * plan.num_kept);
    if (!status.ok()) return status;
  }
  if (num_blocks < 1 || num_blocks > spec.sequence.shape.num_tokens) {
    return InvalidField("plan.num_blocks", absl::StrCat("is ", num_blocks, "; must be in [1, ",
                                                        spec.sequence.shape.num_tokens, "]"));
  }
  return CheckBytes(*Find(tensors.sequence, TensorKind::kBlockStarts), 4 * (num_blocks + 1));
}

void FillSupply(const Tensors& tensors, SequenceSpec& sequence) {
  const Kinds& layer = tensors.layers.front();
  const DecodedTensor* packed = Find(layer, TensorKind::kKeyValue);
  const DecodedTensor* key = packed != nullptr ? packed : Find(layer, TensorKind::kKey);
  const DecodedTensor* value = packed != nullptr ? packed : Find(layer, TensorKind::kValue);
  sequence.supply.keys = key != nullptr;
  sequence.supply.values = value != nullptr;
  if (key != nullptr) sequence.key_dtype = key->tensor.view.dtype;
  if (value != nullptr) sequence.value_dtype = value->tensor.view.dtype;
  if (const DecodedTensor* queries = Find(layer, TensorKind::kQueries); queries != nullptr) {
    sequence.supply.num_window_queries = queries->tensor.view.num_tokens;
  }
  sequence.supply.lse = Find(layer, TensorKind::kLogSumExp) != nullptr;
  if (const DecodedTensor* scores = Find(layer, TensorKind::kAccumulatedScores);
      scores != nullptr) {
    sequence.supply.accumulated_rows =
        static_cast<int32_t>(scores->tensor.byte_size / 4 / sequence.shape.num_tokens);
  }
}

absl::Status CheckWindow(const RequestSpec& spec, const Tensors& tensors) {
  const DecodedTensor* queries = Find(tensors.layers.front(), TensorKind::kQueries);
  if (queries == nullptr || spec.method == Method::kCalibrate) return absl::OkStatus();
  const int64_t most = std::min(kMaxWindowQueries, spec.sequence.shape.num_tokens - 1);
  const int64_t rows = queries->tensor.view.num_tokens;
  if (rows >= 1 && rows <= most) return absl::OkStatus();
  return InvalidField(queries->tensor.field,
                      absl::StrCat("has ", rows, " window queries; must have 1 to ", most));
}

// Delimiters that the segmentation reads. `field` is the path of its policy.
absl::StatusOr<std::shared_ptr<const DelimiterProfile>> ChooseProfile(
    const ProfileStore& profiles, const std::string& field, SegmentationPolicy& segmentation) {
  if (segmentation.profile.empty() && profiles.default_name().empty()) {
    return InvalidField(field + ".segmentation.profile",
                        "is empty, and this server has no default profile; must name the one of "
                        "the request's tokenizer (Info.ListDelimiterProfiles)");
  }
  absl::StatusOr<std::shared_ptr<const DelimiterProfile>> profile =
      profiles.Find(segmentation.profile);
  if (profile.ok()) segmentation.profile = (*profile)->name();
  return profile;
}

// Delimiters that the request's policy, or the calibration, reads.
absl::Status ChooseProfile(const ProfileStore& profiles, RequestSpec& spec) {
  SegmentationPolicy& segmentation = spec.sequence.policy.segmentation;
  if (spec.method != Method::kCalibrate && !ReadsTokenIds(segmentation)) return absl::OkStatus();
  auto profile = ChooseProfile(profiles, "policy", segmentation);
  if (!profile.ok()) return profile.status();
  spec.profile = *std::move(profile);
  return absl::OkStatus();
}

// How the sequence is to rest.
absl::Status ResolveOpening(const v1::Begin& begin, const ProfileStore& profiles,
                            RequestSpec& spec) {
  if (spec.method != Method::kOpen && !begin.has_session()) return absl::OkStatus();
  const std::string field = spec.method == Method::kOpen ? "policy" : "session_policy";
  absl::StatusOr<SessionOpening> opening = OpeningFromProto(
      begin.session(), spec.method == Method::kOpen ? begin.policy() : begin.session_policy(),
      field, spec.sequence.shape, spec.sequence.rope, spec.tenant);
  if (!opening.ok()) return opening.status();
  SegmentationPolicy& segmentation = opening->resident.policy.segmentation;
  if (ReadsTokenIds(segmentation)) {
    auto profile = ChooseProfile(profiles, field, segmentation);
    if (!profile.ok()) return profile.status();
    opening->profile = *std::move(profile);
  }
  if (spec.method == Method::kOpen) spec.sequence.policy = opening->resident.policy;
  spec.opening = *std::move(opening);
  return absl::OkStatus();
}

absl::Status DecodeRope(const v1::Begin& begin, RequestSpec& spec) {
  if (!begin.has_rope()) return absl::OkStatus();
  absl::StatusOr<Rope> rope = RopeFromProto(begin.rope(), spec.sequence.shape.head_dim);
  if (!rope.ok()) return rope.status();
  spec.sequence.rope = *std::move(rope);
  return absl::OkStatus();
}

// Append and Fetch: what the session says.
absl::Status ResolveTarget(const v1::Begin& begin, const TargetSession& target, RequestSpec& spec) {
  if (!spec.sequence.rope.has_value()) spec.sequence.rope = target.spec.rope;
  spec.sequence.policy = target.spec.policy;
  if (spec.method == Method::kAppend) return absl::OkStatus();
  if (absl::Status status = DecodeFetch(begin, spec); !status.ok()) return status;
  spec.segmentation = target.segmentation;
  const ResidentLayout layout = PlanResident(target.spec, 0);
  spec.sequence.key_dtype = layout.key_dtype;
  spec.sequence.value_dtype = layout.value_dtype;
  const Rope* rope = spec.sequence.rope.has_value() ? &*spec.sequence.rope : nullptr;
  return ValidatePolicy(spec.sequence.policy, spec.sequence.shape, rope);
}

absl::Status ResolvePolicy(const v1::Begin& begin, const ProfileStore& profiles,
                           RequestSpec& spec) {
  const bool apply = spec.method == Method::kApply;
  if (apply != begin.has_plan()) {
    return InvalidField("plan",
                        apply ? "is missing; Apply executes it" : "is set; only Apply takes one");
  }
  absl::StatusOr<Policy> policy = apply ? PolicyFromProto(begin.plan().policy(), "plan.policy")
                                        : PolicyFromProto(begin.policy(), "policy");
  if (!policy.ok()) return policy.status();
  spec.sequence.policy = *std::move(policy);
  const Rope* rope = spec.sequence.rope.has_value() ? &*spec.sequence.rope : nullptr;
  absl::Status status = ValidatePolicy(spec.sequence.policy, spec.sequence.shape, rope);
  if (!status.ok() || apply) return status;
  return ChooseProfile(profiles, spec);
}

// Tokens that an append without a shape brings: as many as it has ids of, or else rows of keys.
int64_t AppendedTokens(const v1::Begin& begin, const SequenceShape& shape) {
  int64_t num_tokens = 0;
  for (const v1::TensorDescriptor& tensor : begin.tensors()) {
    if (tensor.kind() == v1::TENSOR_KIND_TOKEN_IDS) return tensor.byte_size() / 4;
    if (num_tokens > 0 || tensor.kind() != v1::TENSOR_KIND_KEY) continue;
    for (const v1::Dim& dim : tensor.dims()) {
      if (dim.axis() == v1::AXIS_TOKEN) num_tokens = dim.size();
    }
    const absl::StatusOr<DType> dtype = DTypeFromProto(tensor.dtype(), "");
    if (tensor.dims_size() > 0 || !dtype.ok()) continue;
    num_tokens = tensor.byte_size() / (DTypeBytes(*dtype) * shape.num_kv_heads * shape.head_dim);
  }
  return num_tokens;
}

absl::Status DecodeShape(const v1::Begin& begin, const TargetSession* target, RequestSpec& spec) {
  SequenceShape& shape = spec.sequence.shape;
  shape = ShapeFromProto(begin.shape());
  if (target == nullptr) return ValidateShape(shape);
  SequenceShape own = target->spec.shape;
  if (spec.method == Method::kAppend) {
    own.num_tokens = begin.has_shape() ? shape.num_tokens : AppendedTokens(begin, own);
  }
  if (begin.has_shape() && shape != own) {
    return InvalidField("shape", "differs from the session's; leave it out, or repeat it");
  }
  shape = own;
  return ValidateShape(shape);
}

absl::Status DecodeHead(const v1::Begin& begin, const BeginContext& context, RequestSpec& spec) {
  const Method method = spec.method;
  spec.sequence.with_receipt = !begin.no_receipt() && method <= Method::kApply;
  spec.shadow = begin.shadow();
  absl::Status status = DecodeNames(begin, context.fallback_request_id, spec);
  if (status.ok()) status = CheckSessionFields(begin, method);
  if (status.ok()) status = DecodeShape(begin, context.target, spec);
  if (status.ok()) status = DecodeNumbers(begin, spec);
  if (status.ok()) status = DecodeRope(begin, spec);
  if (status.ok() && spec.shadow && method != Method::kCompress) {
    status = InvalidField("shadow", "is set; only Compress has a shadow mode");
  }
  if (status.ok() && method > Method::kCalibrate && begin.has_plan()) {
    status = InvalidField("plan", "is set; only Apply takes one");
  }
  if (!status.ok()) return status;
  if (context.target != nullptr) return ResolveTarget(begin, *context.target, spec);
  if (method != Method::kOpen) {
    status = ResolvePolicy(begin, context.profiles, spec);
    if (!status.ok()) return status;
  }
  return ResolveOpening(begin, context.profiles, spec);
}

// Rows rest with a scale each: one for all of a head's rows would have to change as it grows.
absl::Status CheckRestingScales(const ResidentSpec& resident) {
  const EncodingPolicy& encoding = resident.policy.encoding;
  const auto as_is = [](DType dtype, EncodingPolicy::Format format) {
    return IsQuantized(dtype) && format == EncodingPolicy::Format::kAsIs;
  };
  if (!as_is(resident.key_dtype, encoding.key) && !as_is(resident.value_dtype, encoding.value)) {
    return absl::OkStatus();
  }
  return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_SCALES",
                    "K or V come quantised with scales by head; sessions keep them as they are "
                    "with SCALE_GRANULARITY_TOKEN_HEAD, or encode them anew (policy.encoding)");
}

absl::Status CheckTensors(const v1::Begin& begin, const BeginContext& context,
                          const Tensors& tensors, RequestSpec& spec) {
  const Method method = spec.method;
  if (method == Method::kFetch) {
    spec.sequence.input_scale_granularity = ScaleGranularity::kTokenHead;
    return CheckFetchTensors(spec, tensors);
  }
  absl::Status status = CheckUniform(tensors);
  std::optional<ScaleGranularity> granularity;
  for (const Kinds& layer : tensors.layers) {
    if (status.ok()) status = CheckLayerSizes(layer, spec.sequence.shape, granularity);
  }
  if (status.ok()) status = CheckPaging(tensors, spec.sequence.shape);
  if (status.ok()) status = CheckDemand(spec, tensors);
  if (status.ok()) status = CheckWindow(spec, tensors);
  if (!status.ok()) return status;
  spec.sequence.input_scale_granularity = granularity.value_or(ScaleGranularity::kHead);
  FillSupply(tensors, spec.sequence);
  if (spec.opening.has_value()) {
    SetTypes(begin.session(), spec.sequence.key_dtype, spec.sequence.value_dtype,
             spec.opening->resident);
  }
  const ResidentSpec* const resident = spec.opening.has_value()    ? &spec.opening->resident
                                       : method == Method::kAppend ? &context.target->spec
                                                                   : nullptr;
  if (resident != nullptr && granularity == ScaleGranularity::kHead) {
    if (status = CheckRestingScales(*resident); !status.ok()) return status;
  }
  switch (method) {
    case Method::kOpen:
    case Method::kFetch:
      return absl::OkStatus();
    case Method::kAppend:
      return CheckAppendTypes(spec, context.target->spec);
    case Method::kCalibrate:
      DecodeCalibration(begin.calibration(), spec.calibration);
      return CheckCalibration(spec, tensors);
    case Method::kApply:
      status = DecodePlan(begin.plan(), spec);
      if (status.ok()) status = CheckPlanTensors(spec, tensors, begin.plan().num_blocks());
      return status;
    case Method::kCompress:
    case Method::kPlan:
      break;
  }
  status = ResolveEvidence(spec.sequence);
  // A fallback may cut otherwise than the policy it replaces.
  if (status.ok() && !spec.sequence.fallback_preset.empty()) {
    status = CheckDemand(spec, tensors);
    if (status.ok()) status = ChooseProfile(context.profiles, spec);
  }
  return status;
}

}  // namespace

const char* MethodName(Method method) {
  switch (method) {
    case Method::kCompress:
      return "Compress";
    case Method::kPlan:
      return "Plan";
    case Method::kApply:
      return "Apply";
    case Method::kCalibrate:
      return "Calibrate";
    case Method::kOpen:
      return "Open";
    case Method::kAppend:
      return "Append";
    case Method::kFetch:
      return "Fetch";
  }
  return "";
}

absl::StatusOr<RequestSpec> SpecFromBegin(const v1::Begin& begin, Method method,
                                          const BeginContext& context) {
  RequestSpec spec;
  spec.method = method;
  absl::Status status = DecodeHead(begin, context, spec);
  if (!status.ok()) return status;
  absl::StatusOr<Tensors> tensors = DecodeTensors(begin, spec.sequence.shape, context);
  if (!tensors.ok()) return tensors.status();
  status = CheckTensors(begin, context, *tensors, spec);
  if (!status.ok()) return status;
  spec.tensors.reserve(tensors->all.size());
  for (DecodedTensor& decoded : tensors->all) spec.tensors.push_back(std::move(decoded.tensor));
  return spec;
}

}  // namespace dynsplit::rpc
