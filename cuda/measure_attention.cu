// SPDX-License-Identifier: Apache-2.0
//
// Attention of the window's queries, three times: over all tokens, over the kept tokens' original
// keys (mass), and over the kept pages (what the consumer computes). Each pass splits the items
// over thread blocks; partial results are joined in a fixed order.
#include <algorithm>
#include <cmath>

#include "cuda/attend.cuh"
#include "cuda/cuda_status.h"
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

// One thread a packed element; queries turned by -delta positions where rotation has a dimension.
__global__ void __launch_bounds__(kThreads)
    PackTurnedKernel(TensorView view, bool aligned, Queries queries, RotationTable rotation,
                     int delta, int64_t count, float* packed) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / queries.depth_padded;
  const auto channel = static_cast<int>(index - row * queries.depth_padded);
  const auto h = static_cast<int>(row / queries.rows);
  const auto r = static_cast<int>(row - static_cast<int64_t>(h) * queries.rows);
  const int a = h * queries.group + r / queries.window;
  const int i = r % queries.window;
  float value = 0;
  if (channel < view.head_dim) {
    value = LoadAnyElement(view, aligned, i, a, channel);
    if (channel < rotation.rotary_dim) {
      const int half = rotation.rotary_dim / 2;
      const bool is_x = rotation.interleaved ? channel % 2 == 0 : channel < half;
      const int step = rotation.interleaved ? 1 : half;
      const int pair = rotation.interleaved ? channel / 2 : channel % half;
      const float partner =
          LoadAnyElement(view, aligned, i, a, is_x ? channel + step : channel - step);
      const float2 angle = AngleOf(rotation, delta, pair);
      value = is_x ? TurnX(value, partner, angle) : TurnY(partner, value, angle);
    }
  }
  packed[index] = value;
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

__device__ float JoinOutputs(const Partials& partials, int64_t row, int64_t all_rows, int head_dim,
                             int channel, SoftmaxSum total) {
  if (total.sum == 0) return 0;
  float output = 0;
  for (int split = 0; split < partials.splits; ++split) {
    const int64_t at = split * all_rows + row;
    output = fmaf(partials.outputs[at * head_dim + channel],
                  Exp2(partials.sums[at].x - total.maximum), output);
  }
  return output / total.sum;
}

// rows_loss[row] = (mass, ||o_kept - o_full||^2, ||o_full||^2). One warp a row.
__global__ void __launch_bounds__(kThreads)
    RowLossKernel(Partials all, Partials kept_original, Partials kept, int head_dim,
                  int64_t all_rows, float* rows_loss) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= all_rows) return;
  const SoftmaxSum all_sum = JoinSums(all, row, all_rows, lane);
  const SoftmaxSum mass_sum = JoinSums(kept_original, row, all_rows, lane);
  float error = 0;
  float reference = 0;
  if (all.outputs != nullptr) {
    const SoftmaxSum kept_sum = JoinSums(kept, row, all_rows, lane);
    for (int channel = lane; channel < head_dim; channel += kWarp) {
      const float full = JoinOutputs(all, row, all_rows, head_dim, channel, all_sum);
      const float partial = JoinOutputs(kept, row, all_rows, head_dim, channel, kept_sum);
      error = fmaf(partial - full, partial - full, error);
      reference = fmaf(full, full, reference);
    }
    error = GroupSum(error, kWarp);
    reference = GroupSum(reference, kWarp);
  }
  if (lane == 0) {
    rows_loss[row * 3] = mass_sum.sum * Exp2(mass_sum.maximum - all_sum.maximum) / all_sum.sum;
    rows_loss[row * 3 + 1] = error;
    rows_loss[row * 3 + 2] = reference;
  }
}

