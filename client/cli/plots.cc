// SPDX-License-Identifier: Apache-2.0
#include "client/cli/plots.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cli/console.h"
#include "client/cli/report.h"
#include "client/cli/request.h"

namespace dynsplit::cli {
namespace {

const v1::LayerReceipt* FindReceipt(const v1::Receipt& receipt, int32_t layer) {
  for (const v1::LayerReceipt& candidate : receipt.layers()) {
    if (candidate.layer() == layer) return &candidate;
  }
  return nullptr;
}

// Adds one to `counts` for each set of the layer that keeps the token; returns the number of sets.
int64_t CountKept(const LayerOutput& layer, std::vector<int64_t>& counts) {
  const OutputTensor* kept = FindTensor(layer.tensors, v1::TENSOR_KIND_KEPT_TOKENS);
  const int64_t num_groups = std::max(layer.result.plan().num_groups(), 1);
  if (kept == nullptr) {
    // Dense layers keep all, whether or not they say so.
    if (!layer.result.plan().dense()) return 0;
    for (int64_t& count : counts) count += num_groups;
    return num_groups;
  }
  for (const int32_t token : Int32Values(*kept)) {
    if (token >= 0 && std::cmp_less(token, counts.size())) ++counts[static_cast<size_t>(token)];
  }
  return num_groups;
}

}  // namespace

PlotData MakePlotData(const Capture& capture, const CompressResult& result) {
  PlotData data;
  const v1::Plan& plan = result.end.plan();
  data.title = capture.text_kind;
  if (!capture.text_title.empty()) {
    absl::StrAppend(&data.title, data.title.empty() ? "" : ": ", capture.text_title);
  }
  for (int64_t t = 0; t < capture.shape.num_tokens(); ++t) {
    data.tokens.emplace_back(capture.token_text(t));
  }
  std::vector<int64_t> counts(data.tokens.size());
  int64_t num_sets = 0;
  for (const LayerOutput& layer : result.layers) num_sets += CountKept(layer, counts);
  for (const int64_t count : counts) {
    data.kept_share.push_back(
        num_sets == 0 ? 0 : static_cast<double>(count) / static_cast<double>(num_sets));
  }
  if (const OutputTensor* starts =
          FindTensor(result.sequence_tensors, v1::TENSOR_KIND_BLOCK_STARTS)) {
    data.block_starts = Int32Values(*starts);
  }
  const auto beyond = [&data](int32_t start) {
    return start < 0 || std::cmp_greater(start, data.tokens.size());
  };
  std::erase_if(data.block_starts, beyond);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const v1::LayerPlan& decided : plan.layers()) {
    PlotData::Layer& layer = data.layers.emplace_back();
    const auto index = static_cast<size_t>(decided.layer());
    layer.label = absl::StrCat(index < capture.layers.size() ? capture.layers[index].model_layer
                                                             : decided.layer());
    layer.num_kept = decided.num_kept_tokens();
    const v1::LayerReceipt* receipt = FindReceipt(result.end.receipt(), decided.layer());
    layer.mass_mean = receipt == nullptr ? nan : receipt->retained_attention_mass_mean();
    layer.mass_min = receipt == nullptr ? nan : receipt->retained_attention_mass_min();
    layer.error_mean = receipt == nullptr ? nan : receipt->output_relative_error_mean();
    layer.error_max = receipt == nullptr ? nan : receipt->output_relative_error_max();
    data.kept_ratio += static_cast<double>(layer.num_kept) /
                       static_cast<double>(data.tokens.size()) / plan.layers_size();
  }
  data.subtitle =
      absl::StrCat(capture.model, "  ·  ", DescribePolicy(plan.policy()), "  ·  kept ",
                   Percent(data.kept_ratio), " of ", HumanCount(capture.shape.num_tokens()),
                   " tokens, ", HumanCount(plan.num_blocks()), " blocks");
  return data;
}

absl::Status PlotAll(const PlotData& data, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot make folder ", folder, ": ", error.message()));
  }
  absl::Status status = PlotText(data, folder + "/text.png");
  status.Update(PlotBlockLengths(data, folder + "/block_lengths.png"));
  status.Update(PlotBudget(data, folder + "/budget.png"));
  status.Update(PlotReceipt(data, folder + "/receipt.png"));
  return status;
}

}  // namespace dynsplit::cli
