// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "server/cpu/operations.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {
constexpr int64_t kChunk = 4096;  // columns: a piece of each row stays in the first-level cache
}

absl::Status ReduceRows(const ReduceRowsParams& params, const Workspace& workspace) {
  const int64_t fold = params.rows_in / params.rows_out;
  const int64_t chunks = CeilDiv(params.columns, kChunk);
  workspace.threads.ParallelFor(params.rows_out * chunks, [&](int64_t chunk, int /*slot*/) {
    const int64_t r = chunk / chunks;
    const int64_t begin = chunk % chunks * kChunk;
    const int64_t count = std::min(kChunk, params.columns - begin);
    float* out = params.out + r * params.columns + begin;
    float sum[kChunk] = {};
    for (int64_t i = 0; i < fold; ++i) {
      const float* in = params.in + (r * fold + i) * params.columns + begin;
      for (int64_t c = 0; c < count; ++c) sum[c] += in[c];
    }
    if (params.mean) {
      for (int64_t c = 0; c < count; ++c) sum[c] /= static_cast<float>(fold);
    }
    if (params.accumulate) {
      for (int64_t c = 0; c < count; ++c) out[c] += sum[c];
    } else {
      std::copy(sum, sum + count, out);
    }
  });
  return absl::OkStatus();
}

}  // namespace dynsplit::cpu
