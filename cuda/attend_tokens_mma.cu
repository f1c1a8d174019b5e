// SPDX-License-Identifier: Apache-2.0
//
// AttendTokens on tensor cores. The query heads of a KV head are the 16 rows of the register
// operand. Each warp reads its own rows of K and V, 16 at a time, through its own stages of shared
// memory, and keeps its own softmax: the loop has no barrier of the block. Codes of quantised types
// become bfloat16 exactly; their scales enter logits and weights in fp32. Weights, and queries of
// quantised K, are split into a high and a low half of the 16-bit type, so that the error of the
// products stays near that of fp32.
#include <algorithm>

#include "cuda/attend_tokens.cuh"
#include "cuda/attend_tokens_stage.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/exponent.cuh"
#include "cuda/mma.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kRows = kAttendStepRows;
constexpr int kRowTiles = kRows / kTileCols;

// Rows of keys or values of all heads.
struct RowSource {
  const std::byte* data;
  const float* scales;
  int64_t head_stride_bytes;
  int32_t token_stride_bytes;
  int32_t scale_token_stride;  // elements; scales of heads are neighbours
};

struct MmaItem {
  const std::byte* queries;
  int64_t query_stride_bytes;
  RowSource keys;
  RowSource values;
  RowSource tail_keys;
  RowSource tail_values;
  const int32_t* tokens;
  int32_t num_tokens;
  int32_t num_rows;  // with the tail's
  AttendCut cut;
};

struct MmaBatch {
  MmaItem items[kAttendMmaItems];
  AttendPartials out;
  int num_items;
  int group;
  DType query_dtype;
  bool queries_aligned;
  bool tokens_per_head;
  float scale_log2;
};
static_assert(sizeof(MmaBatch) < 32000, "parameters of a kernel are at most 32764 bytes");

// ---- rows --------------------------------------------------------------------------------------

// Where a lane finds rows: lanes 0-15 those of keys, lanes 16-31 those of values.
struct LaneRows {
  const std::byte* data;
  const std::byte* tail;
  const float* scales;
  const float* tail_scales;
  int32_t stride_bytes;
  int32_t tail_stride_bytes;
  int32_t scale_stride;
  int32_t tail_scale_stride;
  const int32_t* tokens;
  int num_tokens;
  int end;  // of the split's rows

  __device__ LaneRows(const MmaItem& item, int h, const int32_t* item_tokens, int row_end, int lane)
      : tokens(item_tokens), num_tokens(item.num_tokens), end(row_end) {
    const bool is_key = lane < kRows;
    const RowSource& main_rows = is_key ? item.keys : item.values;
    const RowSource& tail_rows = is_key ? item.tail_keys : item.tail_values;
    data = main_rows.data + h * main_rows.head_stride_bytes;
    tail = tail_rows.data + h * tail_rows.head_stride_bytes;
    scales = main_rows.scales + h;
    tail_scales = tail_rows.scales + h;
    stride_bytes = main_rows.token_stride_bytes;
    tail_stride_bytes = tail_rows.token_stride_bytes;
    scale_stride = main_rows.scale_token_stride;
    tail_scale_stride = tail_rows.scale_token_stride;
  }

  // Rows beyond the end are not read; they count as row 0 of whatever has rows.
  __device__ bool InTail(int row) const {
    return num_tokens == 0 || (row >= num_tokens && row < end);
  }
  // Index of logical row `row` in its tensor.
  __device__ int IndexOf(int row) const {
    if (row >= end) return 0;
    if (row >= num_tokens) return row - num_tokens;
    return tokens == nullptr ? row : tokens[row];
  }
};

