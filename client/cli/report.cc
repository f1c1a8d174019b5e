// SPDX-License-Identifier: Apache-2.0
#include "client/cli/report.h"

#include <google/protobuf/util/json_util.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/cli/console.h"
#include "client/cpp/file_io.h"

namespace dynsplit::cli {
namespace {

using Json = nlohmann::json;

// METHOD_WINDOW_QUERIES, "METHOD_" -> window-queries
std::string Choice(const std::string& name, size_t prefix) {
  return absl::StrReplaceAll(absl::AsciiStrToLower(name.substr(std::min(prefix, name.size()))),
                             {{"_", "-"}});
}
constexpr size_t kMethod = sizeof("METHOD_") - 1;

std::string DescribeSegmentation(const v1::Segmentation& segmentation) {
  std::string text = Choice(v1::Segmentation::Method_Name(segmentation.method()), kMethod);
  if (segmentation.method() == v1::Segmentation::METHOD_FIXED) {
    absl::StrAppend(&text, "(", segmentation.block_size(), ")");
  } else if (segmentation.method() == v1::Segmentation::METHOD_DYNAMIC) {
    absl::StrAppend(&text, "(", segmentation.block_size(), "±", segmentation.max_deviation(),
                    segmentation.profile().empty() ? "" : ", ", segmentation.profile(), ")");
  }
  return text;
}

std::string DescribeBudget(const v1::Budget& budget) {
  std::string method = Choice(v1::Budget::Method_Name(budget.method()), kMethod);
  switch (budget.target_case()) {
    case v1::Budget::kKeptRatio:
      return absl::StrCat(method, " ", Percent(budget.kept_ratio()));
    case v1::Budget::kTokensPerHead:
      return absl::StrCat(method, " ", budget.tokens_per_head(), " tokens");
    case v1::Budget::kBytes:
      return absl::StrCat(method, " ", HumanBytes(static_cast<double>(budget.bytes())));
    default:
      return method;
  }
}

// JSON has no NaN: protobuf writes the string, scripts want null.
void NullifyNan(Json& json) {
  if (json.is_string() && json.get_ref<const std::string&>() == "NaN") json = nullptr;
  if (!json.is_structured()) return;
  for (Json& element : json) NullifyNan(element);
}

Json Number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

double MeanKept(const v1::Plan& plan) {
  double sum = 0;
  for (const v1::LayerPlan& layer : plan.layers())
    sum += static_cast<double>(layer.num_kept_tokens());
  return plan.layers().empty() ? 0 : sum / plan.layers_size();
}

absl::StatusOr<Json> ReadObject(const std::string& path) {
  if (!std::filesystem::exists(path)) return Json::object();
  std::ifstream file(path);
  Json json = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object())
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a JSON object"));
  return json;
}

std::string Cell(const std::string& key, const Json& value) {
  if (value.is_null()) return "-";
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_number()) return value.dump();
  const auto number = value.get<double>();
  if (key.starts_with("bytes_")) return HumanBytes(number);
  if (key == "seconds") return HumanDuration(absl::Seconds(number));
  if (key == "ratio" || key.ends_with("_mean")) return absl::StrFormat("%.4f", number);
  if (number == std::floor(number)) return HumanCount(static_cast<int64_t>(number));
  return absl::StrFormat("%.1f", number);
}

}  // namespace

std::string DescribePolicy(const v1::Policy& policy) {
  std::string text =
      absl::StrCat(policy.preset(), ": ", DescribeSegmentation(policy.segmentation()), ", ",
                   Choice(v1::Scoring::Method_Name(policy.scoring().method()), kMethod), ", ",
                   DescribeBudget(policy.budget()), ", ",
                   Choice(v1::Transform_Name(policy.transform()), sizeof("TRANSFORM_") - 1),
                   ", scope ", Choice(v1::Scope_Name(policy.scope()), sizeof("SCOPE_") - 1));
  for (const auto& [name, format] : {std::pair("keys", policy.encoding().key()),
                                     std::pair("values", policy.encoding().value())}) {
    if (format == v1::Encoding::FORMAT_UNSPECIFIED || format == v1::Encoding::FORMAT_AS_IS)
      continue;
    absl::StrAppend(&text, ", ", name, " ",
                    Choice(v1::Encoding::Format_Name(format), sizeof("FORMAT_") - 1));
  }
  return text;
}

