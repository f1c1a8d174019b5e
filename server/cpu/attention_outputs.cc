// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/attention_outputs.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "server/cpu/attention_tile.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kMinChunkTiles = 4;
constexpr int64_t kMaxChunks = 64;                  // of a head
constexpr int64_t kBatchBytes = int64_t{32} << 20;  // of partial results
constexpr int kMaxRow = 0, kSumRow = 1, kPartialRow = 2, kOutputRow = 5;

constexpr int kNumPartials = kOutputRow - kPartialRow;

class Outputs {
 public:
  using Finish = absl::FunctionRef<void(int64_t, const AttentionResult&)>;

  Outputs(const AttentionOutputsParams& params, const Workspace& workspace, Finish finish)
      : p_(params),
        workspace_(workspace),
        finish_(finish),
        dim_(params.head_dim),
        columns_(params.rows.max_columns()),
        with_values_(params.with_values),
        state_floats_((kOutputRow + (with_values_ ? dim_ : 0)) * columns_) {
    const int64_t tiles = CeilDiv(p_.num_keys, kTileRows);
    chunk_keys_ = std::max(kMinChunkTiles, CeilDiv(tiles, kMaxChunks)) * kTileRows;
    num_chunks_ = CeilDiv(p_.num_keys, chunk_keys_);
  }

  absl::Status Run();

 private:
  // Of a thread: decoded keys, decoded values, logits.
  struct Scratch {
    float* keys;
    float* values;
    float* logits;
  };
  int64_t SlotFloats() const { return kTileRows * (2 * dim_ + columns_); }
  Scratch SlotScratch(int slot) const {
    float* base = scratch_.as<float>() + slot * SlotFloats();
    return {base, base + kTileRows * dim_, base + kTileRows * 2 * dim_};
  }
  const RowBlock& Block(int64_t index) const {
    return p_.rows.blocks()[static_cast<size_t>(index)];
  }
  // State of (block, chunk): rows of `columns_` floats as the k...Row constants say.
  float* State(int64_t block, int64_t chunk) const {
    return states_.as<float>() + ((block - batch_begin_) * num_chunks_ + chunk) * state_floats_;
  }
  int32_t Position(int64_t head, int64_t key) const {
    return p_.positions == nullptr ? static_cast<int32_t>(key)
                                   : p_.positions[head * p_.positions_stride + key];
  }

  void AttendChunk(int64_t head, int64_t chunk, const Scratch& scratch) const;
  void AttendTile(const RowBlock& block, int64_t begin, int64_t end, const Scratch& scratch,
                  float* state) const;
  void AddPartialSums(const RowBlock& block, LogitTile tile, int64_t begin, float* state) const;
  void Combine(int64_t block) const;

  const AttentionOutputsParams& p_;
  const Workspace& workspace_;
  const Finish finish_;
  const int64_t dim_;
  const int64_t columns_;
  const bool with_values_;
  const int64_t state_floats_;
  int64_t chunk_keys_ = 0;
  int64_t num_chunks_ = 0;
  int64_t batch_begin_ = 0;
  Buffer scratch_;
  Buffer states_;
};

absl::Status Outputs::Run() {
  const int64_t per_head = p_.rows.blocks_per_set();
  const auto num_heads = static_cast<int64_t>(p_.rows.blocks().size()) / per_head;
  const int64_t head_floats = per_head * num_chunks_ * state_floats_;
  const int64_t batch_heads = std::clamp<int64_t>(kBatchBytes / (head_floats * 4), 1, num_heads);
  auto scratch = workspace_.Scratch<float>(workspace_.threads.num_slots() * SlotFloats());
  if (!scratch.ok()) return scratch.status();
  auto states = workspace_.Scratch<float>(batch_heads * head_floats);
  if (!states.ok()) return states.status();
  scratch_ = *std::move(scratch);
  states_ = *std::move(states);
  for (int64_t first = 0; first < num_heads; first += batch_heads) {
    const int64_t heads = std::min(batch_heads, num_heads - first);
    batch_begin_ = first * per_head;
    workspace_.threads.ParallelFor(heads * num_chunks_, [&](int64_t index, int slot) {
      AttendChunk(first + index / num_chunks_, index % num_chunks_, SlotScratch(slot));
    });
    workspace_.threads.ParallelFor(
        heads * per_head, [&](int64_t index, int /*slot*/) { Combine(batch_begin_ + index); });
  }
  return absl::OkStatus();
}

void Outputs::AttendChunk(int64_t head, int64_t chunk, const Scratch& scratch) const {
  const int64_t per_head = p_.rows.blocks_per_set();
  const int64_t end = std::min((chunk + 1) * chunk_keys_, p_.num_keys);
  for (int64_t b = head * per_head; b < (head + 1) * per_head; ++b) {
    float* state = State(b, chunk);
    std::fill(state, state + columns_, -std::numeric_limits<float>::infinity());
    std::fill(state + columns_, state + state_floats_, 0.0F);
  }
  const auto h = static_cast<int32_t>(head);
  for (int64_t t = chunk * chunk_keys_; t < end; t += kTileRows) {
    const int64_t tile_end = std::min(t + kTileRows, end);
    p_.load(h, t, tile_end, scratch.keys, scratch.values);
    for (int64_t b = head * per_head; b < (head + 1) * per_head; ++b) {
      AttendTile(Block(b), t, tile_end, scratch, State(b, chunk));
    }
  }
}