// Sums over the queries of each query head; row order is [Hkv, group, W], so heads are in a row.
__global__ void SumLossKernel(const float* rows_loss, int window, int num_query_heads,
                              MeasureAttentionParams params) {
  const int a = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (a >= num_query_heads) return;
  float mass = 0;
  float error = 0;
  float reference = 0;
  for (int i = 0; i < window; ++i) {
    const float* const loss = rows_loss + (static_cast<int64_t>(a) * window + i) * 3;
    mass += loss[0];
    error += loss[1];
    reference += loss[2];
  }
  params.mass[a] = mass / static_cast<float>(window);
  if (params.values.data == nullptr) return;
  params.err_sq[a] = error;
  params.ref_sq[a] = reference;
}

// One wave of thread blocks, where the items suffice.
int SplitsOf(int64_t num_items, int64_t row_blocks, int num_sms) {
  constexpr int64_t kBlocksPerSm = 3;
  return static_cast<int>(
      std::clamp<int64_t>(kBlocksPerSm * num_sms / row_blocks, 1,
                          std::max<int64_t>(CeilDiv(num_items, kAttendTile), 1)));
}

absl::Status Attend(const Pass& pass, DType queries_dtype, cudaStream_t stream) {
  return UsesTensorCores(pass, queries_dtype) ? AttendMma(pass, stream) : AttendSimt(pass, stream);
}

