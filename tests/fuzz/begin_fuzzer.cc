// SPDX-License-Identifier: Apache-2.0
//
// First byte: the method. The rest: a Begin, as any caller may claim it. What the server accepts
// must hold together; what it refuses must be the caller's fault.
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "dynsplit/v1/compression.pb.h"
#include "server/pipeline/plan.h"
#include "server/rpc/begin_adapter.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/shard_table.h"
#include "server/runtime/layer_work.h"
#include "server/runtime/output_need.h"
#include "server/runtime/output_room.h"
#include "tests/fuzz/begin_seeds.h"

namespace {

using dynsplit::Method;
using dynsplit::RequestSpec;
using dynsplit::RequestTensor;
using dynsplit::TensorKind;

constexpr int64_t kMaxTensorBytes = int64_t{1} << 40;

void Check(bool condition) {
  if (!condition) std::abort();
}

const dynsplit::ProfileStore& Profiles() {
  static const auto& store =
      *new auto(dynsplit::ProfileStore::Create({.default_name = "smollm2", .directory = ""}));
  Check(store.ok());
  return **store;
}

bool IsCallersFault(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kUnimplemented:
      return true;
    default:
      return false;
  }
}

// The last byte that the layout addresses is the last of the tensor; in 128 bits, which do not
// overflow.
void CheckExtent(const RequestTensor& tensor) {
  const dynsplit::TensorView& view = tensor.view;
  if (view.num_heads == 0) return;  // no layout of its own
  const bool paged = view.page_size > 0;
  const __int128 slots = paged ? view.page_size : view.num_tokens;
  const __int128 pages = paged ? tensor.num_pool_pages : 1;
  if (paged) Check(pages * slots >= view.num_tokens);
  const __int128 end = (pages - 1) * view.page_stride_bytes +
                       (slots - 1) * view.token_stride_bytes +
                       __int128{view.num_heads - 1} * view.head_stride_bytes +
                       __int128{view.head_dim} * DTypeBytes(view.dtype) + tensor.value_offset_bytes;
  Check(end == tensor.byte_size);
}

// All of the room can be taken, in its place, and not a byte more.
void CheckOutput(const RequestSpec& spec, const dynsplit::v1::Begin& begin) {
  const dynsplit::v1::RegionSlice& slice = begin.output().region();
  Check(slice.offset_bytes() % dynsplit::OutputRoom::kAlignmentBytes == 0);
  const int64_t least_bytes = OutputNeedOf(spec).least_bytes;
  Check(least_bytes >= 0 && least_bytes <= OutputNeedOf(spec).most_bytes);
  const auto first = spec.output->Take(std::max<int64_t>(least_bytes, 1));
  Check(first.ok());
  Check(spec.output->NameOf(first->data()).offset_bytes == slice.offset_bytes());
  for (const RequestTensor& tensor : spec.tensors) {
    Check(!tensor.located() || !spec.output->Holds(tensor.place.data));
  }
  Check(!spec.output
             ->Take(begin.output().byte_size() == 0 ? kMaxTensorBytes : begin.output().byte_size())
             .ok());
}

// A later shard names its request, and nothing else.
void CheckLaterShard(const dynsplit::v1::Begin& begin) {
  const auto names = dynsplit::rpc::LaterShardFromBegin(begin);
  if (!names.ok()) return Check(IsCallersFault(names.status()));
  Check(!names->request_id.empty() && !names->tenant.empty());
  Check(begin.num_shards() > begin.shard_index());
  Check(begin.tensors_size() == 0 && !begin.has_shape());
}

void CheckAccepted(const RequestSpec& spec, const dynsplit::v1::Begin& begin) {
  const dynsplit::SequenceShape& shape = spec.sequence.shape;
  Check(static_cast<int>(spec.tensors.size()) == begin.tensors_size());
  for (const RequestTensor& tensor : spec.tensors) {
    Check(tensor.byte_size >= 1 && tensor.byte_size <= kMaxTensorBytes);
    Check(tensor.layer >= RequestTensor::kWholeSequence && tensor.layer < shape.num_layers);
    CheckExtent(tensor);
  }
  Check(spec.max_open_layers >= 1 && spec.max_open_layers <= shape.num_layers);
  Check(spec.opening.has_value() == (spec.method == Method::kOpen || begin.has_session()));
  if (spec.opening.has_value()) {
    Check(ValidateResidentPolicy(spec.opening->resident.policy).ok());
    Check(spec.opening->resident.capacity_tokens >= shape.num_tokens);
    Check(PlanResident(spec.opening->resident, 1).key_value_bytes > 0);
  }
  Check(spec.fetch_layers.empty() == (spec.method != Method::kFetch));
  Check(spec.plan.has_value() == (spec.method == Method::kApply));
  Check((spec.output != nullptr) == begin.has_output());
  if (spec.output != nullptr) CheckOutput(spec, begin);
  Check(spec.num_shards >= 1 && spec.num_shards <= dynsplit::rpc::kMaxShards);
  Check(spec.num_shards == 1 || !spec.request_id.empty());
  for (const bool device_has_own_memory : {false, true}) {
    Check(ReservationBytes(spec, device_has_own_memory) > 0);
  }
  // `accepted` echoes the policy: sent again, it must mean the same.
  const auto echoed =
      dynsplit::rpc::PolicyFromProto(dynsplit::rpc::PolicyToProto(spec.sequence.policy), "policy");
  Check(echoed.ok());
  Check(CanonicalPolicy(*echoed) == CanonicalPolicy(spec.sequence.policy));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static const google::protobuf::LogSilencer silencer;  // of strings that are not UTF-8
  dynsplit::v1::Begin begin;
  if (!begin.ParseFromArray(data + 1, static_cast<int>(size - 1))) return 0;
  if (begin.shard_index() != 0) CheckLaterShard(begin);
  const auto method = static_cast<Method>(data[0] % 7);
  const auto spec = dynsplit::ReadBegin(begin, method, Profiles());
  if (spec.ok()) {
    CheckAccepted(*spec, begin);
    return 0;
  }
  Check(IsCallersFault(spec.status()));
  Check(!dynsplit::rpc::ErrorToGrpc(spec.status()).ok());
  return 0;
}
