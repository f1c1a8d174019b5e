// SPDX-License-Identifier: Apache-2.0
//
// DD-Select for all starts at once. Where a block ends depends on where it starts, so each chunk of
// tokens becomes a map from the position at which the cuts enter it to that at which they leave it;
// maps compose, and are small, because a block is at most `lookahead` tokens long.
//
//   cut      the length of the block that would start at each token, and the map of each chunk
//   compose  the map of each span of chunks
//   enter    where the cuts enter each span
//   emit     where they enter each chunk, and the starts in it
//
// Values are doubles with the CPU's roundings (server/pipeline/segmentation.cc), so that cuts are
// equal.
#include <cstdlib>

#include "cuda/cuda_status.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/operations.h"
#include "cuda/segment_tokens.h"
#include "cuda/tensor.cuh"

namespace dynsplit::kernels {
namespace {

constexpr int kCutThreads = 256;
constexpr int kComposeThreads = 64;
constexpr int kEmitThreads = 128;
constexpr int32_t kEnded = -1;             // the last start lies before
constexpr uint16_t kOpen = 0;              // length of a block whose end is not known
constexpr int64_t kFreeShared = 48 << 10;  // needs no opting in

// From an entry of a chunk or span on.
struct Passage {
  int32_t exit = kEnded;  // position in the next one, below the lookahead
  int32_t num_starts = 0;
};

// Where the cuts enter a span, and the index of the first start there.
struct Entry {
  int32_t position;
  int32_t index;
};

struct Job {
  SegmentTokensParams params;
  SegmentShape shape;
  uint16_t* lengths = nullptr;        // [num_chunks, chunk_tokens]
  Passage* chunk_passages = nullptr;  // [num_chunks, lookahead]
  Passage* span_passages = nullptr;   // [num_spans, lookahead]
  Entry* span_entries = nullptr;      // [num_spans]
};

__device__ float WeightOf(const SegmentTokensParams& p, int64_t token) {
  if (token >= p.num_tokens) return -1;
  const auto id = static_cast<uint32_t>(p.token_ids[token]);  // negative ids lie beyond any
  return id < p.num_weights ? p.weights[id] : -1;
}

// The rule of segmentation.cc, over the weights of the tokens from the block's start on.
class Cutter {
 public:
  // `closeness_terms` holds (1 - balance) * closeness by distance from the ideal end.
  __device__ Cutter(const SegmentTokensParams& params, const double* closeness_terms)
      : params_(params), closeness_terms_(closeness_terms) {}

  __device__ static double ClosenessTerm(const SegmentTokensParams& p, int32_t distance) {
    const double closeness =
        1.0 - static_cast<double>(distance) / static_cast<double>(p.max_deviation + 1);
    return (1.0 - p.balance) * closeness;
  }

  __device__ uint16_t BlockLength(const float* weights) const {
    const int32_t last = params_.block_size + params_.max_deviation;
    int32_t best_end = params_.block_size;
    double best_value = -1;
    float run_weight = -1;  // negative outside of a run
    for (int32_t end = params_.block_size - params_.max_deviation; end <= last; ++end) {
      const float weight = weights[end - 1];
      const bool is_delimiter = weight >= 0;
      if (is_delimiter) run_weight = max(run_weight, weight);
      if (run_weight < 0 || (is_delimiter && end < last)) continue;
      const int32_t run_end = is_delimiter ? end : end - 1;
      const int32_t distance = abs(run_end - params_.block_size);
      const double value =
          params_.balance * static_cast<double>(run_weight) + closeness_terms_[distance];
      if (value > best_value ||
          (value == best_value && distance < abs(best_end - params_.block_size))) {
        best_value = value;
        best_end = run_end;
      }
      run_weight = -1;
    }
    return static_cast<uint16_t>(best_end);
  }

