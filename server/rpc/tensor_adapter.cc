// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/tensor_adapter.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "server/rpc/enum_map.h"

namespace dynsplit::rpc {
namespace {

constexpr EnumMap<v1::TensorKind, TensorKind, 21> kKinds = {
    {{v1::TENSOR_KIND_KEY, TensorKind::kKey},
     {v1::TENSOR_KIND_VALUE, TensorKind::kValue},
     {v1::TENSOR_KIND_KEY_VALUE, TensorKind::kKeyValue},
     {v1::TENSOR_KIND_KEY_SCALES, TensorKind::kKeyScales},
     {v1::TENSOR_KIND_VALUE_SCALES, TensorKind::kValueScales},
     {v1::TENSOR_KIND_QUERIES, TensorKind::kQueries},
     {v1::TENSOR_KIND_LOG_SUM_EXP, TensorKind::kLogSumExp},
     {v1::TENSOR_KIND_ACCUMULATED_SCORES, TensorKind::kAccumulatedScores},
     {v1::TENSOR_KIND_TOKEN_IDS, TensorKind::kTokenIds},
     {v1::TENSOR_KIND_BLOCK_TABLE, TensorKind::kBlockTable},
     {v1::TENSOR_KIND_QUERY_POSITIONS, TensorKind::kQueryPositions},
     {v1::TENSOR_KIND_BLOCK_STARTS, TensorKind::kBlockStarts},
     {v1::TENSOR_KIND_KEPT_TOKENS, TensorKind::kKeptTokens},
     {v1::TENSOR_KIND_KEY_PAGES, TensorKind::kKeyPages},
     {v1::TENSOR_KIND_VALUE_PAGES, TensorKind::kValuePages},
     {v1::TENSOR_KIND_KEY_PAGE_SCALES, TensorKind::kKeyPageScales},
     {v1::TENSOR_KIND_VALUE_PAGE_SCALES, TensorKind::kValuePageScales},
     {v1::TENSOR_KIND_PAGE_TABLE, TensorKind::kPageTable},
     {v1::TENSOR_KIND_BLOCK_KEY_MIN, TensorKind::kBlockKeyMin},
     {v1::TENSOR_KIND_BLOCK_KEY_MAX, TensorKind::kBlockKeyMax},
     {v1::TENSOR_KIND_BLOCK_KEY_MEAN, TensorKind::kBlockKeyMean}}};

constexpr EnumMap<v1::DType, DType, 7> kDTypes = {{{v1::DTYPE_FLOAT32, DType::kFloat32},
                                                   {v1::DTYPE_FLOAT16, DType::kFloat16},
                                                   {v1::DTYPE_BFLOAT16, DType::kBFloat16},
                                                   {v1::DTYPE_FLOAT8_E4M3, DType::kFloat8E4M3},
                                                   {v1::DTYPE_FLOAT8_E5M2, DType::kFloat8E5M2},
                                                   {v1::DTYPE_INT8, DType::kInt8},
                                                   {v1::DTYPE_INT32, DType::kInt32}}};

constexpr EnumMap<v1::ScaleGranularity, ScaleGranularity, 2> kGranularities = {
    {{v1::SCALE_GRANULARITY_HEAD, ScaleGranularity::kHead},
     {v1::SCALE_GRANULARITY_TOKEN_HEAD, ScaleGranularity::kTokenHead}}};

constexpr int32_t kMaxInputPageSize = 1024;

bool IsSequenceKind(TensorKind kind) {
  return kind == TensorKind::kTokenIds || kind == TensorKind::kBlockTable ||
         kind == TensorKind::kQueryPositions || kind == TensorKind::kBlockStarts;
}

bool IsInputKind(TensorKind kind) { return kind <= TensorKind::kKeptTokens; }

bool HasLayout(TensorKind kind) {
  return kind == TensorKind::kKey || kind == TensorKind::kValue || kind == TensorKind::kKeyValue ||
         kind == TensorKind::kQueries;
}

bool IsInt32Kind(TensorKind kind) {
  return IsSequenceKind(kind) || kind == TensorKind::kKeptTokens;
}

absl::Status CheckDType(TensorKind kind, DType dtype, const std::string& field) {
  const bool is_float =
      dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
  bool fits = false;
  const char* wanted = "";
  if (IsInt32Kind(kind)) {
    fits = dtype == DType::kInt32;
    wanted = "int32";
  } else if (kind == TensorKind::kQueries) {
    fits = is_float;
    wanted = "fp32, fp16 or bf16";
  } else if (HasLayout(kind)) {
    fits = dtype != DType::kInt32;
    wanted = "fp32, fp16, bf16, fp8 or int8";
  } else {
    fits = dtype == DType::kFloat32;
    wanted = "fp32";
  }
  if (fits) return absl::OkStatus();
  return InvalidField(field + ".dtype", absl::StrCat("is ", std::string(DTypeName(dtype)), "; ",
                                                     TensorKindName(kind), " must be ", wanted));
}

// A dim with the axis it was given for.
struct AxisDim {
  int64_t size = 1;
  int64_t stride_bytes = 0;
  bool present = false;
};

// Indexed by v1::Axis.
using Axes = std::array<AxisDim, 6>;

absl::StatusOr<Axes> CollectAxes(const v1::TensorDescriptor& descriptor, int64_t element_bytes,
                                 const std::string& field) {
  Axes axes;
  for (int i = 0; i < descriptor.dims_size(); ++i) {
    const v1::Dim& dim = descriptor.dims(i);
    const std::string path = absl::StrCat(field, ".dims[", i, "]");
    const int axis = static_cast<int>(dim.axis());
    if (axis < 1 || axis > 5) {
      return InvalidField(path + ".axis", absl::StrCat("is ", axis, "; must name an axis"));
    }
    AxisDim& target = axes[static_cast<size_t>(axis)];
    if (target.present) {
      return InvalidField(path + ".axis", absl::StrCat("is ", axis, "; that axis occurs twice"));
    }
    if (dim.size() < 1) {
      return InvalidField(path + ".size", absl::StrCat("is ", dim.size(), "; must be >= 1"));
    }
    if (dim.stride_bytes() < 1 || dim.stride_bytes() % element_bytes != 0) {
      return InvalidField(
          path + ".stride_bytes",
          absl::StrCat("is ", dim.stride_bytes(),
                       "; must be a positive multiple of the element size, ", element_bytes));
    }
    target = {.size = dim.size(), .stride_bytes = dim.stride_bytes(), .present = true};
  }
  return axes;
}

// Last addressed byte + 1. INVALID_ARGUMENT where entries overlap or the extent leaves 64 bits.
absl::StatusOr<int64_t> Extent(const Axes& axes, int64_t element_bytes, const std::string& field) {
  std::vector<AxisDim> dims;
  for (const AxisDim& dim : axes) {
    if (dim.present && dim.size > 1) dims.push_back(dim);
  }
  std::sort(dims.begin(), dims.end(),
            [](const AxisDim& a, const AxisDim& b) { return a.stride_bytes < b.stride_bytes; });
  // Each axis must step over all that the narrower ones span.
  int64_t extent = element_bytes;
  for (const AxisDim& dim : dims) {
    if (dim.stride_bytes < extent) {
      return InvalidField(field + ".dims", absl::StrCat("overlap: a stride of ", dim.stride_bytes,
                                                        " bytes is within the ", extent,
                                                        " bytes that the narrower axes span"));
    }
    int64_t span = 0;
    if (__builtin_mul_overflow(dim.size - 1, dim.stride_bytes, &span) ||
        __builtin_add_overflow(extent, span, &extent) || extent > kMaxTensorBytes) {
      return InvalidField(field + ".dims",
                          absl::StrCat("span more than ", kMaxTensorBytes, " bytes"));
    }
  }
  return extent;
}

absl::Status CheckSize(const AxisDim& dim, int64_t wanted, const char* axis,
                       const std::string& field) {
  if (dim.present && dim.size == wanted) return absl::OkStatus();
  return InvalidField(field + ".dims", dim.present ? absl::StrCat("have ", dim.size, " entries of ",
                                                                  axis, "; the shape says ", wanted)
                                                   : absl::StrCat("lack ", axis, ", which has ",
                                                                  wanted, " entries"));
}

// Bytes of a dense tensor, or nullopt beyond kMaxTensorBytes.
std::optional<int64_t> DenseBytes(std::initializer_list<int64_t> sizes, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > kMaxTensorBytes) return std::nullopt;
  }
  return bytes;
}

