// SPDX-License-Identifier: Apache-2.0
//
// The one virtual interface of the data path: numeric operations on a device. Two implementations,
// server/cpu and cuda/, with one file an operation of the same name on both sides.
//
// Contract
//   * Parity: given equal inputs, integer and byte results are equal on all backends; float results
//     agree within fp32 accumulation error. Accumulation is in fp32; inputs of any DType are
//     decoded exactly (code * scale for quantised types) first.
//   * Pointers in params are device pointers of this backend unless marked host.
//   * Operations enqueue on the stream and may return before the work is done; results are valid
//     after Stream::Synchronize(). Errors of earlier work on the stream may surface in later calls.
//   * Sizes are validated by callers (64-bit, on the host) before an operation is called;
//   "Requires"
//     lines are preconditions, not checked input.
//   * Scores are finite. Where a NaN slips in (overflowing logits) it orders as -infinity; -0
//   equals 0.
//   * A device fault is INTERNAL with reason DEVICE_FAULT; the backend is unusable afterwards and
//     Healthy() returns it.
// Thread safety: all methods may be called concurrently on different streams.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/policy.h"
#include "server/pipeline/types.h"

namespace dynsplit {

// Owner of backend memory. Move-only; frees on destruction (stream-ordered where allocated so).
class Buffer {
 public:
  using Deleter = absl::AnyInvocable<void(std::byte*, int64_t) &&>;

  Buffer() = default;
  Buffer(std::byte* data, int64_t size_bytes, Deleter deleter)
      : data_(data), size_bytes_(size_bytes), deleter_(std::move(deleter)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      Reset();
      data_ = std::exchange(other.data_, nullptr);
      size_bytes_ = std::exchange(other.size_bytes_, 0);
      deleter_ = std::move(other.deleter_);
      other.deleter_ = nullptr;
    }
    return *this;
  }
  ~Buffer() { Reset(); }

  std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  bool empty() const { return size_bytes_ == 0; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  void Reset() {
    if (data_ != nullptr && deleter_) std::move(deleter_)(data_, size_bytes_);
    data_ = nullptr;
    size_bytes_ = 0;
    deleter_ = nullptr;
  }

 private:
  std::byte* data_ = nullptr;
  int64_t size_bytes_ = 0;
  Deleter deleter_;
};

// Work queue of a backend: work given to one stream runs in order.
class Stream {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kMaxMarks = 64;

