// SPDX-License-Identifier: Apache-2.0
//
// Attention of the window's queries, three times: over all tokens, over the kept tokens' original
// keys (mass; where warpgroups take the first pass, it marks them and sums them up on the way), and
// over the kept pages (what the consumer computes). Each pass splits the items over thread blocks;
// partial results are joined in a fixed order.
#include <algorithm>
#include <cmath>

#include "cuda/attend.cuh"
#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/operations.h"
#include "cuda/rotation.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kDepthStep = 32;  // packed rows are whole steps of both kernels

__device__ float LoadAnyElement(const TensorView& view, bool aligned, int64_t t, int h,
                                int channel) {
  float values[kChunk];
  LoadAnyValues(view, aligned, t, h, channel / kChunk, values);
  float result = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) result = channel % kChunk == i ? values[i] : result;
  return result;
}

// value = high + low, the latter if wanted.
template <typename T>
__device__ void SplitInto(float value, int64_t index, void* high, void* low) {
  static_cast<T*>(high)[index] = static_cast<T>(value);
  if (low != nullptr) static_cast<T*>(low)[index] = static_cast<T>(Remainder<T>(value));
}

struct PackArgs {
  TensorView view;
  bool aligned;
  Queries queries;
  RotationTable rotation;
  int delta;
  int64_t count;
  float* packed;
  void* high;  // of the view's type; null = not wanted
  void* low;   // null = not wanted
};

// One thread a packed element; queries turned by -delta positions where rotation has a dimension.
__global__ void __launch_bounds__(kThreads) PackTurnedKernel(PackArgs args) {
  WaitForEarlierGrids();
  AllowDependents();
  const TensorView& view = args.view;
  const Queries& queries = args.queries;
  const RotationTable& rotation = args.rotation;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.count) return;
  const int64_t row = index / queries.depth_padded;
  const auto channel = static_cast<int>(index - row * queries.depth_padded);
  const auto h = static_cast<int>(row / queries.rows);
  const auto r = static_cast<int>(row - static_cast<int64_t>(h) * queries.rows);
  const int a = h * queries.group + r / queries.window;
  const int i = r % queries.window;
  float value = 0;
  if (channel < view.head_dim) {
    value = LoadAnyElement(view, args.aligned, i, a, channel);
    if (channel < rotation.rotary_dim) {
      const int half = rotation.rotary_dim / 2;
      const bool is_x = rotation.interleaved ? channel % 2 == 0 : channel < half;
      const int step = rotation.interleaved ? 1 : half;
      const int pair = rotation.interleaved ? channel / 2 : channel % half;
      const float partner =
          LoadAnyElement(view, args.aligned, i, a, is_x ? channel + step : channel - step);
      const float2 angle = AngleOf(rotation, args.delta, pair);
      value = is_x ? TurnX(value, partner, angle) : TurnY(partner, value, angle);
    }
  }
  args.packed[index] = value;
  if (args.high == nullptr) return;
  if (view.dtype == DType::kFloat16) {
    SplitInto<__half>(value, index, args.high, args.low);
  } else {
    SplitInto<__nv_bfloat16>(value, index, args.high, args.low);
  }
}

// Joined sums of a row, for all lanes of a warp.
__device__ SoftmaxSum JoinSums(const Partials& partials, int64_t row, int64_t all_rows, int lane) {
  SoftmaxSum total;
  for (int split = lane; split < partials.splits; split += kWarp) {
    const float2 part = partials.sums[split * all_rows + row];
    total.Merge({part.x, part.y});
  }
  total.MergeLanes(kWarp);
  return total;
}