absl::Status CheckByteSize(int64_t byte_size, std::optional<int64_t> wanted,
                           const std::string& field) {
  if (wanted.has_value() && byte_size == *wanted) return absl::OkStatus();
  return InvalidField(
      field + ".byte_size",
      wanted.has_value()
          ? absl::StrCat("is ", byte_size, "; the layout makes ", *wanted)
          : absl::StrCat("is ", byte_size, "; the layout makes more than ", kMaxTensorBytes));
}

// KEY, VALUE, KEY_VALUE and QUERIES with dims.
absl::Status DecodeLayout(const v1::TensorDescriptor& descriptor, const SequenceShape& shape,
                          DType dtype, RequestTensor& tensor) {
  const std::string& field = tensor.field;
  const int64_t element_bytes = DTypeBytes(dtype);
  absl::StatusOr<Axes> axes = CollectAxes(descriptor, element_bytes, field);
  if (!axes.ok()) return axes.status();
  const AxisDim& token = (*axes)[v1::AXIS_TOKEN];
  const AxisDim& head = (*axes)[v1::AXIS_HEAD];
  const AxisDim& channel = (*axes)[v1::AXIS_CHANNEL];
  const AxisDim& kv = (*axes)[v1::AXIS_KV];
  const AxisDim& page = (*axes)[v1::AXIS_PAGE];
  const bool is_query = tensor.kind == TensorKind::kQueries;
  const int32_t num_heads = is_query ? shape.num_query_heads : shape.num_kv_heads;
  absl::Status status = CheckSize(head, num_heads, "AXIS_HEAD", field);
  status.Update(CheckSize(channel, shape.head_dim, "AXIS_CHANNEL", field));
  if (status.ok() && channel.stride_bytes != element_bytes) {
    status = InvalidField(field + ".dims",
                          absl::StrCat("have an AXIS_CHANNEL stride of ", channel.stride_bytes,
                                       "; must be the element size, ", element_bytes));
  }
  if (tensor.kind == TensorKind::kKeyValue) {
    status.Update(CheckSize(kv, 2, "AXIS_KV", field));
  } else if (kv.present) {
    status.Update(InvalidField(field + ".dims", "name AXIS_KV, which is for KEY_VALUE only"));
  }
  int64_t num_tokens = is_query ? token.size : shape.num_tokens;
  if (page.present && is_query) {
    status.Update(InvalidField(field + ".dims", "name AXIS_PAGE, which is for K and V only"));
  } else if (page.present) {
    if (!token.present || token.size > kMaxInputPageSize) {
      status.Update(InvalidField(field + ".dims", absl::StrCat("must have 1 to ", kMaxInputPageSize,
                                                               " slots of AXIS_TOKEN in a page")));
    } else if (page.size < (num_tokens + token.size - 1) / token.size) {
      status.Update(InvalidField(field + ".dims",
                                 absl::StrCat("have ", page.size, " pages of ", token.size,
                                              " slots; the sequence has ", num_tokens, " tokens")));
    }
  } else {
    status.Update(CheckSize(token, num_tokens, "AXIS_TOKEN", field));
  }
  if (!status.ok()) return status;
  absl::StatusOr<int64_t> extent = Extent(*axes, element_bytes, field);
  if (!extent.ok()) return extent.status();
  if (status = CheckByteSize(descriptor.byte_size(), *extent, field); !status.ok()) return status;

  tensor.view = {.data = nullptr,
                 .dtype = dtype,
                 .num_tokens = num_tokens,
                 .num_heads = num_heads,
                 .head_dim = shape.head_dim,
                 .token_stride_bytes = token.stride_bytes,
                 .head_stride_bytes = head.stride_bytes};
  tensor.value_offset_bytes = kv.stride_bytes;
  if (page.present) {
    tensor.view.page_size = static_cast<int32_t>(token.size);
    tensor.view.page_stride_bytes = page.stride_bytes;
    tensor.num_pool_pages = page.size;
  }
  return absl::OkStatus();
}