  virtual ~Stream() = default;
  // Waits for all work enqueued so far; returns its first error.
  virtual absl::Status Synchronize() = 0;
  // Notes the moment when all work enqueued so far is done; returns its number for TimeOf. What
  // goes wrong here is told by Synchronize.
  virtual int64_t Mark() = 0;
  // When that was, by the host's clock. Requires: Synchronize() has returned since, and at most
  // kMaxMarks marks are as young as this one.
  virtual Clock::time_point TimeOf(int64_t mark) = 0;
};

struct BackendInfo {
  std::string name;    // "cpu" or "cuda"
  std::string device;  // "NVIDIA H100 80GB HBM3", or the processor's vector target and threads
  int64_t memory_bytes = 0;
  std::string uuid;  // of the device, 16 bytes; empty for the CPU
};

// Where long-lived memory lies.
enum class Residence : uint8_t { kDevice, kHost };

// Attention of the last W queries over all keys (SnapKV's score).
//   p[i,a,:]    = softmax over keys t <= T-W+i of scale * q[i,a].k[h(a),t]      h(a) = a / G
//   s[h,t]      = mean over the group's heads of pool( mean over i of p[i,a,t] )   for t < T-W
//               = pool( sqrt( mean over i and the group's heads of p[i,a,t]^2 ) )  kRootMeanSquare;
//                 squares below the smallest normal float may count as 0
//   s[h,t]      = 0 for t >= T-W: window tokens are protected, not scored
// pool runs over t in [0, T-W): average divides by the full kernel (zero padding), max pads with
// -inf. Requires: 1 <= W < T; kernel odd.
struct ScoreWindowParams {
  TensorView queries;  // [W, Hq, D]: positions T-W .. T-1
  TensorView keys;     // [T, Hkv, D]
  const float* lse =
      nullptr;  // [W, Hq] natural log-sum-exp of the scaled, causal logits; null = computed
  float softmax_scale = 0;
  int32_t pooling_kernel = 1;
  ScoringPolicy::Pooling pooling = ScoringPolicy::Pooling::kAverage;
  ScoringPolicy::QueryReduction reduction = ScoringPolicy::QueryReduction::kMean;
  float* scores = nullptr;  // out [Hkv, T]
};

// Scores from keys alone.
//   kKeyNorm        s[h,t] = -||k||
//   kKeyDifference  s[h,t] = -cos(k, mean over t of k/||k||); a zero key has k/||k|| = 0 and s = 0
struct ScoreKeysParams {
  TensorView keys;  // [T, Hkv, D]
  ScoringPolicy::Method method = ScoringPolicy::Method::kKeyNorm;
  float* scores = nullptr;  // out [Hkv, T]
};

// out[r, :] (+)= reduce over the rows_in/rows_out consecutive input rows of r. Summation in row
// order.
struct ReduceRowsParams {
  const float* in = nullptr;  // [rows_in, columns]
  int32_t rows_in = 0;
  int32_t rows_out = 0;  // divides rows_in
  int64_t columns = 0;
  bool mean = false;        // else sum
  bool accumulate = false;  // add to out instead of overwriting it
  float* out = nullptr;     // [rows_out, columns]
};

// Token scores -> block scores. Sums run in token order in fp32 so that results are equal on all
// backends.
struct ReduceBlocksParams {
  const float* token_scores = nullptr;  // [rows, T]
  int32_t rows = 0;
  int64_t num_tokens = 0;
  const int32_t* block_starts = nullptr;  // [B + 1]
  int64_t num_blocks = 0;
  ScoringPolicy::BlockReduction reduction = ScoringPolicy::BlockReduction::kMean;
  float* block_scores = nullptr;  // out [rows, B]
};

// Summaries of the blocks of one layer, for all KV heads: row j of head h starts
// j * block_stride_bytes + h * head_stride_bytes behind each pointer and holds D elements.
// kFloat8E4M3: value = code * scale, with one scale for min and max, and one for mean, at index
// h * scale_head_stride + j. Each scale is the smallest power of two s >= 2^-120 with
// amax <= 448 * s (amax over what shares the scale; 1 where amax is 0), so that scaling is exact.
struct BlockSummaries {
  DType dtype = DType::kFloat32;  // a float type or kFloat8E4M3
  std::byte* min = nullptr;       // both or neither
  std::byte* max = nullptr;
  std::byte* mean = nullptr;
  int64_t block_stride_bytes = 0;
  int64_t head_stride_bytes = 0;
  float* bound_scales = nullptr;  // kFloat8E4M3 only
  float* mean_scales = nullptr;
  int64_t scale_head_stride = 0;  // elements
};
// Row-major [B, Hkv, D] of a float type; null pointers = absent.
BlockSummaries DenseSummaries(DType dtype, int32_t num_kv_heads, int32_t head_dim, void* min,
                              void* max, void* mean);

// Fixed-size representation of unequal blocks (V2F step a): element-wise min and max, or mean, of
// the block's keys. Min and max are exact in a float input's type; summaries of quantised input
// are float32, bfloat16 or e4m3. Where the output type is narrower than the decoded keys, minima
// are rounded down and maxima up, so that they still bound the keys. Zeros come out as +0. Means
// are sums in token order over the length in fp32, rounded to nearest even.
// Requires: the keys' type, float32, bfloat16 or kFloat8E4M3 as output.
struct SummarizeBlocksParams {
  TensorView keys;                        // [T, Hkv, D]
  const int32_t* block_starts = nullptr;  // [B + 1]
  int64_t first_block = 0;                // blocks [first_block, num_blocks) are written
  int64_t num_blocks = 0;
  BlockSummaries summaries;  // out
};

// Block scores from summaries (V2F step b), for several layers of several sequences at once.
//   raw[i,a,j]  = sum_c max(q_c * max_jc, q_c * min_jc)   (upper bound of q.k over the block), or
//                 q.mean_j
//   p[i,a,:]    = softmax over blocks of scale * raw, each weighted by its length
//   s[h,j]      = sum over the group's heads of mean over i of p[i,a,j] / length_j
// (divided by the length again, so that a block ranks by what one of its tokens is worth).
struct ScoreBlocksItem {
  TensorView queries;                     // [W, Hq, D], a float type
  BlockSummaries summaries;               // min and max: bound variant, else mean
  const int32_t* block_starts = nullptr;  // [B + 1]
  int64_t num_blocks = 0;
  float* block_scores = nullptr;  // out [Hkv, B]
};
// Requires: all items have equal types, head counts, D, W, strides and variant.
struct ScoreBlocksParams {
  std::span<const ScoreBlocksItem> items;  // host
  int32_t num_kv_heads = 0;
  float softmax_scale = 0;
};

// Scores of tokens by their own keys, for several layers of several sequences at once: what decides
// among the candidates that blocks propose.
//   p[i,a,:]    = softmax over places j of scale * q[i,a].k[h(a), tokens[g(h), j]]
//   s[h,j]      = sum over the group's heads of mean over i of p[i,a,j]
// What a refined step reads, in bytes a KV head: the index (for e4m3 means of C tokens T * D / C),
// candidates * D * bytes of a key's element, and, where it is attended to, n rows of K and V; with
// bf16, C 14, T 131,072, n = T / 10 and 4 n candidates that is 1.2 + 13.4 + 6.7 of 67 MB (D 128).
struct ScoreTokensItem {
  TensorView queries;               // [W, Hq, D], a float type
  TensorView keys;                  // [T, Hkv, D]
  const int32_t* tokens = nullptr;  // [groups, num_tokens] or null: rows 0 .. num_tokens - 1
  int64_t num_tokens = 0;           // places, >= 0
  float* token_scores = nullptr;    // out [Hkv, num_tokens]
};
// Requires: all items have equal types, head counts, D and W.
struct ScoreTokensParams {
  std::span<const ScoreTokensItem> items;  // host
  int32_t groups = 1;                      // of tokens: 1 or Hkv
  float softmax_scale = 0;
};

// Block ranks -> tokens of a decode step (V2F step c), for several layers and sequences at once:
// all tokens of [0, prefix_end) and [suffix_begin, T), then the other tokens of blocks in order
// (score desc, block asc) until num_selected; the last block gives its leading ones. What
// SelectTokens does in exact mode without token scores, where what is protected is a head and a
// tail.
struct SelectBlocksItem {
  const float* block_scores = nullptr;    // [groups, B]
  const int32_t* block_starts = nullptr;  // [B + 1]; null: every token is a block, B = T
  int64_t num_blocks = 0;
  int64_t num_tokens = 0;     // T
  int64_t prefix_end = 0;     // 0 <= prefix_end <= suffix_begin <= T
  int64_t suffix_begin = 0;   // prefix_end + T - suffix_begin <= num_selected
  int64_t num_selected = 0;   // <= T
  int32_t* tokens = nullptr;  // out [groups, num_selected], ascending per group
  // What is written for token t of a group where tokens are places among candidates; null = t.
  // Requires block_starts null.
  const int32_t* names = nullptr;  // [groups, T], ascending per group
};
// Requires: block_starts are null in all items or in none.
struct SelectBlocksParams {
  std::span<const SelectBlocksItem> items;  // host
  int32_t groups = 0;
};

// Attention of one query a head over chosen rows, for several layers and sequences at once; what an
// engine does with a selection.
//   o[a] = softmax over r of (scale * q[a].k[h(a),r]) . v[h(a),r],  r over tokens[g(h), :] of keys
//   and values and over all of tail_keys and tail_values;  lse[a] = log sum exp of the logits
//   (natural)
struct AttendTokensItem {
  TensorView queries;  // [1, Hq, D]
  TensorView keys;     // [T, Hkv, D]
  TensorView values;
  const int32_t* tokens = nullptr;  // [groups, num_tokens] or null: rows 0 .. num_tokens - 1
  int64_t num_tokens = 0;           // rows read of keys and values, >= 0
  TensorView tail_keys;             // [M, Hkv, D], M >= 0; types of keys and values
  TensorView tail_values;
  void* output = nullptr;  // out [Hq, D], the queries' type
  float* lse = nullptr;    // out [Hq]; null = not wanted
};
// Requires: all items have equal types, head counts and D, and at least one row.
struct AttendTokensParams {
  std::span<const AttendTokensItem> items;  // host
  int32_t groups = 1;                       // of tokens: 1 or Hkv
  float softmax_scale = 0;
};

// The reuse pipeline: slots that hold the rows of one step are brought to those of the next, for
// several layers and sequences at once. Per KV head h: slots whose token is still wanted are left
// alone; the others, in ascending order, take the wanted tokens that no slot holds, in ascending
// order. Rows move bit for bit, with their scales.
struct RefreshRowsItem {
  TensorView keys;                  // [T, Hkv, D]
  TensorView values;                // [T, Hkv, D]
  const int32_t* wanted = nullptr;  // [groups, num_rows], ascending per group
  int32_t* held = nullptr;          // in, out [Hkv, num_rows]: token of each slot, -1 = none
  int32_t* moved_slots = nullptr;   // out [Hkv, num_rows]: slots that changed, ascending; null = no
  int32_t* num_moved = nullptr;     // out [Hkv]
  // out [Hkv, num_rows, D] in the types of keys and values; null = only slots are kept up to date
  std::byte* key_rows = nullptr;
  std::byte* value_rows = nullptr;
  float* key_scales = nullptr;  // out [Hkv, num_rows]; null unless quantised
  float* value_scales = nullptr;
};
// Requires: all items have equal types, head counts, D and num_rows; held tokens per head distinct
// (but for -1) and in [0, T).
struct RefreshRowsParams {
  std::span<const RefreshRowsItem> items;  // host
  int32_t groups = 1;                      // of wanted: 1 or Hkv
  int64_t num_rows = 0;
};

// Block ranks -> kept tokens (V2F step c).
// Exact mode (num_whole_blocks == 0): keep all protected tokens, then the unprotected tokens of
// blocks in order (score desc, block asc) until num_kept tokens; the last block gives its best
// tokens by (token score desc, token asc), or its leading ones when token_scores is null.
// Whole-block mode: blocks that hold a protected token first, then (score desc, block asc), until
// num_whole_blocks blocks; all blocks with protected tokens are kept in any case.
struct SelectTokensParams {
  const float* block_scores = nullptr;  // [groups, B]
  const float* token_scores = nullptr;  // [groups, T] or null
  int32_t groups = 0;
  int64_t num_tokens = 0;                     // T
  const int32_t* block_starts = nullptr;      // [B + 1]
  int64_t num_blocks = 0;                     // B
  const uint8_t* protected_tokens = nullptr;  // [T], 1 = protected; no operation's output
  int64_t num_kept = 0;                       // exact mode: protected tokens <= num_kept <= T
  int64_t num_whole_blocks = 0;               // whole-block mode: 1..B
  int32_t* kept =
      nullptr;  // out, ascending per group; row stride num_kept (exact) or T (whole blocks)
  int32_t* kept_counts = nullptr;  // out [groups]
};

// cos and sin of multiples of the RoPE frequencies, so that any angle up to the context length is
// two complex products away: angle(delta) = coarse[delta / 256] * fine[delta % 256]. Both tables:
// interleaved (cos, sin) float pairs, computed in double.
//   c = cc * cf - sc * sf,  s = sc * cf + cc * sf      (cc, sc) = coarse, (cf, sf) = fine
// Turning a channel pair (x, y) by -delta positions: (x * c + y * s, y * c - x * s). Each product
// and each sum is rounded to fp32 on its own, so that bytes are equal on all backends.
struct RotationTable {
  const float* coarse = nullptr;  // [ceil(T / 256) + 1, rotary_dim / 2, 2]
  const float* fine = nullptr;    // [256, rotary_dim / 2, 2]
  int32_t rotary_dim = 0;         // 0 = no rotation
  bool interleaved = false;
};

// Kept rows -> uniform pages, encoded, optionally re-rotated; K and V, or layers, at once.
// Slot s of head h takes token kept[g(h), s], g(h) = h if groups == heads else 0, or token s where
// kept is null. Slots >= num_kept of the last page are zero bytes (scale 1). Rotation turns the key
// of original position p to position s (by -(p - s)), in fp32 with separate multiply and add
// roundings, then rounds to the output type. Encoding as the Encoding message says; an all-zero
// scale group has scale 1. As-is copies bits, and gathers scales of quantised input.
struct GatherPagesItem {
  TensorView source;              // [T, Hkv, D]
  const int32_t* kept = nullptr;  // [groups, num_kept]; null = all in order, num_kept of them
  int32_t groups = 1;
  int64_t num_kept = 0;
  int32_t page_size = 16;  // 1 = rows without padding
  EncodingPolicy::Format format = EncodingPolicy::Format::kAsIs;
  ScaleGranularity scale_granularity = ScaleGranularity::kHead;
  DType out_dtype = DType::kBFloat16;  // OutputDType(source.dtype, format, rotated)
  RotationTable rotation;
  void* pages = nullptr;    // out [num_pages, page_size, Hkv, D]
  float* scales = nullptr;  // out [Hkv] or [num_pages, page_size, Hkv]; null for unquantised output
  // Where slots lie instead of densely: slot s of head h at pages + s * slot_stride_bytes +
  // h * head_stride_bytes, its scale (kTokenHead) at scales[s + h * scale_head_stride]. 0 = dense.
  int64_t slot_stride_bytes = 0;
  int64_t head_stride_bytes = 0;
  int64_t scale_head_stride = 0;  // elements
};
// Items need nothing in common; consecutive ones of equal types and formats share launches.
struct GatherPagesParams {
  std::span<const GatherPagesItem> items;  // host
};
// kAsIs: source's type, but bfloat16 for rotated quantised input.
DType OutputDType(DType source, EncodingPolicy::Format format, bool rotated);

// What the consumer loses: attention of the queries over everything against over the kept pages.
// Queries are positions T-W..T-1, causal. Mass uses the original keys:
//   mass[a]     = mean over i of  sum_{t kept} p[i,a,t]
//   err_sq[a]   = sum over i of ||o_kept[i,a] - o_full[i,a]||^2,   ref_sq[a] = sum over i of
//   ||o_full[i,a]||^2
// where o_kept is softmax attention over kept_keys / kept_values (decoded), with the query turned
// by -query_shift positions when rotation.rotary_dim > 0. A query with no kept key <= its position
// has o_kept = 0.
struct MeasureAttentionParams {
  TensorView queries;    // [W, Hq, D]
  TensorView keys;       // [T, Hkv, D]
  TensorView values;     // data null: only mass is computed
  TensorView kept_keys;  // [num_kept, Hkv, D]; data null: only mass is computed
  TensorView kept_values;
  const int32_t* kept = nullptr;  // [groups, num_kept]
  int32_t groups = 1;
  int64_t num_kept = 0;
  RotationTable rotation;
  int64_t query_shift = 0;
  float softmax_scale = 0;
  float* mass = nullptr;    // out [Hq]
  float* err_sq = nullptr;  // out [Hq]; null with values null
  float* ref_sq = nullptr;  // out [Hq]
};

// Attention mass of query rows over three spans of keys (delimiter calibration, section 3.1):
//   drop = [0, lo), overlap = [lo, hi), own = [hi, position]; mean over query heads; sums to 1.
struct MeasureSpansParams {
  TensorView queries;                  // [N, Hq, D]
  const int32_t* positions = nullptr;  // [N]
  const int32_t* lo = nullptr;         // [N], 0 <= lo <= hi <= position + 1
  const int32_t* hi = nullptr;         // [N]
  TensorView keys;                     // [T, Hkv, D]
  float softmax_scale = 0;
  float* masses = nullptr;  // out [N, 3]: drop, overlap, own
};

// First token with a NaN or infinity (after decoding), or num_tokens; for several tensors at once.
struct CheckFiniteItem {
  TensorView tensor;
  int32_t* first_bad_token = nullptr;  // out [1]
};
struct CheckFiniteParams {
  std::span<const CheckFiniteItem> items;  // host
};

// DD-Select (segmentation.h, Method::kDynamic) by a table of weights, for all starts at once.
// Requires: 0 < T < 2^31 and what a validated policy has: 0 <= max_deviation < block_size <= 4096,
// balance in [0, 1].
struct SegmentTokensParams {
  const int32_t* token_ids = nullptr;  // [T]
  int64_t num_tokens = 0;              // T
  const float* weights = nullptr;      // [num_weights] by token id; negative = no delimiter
  int64_t num_weights = 0;             // ids beyond are no delimiters
  int32_t block_size = 0;
  int32_t max_deviation = 0;
  double balance = 0;
  int32_t* block_starts = nullptr;  // out [B + 1]; room for [MaxSegmentStarts]
  int32_t* counts = nullptr;        // out [2]: B, and the first token of the open block
};
// B + 1 at most.
int64_t MaxSegmentStarts(int64_t num_tokens, int32_t block_size, int32_t max_deviation);

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const = 0;
  // OK, or the fault that made the device unusable.
  virtual absl::Status Healthy() const = 0;

