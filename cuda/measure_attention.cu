// SPDX-License-Identifier: Apache-2.0
//
// Attention of the window's queries, three times: over all tokens, over the kept tokens' original
// keys (mass), and over the kept pages (what the consumer computes). Each pass splits the items
// over thread blocks; partial results are joined in a fixed order.
#include <algorithm>
#include <cmath>

#include "cuda/column_softmax.cuh"
#include "cuda/cuda_status.h"
#include "cuda/operations.h"
#include "cuda/rotation.cuh"
#include "cuda/simt_tile.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kValueColumns = 128;  // channels of the output a thread block accumulates
constexpr int kValueRows = 32;      // items of V in shared memory at a time
constexpr int kColumnsPerThread = kValueColumns / kSimtSide;
constexpr int kThreads = 256;

// Queries [W, Hq, D] as fp32 rows [Hkv, rows, depth_padded], row = head of the group * W + query.
struct Queries {
  const float* packed;
  int window;
  int group;
  int rows;
  int depth_padded;
};

// Partial results of one pass; row index is h * rows + r.
struct Partials {
  float2* sums;    // [splits, Hkv * rows]: maximum (base 2) and sum
  float* outputs;  // [splits, Hkv * rows, D], not divided by the sum; null without values
  int splits;
};

struct Pass {
  Queries queries;
  TensorView keys;
  bool keys_aligned;
  TensorView values;  // data null: sums only
  bool values_aligned;
  const int32_t* positions;  // [groups, num_items] position of item n; null = n
  bool positions_per_head;
  bool keys_by_position;  // keys are the original ones: item n is row positions[n]
  int64_t num_items;
  int64_t num_tokens;  // T
  int num_kv_heads;
  float scale_log2;
  Partials out;

  __device__ int64_t Position(int h, int64_t n) const {
    return positions == nullptr ? n : positions[(positions_per_head ? h * num_items : 0) + n];
  }
};

struct KeySource {
  const Pass& pass;
  int h;
  __device__ void Load(int64_t n, int chunk, float (&out)[kChunk]) const {
    if (n >= pass.num_items || chunk * kChunk >= pass.keys.head_dim) return;
    const int64_t row = pass.keys_by_position ? pass.Position(h, n) : n;
    LoadAnyValues(pass.keys, pass.keys_aligned, row, h, chunk, out);
  }
};

struct QuerySource {
  const float* rows_base;
  int num_rows;
  int depth_padded;
  __device__ void Load(int64_t row, int chunk, float (&out)[kChunk]) const {
    if (row >= num_rows) return;
    LoadValues<float>(reinterpret_cast<const std::byte*>(rows_base + row * depth_padded), chunk,
                      true, 1.0F, out);
  }
};

// Thread (tx, ty) holds rows 4 ty .. + 3; sums are equal in all tx.
struct AttendState {
  float maximum[kSimtPart];
  float sum[kSimtPart];
  float output[kSimtPart][kColumnsPerThread];
};

// Weights of a tile relative to the new maxima, into `weights` [item][row]; rescales the state.
template <bool kWithValues>
__device__ void Weigh(const Pass& pass, int h, int first_row, int64_t first_item,
                      float (&logits)[kSimtPart][kSimtPart], AttendState& state,
                      float (&weights)[kSimtTile][kSimtPitch]) {
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  const int window = pass.queries.window;
  int64_t positions[kSimtPart];
#pragma unroll
  for (int j = 0; j < kSimtPart; ++j) {
    const int64_t n = first_item + tx * kSimtPart + j;
    positions[j] = n < pass.num_items ? pass.Position(h, n) : pass.num_tokens;  // never visible
  }
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    const int row = first_row + ty * kSimtPart + i;
    const int64_t last_visible = pass.num_tokens - window + row % window;
    float largest = kNoLogit;
#pragma unroll
    for (int j = 0; j < kSimtPart; ++j) {
      logits[i][j] *= pass.scale_log2;
      if (positions[j] <= last_visible) largest = fmaxf(largest, logits[i][j]);
    }
    largest = fmaxf(GroupMax(largest, kSimtSide), state.maximum[i]);
    const float shrink = Exp2(state.maximum[i] - largest);
    state.maximum[i] = largest;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kSimtPart; ++j) {
      const float weight =
          positions[j] <= last_visible ? Exp2(logits[i][j] - largest) : 0.0F;
      sum += weight;
      if (kWithValues) weights[tx * kSimtPart + j][ty * kSimtPart + i] = weight;
    }
    state.sum[i] = fmaf(state.sum[i], shrink, GroupSum(sum, kSimtSide));
    if (kWithValues) {
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) state.output[i][c] *= shrink;
    }
  }
}

