// SPDX-License-Identifier: Apache-2.0
//
// Pictures of a plan: where the text was cut, what stayed, and what that cost.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/capture.h"
#include "client/cpp/job.h"

namespace dynsplit::cli {

struct PlotData {
  struct Layer {
    std::string label;  // its number in the model
    int64_t num_kept = 0;
    // NaN where not measured.
    double mass_mean = 0, mass_min = 0, error_mean = 0, error_max = 0;
  };

  std::string title;                  // "prose: Alice's Adventures in Wonderland"
  std::string subtitle;               // model and policy
  std::vector<std::string> tokens;    // bytes of each
  std::vector<double> kept_share;     // of the (layer, KV head) sets that keep the token, 0 to 1
  std::vector<int32_t> block_starts;  // [B + 1]
  std::vector<Layer> layers;
  double kept_ratio = 0;  // mean over layers
};

PlotData MakePlotData(const Capture& capture, const CompressResult& result);

// text.png, block_lengths.png, budget.png and receipt.png in `folder`, which is made.
absl::Status PlotAll(const PlotData& data, const std::string& folder);

absl::Status PlotText(const PlotData& data, const std::string& path);
absl::Status PlotBlockLengths(const PlotData& data, const std::string& path);
absl::Status PlotBudget(const PlotData& data, const std::string& path);
absl::Status PlotReceipt(const PlotData& data, const std::string& path);

}  // namespace dynsplit::cli
