// SPDX-License-Identifier: Apache-2.0
//
// Tensor descriptors: untrusted sizes, strides and kinds in, layouts out. All arithmetic is in 64
// bits and refuses overflow.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "dynsplit/v1/types.pb.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

// Most bytes of one tensor.
inline constexpr int64_t kMaxTensorBytes = int64_t{1} << 40;
inline constexpr int64_t kMaxWindowQueries = 1024;

struct DecodedTensor {
  RequestTensor tensor;
  // Scales, and quantised data: the granularity that was stated.
  std::optional<ScaleGranularity> scale_granularity;
};

// Checks one descriptor by itself against the shape. `field` is its path ("tensors[3]").
//   INVALID_ARGUMENT  kind, layer, dtype, sizes, strides, overlap, extent
//   UNIMPLEMENTED     int4, locations in sessions, evidence no policy of this server reads
// Regions are looked up by the caller, who knows them (begin_adapter).
// Scales are sized where they are paired with their data (begin_adapter).
absl::StatusOr<DecodedTensor> TensorFromProto(const v1::TensorDescriptor& descriptor,
                                              const SequenceShape& shape, const std::string& field);

// Descriptor of a tensor of a response.
v1::TensorDescriptor TensorToProto(const ResultTensor& tensor, uint32_t id,
                                   std::optional<int32_t> layer);

absl::StatusOr<DType> DTypeFromProto(v1::DType dtype, const std::string& field);
v1::DType DTypeToProto(DType dtype);

std::optional<TensorKind> TensorKindFromProto(v1::TensorKind kind);
const std::string& TensorKindName(TensorKind kind);  // "KEY", "TOKEN_IDS", ...

}  // namespace dynsplit::rpc
