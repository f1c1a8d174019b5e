// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/row_math.h"
#include "server/cpu/tensor.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kChunk = 256;  // tokens: decoded rows stay in the second-level cache

float Norm(const float* row, int64_t count) { return std::sqrt(DotProduct(row, row, count)); }

// Runs f(head, chunk, first token, number of rows, decoded rows) for all pieces of all heads.
template <typename F>
absl::Status ForDecodedChunks(const TensorView& keys, const Workspace& workspace, F f) {
  auto scratch = workspace.Scratch<float>(workspace.threads.num_slots() * kChunk * keys.head_dim);
  if (!scratch.ok()) return scratch.status();
  const int64_t chunks = CeilDiv(keys.num_tokens, kChunk);
  workspace.threads.ParallelFor(keys.num_heads * chunks, [&](int64_t index, int slot) {
    const auto head = static_cast<int32_t>(index / chunks);
    const int64_t begin = index % chunks * kChunk;
    const int64_t end = std::min(begin + kChunk, keys.num_tokens);
    float* rows = scratch->as<float>() + slot * kChunk * keys.head_dim;
    DecodeTile(keys, head, begin, end, keys.head_dim, rows);
    f(head, index % chunks, begin, end - begin, rows);
  });
  return absl::OkStatus();
}

absl::Status ScoreNorms(const ScoreKeysParams& params, const Workspace& workspace) {
  const TensorView& keys = params.keys;
  return ForDecodedChunks(
      keys, workspace,
      [&](int32_t head, int64_t /*chunk*/, int64_t begin, int64_t count, const float* rows) {
        float* out = params.scores + head * keys.num_tokens + begin;
        for (int64_t r = 0; r < count; ++r) {
          out[r] = -Norm(rows + r * keys.head_dim, keys.head_dim);
        }
      });
}

absl::Status ScoreDifferences(const ScoreKeysParams& params, const Workspace& workspace) {
  const TensorView& keys = params.keys;
  const int64_t dim = keys.head_dim;
  const int64_t chunks = CeilDiv(keys.num_tokens, kChunk);
  auto partial = workspace.Scratch<float>(keys.num_heads * chunks * dim);
  if (!partial.ok()) return partial.status();
  // Sums of unit keys of each chunk; the norms stay in the output until the second pass.
  absl::Status status = ForDecodedChunks(
      keys, workspace,
      [&](int32_t head, int64_t chunk, int64_t begin, int64_t count, const float* rows) {
        float* norms = params.scores + head * keys.num_tokens + begin;
        float* sum = partial->as<float>() + (head * chunks + chunk) * dim;
        std::fill(sum, sum + dim, 0.0F);
        for (int64_t r = 0; r < count; ++r) {
          norms[r] = Norm(rows + r * dim, dim);
          if (norms[r] > 0) AddScaled(rows + r * dim, 1.0F / norms[r], dim, sum);
        }
      });
  if (!status.ok()) return status;
  // The mean's direction, in chunk order; its length cancels in the cosine.
  std::vector<float> directions(static_cast<size_t>(keys.num_heads * dim), 0.0F);
  for (int64_t h = 0; h < keys.num_heads; ++h) {
    float* direction = directions.data() + h * dim;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      AddScaled(partial->as<float>() + (h * chunks + chunk) * dim, 1.0F, dim, direction);
    }
    const float norm = Norm(direction, dim);
    for (int64_t c = 0; c < dim; ++c) direction[c] = norm > 0 ? direction[c] / norm : 0.0F;
  }
  return ForDecodedChunks(
      keys, workspace,
      [&](int32_t head, int64_t /*chunk*/, int64_t begin, int64_t count, const float* rows) {
        float* out = params.scores + head * keys.num_tokens + begin;
        const float* direction = directions.data() + head * dim;
        for (int64_t r = 0; r < count; ++r) {
          const float norm = out[r];
          out[r] = norm > 0 ? -DotProduct(rows + r * dim, direction, dim) / norm : 0.0F;
        }
      });
}

}  // namespace

absl::Status ScoreKeys(const ScoreKeysParams& params, const Workspace& workspace) {
  return params.method == ScoringPolicy::Method::kKeyNorm ? ScoreNorms(params, workspace)
                                                          : ScoreDifferences(params, workspace);
}

}  // namespace dynsplit::cpu