// Four channels of a row's output, from `channel` on.
__device__ float4 JoinOutputs(const Partials& partials, int64_t row, int64_t all_rows, int head_dim,
                              int channel, SoftmaxSum total) {
  float4 output = make_float4(0, 0, 0, 0);
  if (total.sum == 0) return output;
#pragma unroll 4
  for (int split = 0; split < partials.splits; ++split) {
    const int64_t at = split * all_rows + row;
    const float weight = Exp2(partials.sums[at].x - total.maximum);
    const float4 part =
        *reinterpret_cast<const float4*>(partials.outputs + at * head_dim + channel);
    output.x = fmaf(part.x, weight, output.x);
    output.y = fmaf(part.y, weight, output.y);
    output.z = fmaf(part.z, weight, output.z);
    output.w = fmaf(part.w, weight, output.w);
  }
  return make_float4(output.x / total.sum, output.y / total.sum, output.z / total.sum,
                     output.w / total.sum);
}

struct LossArgs {
  Partials all;
  Partials kept_original;
  Partials kept;
  int head_dim;
  int window;
  int num_query_heads;
  int64_t all_rows;
  float* rows_loss;  // [all_rows, 3]: mass, ||o_kept - o_full||^2, ||o_full||^2
  float* mass;
  float* err_sq;
  float* ref_sq;
};

// Fills rows_loss. One warp a row.
__global__ void __launch_bounds__(kThreads) RowLossKernel(const __grid_constant__ LossArgs args) {
  WaitForEarlierGrids();
  AllowDependents();
  const Partials& all = args.all;
  const int64_t all_rows = args.all_rows;
  constexpr int kLaneChannels = 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= all_rows) return;
  const SoftmaxSum all_sum = JoinSums(all, row, all_rows, lane);
  const SoftmaxSum mass_sum = JoinSums(args.kept_original, row, all_rows, lane);
  float error = 0;
  float reference = 0;
  if (all.outputs != nullptr) {
    const SoftmaxSum kept_sum = JoinSums(args.kept, row, all_rows, lane);
    for (int channel = lane * kLaneChannels; channel < args.head_dim;
         channel += kWarp * kLaneChannels) {
      const float4 full = JoinOutputs(all, row, all_rows, args.head_dim, channel, all_sum);
      const float4 partial =
          JoinOutputs(args.kept, row, all_rows, args.head_dim, channel, kept_sum);
      const auto add = [&](float of_full, float of_partial) {
        error = fmaf(of_partial - of_full, of_partial - of_full, error);
        reference = fmaf(of_full, of_full, reference);
      };
      add(full.x, partial.x);
      add(full.y, partial.y);
      add(full.z, partial.z);
      add(full.w, partial.w);
    }
    error = GroupSum(error, kWarp);
    reference = GroupSum(reference, kWarp);
  }
  if (lane == 0) {
    float* const loss = args.rows_loss + row * 3;
    loss[0] = mass_sum.sum * Exp2(mass_sum.maximum - all_sum.maximum) / all_sum.sum;
    loss[1] = error;
    loss[2] = reference;
  }
}

// Sums over the queries of each query head; row order is [Hkv, group, W], so heads are in a row.
// One warp a head.
__global__ void __launch_bounds__(kThreads) SumLossKernel(LossArgs args) {
  WaitForEarlierGrids();
  AllowDependents();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int a = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (a >= args.num_query_heads) return;
  float mass = 0;
  float error = 0;
  float reference = 0;
  for (int i = lane; i < args.window; i += kWarp) {
    const float* const loss = args.rows_loss + (static_cast<int64_t>(a) * args.window + i) * 3;
    mass += loss[0];
    error += loss[1];
    reference += loss[2];
  }
  mass = GroupSum(mass, kWarp);
  error = GroupSum(error, kWarp);
  reference = GroupSum(reference, kWarp);
  if (lane != 0) return;
  args.mass[a] = mass / static_cast<float>(args.window);
  if (args.all.outputs == nullptr) return;
  args.err_sq[a] = error;
  args.ref_sq[a] = reference;
}

struct MarkArgs {
  const int32_t* tokens;  // [groups, num_kept]
  int64_t num_kept;
  int64_t group_words;
  uint32_t* marks;  // Pass::marks as words of 32 bits; zero before
};

