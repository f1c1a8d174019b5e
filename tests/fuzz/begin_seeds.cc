// SPDX-License-Identifier: Apache-2.0
#include "tests/fuzz/begin_seeds.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/cpu/cpu_backend.h"
#include "server/pipeline/policy.h"
#include "server/rpc/begin_adapter.h"

namespace dynsplit {
namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kQueryHeads = 4;
constexpr int32_t kKvHeads = 2;
constexpr int32_t kTokens = 48;
constexpr int32_t kHeadDim = 8;
constexpr int32_t kQueries = 4;
constexpr int32_t kPageSize = 16;
constexpr const char* kRegion = "seeds";
constexpr int64_t kRegionBytes = int64_t{1} << 20;
constexpr uint64_t kRegionGeneration = 1;  // in place of the one that a store draws

v1::TensorDescriptor& AddTensor(v1::Begin& begin, v1::TensorKind kind, v1::DType dtype,
                                int64_t byte_size) {
  v1::TensorDescriptor& tensor = *begin.add_tensors();
  tensor.set_id(static_cast<uint32_t>(begin.tensors_size()));
  tensor.set_kind(kind);
  tensor.set_dtype(dtype);
  tensor.set_byte_size(byte_size);
  return tensor;
}

void AddToLayers(v1::Begin& begin, v1::TensorKind kind, v1::DType dtype, int64_t byte_size) {
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    AddTensor(begin, kind, dtype, byte_size).set_layer(layer);
  }
}

void AddDim(v1::TensorDescriptor& tensor, v1::Axis axis, int64_t size, int64_t stride_bytes) {
  v1::Dim& dim = *tensor.add_dims();
  dim.set_axis(axis);
  dim.set_size(size);
  dim.set_stride_bytes(stride_bytes);
}

v1::Begin Sequence() {
  v1::Begin begin;
  begin.set_request_id("seed");
  v1::SequenceShape& shape = *begin.mutable_shape();
  shape.set_num_layers(kLayers);
  shape.set_num_query_heads(kQueryHeads);
  shape.set_num_kv_heads(kKvHeads);
  shape.set_num_tokens(kTokens);
  shape.set_head_dim(kHeadDim);
  return begin;
}

void AddTokenIds(v1::Begin& begin) {
  AddTensor(begin, v1::TENSOR_KIND_TOKEN_IDS, v1::DTYPE_INT32, 4 * kTokens);
}

void AddKeysAndValues(v1::Begin& begin, v1::DType dtype, int64_t element_bytes) {
  for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_VALUE}) {
    AddToLayers(begin, kind, dtype, element_bytes * kTokens * kKvHeads * kHeadDim);
  }
}

void AddQueries(v1::Begin& begin) {
  AddToLayers(begin, v1::TENSOR_KIND_QUERIES, v1::DTYPE_BFLOAT16,
              2 * kQueries * kQueryHeads * kHeadDim);
}

v1::Begin Dense() {
  v1::Begin begin = Sequence();
  begin.set_tenant("seeds");
  begin.mutable_policy()->mutable_segmentation()->set_profile("smollm2");
  begin.mutable_policy()->set_positions(v1::POSITIONS_CONTIGUOUS);
  begin.mutable_rope()->set_theta(10000);
  AddTokenIds(begin);
  AddKeysAndValues(begin, v1::DTYPE_BFLOAT16, 2);
  AddQueries(begin);
  AddToLayers(begin, v1::TENSOR_KIND_LOG_SUM_EXP, v1::DTYPE_FLOAT32, 4 * kQueries * kQueryHeads);
  return begin;
}

// Without evidence, so that the fallback takes over.
v1::Begin Paged() {
  v1::Begin begin = Sequence();
  begin.mutable_policy()->set_allow_fallback(true);
  AddTokenIds(begin);
  constexpr int64_t kHead = 2 * kHeadDim;
  constexpr int64_t kPages = 5;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    const int64_t page_bytes = 2 * kPageSize * kKvHeads * kHead;
    v1::TensorDescriptor& tensor =
        AddTensor(begin, v1::TENSOR_KIND_KEY_VALUE, v1::DTYPE_FLOAT16, kPages * page_bytes);
    tensor.set_layer(layer);
    AddDim(tensor, v1::AXIS_PAGE, kPages, page_bytes);
    AddDim(tensor, v1::AXIS_KV, 2, kPageSize * kKvHeads * kHead);
    AddDim(tensor, v1::AXIS_TOKEN, kPageSize, kKvHeads * kHead);
    AddDim(tensor, v1::AXIS_HEAD, kKvHeads, kHead);
    AddDim(tensor, v1::AXIS_CHANNEL, kHeadDim, 2);
  }
  AddTensor(begin, v1::TENSOR_KIND_BLOCK_TABLE, v1::DTYPE_INT32,
            4 * ((kTokens + kPageSize - 1) / kPageSize));
  return begin;
}

