// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/begin_tensors.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/begin_adapter.h"
#include "server/runtime/output_need.h"

namespace dynsplit::rpc {
namespace {

constexpr int32_t kMaxTensorsPerLayer = 8;
constexpr int32_t kMaxSequenceTensors = 16;

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

}  // namespace

const DecodedTensor* Find(const Kinds& kinds, TensorKind kind) {
  const auto found = kinds.find(kind);
  return found == kinds.end() ? nullptr : found->second;
}

absl::StatusOr<Tensors> DecodeTensors(const v1::Begin& begin, const SequenceShape& shape,
                                      const BeginContext& context) {
  if (begin.tensors_size() > context.max_total_tensors) {
    return InvalidField(
        "tensors", absl::StrCat("has ", begin.tensors_size(), " entries; the server takes at most ",
                                context.max_total_tensors));
  }
  Tensors tensors;
  tensors.layers.resize(static_cast<size_t>(shape.num_layers));
  tensors.all.reserve(static_cast<size_t>(begin.tensors_size()));
  absl::flat_hash_set<uint32_t> ids;
  for (int i = 0; i < begin.tensors_size(); ++i) {
    const std::string field = absl::StrCat("tensors[", i, "]");
    absl::StatusOr<DecodedTensor> decoded = TensorFromProto(begin.tensors(i), shape, field);
    if (!decoded.ok()) return decoded.status();
    absl::Status located = Locate(begin.tensors(i), context.regions, decoded->tensor);
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

absl::Status DecodeOutput(const v1::Begin& begin, const RegionStore& regions, RequestSpec& spec) {
  if (!begin.has_output()) return absl::OkStatus();
  if (spec.method != Method::kCompress && spec.method != Method::kApply &&
      spec.method != Method::kFetch) {
    return InvalidField(
        "output", absl::StrCat("is set; ", MethodName(spec.method), " returns no layers to place"));
  }
  if (spec.fetch_resume.has_value()) {
    return InvalidField("output",
                        "is set together with target.resume; what lies in a region was "
                        "not lost with the stream: fetch the missing layers anew");
  }
  const v1::RegionSlice& slice = begin.output().region();
  const RegionName name = {
      .name = slice.name(), .generation = slice.generation(), .offset_bytes = slice.offset_bytes()};
  absl::StatusOr<RegionPart> part =
      regions.Find(name.name, name.generation, name.offset_bytes, begin.output().byte_size(),
                   /*writable=*/true, "output.region");
  if (!part.ok()) return part.status();
  if (name.offset_bytes % OutputRoom::kAlignmentBytes != 0 ||
      reinterpret_cast<uintptr_t>(part->data) % OutputRoom::kAlignmentBytes != 0) {
    return InvalidField("output.region.offset_bytes",
                        absl::StrCat("is ", name.offset_bytes, "; must be a multiple of ",
                                     OutputRoom::kAlignmentBytes, ", in memory too"));
  }
  const int64_t size_bytes = begin.output().byte_size() != 0
                                 ? begin.output().byte_size()
                                 : part->region->size_bytes() - name.offset_bytes;
  for (const RequestTensor& tensor : spec.tensors) {
    if (!tensor.located() || tensor.place.data >= part->data + size_bytes ||
        part->data >= tensor.place.data + tensor.byte_size) {
      continue;
    }
    return InvalidField("output.region",
                        absl::StrCat("overlaps ", tensor.field, ", which the request reads"));
  }
  const OutputNeed need = OutputNeedOf(spec);
  if (size_bytes < need.least_bytes) {
    return InvalidField(
        "output.byte_size",
        absl::StrCat("is ", size_bytes, "; the result needs at least ", need.least_bytes, ", and ",
                     need.most_bytes, " are enough for whatever stays"));
  }
  spec.output = std::make_shared<OutputRoom>(name, *std::move(part), size_bytes, need.most_bytes);
  return absl::OkStatus();
}

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

}  // namespace dynsplit::rpc