 private:
  const SegmentTokensParams& params_;
  const double* closeness_terms_;
};

// grid (chunks)
__global__ void __launch_bounds__(kCutThreads) CutKernel(const __grid_constant__ Job job) {
  extern __shared__ double shared[];
  const SegmentTokensParams& p = job.params;
  const SegmentShape& shape = job.shape;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  double* const closeness_terms = shared;
  auto* const weights = reinterpret_cast<float*>(closeness_terms + p.max_deviation + 1);
  auto* const lengths = reinterpret_cast<uint16_t*>(weights + shape.chunk_tokens + shape.lookahead);
  AllowDependents();
  for (int32_t d = thread; d <= p.max_deviation; d += kCutThreads) {
    closeness_terms[d] = Cutter::ClosenessTerm(p, d);
  }
  WaitForEarlierGrids();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.chunk_tokens;
#pragma unroll 4
  for (int32_t i = thread; i < shape.chunk_tokens + shape.lookahead; i += kCutThreads) {
    weights[i] = WeightOf(p, begin + i);
  }
  __syncthreads();
  const Cutter cutter(p, closeness_terms);
  for (int32_t i = thread; i < shape.chunk_tokens; i += kCutThreads) {
    const bool is_open = begin + i + shape.lookahead > p.num_tokens;
    const uint16_t length = is_open ? kOpen : cutter.BlockLength(weights + i);
    lengths[i] = length;
    job.lengths[begin + i] = length;
  }
  __syncthreads();
  Passage* const passages = job.chunk_passages + static_cast<int64_t>(blockIdx.x) * shape.lookahead;
  for (int32_t entry = thread; entry < shape.lookahead; entry += kCutThreads) {
    Passage passage;
    int32_t at = entry;
    uint16_t length = kOpen;
    do {
      length = lengths[at];
      at += length;
      ++passage.num_starts;
    } while (length != kOpen && at < shape.chunk_tokens);
    if (length != kOpen) passage.exit = at - shape.chunk_tokens;
    passages[entry] = passage;
  }
}

// Goes on from `entry` through chunks [first, last).
__device__ void Pass(const Job& job, int32_t first, int32_t last, Entry& entry) {
  for (int32_t chunk = first; chunk < last && entry.position != kEnded; ++chunk) {
    const Passage passage =
        job.chunk_passages[static_cast<int64_t>(chunk) * job.shape.lookahead + entry.position];
    entry.position = passage.exit;
    entry.index += passage.num_starts;
  }
}

// grid (spans, entries)
__global__ void __launch_bounds__(kComposeThreads) ComposeKernel(const __grid_constant__ Job job) {
  AllowDependents();
  WaitForEarlierGrids();
  const auto span = static_cast<int32_t>(blockIdx.x);
  const auto position = static_cast<int32_t>(blockIdx.y * kComposeThreads + threadIdx.x);
  if (position >= job.shape.lookahead) return;
  const int32_t first = span * kSegmentSpanChunks;
  Entry entry = {position, 0};
  Pass(job, first, min(first + kSegmentSpanChunks, job.shape.num_chunks), entry);
  job.span_passages[static_cast<int64_t>(span) * job.shape.lookahead + position] = {entry.position,
                                                                                    entry.index};
}

// grid (1), one thread
__global__ void EnterKernel(const __grid_constant__ Job job) {
  AllowDependents();
  WaitForEarlierGrids();
  Entry entry = {0, 0};
  for (int32_t span = 0; span < job.shape.num_spans; ++span) {
    job.span_entries[span] = entry;
    if (entry.position == kEnded) continue;
    const Passage passage =
        job.span_passages[static_cast<int64_t>(span) * job.shape.lookahead + entry.position];
    entry = {passage.exit, entry.index + passage.num_starts};
  }
}

// The block from the last start on is open, unless it is empty.
__device__ void EmitOpen(const SegmentTokensParams& p, int32_t index, int32_t start) {
  const bool is_empty = start == p.num_tokens;
  if (!is_empty) p.block_starts[index + 1] = static_cast<int32_t>(p.num_tokens);
  p.counts[0] = is_empty ? index : index + 1;
  p.counts[1] = start;
}

// grid (chunks)
__global__ void __launch_bounds__(kEmitThreads) EmitKernel(const __grid_constant__ Job job) {
  extern __shared__ uint4 shared_vectors[];
  __shared__ int32_t first_index;
  __shared__ int32_t num_starts;
  const SegmentShape& shape = job.shape;
  auto* const lengths = reinterpret_cast<uint16_t*>(shared_vectors);
  uint16_t* const starts = lengths + shape.chunk_tokens;  // in this chunk
  AllowDependents();
  WaitForEarlierGrids();
  const auto chunk = static_cast<int32_t>(blockIdx.x);
  const int64_t begin = static_cast<int64_t>(chunk) * shape.chunk_tokens;
  constexpr int32_t kVector = sizeof(uint4) / sizeof(uint16_t);
  const auto* const vectors = reinterpret_cast<const uint4*>(job.lengths + begin);
  for (auto i = static_cast<int32_t>(threadIdx.x); i < shape.chunk_tokens / kVector;
       i += kEmitThreads) {
    shared_vectors[i] = vectors[i];
  }
  Entry entry = {kEnded, 0};
  if (threadIdx.x == 0) {
    const int32_t span = chunk / kSegmentSpanChunks;
    entry = job.span_entries[span];
    Pass(job, span * kSegmentSpanChunks, chunk, entry);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t count = 0;
    if (entry.position != kEnded) {
      int32_t at = entry.position;
      uint16_t length = kOpen;
      do {
        starts[count++] = static_cast<uint16_t>(at);
        length = lengths[at];
        at += length;
      } while (length != kOpen && at < shape.chunk_tokens);
      if (length == kOpen) {
        EmitOpen(job.params, entry.index + count - 1, static_cast<int32_t>(begin + at));
      }
    }
    first_index = entry.index;
    num_starts = count;
  }
  __syncthreads();
  for (auto i = static_cast<int32_t>(threadIdx.x); i < num_starts; i += kEmitThreads) {
    job.params.block_starts[first_index + i] = static_cast<int32_t>(begin + starts[i]);
  }
}

absl::Status LaunchStep(void (*kernel)(Job), const char* name, const Job& job, dim3 grid,
                        int threads, int64_t shared_bytes, const Launch& launch) {
  if (shared_bytes > kFreeShared) {
    absl::Status status =
        CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)),
                   "cudaFuncSetAttribute");
    if (!status.ok()) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = launch.stream;
  return CudaStatus(LaunchDependent(config, kernel, job), name);
}

}  // namespace

