// SPDX-License-Identifier: Apache-2.0
#include "client/cli/session_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cli/console.h"
#include "client/cli/report.h"

namespace dynsplit::cli {
namespace {

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Mean of the steps after the first, which moves everything; NaN where there are none.
double LaterMovedRows(const StepsReport& steps) {
  if (steps.moved_rows.size() < 2) return std::nan("");
  const auto sum =
      std::accumulate(steps.moved_rows.begin() + 1, steps.moved_rows.end(), int64_t{0});
  return static_cast<double>(sum) / static_cast<double>(steps.moved_rows.size() - 1);
}

std::string ResidenceText(const v1::SessionInfo& session) {
  const bool demoted = session.num_demotions() > session.num_restorations();
  if (session.residence() == v1::SessionOptions::RESIDENCE_DEVICE) return "in device memory";
  return demoted ? "in host memory (demoted)" : "in host memory";
}

}  // namespace

std::string DescribeSession(const v1::SessionInfo& session) {
  const v1::SessionBytes& bytes = session.bytes();
  const auto key_value = static_cast<double>(bytes.key_value());
  const auto index = static_cast<double>(bytes.index());
  const int64_t tokens = session.shape().num_tokens();
  const std::string open_block =
      session.open_block_begin() < tokens
          ? absl::StrCat(", the last open from ", HumanCount(session.open_block_begin()), " on")
          : ", none open";
  return absl::StrCat("session   ", session.session_id(), "\npolicy    ",
                      DescribePolicy(session.policy()), "\ntokens    ", HumanCount(tokens), " in ",
                      HumanCount(session.num_blocks()), " blocks", open_block, "; room for ",
                      HumanCount(session.capacity_tokens()), "\nK and V   ", HumanBytes(key_value),
                      " ", ResidenceText(session), "\nindex     ", HumanBytes(index), " (",
                      Percent(index / key_value), " of K and V)\nlease     ",
                      HumanDuration(absl::Seconds(session.lease_seconds_left())), " unless used\n");
}

std::string DescribeSteps(const StepsReport& steps) {
  std::vector<std::vector<std::string>> rows = {
      {"layer", "tokens read", "share", "attention mass", "least head"}};
  for (size_t l = 0; l < steps.layers.size(); ++l) {
    const StepsReport::Layer& layer = steps.layers[l];
    const int64_t tokens = layer.dense ? steps.num_tokens : steps.tokens_per_head;
    rows.push_back({absl::StrCat(l), HumanCount(tokens) + (layer.dense ? " (dense)" : ""),
                    Percent(static_cast<double>(tokens) / static_cast<double>(steps.num_tokens)),
                    Percent(layer.mass_mean), Percent(layer.mass_min)});
  }
  std::string text = Table(rows);
  absl::StrAppend(&text, "\nselect    p50 ", HumanDuration(absl::Seconds(Median(steps.seconds))),
                  " (", HumanDuration(absl::Seconds(Median(steps.server_seconds))),
                  " in the server) over ", steps.seconds.size(), " steps of ", steps.layers.size(),
                  " layers\n");
  if (steps.budget_raised_by_protection) {
    absl::StrAppend(&text, "budget    raised to what is always read: sinks, recent, open block\n");
  }
  if (steps.moved_rows.empty()) {
    return absl::StrCat(text, "reuse     not tried: one step's rows fill more than a message\n");
  }
  const auto chosen = static_cast<double>(steps.chosen_rows.back());
  absl::StrAppend(&text, "reuse     step 1 moved ", HumanCount(steps.moved_rows.front()), " of ",
                  HumanCount(steps.chosen_rows.front()), " rows");
  if (steps.moved_rows.size() > 1) {
    const double later = LaterMovedRows(steps);
    absl::StrAppend(&text, "; steps 2 to ", steps.moved_rows.size(), " moved ", Decimal(later, 0),
                    " each (", Percent(later / chosen), ")");
  }
  return text + "\n";
}

nlohmann::json JsonSteps(const StepsReport& steps, bool with_tokens) {
  const auto number = [](double value) {
    return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
  };
  nlohmann::json json = {{"steps", steps.seconds.size()},
                         {"tokens_per_head", steps.tokens_per_head},
                         {"budget_raised_by_protection", steps.budget_raised_by_protection},
                         {"select_p50_seconds", Median(steps.seconds)},
                         {"server_p50_seconds", Median(steps.server_seconds)},
                         {"moved_rows", steps.moved_rows},
                         {"chosen_rows", steps.chosen_rows},
                         {"moved_rows_mean_after_first", number(LaterMovedRows(steps))},
                         {"layers", nlohmann::json::array()}};
  const auto set_size = static_cast<std::ptrdiff_t>(steps.tokens_per_head);
  auto set = steps.tokens.begin();
  for (const StepsReport::Layer& layer : steps.layers) {
    nlohmann::json entry = {{"dense", layer.dense},
                            {"attention_mass_mean", number(layer.mass_mean)},
                            {"attention_mass_min", number(layer.mass_min)}};
    for (int32_t group = 0; group < steps.num_groups; ++group, set += set_size) {
      if (with_tokens) entry["tokens"].push_back(std::vector<int32_t>(set, set + set_size));
    }
    json["layers"].push_back(std::move(entry));
  }
  return json;
}

}  // namespace dynsplit::cli