// Sets the tokens' bits. grid (blocks, groups)
__global__ void __launch_bounds__(kThreads) MarkTokensKernel(MarkArgs args) {
  WaitForEarlierGrids();
  AllowDependents();
  constexpr int kWordBits = 32;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = blockIdx.y;
  const int token = n < args.num_kept ? args.tokens[group * args.num_kept + n] : -1;
  const int word = token < 0 ? -1 : token / kWordBits;
  // Tokens ascend: those of a word are mostly in one warp.
  const unsigned peers = __match_any_sync(kFullWarp, word);
  const unsigned bits = __reduce_or_sync(peers, 1U << (token % kWordBits & (kWordBits - 1)));
  if (word >= 0 && lane == __ffs(static_cast<int>(peers)) - 1) {
    atomicOr(args.marks + group * args.group_words + word, bits);
  }
}

template <typename Args>
absl::Status LaunchNext(void (*kernel)(Args), const char* name, dim3 grid, const Args& args,
                        cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return CudaStatus(LaunchDependent(config, kernel, args), name);
}

// Thread blocks for `threads` threads.
dim3 BlocksFor(int64_t threads) { return dim3(static_cast<unsigned>(CeilDiv(threads, kThreads))); }

// One wave of thread blocks, where the items suffice.
int SplitsOf(const Pass& pass, DType queries_dtype, int num_sms) {
  if (UsesGroupMma(pass, queries_dtype)) return GroupSplits(pass, num_sms);
  constexpr int64_t kBlocksPerSm = 3;
  const int64_t row_blocks = CeilDiv(pass.queries.rows, kAttendTile) * pass.num_kv_heads;
  return static_cast<int>(
      std::clamp<int64_t>(kBlocksPerSm * num_sms / row_blocks, 1,
                          std::max<int64_t>(CeilDiv(pass.num_items, kAttendTile), 1)));
}

absl::Status Attend(const Pass& pass, DType queries_dtype, cudaStream_t stream) {
  if (UsesGroupMma(pass, queries_dtype)) return AttendGroup(pass, stream);
  return UsesTensorCores(pass, queries_dtype) ? AttendMma(pass, stream) : AttendSimt(pass, stream);
}

// Scratch in floats, carved from one allocation.
class FloatArena {
 public:
  int64_t Add(int64_t count) {
    const int64_t at = count_;
    count_ += CeilDiv(count, 64) * 64;
    return at;
  }
  int64_t size_bytes() const { return count_ * static_cast<int64_t>(sizeof(float)); }

 private:
  int64_t count_ = 0;
};

// The three passes, but for their queries' rows and what lies in scratch memory.
struct Passes {
  Passes(const MeasureAttentionParams& params, const Queries& queries) {
    all.queries = queries;
    all.positions_per_head = params.groups > 1;
    all.num_tokens = params.keys.num_tokens;
    all.num_kv_heads = params.keys.num_heads;
    all.scale_log2 = params.softmax_scale * kLog2E;
    mass = kept = all;
    SetItems(params.keys, params.values, all);
    SetItems(params.keys, {}, mass);
    mass.keys_by_position = true;
    SetItems(params.kept_keys, params.kept_values, kept);
    mass.positions = kept.positions = params.kept;
    mass.num_items = kept.num_items = params.num_kept;
  }

  Pass all, mass, kept;

 private:
  static void SetItems(const TensorView& keys, const TensorView& values, Pass& pass) {
    pass.keys = keys;
    pass.keys_aligned = HasAlignedChunks(keys);
    pass.values = values;
    pass.values_aligned = HasAlignedChunks(values);
    pass.num_items = keys.num_tokens;
  }
};