v1::Begin Int8() {
  v1::Begin begin = Sequence();
  begin.mutable_policy()->mutable_segmentation()->set_method(v1::Segmentation::METHOD_FIXED);
  begin.mutable_policy()->mutable_scoring()->set_method(v1::Scoring::METHOD_ACCUMULATED);
  begin.mutable_policy()->mutable_budget()->set_tokens_per_head(40);
  begin.mutable_policy()->mutable_protection()->add_dense_layers(1);
  AddKeysAndValues(begin, v1::DTYPE_INT8, 1);
  for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY_SCALES, v1::TENSOR_KIND_VALUE_SCALES}) {
    AddToLayers(begin, kind, v1::DTYPE_FLOAT32, 4 * kTokens * kKvHeads);
  }
  AddToLayers(begin, v1::TENSOR_KIND_ACCUMULATED_SCORES, v1::DTYPE_FLOAT32,
              4 * kQueryHeads * kTokens);
  return begin;
}

v1::Begin Apply() {
  constexpr int32_t kKept = 40;
  constexpr int32_t kBlocks = 6;
  v1::Begin begin = Sequence();
  v1::Plan& plan = *begin.mutable_plan();
  *plan.mutable_shape() = begin.shape();
  plan.set_policy_version(kPolicyVersion);
  plan.set_evidence(v1::EVIDENCE_WINDOW_QUERIES);
  plan.set_num_blocks(kBlocks);
  plan.set_hash(std::string(32, 'a'));
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    v1::LayerPlan& decision = *plan.add_layers();
    decision.set_layer(layer);
    decision.set_num_groups(1);
    decision.set_num_kept_tokens(kKept);
    decision.set_hash(std::string(32, '0'));
  }
  AddKeysAndValues(begin, v1::DTYPE_FLOAT32, 4);
  AddToLayers(begin, v1::TENSOR_KIND_KEPT_TOKENS, v1::DTYPE_INT32, 4 * kKept);
  AddTensor(begin, v1::TENSOR_KIND_BLOCK_STARTS, v1::DTYPE_INT32, 4 * (kBlocks + 1));
  return begin;
}

v1::Begin Calibrate() {
  v1::Begin begin = Sequence();
  begin.mutable_calibration()->add_candidate_token_ids(30);
  begin.mutable_calibration()->set_overlap_size(8);
  AddTokenIds(begin);
  AddKeysAndValues(begin, v1::DTYPE_FLOAT16, 2);
  AddQueries(begin);
  AddTensor(begin, v1::TENSOR_KIND_QUERY_POSITIONS, v1::DTYPE_INT32, 4 * kQueries);
  return begin;
}

v1::Begin OfSession(Method method) {
  v1::Begin begin = Sequence();
  if (method == Method::kFetch) {
    v1::SessionTarget& target = *begin.mutable_target();
    target.set_session_id("s-1");
    target.add_layers(1);
    target.mutable_resume()->set_layer(1);
    target.mutable_resume()->set_offset(3);
    begin.mutable_policy()->mutable_encoding()->set_key(v1::Encoding::FORMAT_INT8);
    AddTensor(begin, v1::TENSOR_KIND_KEPT_TOKENS, v1::DTYPE_INT32, 4 * kKvHeads * 7).set_layer(1);
    return begin;
  }
  AddTokenIds(begin);
  AddKeysAndValues(begin, v1::DTYPE_BFLOAT16, 2);
  if (method == Method::kAppend) {
    begin.mutable_target()->set_session_id("s-1");
    begin.mutable_target()->set_position(kTokens);
    return begin;
  }
  begin.mutable_policy()->mutable_segmentation()->set_profile("smollm2");
  begin.mutable_session()->set_reserve_tokens(100);
  begin.mutable_session()->set_residence(v1::SessionOptions::RESIDENCE_HOST);
  begin.mutable_session()->set_summaries(v1::SessionOptions::SUMMARIES_AS_KEYS);
  return begin;
}

v1::Begin Keep() {
  v1::Begin begin = Dense();
  begin.mutable_session()->set_lease_seconds(60);
  begin.mutable_session_policy()->mutable_budget()->set_tokens_per_head(20);
  begin.mutable_session_policy()->set_scope(v1::SCOPE_LAYER);
  return begin;
}