absl::Status DecodeDense(const v1::TensorDescriptor& descriptor, const SequenceShape& shape,
                         DType dtype, RequestTensor& tensor) {
  const std::string& field = tensor.field;
  const int64_t element_bytes = DTypeBytes(dtype);
  if (tensor.kind == TensorKind::kKeyValue) {
    return InvalidField(field + ".dims", "are empty; KEY_VALUE must name AXIS_KV");
  }
  int32_t num_heads = shape.num_kv_heads;
  int64_t num_tokens = shape.num_tokens;
  if (tensor.kind == TensorKind::kQueries) {
    num_heads = shape.num_query_heads;
    const int64_t row_bytes = element_bytes * num_heads * shape.head_dim;
    if (descriptor.byte_size() % row_bytes != 0) {
      return InvalidField(field + ".byte_size",
                          absl::StrCat("is ", descriptor.byte_size(),
                                       "; must be a multiple of one query row, ", row_bytes));
    }
    num_tokens = descriptor.byte_size() / row_bytes;
  }
  absl::Status status =
      CheckByteSize(descriptor.byte_size(),
                    DenseBytes({num_tokens, num_heads, shape.head_dim}, element_bytes), field);
  if (!status.ok()) return status;
  tensor.view = DenseView(nullptr, dtype, num_tokens, num_heads, shape.head_dim);
  return absl::OkStatus();
}