absl::Status SegmentTokens(const SegmentTokensParams& params, const Launch& launch) {
  const SegmentShape shape =
      SegmentShapeOf(params.num_tokens, params.block_size + params.max_deviation);
  constexpr auto kPassage = static_cast<int64_t>(sizeof(Passage));
  const int64_t length_bytes =
      int64_t{shape.num_chunks} * shape.chunk_tokens * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t chunk_bytes = int64_t{shape.num_chunks} * shape.lookahead * kPassage;
  const int64_t span_bytes = int64_t{shape.num_spans} * shape.lookahead * kPassage;
  absl::StatusOr<Buffer> scratch =
      launch.Scratch(length_bytes + chunk_bytes + span_bytes +
                     shape.num_spans * static_cast<int64_t>(sizeof(Entry)));
  if (!scratch.ok()) return scratch.status();
  std::byte* const passages = scratch->data() + length_bytes;  // whole vectors before
  const Job job = {.params = params,
                   .shape = shape,
                   .lengths = scratch->as<uint16_t>(),
                   .chunk_passages = reinterpret_cast<Passage*>(passages),
                   .span_passages = reinterpret_cast<Passage*>(passages + chunk_bytes),
                   .span_entries = reinterpret_cast<Entry*>(passages + chunk_bytes + span_bytes)};
  const dim3 chunks(static_cast<unsigned>(shape.num_chunks));
  const dim3 spans(static_cast<unsigned>(shape.num_spans),
                   static_cast<unsigned>(CeilDiv(shape.lookahead, kComposeThreads)));
  absl::Status status = LaunchStep(CutKernel, "CutKernel", job, chunks, kCutThreads,
                                   shape.ChunkSharedBytes(params.max_deviation), launch);
  if (status.ok()) {
    status.Update(
        LaunchStep(ComposeKernel, "ComposeKernel", job, spans, kComposeThreads, 0, launch));
  }
  if (status.ok()) {
    status.Update(LaunchStep(EnterKernel, "EnterKernel", job, dim3(1), 1, 0, launch));
  }
  if (status.ok()) {
    status.Update(LaunchStep(EmitKernel, "EmitKernel", job, chunks, kEmitThreads,
                             shape.EmitSharedBytes(), launch));
  }
  return status;
}

}  // namespace dynsplit::kernels
