// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/row_blocks.h"

#include <algorithm>
#include <utility>

#include "server/cpu/tensor.h"

namespace dynsplit::cpu {

absl::StatusOr<RowBlocks> RowBlocks::Create(const Source& source, const Workspace& workspace) {
  RowBlocks out;
  out.blocks_per_set_ = CeilDiv(source.rows_per_set, kBlockColumns);
  const int64_t set_columns =
      (out.blocks_per_set_ - 1) * kBlockColumns +
      CeilDiv(source.rows_per_set - (out.blocks_per_set_ - 1) * kBlockColumns, kColumnAlignment) *
          kColumnAlignment;
  const int64_t columns = source.num_sets * set_columns;
  auto queries = workspace.Scratch<float>(columns * source.depth);
  if (!queries.ok()) return queries.status();
  auto limits = workspace.Scratch<int32_t>(columns);
  if (!limits.ok()) return limits.status();
  out.queries_ = *std::move(queries);
  out.limits_ = *std::move(limits);

  int64_t first_column = 0;
  for (int64_t set = 0; set < source.num_sets; ++set) {
    for (int64_t row = 0; row < source.rows_per_set; row += kBlockColumns) {
      RowBlock block{.set = set, .first_row = row};
      block.num_rows = std::min(kBlockColumns, source.rows_per_set - row);
      block.columns = CeilDiv(block.num_rows, kColumnAlignment) * kColumnAlignment;
      block.queries = out.queries_.as<float>() + first_column * source.depth;
      block.limits = out.limits_.as<int32_t>() + first_column;
      first_column += block.columns;
      out.blocks_.push_back(block);
    }
  }
  workspace.threads.ParallelFor(
      static_cast<int64_t>(out.blocks_.size()), [&](int64_t chunk, int /*slot*/) {
        const RowBlock& block = out.blocks_[static_cast<size_t>(chunk)];
        auto* transposed = const_cast<float*>(block.queries);
        auto* last = const_cast<int32_t*>(block.limits);
        std::vector<float> row(static_cast<size_t>(source.depth));
        for (int64_t j = 0; j < block.columns; ++j) {
          const bool real = j < block.num_rows;
          if (real) {
            source.load(block.set, block.first_row + j, row.data());
          } else {
            std::fill(row.begin(), row.end(), 0.0F);
          }
          last[j] = real ? source.limit(block.first_row + j) : -1;
          for (size_t c = 0; c < row.size(); ++c) {
            transposed[static_cast<int64_t>(c) * block.columns + j] = row[c];
          }
        }
      });
  return out;
}

}  // namespace dynsplit::cpu