// Starts copying rows [first, first + 16); `index` is IndexOf(first + lane % 16).
template <typename S, int KS>
__device__ void CopyRows(const LaneRows& rows, int first, int index, uint4* stage, int lane) {
  using St = Stage<S, KS>;
  constexpr int kPassRows = kWarp / St::kRowChunks;
  const bool in_tail = rows.InTail(first + lane % kRows);
  const std::byte* const own =
      (in_tail ? rows.tail : rows.data) +
      static_cast<int64_t>(index) * (in_tail ? rows.tail_stride_bytes : rows.stride_bytes);
  const auto own_bits = reinterpret_cast<unsigned long long>(own);
  const int chunk = lane % St::kRowChunks;
#pragma unroll
  for (int pass = 0; pass < kRows / kPassRows; ++pass) {
    const int row = pass * kPassRows + lane / St::kRowChunks;
    const bool valid = first + row < rows.end;
    const auto key = __shfl_sync(kFullWarp, own_bits, row) + chunk * kChunkBytes;
    const auto value = __shfl_sync(kFullWarp, own_bits, row + kRows) + chunk * kChunkBytes;
    CopyAsync<kChunkBytes>(stage + St::KeyAt(row, chunk), reinterpret_cast<const void*>(key),
                           valid);
    CopyAsync<kChunkBytes>(stage + St::ValueAt(row, chunk), reinterpret_cast<const void*>(value),
                           valid);
  }
  if constexpr (sizeof(S) == 1) {
    const float* const scale =
        (in_tail ? rows.tail_scales : rows.scales) +
        static_cast<int64_t>(index) * (in_tail ? rows.tail_scale_stride : rows.scale_stride);
    CopyAsync<sizeof(float)>(St::Scales(stage) + lane, scale, first + lane % kRows < rows.end);
  }
}

// ---- queries -----------------------------------------------------------------------------------

// Any 16-bit type: two halves of bfloat16 hold a float16 exactly.
__device__ void DecodeQuery(const MmaBatch& batch, const std::byte* row, int chunk,
                            float (&out)[kChunk]) {
  if (batch.query_dtype == DType::kFloat16) {
    LoadValues<__half>(row, chunk, batch.queries_aligned, 1.0F, out);
  } else {
    LoadValues<__nv_bfloat16>(row, chunk, batch.queries_aligned, 1.0F, out);
  }
}

// Chunk of a query in the order of WidenEven and WidenOdd.
template <bool kLow>
__device__ uint4 PackQuery(const float (&values)[kChunk]) {
  using T = __nv_bfloat16;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int first = i / 2 * 4 + i % 2;
    const float a = kLow ? Remainder<T>(values[first]) : values[first];
    const float b = kLow ? Remainder<T>(values[first + 2]) : values[first + 2];
    words[i] = PackPair<T>(a, b);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Row r of the operand is query head h * group + r; rows from `group` on are zeros.
template <typename S, int KS, int MT>
__device__ void LoadQueries(const MmaBatch& batch, const MmaItem& item, int h, int lane,
                            RowTile<KS> (&tiles)[MT]) {
#pragma unroll
  for (int step = 0; step < KS; ++step) {
    const int chunk = 4 * step + lane % 4;
    uint4 parts[2][MT] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      if (row >= batch.group) continue;
      const std::byte* const query =
          item.queries + (h * batch.group + row) * item.query_stride_bytes;
      if constexpr (MT == 1) {
        parts[half][0] = LoadBits<S>(query + chunk * kChunkBytes, batch.queries_aligned);
      } else {
        float values[kChunk];
        DecodeQuery(batch, query, chunk, values);
        parts[half][0] = PackQuery<false>(values);
        parts[half][1] = PackQuery<true>(values);
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) tiles[m].Set(step, parts[0][m], parts[1][m]);
  }
}

// ---- one step ----------------------------------------------------------------------------------

// What a thread holds of its warp's query rows: lane / 4 (half 0) and lane / 4 + 8 (half 1).
template <int KS>
struct RowState {
  float maximum[2] = {kNoLogit, kNoLogit};
  float sum[2] = {};  // of this lane's columns
  float output[KS * 4][4] = {};
};

// Products of the queries with the stage's keys, without scales.
template <typename S, int KS, int MT>
__device__ void MultiplyKeys(const RowTile<KS> (&queries)[MT], uint4* stage, int lane,
                             float (&logits)[kRowTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    if constexpr (MT == 1) {
      float sums[1][4];
      Multiply<S, KS>(sums, queries, stage, tile * kTileCols, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[tile][i] = sums[0][i];
    } else {
      const int row = tile * kTileCols + lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[tile][i] = 0;
#pragma unroll
      for (int step = 0; step < KS; ++step) {
        const uint4* const chunk = stage + Stage<S, KS>::KeyAt(row, 2 * step + lane % 4 / 2);
        const uint2 codes = reinterpret_cast<const uint2*>(chunk)[lane % 2];
        const uint32_t b[4] = {WidenEven<S>(codes.x), WidenOdd<S>(codes.x), WidenEven<S>(codes.y),
                               WidenOdd<S>(codes.y)};
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          Mma<Factor<S>>(logits[tile], queries[m].a[2 * step], b[0], b[1]);
          Mma<Factor<S>>(logits[tile], queries[m].a[2 * step + 1], b[2], b[3]);
        }
      }
    }
  }
}

// logits -> weights relative to the new maxima. `scales` are those of the stage, null for 16-bit
// types; the weights that come out carry the values' scales, the sum does not.
template <int KS>
__device__ void Weigh(float scale_log2, int num_valid, const float* scales, int lane,
                      float (&logits)[kRowTiles][4], RowState<KS>& state) {
  float largest[2] = {state.maximum[0], state.maximum[1]};
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile * kTileCols + lane % 4 * 2 + i % 2;
      float scale = scale_log2;
      if (scales != nullptr) scale *= scales[row];
      logits[tile][i] = row < num_valid ? logits[tile][i] * scale : -INFINITY;
      largest[i / 2] = fmaxf(largest[i / 2], logits[tile][i]);
    }
  }
  largest[0] = GroupMax(largest[0], 4);
  largest[1] = GroupMax(largest[1], 4);
  const bool grows = largest[0] > state.maximum[0] || largest[1] > state.maximum[1];
  if (__any_sync(kFullWarp, grows)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shrink = Exp2(state.maximum[half] - largest[half]);
      state.maximum[half] = largest[half];
      state.sum[half] *= shrink;
#pragma unroll
      for (int tile = 0; tile < KS * 4; ++tile) {
        state.output[tile][2 * half] *= shrink;
        state.output[tile][2 * half + 1] *= shrink;
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = Exp2(logits[tile][i] - state.maximum[i / 2]);
      state.sum[i / 2] += weight;
      const int row = tile * kTileCols + lane % 4 * 2 + i % 2;
      logits[tile][i] = scales == nullptr ? weight : weight * scales[kRows + row];
    }
  }
}