absl::Status PackTurned(const TensorView& view, const Queries& queries,
                        const RotationTable& rotation, int64_t delta, int64_t count, float* packed,
                        cudaStream_t stream) {
  PackTurnedKernel<<<static_cast<unsigned>(CeilDiv(count, kThreads)), kThreads, 0, stream>>>(
      view, HasAlignedChunks(view), queries, rotation, static_cast<int>(delta), count, packed);
  return LaunchStatus("PackTurnedKernel");
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

// Where the parts of the scratch memory begin, in floats.
struct Layout {
  Layout(const MeasureAttentionParams& params, const Queries& queries, int num_sms) {
    const bool with_values = params.values.data != nullptr;
    const int32_t heads = params.keys.num_heads;
    all_rows = static_cast<int64_t>(heads) * queries.rows;
    packed_count = all_rows * queries.depth_padded;
    const int64_t row_blocks = CeilDiv(queries.rows, kAttendTile) * heads;
    all_splits = SplitsOf(params.keys.num_tokens, row_blocks, num_sms);
    kept_splits = SplitsOf(params.num_kept, row_blocks, num_sms);
    const int64_t output_count = with_values ? all_rows * params.keys.head_dim : 0;
    packed = arena.Add(packed_count);
    high = arena.Add(packed_count / 2);
    low = arena.Add(packed_count / 2);
    all_sums = arena.Add(2 * all_splits * all_rows);
    mass_sums = arena.Add(2 * kept_splits * all_rows);
    kept_sums = arena.Add(2 * kept_splits * all_rows);
    all_outputs = arena.Add(all_splits * output_count);
    kept_outputs = arena.Add(kept_splits * output_count);
    losses = arena.Add(3 * all_rows);
  }

  FloatArena arena;
  int64_t all_rows, packed_count;
  int all_splits, kept_splits;
  int64_t packed, high, low, all_sums, mass_sums, kept_sums, all_outputs, kept_outputs, losses;
};

// Packs the queries, turned where `rotation` has a dimension. Turning leaves the 16-bit types, so
// turned queries have a low half.
absl::Status PrepareQueries(const MeasureAttentionParams& params, const Layout& layout,
                            const RotationTable& rotation, float* base, Queries& queries,
                            cudaStream_t stream) {
  const bool turned = rotation.rotary_dim > 0;
  queries.packed = base + layout.packed;
  absl::Status status =
      PackTurned(params.queries, queries, rotation, turned ? params.query_shift : 0,
                 layout.packed_count, base + layout.packed, stream);
  if (!status.ok() || DTypeBytes(params.queries.dtype) != 2) return status;
  queries.high = base + layout.high;
  queries.low = turned ? base + layout.low : nullptr;
  status.Update(SplitQueries(queries.packed, layout.packed_count, params.queries.dtype,
                             base + layout.high, turned ? base + layout.low : nullptr, stream));
  return status;
}

// Passes over everything and over the kept tokens' original keys.
absl::Status AttendOriginals(const MeasureAttentionParams& params, Pass pass, const Partials& all,
                             const Partials& mass, cudaStream_t stream) {
  pass.keys = params.keys;
  pass.keys_aligned = HasAlignedChunks(params.keys);
  pass.values = params.values;
  pass.values_aligned = HasAlignedChunks(params.values);
  pass.num_items = params.keys.num_tokens;
  pass.out = all;
  absl::Status status = Attend(pass, params.queries.dtype, stream);
  if (!status.ok()) return status;
  pass.values = {};
  pass.positions = params.kept;
  pass.keys_by_position = true;
  pass.num_items = params.num_kept;
  pass.out = mass;
  status.Update(Attend(pass, params.queries.dtype, stream));
  return status;
}

// Pass over the kept pages.
absl::Status AttendKept(const MeasureAttentionParams& params, Pass pass, const Partials& kept,
                        cudaStream_t stream) {
  pass.keys = params.kept_keys;
  pass.keys_aligned = HasAlignedChunks(params.kept_keys);
  pass.values = params.kept_values;
  pass.values_aligned = HasAlignedChunks(params.kept_values);
  pass.positions = params.kept;
  pass.num_items = params.num_kept;
  pass.out = kept;
  return Attend(pass, params.queries.dtype, stream);
}

absl::Status SumLosses(const MeasureAttentionParams& params, const Layout& layout,
                       const Partials& all, const Partials& mass, const Partials& kept,
                       float* losses, cudaStream_t stream) {
  RowLossKernel<<<static_cast<unsigned>(CeilDiv(layout.all_rows * kWarp, kThreads)), kThreads, 0,
                  stream>>>(all, mass, kept, params.keys.head_dim, layout.all_rows, losses);
  absl::Status status = LaunchStatus("RowLossKernel");
  if (!status.ok()) return status;
  SumLossKernel<<<static_cast<unsigned>(CeilDiv(params.queries.num_heads, kThreads)), kThreads, 0,
                  stream>>>(losses, static_cast<int>(params.queries.num_tokens),
                            params.queries.num_heads, params);
  status.Update(LaunchStatus("SumLossKernel"));
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
  const Layout layout(params, queries, launch.num_sms);
  absl::StatusOr<Buffer> memory = launch.Scratch(layout.arena.size_bytes());
  if (!memory.ok()) return memory.status();
  auto* const base = memory->as<float>();
  const auto partials = [&](int64_t sums, int64_t outputs, int splits) {
    return Partials{.sums = reinterpret_cast<float2*>(base + sums),
                    .outputs = with_values && outputs >= 0 ? base + outputs : nullptr,
                    .splits = splits};
  };
  const Partials all = partials(layout.all_sums, layout.all_outputs, layout.all_splits);
  const Partials mass = partials(layout.mass_sums, -1, layout.kept_splits);
  const Partials kept = partials(layout.kept_sums, layout.kept_outputs, layout.kept_splits);

  absl::Status status = PrepareQueries(params, layout, {}, base, queries, launch.stream);
  if (!status.ok()) return status;
  Pass pass;
  pass.queries = queries;
  pass.positions_per_head = params.groups > 1;
  pass.num_tokens = keys.num_tokens;
  pass.num_kv_heads = keys.num_heads;
  pass.scale_log2 = params.softmax_scale * kLog2E;
  status.Update(AttendOriginals(params, pass, all, mass, launch.stream));
  if (status.ok() && with_values) {
    if (params.rotation.rotary_dim > 0) {
      status.Update(
          PrepareQueries(params, layout, params.rotation, base, pass.queries, launch.stream));
    }
    if (status.ok()) status.Update(AttendKept(params, pass, kept, launch.stream));
  }
  if (!status.ok()) return status;
  return SumLosses(params, layout, all, mass, kept, base + layout.losses, launch.stream);
}

}  // namespace dynsplit::kernels
