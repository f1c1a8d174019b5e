// SPDX-License-Identifier: Apache-2.0
//
// The query rows of a KV head, cut into blocks of at most kBlockColumns and transposed.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "server/cpu/attention_tile.h"
#include "server/cpu/operations.h"

namespace dynsplit::cpu {

struct RowBlock {
  int64_t set = 0;        // which set of rows
  int64_t first_row = 0;  // within the set
  int64_t num_rows = 0;
  int64_t columns = 0;              // num_rows rounded up; columns behind num_rows are zero queries
  const float* queries = nullptr;   // [depth, columns]
  const int32_t* limits = nullptr;  // [columns] last position seen; -1 behind num_rows
};

class RowBlocks {
 public:
  struct Source {
    int64_t num_sets = 0;
    int64_t rows_per_set = 0;
    int32_t depth = 0;
    // Writes `depth` floats, already multiplied by the softmax scale.
    absl::FunctionRef<void(int64_t set, int64_t row, float* out)> load;
    // Last visible position of a row.
    absl::FunctionRef<int32_t(int64_t row)> limit;
  };
  static absl::StatusOr<RowBlocks> Create(const Source& source, const Workspace& workspace);

  // Ordered by set, then row. Every set has the same number of blocks.
  const std::vector<RowBlock>& blocks() const { return blocks_; }
  int64_t blocks_per_set() const { return blocks_per_set_; }
  int64_t max_columns() const { return blocks_.front().columns; }

 private:
  RowBlocks() = default;
  std::vector<RowBlock> blocks_;
  int64_t blocks_per_set_ = 0;
  Buffer queries_;
  Buffer limits_;
};

// Rows of `queries` [W, Hq, D] that attend to KV head h, in the order query head, then position:
// row = a_in_group * W + i.
inline int64_t QueryOfRow(int64_t row, int64_t num_queries) { return row % num_queries; }
inline int64_t GroupHeadOfRow(int64_t row, int64_t num_queries) { return row / num_queries; }

}  // namespace dynsplit::cpu