// Tensors without a layout of their own: sizes that the shape alone decides.
absl::Status CheckPlainSize(const v1::TensorDescriptor& descriptor, const SequenceShape& shape,
                            const RequestTensor& tensor) {
  const std::string& field = tensor.field;
  if (descriptor.dims_size() > 0) {
    return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_LAYOUT",
                      absl::StrCat(field, ".dims: ", TensorKindName(tensor.kind),
                                   " is taken dense only; leave dims empty"));
  }
  if (descriptor.byte_size() % 4 != 0) {
    return InvalidField(field + ".byte_size",
                        absl::StrCat("is ", descriptor.byte_size(), "; elements have 4 bytes"));
  }
  switch (tensor.kind) {
    case TensorKind::kTokenIds:
      return CheckByteSize(descriptor.byte_size(), DenseBytes({shape.num_tokens}, 4), field);
    case TensorKind::kAccumulatedScores: {
      const auto per_query_head = DenseBytes({shape.num_query_heads, shape.num_tokens}, 4);
      if (per_query_head.has_value() && descriptor.byte_size() == *per_query_head) {
        return absl::OkStatus();
      }
      return CheckByteSize(descriptor.byte_size(),
                           DenseBytes({shape.num_kv_heads, shape.num_tokens}, 4), field);
    }
    default:
      return absl::OkStatus();  // depends on other tensors; begin_adapter
  }
}

}  // namespace

absl::StatusOr<DType> DTypeFromProto(v1::DType wire, const std::string& field) {
  if (wire == v1::DTYPE_UNSPECIFIED) return InvalidField(field, "is missing");
  DType dtype = DType::kFloat32;
  absl::Status status = Assign(kDTypes, wire, &v1::DType_IsValid, field, dtype);
  if (!status.ok()) return status;
  return dtype;
}

v1::DType DTypeToProto(DType dtype) { return kDTypes.ToWire(dtype); }

const std::string& TensorKindName(TensorKind kind) {
  static const auto& names = *new std::vector<std::string>([] {
    std::vector<std::string> made(std::size(kKinds.rows));
    for (const auto& [wire, domain] : kKinds.rows) {
      made[static_cast<size_t>(domain)] =
          v1::TensorKind_Name(wire).substr(std::string("TENSOR_KIND_").size());
    }
    return made;
  }());
  return names[static_cast<size_t>(kind)];
}

std::optional<TensorKind> TensorKindFromProto(v1::TensorKind kind) { return kKinds.ToDomain(kind); }