// output += weights * values, weights split in two halves.
template <typename S, int KS>
__device__ void AddValues(const float (&weights)[kRowTiles][4], uint4* stage, int lane,
                          RowState<KS>& state) {
  using T = Factor<S>;
  uint32_t high[4];
  uint32_t low[4];
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const float* const pair = &weights[part / 2][part % 2 * 2];
    high[part] = PackPair<T>(pair[0], pair[1]);
    low[part] = PackPair<T>(Remainder<T>(pair[0]), Remainder<T>(pair[1]));
  }
  const auto add = [&](int tile, uint32_t b0, uint32_t b1) {
    Mma<T>(state.output[tile], high, b0, b1);
    Mma<T>(state.output[tile], low, b0, b1);
  };
  const int row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int chunk = 0; chunk < Stage<S, KS>::kRowChunks; chunk += 2) {
    uint32_t b[4];
    LoadTransposed(b, stage + Stage<S, KS>::ValueAt(row, chunk + lane / 16));
    if constexpr (sizeof(S) == 2) {
      add(chunk, b[0], b[1]);
      add(chunk + 1, b[2], b[3]);
    } else {  // an element of the transposed matrices is two channels
      add(2 * chunk, WidenEven<S>(b[0]), WidenEven<S>(b[1]));
      add(2 * chunk + 1, WidenOdd<S>(b[0]), WidenOdd<S>(b[1]));
      add(2 * chunk + 2, WidenEven<S>(b[2]), WidenEven<S>(b[3]));
      add(2 * chunk + 3, WidenOdd<S>(b[2]), WidenOdd<S>(b[3]));
    }
  }
}

// Channel of element i (0 or 1) of an output tile.
template <typename S>
__device__ int ChannelOf(int tile, int i, int lane) {
  if constexpr (sizeof(S) == 2) return tile * kTileCols + lane % 4 * 2 + i;
  return tile / 2 * 16 + lane % 4 * 4 + i * 2 + tile % 2;
}

// ---- kernel ------------------------------------------------------------------------------------

