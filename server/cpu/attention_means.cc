// SPDX-License-Identifier: Apache-2.0
//
// Without log-sum-exps, a weight is exp(logit - lse) with an lse that is known only after the last
// key. Exponentials relative to the tile's own maximum are kept in memory until then, for a batch
// of row blocks small enough to stay in the last-level cache; computing the logits twice would cost
// twice the arithmetic.
#include "server/cpu/attention_means.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "server/cpu/attention_tile.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kBatchBytes = int64_t{16} << 20;

class Means {
 public:
  Means(const AttentionMeansParams& params, const Workspace& workspace)
      : p_(params),
        workspace_(workspace),
        columns_(params.rows.max_columns()),
        num_tiles_(CeilDiv(params.num_keys, kTileRows)) {}

  absl::Status Run() {
    auto keys = workspace_.Scratch<float>(workspace_.threads.num_slots() * kTileRows * p_.depth);
    if (!keys.ok()) return keys.status();
    keys_ = *std::move(keys);
    return p_.lse != nullptr ? RunOnePass() : RunBatches();
  }

 private:
  using Span = std::pair<int64_t, int64_t>;

  const std::vector<RowBlock>& blocks() const { return p_.rows.blocks(); }
  Span KeysOf(int64_t tile) const {
    return {tile * kTileRows, std::min((tile + 1) * kTileRows, p_.num_keys)};
  }
  float* SlotKeys(int slot) const { return keys_.as<float>() + slot * kTileRows * p_.depth; }

  LogitTile Logits(const RowBlock& block, int64_t tile, const float* keys, float* out) const {
    const auto [begin, end] = KeysOf(tile);
    MultiplyTile({.a = keys,
                  .a_row_stride = p_.depth,
                  .a_depth_stride = 1,
                  .b = block.queries,
                  .rows = end - begin,
                  .depth = p_.depth,
                  .columns = block.columns,
                  .c = out});
    return Tile(block, tile, out);
  }
  LogitTile Tile(const RowBlock& block, int64_t tile, float* values) const {
    const auto [begin, end] = KeysOf(tile);
    const bool masked =
        p_.causal && end - 1 > *std::min_element(block.limits, block.limits + block.num_rows);
    return {.values = values,
            .rows = end - begin,
            .columns = block.columns,
            .first_position = static_cast<int32_t>(begin),
            .limits = masked ? block.limits : nullptr};
  }

  absl::Status RunOnePass();
  absl::Status RunBatches();
  void AddTo(float* out, const LogitTile& tile, const float* weights) const {
    p_.squares ? AddRowSquares(tile, weights, out) : AddRowSums(tile, weights, out);
  }
  void ExponentiateTile(int64_t first, int64_t last, int64_t tile, int slot);
  void FinishBlock(int64_t index);
  void AddTile(int64_t set, int64_t first, int64_t last, int64_t tile);

  const AttentionMeansParams& p_;
  const Workspace& workspace_;
  const int64_t columns_;
  const int64_t num_tiles_;
  Buffer keys_;  // [slots, kTileRows, depth]
  // Of a batch. Block b of a batch has its exponentials at b * num_keys * columns_.
  int64_t batch_begin_ = 0;
  Buffer exponentials_;  // [batch, num_keys, columns]
  Buffer max_, sum_;     // [batch, tiles, columns]; then max_ holds the tile's row weights
};

absl::Status Means::RunOnePass() {
  auto logits = workspace_.Scratch<float>(workspace_.threads.num_slots() * kTileRows * columns_);
  if (!logits.ok()) return logits.status();
  const int64_t per_set = p_.rows.blocks_per_set();
  const int64_t num_sets = static_cast<int64_t>(blocks().size()) / per_set;
  std::vector<float> reference(blocks().size() * static_cast<size_t>(columns_), 0.0F);
  for (size_t b = 0; b < blocks().size(); ++b) {
    for (int64_t j = 0; j < blocks()[b].num_rows; ++j) {
      reference[b * static_cast<size_t>(columns_) + static_cast<size_t>(j)] =
          (*p_.lse)(blocks()[b].set, blocks()[b].first_row + j);
    }
  }
  workspace_.threads.ParallelFor(num_sets * num_tiles_, [&](int64_t chunk, int slot) {
    const int64_t set = chunk / num_tiles_;
    const int64_t tile = chunk % num_tiles_;
    const auto [begin, end] = KeysOf(tile);
    float* values = logits->as<float>() + slot * kTileRows * columns_;
    float* out = p_.sums + set * p_.num_keys + begin;
    p_.load_keys(set, begin, end, SlotKeys(slot));
    std::fill(out, out + (end - begin), 0.0F);
    for (int64_t b = set * per_set; b < (set + 1) * per_set; ++b) {
      const RowBlock& block = blocks()[static_cast<size_t>(b)];
      float weights[kBlockColumns] = {};  // padding columns weigh nothing
      float unused[kBlockColumns] = {};
      std::fill(weights, weights + block.num_rows, p_.row_weight);
      const LogitTile logit_tile = Logits(block, tile, SlotKeys(slot), values);
      Exponentiate(logit_tile, reference.data() + b * columns_, nullptr, unused);
      AddTo(out, logit_tile, weights);
    }
  });
  return absl::OkStatus();
}