// K and V in a region, and room for the result behind them.
v1::Begin InRegions() {
  v1::Begin begin = Dense();
  int64_t offset_bytes = 0;
  for (v1::TensorDescriptor& tensor : *begin.mutable_tensors()) {
    if (tensor.kind() != v1::TENSOR_KIND_KEY && tensor.kind() != v1::TENSOR_KIND_VALUE) continue;
    v1::RegionSlice& slice = *tensor.mutable_location()->mutable_region();
    slice.set_name(kRegion);
    slice.set_generation(kRegionGeneration);
    slice.set_offset_bytes(offset_bytes);
    offset_bytes += tensor.byte_size();
  }
  v1::RegionSlice& room = *begin.mutable_output()->mutable_region();
  room.set_name(kRegion);
  room.set_generation(kRegionGeneration);
  room.set_offset_bytes(kRegionBytes / 2);
  begin.mutable_output()->set_byte_size(kRegionBytes / 4);
  return begin;
}

v1::Begin FirstShard() {
  v1::Begin begin = Dense();
  begin.set_num_shards(4);
  return begin;
}

// The shared memory that requests of seeds name.
class SeedRegions {
 public:
  explicit SeedRegions(Backend& backend)
      : store_({.allow_shm = true, .files = &files_}, {&backend}) {
    FileDescriptor file(memfd_create(kRegion, MFD_CLOEXEC | MFD_ALLOW_SEALING));
    const std::string token(PassedFiles::kTokenBytes, 's');
    if (ftruncate(file.number(), kRegionBytes) != 0 ||
        fcntl(file.number(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 ||
        !files_.Add({.token = token, .file = std::move(file)}).ok()) {
      std::abort();
    }
    const absl::StatusOr<RegionStore::Info> info =
        store_.Register({.name = kRegion,
                         .byte_size = kRegionBytes,
                         .writable = true,
                         .lease = absl::InfiniteDuration(),
                         .file_token = token});
    if (!info.ok()) std::abort();
    generation_ = info->generation;
  }

  const RegionStore& store() const { return store_; }
  // With the generation that the store drew.
  v1::Begin Named(v1::Begin begin) const {
    for (v1::TensorDescriptor& tensor : *begin.mutable_tensors()) {
      if (tensor.location().has_region()) Name(*tensor.mutable_location()->mutable_region());
    }
    if (begin.output().has_region()) Name(*begin.mutable_output()->mutable_region());
    return begin;
  }

 private:
  void Name(v1::RegionSlice& slice) const {
    if (slice.generation() == kRegionGeneration) slice.set_generation(generation_);
  }

  PassedFiles files_;
  RegionStore store_;
  uint64_t generation_ = 0;
};

}  // namespace

absl::StatusOr<RequestSpec> ReadBegin(const v1::Begin& begin, Method method,
                                      const ProfileStore& profiles) {
  static Backend& backend = *CreateCpuBackend({.num_threads = 1})->release();
  static const auto& regions = *new SeedRegions(backend);
  static const auto& target = *new rpc::TargetSession([&profiles] {
    const auto opening = rpc::SpecFromBegin(OfSession(Method::kOpen), Method::kOpen,
                                            {.profiles = profiles, .regions = regions.store()});
    return rpc::TargetSession{.spec = opening->opening->resident, .segmentation = {}};
  }());
  const bool targeted = method == Method::kAppend || method == Method::kFetch;
  return rpc::SpecFromBegin(regions.Named(begin), method,
                            {.profiles = profiles,
                             .regions = regions.store(),
                             .target = targeted ? &target : nullptr,
                             .fallback_request_id = "fallback"});
}

absl::StatusOr<std::vector<BeginSeed>> BeginSeeds() {
  std::vector<BeginSeed> seeds = {
      {"dense", Method::kCompress, Dense()}, {"paged", Method::kCompress, Paged()},
      {"int8", Method::kCompress, Int8()},   {"plan", Method::kPlan, Dense()},
      {"apply", Method::kApply, Apply()},    {"calibrate", Method::kCalibrate, Calibrate()}};
  for (const Method method : {Method::kOpen, Method::kAppend, Method::kFetch}) {
    seeds.push_back({rpc::MethodName(method), method, OfSession(method)});
  }
  seeds.push_back({"keep", Method::kCompress, Keep()});
  seeds.push_back({"output", Method::kCompress, InRegions()});
  seeds.push_back({"shards", Method::kCompress, FirstShard()});
  const auto profiles = ProfileStore::Create({.default_name = "smollm2", .directory = ""});
  if (!profiles.ok()) return profiles.status();
  for (const BeginSeed& seed : seeds) {
    const auto spec = ReadBegin(seed.begin, seed.method, **profiles);
    if (spec.ok()) continue;
    return absl::Status(spec.status().code(),
                        absl::StrCat("seed ", seed.name, ": ", spec.status().message()));
  }
  return seeds;
}

}  // namespace dynsplit