// Joins the warps in their order and writes the block's partial. `shared` is free.
template <typename S, int KS>
__device__ void WritePartial(const MmaBatch& batch, const RowState<KS>& state, float* shared) {
  constexpr int kDim = Stage<S, KS>::kDim;
  __shared__ float2 sums[kAttendWarps][kTileRows];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float(*const outputs)[kTileRows][kDim] = reinterpret_cast<float(*)[kTileRows][kDim]>(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = GroupSum(state.sum[half], 4);
    const int row = lane / 4 + half * 8;
    if (lane % 4 == 0) sums[warp][row] = make_float2(state.maximum[half], sum);
    if (row >= batch.group) continue;
#pragma unroll
    for (int tile = 0; tile < KS * 4; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        outputs[warp][row][ChannelOf<S>(tile, i, lane)] = state.output[tile][2 * half + i];
      }
    }
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * batch.group;
  for (int unit = static_cast<int>(threadIdx.x); unit < batch.group * kDim;
       unit += kAttendThreads) {
    const int row = unit / kDim;
    const int channel = unit % kDim;
    SoftmaxSum total;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) total.Merge({sums[w][row].x, sums[w][row].y});
    float output = 0;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      output = fmaf(outputs[w][row][channel], Exp2(sums[w][row].x - total.maximum), output);
    }
    batch.out.outputs[first * kDim + unit] = output;
    if (channel == 0) batch.out.sums[first + row] = make_float2(total.maximum, total.sum);
  }
}

// grid (partials)
template <typename S, int KS>
__global__ void __launch_bounds__(kAttendThreads, kAttendBlocksPerSm)
    AttendTokensMmaKernel(const __grid_constant__ MmaBatch batch) {
  using St = Stage<S, KS>;
  constexpr int kQueryParts = sizeof(S) == 1 ? 2 : 1;
  extern __shared__ uint4 stages[];
  AllowDependents();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto block = static_cast<int>(blockIdx.x);
  const MmaItem& item = batch.items[ItemOfBlock(
      batch.num_items, block, [&](int i) -> const AttendCut& { return batch.items[i].cut; })];
  const int local = block - item.cut.first_partial;
  const int h = local / item.cut.splits;
  const int begin = (local - h * item.cut.splits) * item.cut.rows_per_split;
  const int end = min(begin + item.cut.rows_per_split, item.num_rows);
  const int32_t* const tokens = item.tokens == nullptr || !batch.tokens_per_head
                                    ? item.tokens
                                    : item.tokens + static_cast<int64_t>(h) * item.num_tokens;
  const LaneRows rows(item, h, tokens, end, lane);

  // The warp's j-th step begins here; steps without rows are beyond the end.
  const auto row_of = [&](int j) { return begin + (j * kAttendWarps + warp) * kRows; };
  const auto index_of = [&](int j) { return rows.IndexOf(row_of(j) + lane % kRows); };
  uint4* const own_stages = stages + warp * St::kCount * St::kChunks;
  int ahead[St::kCount - 1];
  WaitForEarlierGrids();
#pragma unroll
  for (int j = 0; j < St::kCount - 1; ++j) ahead[j] = index_of(j);
#pragma unroll
  for (int j = 0; j < St::kCount - 1; ++j) {
    if (row_of(j) < end) {
      CopyRows<S, KS>(rows, row_of(j), ahead[j], own_stages + j * St::kChunks, lane);
    }
    CommitCopies();
  }
  int next_index = index_of(St::kCount - 1);
  RowTile<KS> queries[kQueryParts];
  LoadQueries<S, KS>(batch, item, h, lane, queries);

  RowState<KS> state;
  int stage = 0;
  int free_stage = St::kCount - 1;
  for (int j = 0; row_of(j) < end; ++j) {
    WaitForCopies<St::kCount - 2>();
    __syncwarp();  // everyone's copies have come, and everyone is done with the free stage
    const int next = j + St::kCount - 1;
    if (row_of(next) < end) {
      CopyRows<S, KS>(rows, row_of(next), next_index, own_stages + free_stage * St::kChunks, lane);
    }
    CommitCopies();
    next_index = index_of(next + 1);
    uint4* const current = own_stages + stage * St::kChunks;
    float weights[kRowTiles][4];
    MultiplyKeys<S, KS>(queries, current, lane, weights);
    Weigh<KS>(batch.scale_log2, end - row_of(j), sizeof(S) == 1 ? St::Scales(current) : nullptr,
              lane, weights, state);
    AddValues<S, KS>(weights, current, lane, state);
    free_stage = stage;
    stage = stage + 1 == St::kCount ? 0 : stage + 1;
  }
  WaitForCopies<0>();
  __syncthreads();  // all stages are free
  WritePartial<S, KS>(batch, state, reinterpret_cast<float*>(stages));
}

// ---- launch ------------------------------------------------------------------------------------

