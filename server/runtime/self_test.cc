// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/self_test.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/pipeline/compress.h"

namespace dynsplit {
namespace {

constexpr int32_t kTokens = 64;
constexpr int32_t kHeadDim = 8;
constexpr int32_t kWindow = 4;
constexpr int32_t kPointedAt = 20;  // token whose key all queries point at

SequenceSpec TestSpec() {
  SequenceSpec spec;
  spec.shape = {.num_layers = 1,
                .num_query_heads = 1,
                .num_kv_heads = 1,
                .num_tokens = kTokens,
                .head_dim = kHeadDim};
  spec.policy.segmentation.method = SegmentationPolicy::Method::kNone;
  spec.policy.scoring.pooling_kernel = 1;
  spec.policy.budget.target = BudgetPolicy::Target::kTokens;
  spec.policy.budget.tokens_per_head = 6;
  spec.policy.protection.num_sink_tokens = 1;
  spec.policy.protection.num_recent_tokens = kWindow;
  spec.supply.num_window_queries = kWindow;
  spec.key_dtype = DType::kFloat32;
  spec.value_dtype = DType::kFloat32;
  return spec;
}

// Keys, values, queries one after the other.
void FillRows(float* rows) {
  float* values = rows + kTokens * kHeadDim;
  float* queries = values + kTokens * kHeadDim;
  std::fill_n(rows, kTokens * kHeadDim, 0.0F);
  for (int32_t i = 0; i < kTokens * kHeadDim; ++i) values[i] = static_cast<float>(i) / 16;
  rows[kPointedAt * kHeadDim] = 8;
  std::fill_n(queries, kWindow * kHeadDim, 0.0F);
  for (int32_t w = 0; w < kWindow; ++w) queries[w * kHeadDim] = 8;
}

absl::Status Differs(const std::string& what) {
  return absl::InternalError(absl::StrCat("self-test: ", what));
}

}  // namespace

absl::Status SelfTest(Backend& backend) {
  absl::StatusOr<std::unique_ptr<Stream>> stream = backend.CreateStream();
  if (!stream.ok()) return stream.status();
  constexpr int64_t kRowBytes = int64_t{kHeadDim} * 4;
  absl::StatusOr<Buffer> host = backend.AllocateHost((2 * kTokens + kWindow) * kRowBytes);
  if (!host.ok()) return host.status();
  FillRows(host->as<float>());
  absl::StatusOr<Buffer> device = backend.ToDevice(*host, **stream);
  if (!device.ok()) return device.status();
  absl::StatusOr<std::unique_ptr<SequenceContext>> context =
      PrepareSequence(TestSpec(), std::span<const int32_t>(), nullptr, backend, **stream);
  if (!context.ok()) return context.status();
  LayerTensors tensors;
  tensors.keys = DenseView(device->data(), DType::kFloat32, kTokens, 1, kHeadDim);
  tensors.values =
      DenseView(device->data() + kTokens * kRowBytes, DType::kFloat32, kTokens, 1, kHeadDim);
  tensors.queries =
      DenseView(device->data() + 2 * kTokens * kRowBytes, DType::kFloat32, kWindow, 1, kHeadDim);
  absl::StatusOr<LayerResult> result =
      CompressLayer(**context, tensors, /*with_pages=*/true, backend, **stream);
  if (!result.ok()) return result.status();
  absl::StatusOr<Buffer> pages = backend.ToHost(std::move(result->pages.value_pages), **stream);
  if (!pages.ok()) return pages.status();
  if (absl::Status status = (*stream)->Synchronize(); !status.ok()) return status;

  const std::vector<int32_t> expected = {0, kPointedAt, 60, 61, 62, 63};
  const std::vector<int32_t>& kept = result->decision.plan.kept;
  if (kept != expected) return Differs("other tokens were kept than attention points at");
  for (size_t slot = 0; slot < kept.size(); ++slot) {
    const std::byte* row = host->data() + (kTokens + kept[slot]) * kRowBytes;
    if (std::memcmp(pages->data() + static_cast<int64_t>(slot) * kRowBytes, row, kRowBytes) != 0) {
      return Differs(absl::StrCat("slot ", slot, " is not the row of token ", kept[slot]));
    }
  }
  if (!(result->receipt.mass_mean > 0.9)) {
    return Differs(absl::StrCat("the receipt claims a mass of ", result->receipt.mass_mean));
  }
  return absl::OkStatus();
}

}  // namespace dynsplit
