// SPDX-License-Identifier: Apache-2.0
//
// The tensors that a Begin announces, all of them together: which there are, what they have in
// common, and whether they are what the method takes. One tensor by itself: tensor_adapter.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dynsplit/v1/compression.pb.h"
#include "server/rpc/begin_adapter.h"
#include "server/rpc/tensor_adapter.h"

namespace dynsplit::rpc {

// Tensors by kind of one layer, or of the whole sequence.
using Kinds = std::map<TensorKind, const DecodedTensor*>;
// Null when there is none.
const DecodedTensor* Find(const Kinds& kinds, TensorKind kind);

// Moves, but does not copy: kinds point into `all`.
struct Tensors {
  std::vector<DecodedTensor> all;
  Kinds sequence;
  std::vector<Kinds> layers;
};

// Each by itself, in number, ids, kinds, and where those in regions lie.
absl::StatusOr<Tensors> DecodeTensors(const v1::Begin& begin, const SequenceShape& shape,
                                      const BeginContext& context);
// The tensor has `wanted` bytes.
absl::Status CheckBytes(const DecodedTensor& decoded, int64_t wanted);
// Tensors whose sizes follow from others of the same layer; yields the scales' granularity.
absl::Status CheckLayerSizes(const Kinds& kinds, const SequenceShape& shape,
                             std::optional<ScaleGranularity>& granularity);
// Every layer brings what layer 0 brings: kinds, types and numbers of rows.
absl::Status CheckUniform(const Tensors& tensors);
// Paged tensors have the block table they need.
absl::Status CheckPaging(const Tensors& tensors, const SequenceShape& shape);
// What the method and the policy read is there, and nothing else.
absl::Status CheckDemand(const RequestSpec& spec, const Tensors& tensors);
// Of what Fetch takes: sets of tokens for some of the layers, as the session's scope has them.
absl::Status CheckFetchTensors(const RequestSpec& spec, const Tensors& tensors);
// Where results go, as Begin.output says. Requires: all else of `spec` is decoded.
absl::Status DecodeOutput(const v1::Begin& begin, const RegionStore& regions, RequestSpec& spec);
// K and V come in the types of the session's.
absl::Status CheckAppendTypes(const RequestSpec& spec, const ResidentSpec& session);

}  // namespace dynsplit::rpc