// state.output += weights^T * values of the tile's items, `slice` times kValueColumns channels on.
__device__ void AddValues(const Pass& pass, int h, int slice, int64_t first_item,
                          float (&values)[kValueRows][kValueColumns],
                          const float (&weights)[kSimtTile][kSimtPitch], AttendState& state) {
  constexpr int kRowChunks = kValueColumns / kChunk;
  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  for (int part = 0; part < kSimtTile; part += kValueRows) {
    __syncthreads();  // weights are written, the logits' tile and the last values are done with
    for (int unit = static_cast<int>(threadIdx.x); unit < kValueRows * kRowChunks;
         unit += kSimtThreads) {
      const int row = unit / kRowChunks;
      const int chunk = slice * kRowChunks + unit % kRowChunks;
      const int64_t n = first_item + part + row;
      float loaded[kChunk] = {};
      if (n < pass.num_items && chunk * kChunk < pass.values.head_dim) {
        LoadAnyValues(pass.values, pass.values_aligned, n, h, chunk, loaded);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[row][unit % kRowChunks * kChunk + i] = loaded[i];
    }
    __syncthreads();
#pragma unroll 4
    for (int row = 0; row < kValueRows; ++row) {
      const float4 w = *reinterpret_cast<const float4*>(&weights[part + row][ty * kSimtPart]);
      const float w_part[kSimtPart] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const float value = values[row][c * kSimtSide + tx];
#pragma unroll
        for (int i = 0; i < kSimtPart; ++i) {
          state.output[i][c] = fmaf(w_part[i], value, state.output[i][c]);
        }
      }
    }
  }
}

// grid (splits, row blocks, KV heads * value slices)
template <bool kWithValues>
__global__ void __launch_bounds__(kSimtThreads) AttendKernel(Pass pass, int tiles_per_split) {
  __shared__ union {
    SimtTile tile;
    float values[kValueRows][kValueColumns];
  } shared;
  __shared__ float weights[kWithValues ? kSimtTile : 1][kSimtPitch];
  float(&tile_weights)[kSimtTile][kSimtPitch] =
      reinterpret_cast<float(&)[kSimtTile][kSimtPitch]>(weights);
  const int h = static_cast<int>(blockIdx.z) % pass.num_kv_heads;
  const int slice = static_cast<int>(blockIdx.z) / pass.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) * kSimtTile;
  const int rows = pass.queries.rows;
  const QuerySource queries = {
      pass.queries.packed + static_cast<int64_t>(h) * rows * pass.queries.depth_padded, rows,
      pass.queries.depth_padded};
  const KeySource keys = {pass, h};
  AttendState state;
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    state.maximum[i] = kNoLogit;
    state.sum[i] = 0;
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) state.output[i][c] = 0;
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiles_per_split * kSimtTile;
  const int64_t end =
      min(begin + static_cast<int64_t>(tiles_per_split) * kSimtTile, pass.num_items);
  for (int64_t first = begin; first < end; first += kSimtTile) {
    float logits[kSimtPart][kSimtPart] = {};
    MultiplyTile(shared.tile, queries, first_row, keys, first, pass.queries.depth_padded, logits);
    Weigh<kWithValues>(pass, h, first_row, first, logits, state, tile_weights);
    if constexpr (kWithValues) AddValues(pass, h, slice, first, shared.values, tile_weights, state);
  }

  const int tx = static_cast<int>(threadIdx.x) % kSimtSide;
  const int ty = static_cast<int>(threadIdx.x) / kSimtSide;
  const int64_t all_rows = static_cast<int64_t>(pass.num_kv_heads) * rows;
#pragma unroll
  for (int i = 0; i < kSimtPart; ++i) {
    const int r = first_row + ty * kSimtPart + i;
    if (r >= rows) continue;
    const int64_t row = blockIdx.x * all_rows + static_cast<int64_t>(h) * rows + r;
    if (slice == 0 && tx == 0) pass.out.sums[row] = make_float2(state.maximum[i], state.sum[i]);
    if constexpr (kWithValues) {
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const int channel = slice * kValueColumns + c * kSimtSide + tx;
        if (channel < pass.values.head_dim) {
          pass.out.outputs[row * pass.values.head_dim + channel] = state.output[i][c];
        }
      }
    }
  }
}

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

int SplitsOf(int64_t num_items, int64_t row_blocks, int num_sms) {
  constexpr int64_t kBlocksPerSm = 4;
  return static_cast<int>(std::clamp<int64_t>(CeilDiv(kBlocksPerSm * num_sms, row_blocks), 1,
                                              std::max<int64_t>(CeilDiv(num_items, kSimtTile), 1)));
}

absl::Status Attend(const Pass& pass, cudaStream_t stream) {
  const bool with_values = pass.values.data != nullptr;
  const int64_t slices = with_values ? CeilDiv(pass.values.head_dim, kValueColumns) : 1;
  const dim3 grid(static_cast<unsigned>(pass.out.splits),
                  static_cast<unsigned>(CeilDiv(pass.queries.rows, kSimtTile)),
                  static_cast<unsigned>(pass.num_kv_heads * slices));
  const auto tiles_per_split =
      static_cast<int>(CeilDiv(CeilDiv(pass.num_items, kSimtTile), pass.out.splits));
  if (with_values) {
    AttendKernel<true><<<grid, kSimtThreads, 0, stream>>>(pass, tiles_per_split);
  } else {
    AttendKernel<false><<<grid, kSimtThreads, 0, stream>>>(pass, tiles_per_split);
  }
  return LaunchStatus("AttendKernel");
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

}  // namespace