std::string HumanReport(const v1::Plan& plan, const v1::Receipt& receipt) {
  std::vector<std::vector<std::string>> rows = {{"layer", "kept", "of tokens", "pages", "sets",
                                                 "mass mean", "mass min", "error mean", "error max",
                                                 "note"}};
  const auto tokens = static_cast<double>(plan.shape().num_tokens());
  const int64_t slots = std::max(plan.policy().page_size(), 1);
  for (const v1::LayerPlan& layer : plan.layers()) {
    const v1::LayerReceipt* measured = nullptr;
    for (const v1::LayerReceipt& candidate : receipt.layers()) {
      if (candidate.layer() == layer.layer()) measured = &candidate;
    }
    std::string note = layer.dense() ? "dense" : "";
    if (layer.budget_raised_by_protection()) note = "raised by protection";
    if (layer.budget_raised_by_quality_floor()) note = "raised by quality floor";
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto kept = static_cast<double>(layer.num_kept_tokens());
    rows.push_back(
        {absl::StrCat(layer.layer()), HumanCount(layer.num_kept_tokens()), Percent(kept / tokens),
         HumanCount((layer.num_kept_tokens() + slots - 1) / slots),
         absl::StrCat(layer.num_groups()),
         Decimal(measured == nullptr ? nan : measured->retained_attention_mass_mean(), 4),
         Decimal(measured == nullptr ? nan : measured->retained_attention_mass_min(), 4),
         Decimal(measured == nullptr ? nan : measured->output_relative_error_mean(), 4),
         Decimal(measured == nullptr ? nan : measured->output_relative_error_max(), 4), note});
  }
  return Table(rows);
}

Json ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  if (!google::protobuf::util::MessageToJsonString(message, &text, options).ok()) return nullptr;
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  NullifyNan(json);
  return json;
}

Json JsonReport(const CompressResult& result) {
  Json json = ToJson(result.end);
  json["request_id"] = result.accepted.request_id();
  json["open_block_begin"] = result.sequence.open_block_begin();
  json["client"] = {{"seconds", absl::ToDoubleSeconds(result.elapsed)},
                    {"sent_bytes", result.sent_bytes},
                    {"received_bytes", result.received_bytes}};
  return json;
}

Json SummaryEntry(const Capture& capture, const CompressResult& result) {
  const v1::Plan& plan = result.end.plan();
  const v1::Receipt& receipt = result.end.receipt();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const bool measured = receipt.layers_size() > 0;
  double pages = 0;
  for (const LayerOutput& layer : result.layers) {
    pages += static_cast<double>(layer.result.num_pages());
  }
  if (!result.layers.empty()) pages /= static_cast<double>(result.layers.size());
  const auto bytes_in = static_cast<double>(result.end.bytes_in());
  const auto bytes_out = static_cast<double>(result.end.bytes_out());
  return {
      {"tokens", capture.shape.num_tokens()},
      {"kept_tokens", MeanKept(plan)},
      {"semantic_blocks", plan.num_blocks()},
      {"pages_per_layer", pages},
      {"bytes_in", result.end.bytes_in()},
      {"bytes_out", result.end.bytes_out()},
      {"ratio", Number(bytes_out / bytes_in)},
      {"retained_attention_mass_mean",
       Number(measured ? receipt.retained_attention_mass_mean() : nan)},
      {"attention_output_relative_error_mean",
       Number(measured ? receipt.output_relative_error_mean() : nan)},
      {"seconds", absl::ToDoubleSeconds(result.elapsed)},
      {"backend", result.end.backend()},
      {"policy", DescribePolicy(plan.policy())},
  };
}

absl::Status MergeSummary(const std::string& path, const std::string& key, const Json& entry) {
  absl::StatusOr<Json> summary = ReadObject(path);
  if (!summary.ok()) return summary.status();
  (*summary)[key] = entry;
  const std::string text = summary->dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  if (absl::Status status = (*file)->Write(text.data(), text.size()); !status.ok()) return status;
  return (*file)->Commit();
}

absl::StatusOr<std::string> SummaryTable(const std::string& path) {
  const absl::StatusOr<Json> summary = ReadObject(path);
  if (!summary.ok()) return summary.status();
  static constexpr const char* kRows[] = {"tokens",
                                          "kept_tokens",
                                          "semantic_blocks",
                                          "pages_per_layer",
                                          "bytes_in",
                                          "bytes_out",
                                          "ratio",
                                          "retained_attention_mass_mean",
                                          "attention_output_relative_error_mean",
                                          "seconds",
                                          "backend"};
  std::vector<std::vector<std::string>> rows = {{"text"}};
  for (const char* row : kRows) rows.push_back({absl::StrReplaceAll(row, {{"_", " "}})});
  std::string policies;
  for (const auto& [key, entry] : summary->items()) {
    if (!entry.is_object()) continue;
    rows[0].push_back(key);
    for (size_t i = 0; i < std::size(kRows); ++i) {
      rows[i + 1].push_back(Cell(kRows[i], entry.value(kRows[i], Json(nullptr))));
    }
    absl::StrAppend(&policies, "policy of ", key, ": ",
                    Cell("policy", entry.value("policy", Json())), "\n");
  }
  return absl::StrCat(Table(rows), policies);
}

}  // namespace dynsplit::cli