// Where the parts of the scratch memory begin, in floats.
struct Layout {
  Layout(const MeasureAttentionParams& params, const Passes& passes, int num_sms) {
    const bool with_values = params.values.data != nullptr;
    const DType dtype = params.queries.dtype;
    const Queries& queries = passes.all.queries;
    all_rows = static_cast<int64_t>(params.keys.num_heads) * queries.rows;
    packed_count = all_rows * queries.depth_padded;
    marked = UsesGroupMma(passes.all, dtype);
    all_splits = SplitsOf(passes.all, dtype, num_sms);
    mass_splits = marked ? all_splits : SplitsOf(passes.mass, dtype, num_sms);
    kept_splits = with_values ? SplitsOf(passes.kept, dtype, num_sms) : 0;
    mark_words = marked ? passes.all.mark_stride() * 2 : 0;
    const int64_t output_count = with_values ? all_rows * params.keys.head_dim : 0;
    packed = arena.Add(packed_count);
    high = arena.Add(packed_count / 2);
    low = arena.Add(packed_count / 2);
    all_sums = arena.Add(2 * all_splits * all_rows);
    mass_sums = arena.Add(2 * mass_splits * all_rows);
    kept_sums = arena.Add(2 * kept_splits * all_rows);
    all_outputs = arena.Add(all_splits * output_count);
    kept_outputs = arena.Add(kept_splits * output_count);
    losses = arena.Add(3 * all_rows);
    marks = arena.Add(mark_words * params.groups);
  }

  FloatArena arena;
  int64_t all_rows, packed_count, mark_words;  // of a group
  bool marked;                                 // the first pass takes the second's sums
  int all_splits, mass_splits, kept_splits;
  int64_t packed, high, low, all_sums, mass_sums, kept_sums, all_outputs, kept_outputs, losses,
      marks;
};

// Packs the queries, turned where `rotation` has a dimension. Turning leaves the 16-bit types, so
// turned queries have a low half.
absl::Status PrepareQueries(const MeasureAttentionParams& params, const Layout& layout,
                            const RotationTable& rotation, float* base, Queries& queries,
                            cudaStream_t stream) {
  const bool halved = DTypeBytes(params.queries.dtype) == 2;
  const bool turned = rotation.rotary_dim > 0;
  const PackArgs args = {.view = params.queries,
                         .aligned = HasAlignedChunks(params.queries),
                         .queries = queries,
                         .rotation = rotation,
                         .delta = turned ? static_cast<int>(params.query_shift) : 0,
                         .count = layout.packed_count,
                         .packed = base + layout.packed,
                         .high = halved ? base + layout.high : nullptr,
                         .low = halved && turned ? base + layout.low : nullptr};
  queries.packed = args.packed;
  queries.high = args.high;
  queries.low = args.low;
  return LaunchNext(PackTurnedKernel, "PackTurnedKernel", BlocksFor(args.count), args, stream);
}