  virtual absl::StatusOr<std::unique_ptr<Stream>> CreateStream() = 0;
  // Device memory, 256-byte aligned. RESOURCE_EXHAUSTED when the pool's cap is reached.
  virtual absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) = 0;
  // Host memory that the device copies from and to at full rate (pinned on CUDA), 64-byte aligned.
  virtual absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) = 0;
  // Device copy of host memory; on the CPU a non-owning alias. Valid while `host` lives and is
  // unchanged.
  virtual absl::StatusOr<Buffer> ToDevice(const Buffer& host, Stream& stream) = 0;
  // Host copy of device memory (complete after Synchronize); on the CPU the same memory, moved.
  virtual absl::StatusOr<Buffer> ToHost(Buffer device, Stream& stream) = 0;
  // Long-lived memory of exactly this size, 256-byte aligned, that operations read and write
  // wherever it lies (kHost is pinned). Takes milliseconds, and giving it back may wait for the
  // device. RESOURCE_EXHAUSTED beyond the caps that Allocate and AllocateHost have, too.
  virtual absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) = 0;
  // Names an AllocateResident(kDevice) buffer to other processes (cudaIpcMemHandle_t, 64 bytes).
  // UNIMPLEMENTED on the CPU.
  virtual absl::StatusOr<std::string> ExportHandle(const Buffer& buffer) = 0;
  // Maps `size_bytes` of another process's device memory from `offset_bytes` behind the base of the
  // allocation that `handle` names. The same allocation may be imported more than once.
  // INVALID_ARGUMENT for what is no handle of this device or smaller, UNIMPLEMENTED on the CPU.
  virtual absl::StatusOr<Buffer> ImportHandle(std::string_view handle, int64_t offset_bytes,
                                              int64_t size_bytes) = 0;
  // Makes mapped host memory readable and writable by operations at full rate. The result's data()
  // is what operations take; it must go before the memory does.
  virtual absl::StatusOr<Buffer> RegisterHost(std::byte* data, int64_t size_bytes) = 0;
  // Copies between any two of: device, resident, pinned and registered memory.
  virtual absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                            Stream& stream) = 0;
  // Bytes of device and pinned host memory in use by live buffers.
  virtual int64_t device_bytes_in_use() const = 0;
  virtual int64_t host_bytes_in_use() const = 0;

  virtual absl::Status ScoreWindow(const ScoreWindowParams& params, Stream& stream) = 0;
  virtual absl::Status ScoreKeys(const ScoreKeysParams& params, Stream& stream) = 0;
  virtual absl::Status ReduceRows(const ReduceRowsParams& params, Stream& stream) = 0;
  virtual absl::Status ReduceBlocks(const ReduceBlocksParams& params, Stream& stream) = 0;
  virtual absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, Stream& stream) = 0;
  virtual absl::Status ScoreBlocks(const ScoreBlocksParams& params, Stream& stream) = 0;
  virtual absl::Status ScoreTokens(const ScoreTokensParams& params, Stream& stream) = 0;
  virtual absl::Status SelectTokens(const SelectTokensParams& params, Stream& stream) = 0;
  virtual absl::Status GatherPages(const GatherPagesParams& params, Stream& stream) = 0;
  virtual absl::Status MeasureAttention(const MeasureAttentionParams& params, Stream& stream) = 0;
  virtual absl::Status MeasureSpans(const MeasureSpansParams& params, Stream& stream) = 0;
  virtual absl::Status CheckFinite(const CheckFiniteParams& params, Stream& stream) = 0;
  virtual absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& stream) = 0;
  virtual absl::Status AttendTokens(const AttendTokensParams& params, Stream& stream) = 0;
  virtual absl::Status RefreshRows(const RefreshRowsParams& params, Stream& stream) = 0;
  virtual absl::Status SegmentTokens(const SegmentTokensParams& params, Stream& stream) = 0;
};

}  // namespace dynsplit