absl::Status Means::RunBatches() {
  const int64_t block_floats = p_.num_keys * columns_;
  const auto num_blocks = static_cast<int64_t>(blocks().size());
  const int64_t batch = std::clamp<int64_t>(kBatchBytes / (block_floats * 4), 1, num_blocks);
  auto exponentials = workspace_.Scratch<float>(batch * block_floats);
  if (!exponentials.ok()) return exponentials.status();
  auto max = workspace_.Scratch<float>(batch * num_tiles_ * columns_);
  if (!max.ok()) return max.status();
  auto sum = workspace_.Scratch<float>(batch * num_tiles_ * columns_);
  if (!sum.ok()) return sum.status();
  exponentials_ = *std::move(exponentials);
  max_ = *std::move(max);
  sum_ = *std::move(sum);

  for (batch_begin_ = 0; batch_begin_ < num_blocks; batch_begin_ += batch) {
    const int64_t batch_end = std::min(batch_begin_ + batch, num_blocks);
    // Runs of blocks with the same set share the loading of keys and the output row.
    std::vector<Span> runs;
    for (int64_t b = batch_begin_; b < batch_end; ++b) {
      const bool same = b > batch_begin_ && blocks()[static_cast<size_t>(b)].set ==
                                                blocks()[static_cast<size_t>(b - 1)].set;
      if (same) {
        runs.back().second = b + 1;
      } else {
        runs.emplace_back(b, b + 1);
      }
    }
    const int64_t chunks = static_cast<int64_t>(runs.size()) * num_tiles_;
    workspace_.threads.ParallelFor(chunks, [&](int64_t chunk, int slot) {
      const auto [first, last] = runs[static_cast<size_t>(chunk / num_tiles_)];
      ExponentiateTile(first, last, chunk % num_tiles_, slot);
    });
    workspace_.threads.ParallelFor(batch_end - batch_begin_, [&](int64_t chunk, int /*slot*/) {
      FinishBlock(batch_begin_ + chunk);
    });
    workspace_.threads.ParallelFor(chunks, [&](int64_t chunk, int /*slot*/) {
      const auto [first, last] = runs[static_cast<size_t>(chunk / num_tiles_)];
      AddTile(blocks()[static_cast<size_t>(first)].set, first, last, chunk % num_tiles_);
    });
  }
  return absl::OkStatus();
}

void Means::ExponentiateTile(int64_t first, int64_t last, int64_t tile, int slot) {
  const auto [begin, end] = KeysOf(tile);
  p_.load_keys(blocks()[static_cast<size_t>(first)].set, begin, end, SlotKeys(slot));
  for (int64_t b = first; b < last; ++b) {
    const RowBlock& block = blocks()[static_cast<size_t>(b)];
    const int64_t in_batch = b - batch_begin_;
    float* max = max_.as<float>() + (in_batch * num_tiles_ + tile) * columns_;
    float* sum = sum_.as<float>() + (in_batch * num_tiles_ + tile) * columns_;
    std::fill(max, max + columns_, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + columns_, 0.0F);
    float* values =
        exponentials_.as<float>() + in_batch * p_.num_keys * columns_ + begin * block.columns;
    const LogitTile logit_tile = Logits(block, tile, SlotKeys(slot), values);
    UpdateMax(logit_tile, max);
    Exponentiate(logit_tile, max, p_.key_weights == nullptr ? nullptr : p_.key_weights + begin,
                 sum);
  }
}

// Tile maxima and sums -> the factor that turns a tile's exponentials into softmax weights.
void Means::FinishBlock(int64_t index) {
  const RowBlock& block = blocks()[static_cast<size_t>(index)];
  const int64_t offset = (index - batch_begin_) * num_tiles_ * columns_;
  float* max = max_.as<float>() + offset;
  const float* sum = sum_.as<float>() + offset;
  float largest[kBlockColumns];
  std::fill(largest, largest + kBlockColumns, -std::numeric_limits<float>::infinity());
  float total[kBlockColumns] = {};
  for (int64_t tile = 0; tile < num_tiles_; ++tile) {
    for (int64_t j = 0; j < block.columns; ++j) {
      largest[j] = std::max(largest[j], max[tile * columns_ + j]);
    }
  }
  for (int64_t tile = 0; tile < num_tiles_; ++tile) {
    float* factors = max + tile * columns_;
    ExpDifference(factors, largest, block.columns, factors);
    for (int64_t j = 0; j < block.columns; ++j) total[j] += sum[tile * columns_ + j] * factors[j];
  }
  for (int64_t j = 0; j < block.columns; ++j) {
    total[j] = j < block.num_rows ? p_.row_weight / total[j] : 0.0F;
  }
  ScaleColumns(max, num_tiles_, columns_, total);
}

void Means::AddTile(int64_t set, int64_t first, int64_t last, int64_t tile) {
  const auto [begin, end] = KeysOf(tile);
  float* out = p_.sums + set * p_.num_keys + begin;
  for (int64_t b = first; b < last; ++b) {
    const RowBlock& block = blocks()[static_cast<size_t>(b)];
    if (block.first_row == 0) std::fill(out, out + (end - begin), 0.0F);
    const int64_t in_batch = b - batch_begin_;
    float* values =
        exponentials_.as<float>() + in_batch * p_.num_keys * columns_ + begin * block.columns;
    AddTo(out, Tile(block, tile, values),
          max_.as<float>() + (in_batch * num_tiles_ + tile) * columns_);
  }
}

}  // namespace

absl::Status AttentionMeans(const AttentionMeansParams& params, const Workspace& workspace) {
  return Means(params, workspace).Run();
}

}  // namespace dynsplit::cpu