// Gives the first pass its marks.
absl::Status MarkTokens(const MeasureAttentionParams& params, const Layout& layout, float* base,
                        Pass& pass, cudaStream_t stream) {
  auto* const words = reinterpret_cast<uint32_t*>(base + layout.marks);
  const int64_t bytes = layout.mark_words * params.groups * static_cast<int64_t>(sizeof(uint32_t));
  pass.marks = reinterpret_cast<const uint2*>(words);
  pass.marked_sums = reinterpret_cast<float2*>(base + layout.mass_sums);
  absl::Status status =
      CudaStatus(cudaMemsetAsync(words, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
  if (!status.ok() || params.num_kept == 0) return status;
  dim3 grid = BlocksFor(params.num_kept);
  grid.y = static_cast<unsigned>(params.groups);
  const MarkArgs args = {.tokens = params.kept,
                         .num_kept = params.num_kept,
                         .group_words = layout.mark_words,
                         .marks = words};
  return LaunchNext(MarkTokensKernel, "MarkTokensKernel", grid, args, stream);
}

// Passes over everything and over the kept tokens' original keys.
absl::Status AttendOriginals(const MeasureAttentionParams& params, const Layout& layout,
                             float* base, Passes& passes, cudaStream_t stream) {
  const DType dtype = params.queries.dtype;
  absl::Status status;
  if (layout.marked) status.Update(MarkTokens(params, layout, base, passes.all, stream));
  if (status.ok()) {
    status.Update(
        PrepareQueries(params, layout, RotationTable{}, base, passes.all.queries, stream));
  }
  passes.mass.queries = passes.kept.queries = passes.all.queries;
  if (status.ok()) status.Update(Attend(passes.all, dtype, stream));
  if (status.ok() && !layout.marked) status.Update(Attend(passes.mass, dtype, stream));
  return status;
}

// Pass over the kept pages.
absl::Status AttendKept(const MeasureAttentionParams& params, const Layout& layout, float* base,
                        Passes& passes, cudaStream_t stream) {
  if (params.rotation.rotary_dim > 0) {
    absl::Status status =
        PrepareQueries(params, layout, params.rotation, base, passes.kept.queries, stream);
    if (!status.ok()) return status;
  }
  return Attend(passes.kept, params.queries.dtype, stream);
}

absl::Status SumLosses(const MeasureAttentionParams& params, const Layout& layout,
                       const Passes& passes, float* losses, cudaStream_t stream) {
  const LossArgs args = {.all = passes.all.out,
                         .kept_original = passes.mass.out,
                         .kept = passes.kept.out,
                         .head_dim = params.keys.head_dim,
                         .window = static_cast<int>(params.queries.num_tokens),
                         .num_query_heads = params.queries.num_heads,
                         .all_rows = layout.all_rows,
                         .rows_loss = losses,
                         .mass = params.mass,
                         .err_sq = params.err_sq,
                         .ref_sq = params.ref_sq};
  absl::Status status =
      LaunchNext(RowLossKernel, "RowLossKernel", BlocksFor(layout.all_rows * kWarp), args, stream);
  if (!status.ok()) return status;
  status.Update(LaunchNext(SumLossKernel, "SumLossKernel",
                           BlocksFor(int64_t{params.queries.num_heads} * kWarp), args, stream));
  return status;
}

}  // namespace

absl::Status MeasureAttention(const MeasureAttentionParams& params, const Launch& launch) {
  const TensorView& keys = params.keys;
  const bool with_values = params.values.data != nullptr;
  Queries queries;
  queries.window = static_cast<int>(params.queries.num_tokens);
  queries.group = params.queries.num_heads / keys.num_heads;
  queries.rows = queries.group * queries.window;
  queries.depth_padded = static_cast<int>(CeilDiv(keys.head_dim, kDepthStep)) * kDepthStep;
  Passes passes(params, queries);
  const Layout layout(params, passes, launch.num_sms);
  absl::StatusOr<Buffer> memory = launch.Scratch(layout.arena.size_bytes());
  if (!memory.ok()) return memory.status();
  auto* const base = memory->as<float>();
  const auto partials = [&](int64_t sums, int64_t outputs, int splits) {
    return Partials{.sums = reinterpret_cast<float2*>(base + sums),
                    .outputs = with_values && outputs >= 0 ? base + outputs : nullptr,
                    .splits = splits};
  };
  passes.all.out = partials(layout.all_sums, layout.all_outputs, layout.all_splits);
  passes.mass.out = partials(layout.mass_sums, -1, layout.mass_splits);
  passes.kept.out = partials(layout.kept_sums, layout.kept_outputs, layout.kept_splits);

  absl::Status status = AttendOriginals(params, layout, base, passes, launch.stream);
  if (status.ok() && with_values) {
    status.Update(AttendKept(params, layout, base, passes, launch.stream));
  }
  if (!status.ok()) return status;
  return SumLosses(params, layout, passes, base + layout.losses, launch.stream);
}

}  // namespace dynsplit::kernels