absl::StatusOr<DecodedTensor> TensorFromProto(const v1::TensorDescriptor& descriptor,
                                              const SequenceShape& shape,
                                              const std::string& field) {
  DecodedTensor decoded;
  RequestTensor& tensor = decoded.tensor;
  tensor.id = descriptor.id();
  tensor.field = field;
  tensor.byte_size = descriptor.byte_size();
  if (descriptor.kind() == v1::TENSOR_KIND_UNSPECIFIED) {
    return InvalidField(field + ".kind", "is missing");
  }
  absl::Status status =
      Assign(kKinds, descriptor.kind(), &v1::TensorKind_IsValid, field + ".kind", tensor.kind);
  if (!status.ok()) return status;
  if (!IsInputKind(tensor.kind)) {
    return InvalidField(field + ".kind",
                        absl::StrCat("is ", TensorKindName(tensor.kind), ", which is an output"));
  }
  if (IsSequenceKind(tensor.kind) == descriptor.has_layer()) {
    return InvalidField(field + ".layer",
                        absl::StrCat(descriptor.has_layer() ? "is set" : "is missing", "; ",
                                     TensorKindName(tensor.kind), " belongs to ",
                                     descriptor.has_layer() ? "the whole sequence" : "a layer"));
  }
  if (descriptor.has_layer()) {
    tensor.layer = descriptor.layer();
    if (tensor.layer < 0 || tensor.layer >= shape.num_layers) {
      return InvalidField(field + ".layer", absl::StrCat("is ", tensor.layer, "; must be in [0, ",
                                                         shape.num_layers, ")"));
    }
  }
  if (descriptor.location().where_case() == v1::Location::kSessionId) {
    return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_LOCATION",
                      field +
                          ".location.session_id: this server takes tensors from the stream or "
                          "a region; Sessions.Fetch reads those of a session");
  }
  const absl::StatusOr<DType> stated = DTypeFromProto(descriptor.dtype(), field + ".dtype");
  if (!stated.ok()) return stated.status();
  const DType dtype = *stated;
  if (status = CheckDType(tensor.kind, dtype, field); !status.ok()) return status;
  if (descriptor.byte_size() < 1 || descriptor.byte_size() > kMaxTensorBytes) {
    return InvalidField(
        field + ".byte_size",
        absl::StrCat("is ", descriptor.byte_size(), "; must be in [1, ", kMaxTensorBytes, "]"));
  }
  if (descriptor.scale_granularity() != v1::SCALE_GRANULARITY_UNSPECIFIED) {
    ScaleGranularity granularity = ScaleGranularity::kHead;
    status = Assign(kGranularities, descriptor.scale_granularity(), &v1::ScaleGranularity_IsValid,
                    field + ".scale_granularity", granularity);
    if (!status.ok()) return status;
    decoded.scale_granularity = granularity;
  }
  if (!HasLayout(tensor.kind)) {
    status = CheckPlainSize(descriptor, shape, tensor);
    tensor.view.dtype = dtype;
  } else if (descriptor.dims_size() > 0) {
    status = DecodeLayout(descriptor, shape, dtype, tensor);
  } else {
    status = DecodeDense(descriptor, shape, dtype, tensor);
  }
  if (!status.ok()) return status;
  return decoded;
}

v1::TensorDescriptor TensorToProto(const ResultTensor& tensor, uint32_t id,
                                   std::optional<int32_t> layer) {
  v1::TensorDescriptor descriptor;
  descriptor.set_id(id);
  descriptor.set_kind(kKinds.ToWire(tensor.kind));
  if (layer.has_value()) descriptor.set_layer(*layer);
  descriptor.set_dtype(kDTypes.ToWire(tensor.dtype));
  descriptor.set_byte_size(tensor.byte_size);
  if (tensor.scale_granularity.has_value()) {
    descriptor.set_scale_granularity(kGranularities.ToWire(*tensor.scale_granularity));
  }
  if (tensor.region.has_value()) {
    v1::RegionSlice& slice = *descriptor.mutable_location()->mutable_region();
    slice.set_name(tensor.region->name);
    slice.set_generation(tensor.region->generation);
    slice.set_offset_bytes(tensor.region->offset_bytes);
  }
  return descriptor;
}

}  // namespace dynsplit::rpc