absl::Status MeasureAttention(const MeasureAttentionParams& params, const Launch& launch) {
  const TensorView& keys = params.keys;
  const int window = static_cast<int>(params.queries.num_tokens);
  const int group = params.queries.num_heads / keys.num_heads;
  const int head_dim = keys.head_dim;
  const bool with_values = params.values.data != nullptr;
  const bool turned = with_values && params.rotation.rotary_dim > 0;
  Queries queries = {.packed = nullptr,
                     .window = window,
                     .group = group,
                     .rows = group * window,
                     .depth_padded = static_cast<int>(CeilDiv(head_dim, kSimtDepth)) * kSimtDepth};
  const int64_t all_rows = static_cast<int64_t>(keys.num_heads) * queries.rows;
  const int64_t packed_count = all_rows * queries.depth_padded;
  const int64_t row_blocks = CeilDiv(queries.rows, kSimtTile) * keys.num_heads;
  const int all_splits = SplitsOf(keys.num_tokens, row_blocks, launch.num_sms);
  const int kept_splits = SplitsOf(params.num_kept, row_blocks, launch.num_sms);

  FloatArena arena;
  const int64_t packed_at = arena.Add(packed_count);
  const int64_t turned_at = arena.Add(turned ? packed_count : 0);
  const int64_t all_sums_at = arena.Add(2 * all_splits * all_rows);
  const int64_t mass_sums_at = arena.Add(2 * kept_splits * all_rows);
  const int64_t kept_sums_at = arena.Add(2 * kept_splits * all_rows);
  const int64_t all_outputs_at = arena.Add(with_values ? all_splits * all_rows * head_dim : 0);
  const int64_t kept_outputs_at = arena.Add(with_values ? kept_splits * all_rows * head_dim : 0);
  const int64_t loss_at = arena.Add(3 * all_rows);
  absl::StatusOr<Buffer> memory = launch.Scratch(arena.size_bytes());
  if (!memory.ok()) return memory.status();
  auto* const base = memory->as<float>();
  const auto float2_at = [base](int64_t at) { return reinterpret_cast<float2*>(base + at); };
  const Partials all = {.sums = float2_at(all_sums_at),
                        .outputs = with_values ? base + all_outputs_at : nullptr,
                        .splits = all_splits};
  const Partials mass = {
      .sums = float2_at(mass_sums_at), .outputs = nullptr, .splits = kept_splits};
  const Partials kept = {.sums = float2_at(kept_sums_at),
                         .outputs = with_values ? base + kept_outputs_at : nullptr,
                         .splits = kept_splits};

  queries.packed = base + packed_at;
  Pass pass = {.queries = queries,
               .keys = keys,
               .keys_aligned = HasAlignedChunks(keys),
               .values = params.values,
               .values_aligned = HasAlignedChunks(params.values),
               .positions = nullptr,
               .positions_per_head = params.groups > 1,
               .keys_by_position = false,
               .num_items = keys.num_tokens,
               .num_tokens = keys.num_tokens,
               .num_kv_heads = keys.num_heads,
               .scale_log2 = params.softmax_scale * kLog2E,
               .out = all};
  absl::Status status = PackTurned(params.queries, queries, {}, 0, packed_count, base + packed_at,
                                   launch.stream);
  if (status.ok()) status.Update(Attend(pass, launch.stream));

  pass.positions = params.kept;
  pass.num_items = params.num_kept;
  pass.keys_by_position = true;
  pass.values = {};
  pass.out = mass;
  if (status.ok()) status.Update(Attend(pass, launch.stream));

  if (with_values) {
    pass.keys = params.kept_keys;
    pass.keys_aligned = HasAlignedChunks(params.kept_keys);
    pass.values = params.kept_values;
    pass.values_aligned = HasAlignedChunks(params.kept_values);
    pass.keys_by_position = false;
    pass.out = kept;
    if (turned) {
      pass.queries.packed = base + turned_at;
      if (status.ok()) {
        status.Update(PackTurned(params.queries, queries, params.rotation, params.query_shift,
                                 packed_count, base + turned_at, launch.stream));
      }
    }
    if (status.ok()) status.Update(Attend(pass, launch.stream));
  }
  if (!status.ok()) return status;

  RowLossKernel<<<static_cast<unsigned>(CeilDiv(all_rows * kWarp, kThreads)), kThreads, 0,
                  launch.stream>>>(all, mass, kept, head_dim, all_rows, base + loss_at);
  status.Update(LaunchStatus("RowLossKernel"));
  if (!status.ok()) return status;
  SumLossKernel<<<static_cast<unsigned>(CeilDiv(params.queries.num_heads, kThreads)), kThreads, 0,
                  launch.stream>>>(base + loss_at, window, params.queries.num_heads, params);
  return LaunchStatus("SumLossKernel");
}

}  // namespace dynsplit::kernels