void Outputs::AttendTile(const RowBlock& block, int64_t begin, int64_t end, const Scratch& scratch,
                         float* state) const {
  const auto [least, most] = std::minmax_element(block.limits, block.limits + block.num_rows);
  if (Position(block.set, begin) > *most) return;  // no row sees the tile
  MultiplyTile({.a = scratch.keys,
                .a_row_stride = dim_,
                .a_depth_stride = 1,
                .b = block.queries,
                .rows = end - begin,
                .depth = dim_,
                .columns = block.columns,
                .c = scratch.logits});
  const int32_t* positions =
      p_.positions == nullptr ? nullptr : p_.positions + block.set * p_.positions_stride + begin;
  const LogitTile tile{.values = scratch.logits,
                       .rows = end - begin,
                       .columns = block.columns,
                       .positions = positions,
                       .first_position = static_cast<int32_t>(begin),
                       .limits = Position(block.set, end - 1) > *least ? block.limits : nullptr};
  float* max = state + kMaxRow * columns_;
  float before[kBlockColumns];
  std::copy(max, max + block.columns, before);
  UpdateMax(tile, max);
  if (!std::equal(before, before + block.columns, max)) {
    float factors[kBlockColumns];
    ExpDifference(before, max, block.columns, factors);
    for (int row = kSumRow; row < kOutputRow; ++row) {
      ScaleColumns(state + row * columns_, 1, block.columns, factors);
    }
    if (with_values_) ScaleColumns(state + kOutputRow * columns_, dim_, block.columns, factors);
  }
  Exponentiate(tile, max, nullptr, state + kSumRow * columns_);
  AddPartialSums(block, tile, begin, state);
  if (!with_values_) return;
  MultiplyTile({.a = scratch.values,
                .a_row_stride = 1,
                .a_depth_stride = dim_,
                .b = scratch.logits,
                .rows = dim_,
                .depth = end - begin,
                .columns = block.columns,
                .accumulate = true,
                .c = state + kOutputRow * columns_});
}

void Outputs::AddPartialSums(const RowBlock& block, LogitTile tile, int64_t begin,
                             float* state) const {
  float* partial = state + kPartialRow * columns_;
  if (p_.key_weights != nullptr) {
    tile.limits = nullptr;  // what a row does not see is zero by now
    AddColumnSums(tile, p_.key_weights + block.set * p_.key_weights_stride + begin, partial);
  }
  if (p_.partial_ranges == nullptr) return;
  for (int n = 0; n < kNumPartials; ++n) {
    int32_t floors[kBlockColumns] = {};
    int32_t limits[kBlockColumns];
    std::fill(limits, limits + block.columns, -1);
    for (int64_t j = 0; j < block.num_rows; ++j) {
      const auto range = (*p_.partial_ranges)(n, block.first_row + j);
      floors[j] = range.begin;
      limits[j] = range.end - 1;
    }
    tile.limits = limits;
    AddColumnSumsFrom(tile, floors, partial + n * columns_);
  }
}

// Adds the chunks' states in chunk order into the first.
void Outputs::Combine(int64_t index) const {
  const RowBlock& block = Block(index);
  float* total = State(index, 0);
  float largest[kBlockColumns];
  std::fill(largest, largest + kBlockColumns, -std::numeric_limits<float>::infinity());
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    const float* max = State(index, chunk) + kMaxRow * columns_;
    for (int64_t j = 0; j < block.columns; ++j) largest[j] = std::max(largest[j], max[j]);
  }
  // Outputs have rows of block.columns floats, what stands before them rows of columns_.
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    float* state = State(index, chunk);
    float factors[kBlockColumns];
    ExpDifference(state + kMaxRow * columns_, largest, block.columns, factors);
    for (int row = kSumRow; row < kOutputRow; ++row) {
      ScaleColumns(state + row * columns_, 1, block.columns, factors);
    }
    if (with_values_) ScaleColumns(state + kOutputRow * columns_, dim_, block.columns, factors);
    if (chunk == 0) continue;
    for (int64_t i = columns_; i < state_floats_; ++i) total[i] += state[i];
  }
  std::copy(largest, largest + block.columns, total + kMaxRow * columns_);
  AttentionResult result;
  result.max = total + kMaxRow * columns_;
  result.sum = total + kSumRow * columns_;
  for (int n = 0; n < kNumPartials; ++n) {
    result.partial[n] = total + (kPartialRow + n) * columns_;
  }
  if (with_values_) result.outputs = total + kOutputRow * columns_;
  finish_(index, result);
}

}  // namespace

absl::Status AttentionOutputs(const AttentionOutputsParams& params, const Workspace& workspace,
                              absl::FunctionRef<void(int64_t, const AttentionResult&)> finish) {
  return Outputs(params, workspace, finish).Run();
}

}  // namespace dynsplit::cpu