RowSource SourceOf(const TensorView& view) {
  return {
      .data = view.data,
      .scales = view.scales,
      .head_stride_bytes = view.head_stride_bytes,
      .token_stride_bytes = static_cast<int32_t>(view.token_stride_bytes),
      .scale_token_stride = view.scale_granularity == ScaleGranularity::kHead ? 0 : view.num_heads};
}

// Not const: filled in place, for its size.
void FillBatch(const AttendLaunch& launch, MmaBatch& batch) {
  batch.out = launch.out;
  batch.num_items = static_cast<int>(launch.items.size());
  batch.group = launch.group();
  batch.query_dtype = launch.items[0].queries.dtype;
  batch.queries_aligned = true;
  batch.tokens_per_head = launch.tokens_per_head;
  batch.scale_log2 = launch.scale_log2;
  for (size_t i = 0; i < launch.items.size(); ++i) {
    const AttendTokensItem& from = launch.items[i];
    batch.queries_aligned = batch.queries_aligned && HasAlignedChunks(from.queries);
    batch.items[i] = {.queries = from.queries.data,
                      .query_stride_bytes = from.queries.head_stride_bytes,
                      .keys = SourceOf(from.keys),
                      .values = SourceOf(from.values),
                      .tail_keys = SourceOf(from.tail_keys),
                      .tail_values = SourceOf(from.tail_values),
                      .tokens = from.tokens,
                      .num_tokens = static_cast<int32_t>(from.num_tokens),
                      .num_rows = static_cast<int32_t>(from.num_tokens + from.tail_keys.num_tokens),
                      .cut = launch.cuts[i]};
  }
}

template <typename S, int KS>
cudaError_t LaunchKernel(const AttendLaunch& launch, cudaStream_t stream) {
  constexpr int kSharedBytes =
      std::max(Stage<S, KS>::kSharedBytes,
               kAttendWarps * kTileRows * Stage<S, KS>::kDim * static_cast<int>(sizeof(float)));
  const auto kernel = AttendTokensMmaKernel<S, KS>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  MmaBatch batch = {};
  FillBatch(launch, batch);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.num_blocks));
  config.blockDim = dim3(kAttendThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  return LaunchDependent(config, kernel, batch);
}

// Rows that 16-byte copies can fetch; a view without tokens is never read.
bool HasCopyableRows(const TensorView& view) {
  if (view.num_tokens == 0) return true;
  const int64_t bits =
      reinterpret_cast<intptr_t>(view.data) | view.token_stride_bytes | view.head_stride_bytes;
  return view.block_table == nullptr && bits % kChunkBytes == 0 &&
         view.token_stride_bytes <= INT32_MAX && view.token_stride_bytes >= 0 &&
         IsQuantized(view.dtype) == (view.scales != nullptr);
}

}  // namespace

bool UsesTensorCores(const AttendTokensParams& params) {
  const AttendTokensItem& first = params.items[0];
  const DType dtype = first.keys.dtype;
  const int32_t head_dim = first.keys.head_dim;
  if (first.values.dtype != dtype || (head_dim != 64 && head_dim != 128) ||
      first.queries.num_heads > kTileRows * first.keys.num_heads ||
      DTypeBytes(first.queries.dtype) != 2) {
    return false;
  }
  if (dtype != first.queries.dtype && !IsQuantized(dtype)) return false;
  return std::all_of(params.items.begin(), params.items.end(), [](const AttendTokensItem& item) {
    return HasCopyableRows(item.keys) && HasCopyableRows(item.values) &&
           HasCopyableRows(item.tail_keys) && HasCopyableRows(item.tail_values);
  });
}

cudaError_t AttendTokensMma(const AttendLaunch& launch, cudaStream_t stream) {
  const auto run = [&]<typename S>() {
    return launch.items[0].keys.head_dim == 64 ? LaunchKernel<S, 2>(launch, stream)
                                               : LaunchKernel<S, 4>(launch, stream);
  };
  switch (launch.items[0].keys.dtype) {
    case DType::kFloat16:
      return run.template operator()<__half>();
    case DType::kFloat8E4M3:
      return run.template operator()<E4M3>();
    case DType::kFloat8E5M2:
      return run.template operator()<E5M2>();
    case DType::kInt8:
      return run.template operator()<int8_t>();
    default:
      return run.template operator()<__nv_bfloat16>();
  }
}

}  // namespace dynsplit::kernels
