// SPDX-License-Identifier: Apache-2.0
#include "client/cli/report.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <numeric>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/cli/console.h"
#include "client/cpp/file_io.h"

namespace dynsplit::cli {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

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

// Protobuf writes 64-bit integers and NaN as strings; scripts want numbers and null.
void SimplifyNumber(google::protobuf::FieldDescriptor::CppType type, Json& json) {
  using Field = google::protobuf::FieldDescriptor;
  if (!json.is_string()) return;
  const std::string text = json.get<std::string>();
  int64_t integer = 0;
  uint64_t natural = 0;
  switch (type) {
    case Field::CPPTYPE_FLOAT:
    case Field::CPPTYPE_DOUBLE:
      json = nullptr;
      break;
    case Field::CPPTYPE_INT64:
      if (absl::SimpleAtoi(text, &integer)) json = integer;
      break;
    case Field::CPPTYPE_UINT64:
      if (absl::SimpleAtoi(text, &natural)) json = natural;
      break;
    default:
      break;
  }
}

void SimplifyNumbers(const google::protobuf::Descriptor& type, Json& json) {
  for (int i = 0; i < type.field_count(); ++i) {
    const google::protobuf::FieldDescriptor& field = *type.field(i);
    const auto found = json.find(field.name());
    if (found == json.end()) continue;
    // Values of a map are those of its entries' second field.
    const auto& element = field.is_map() ? *field.message_type()->map_value() : field;
    const auto simplify = [&element](Json& value) {
      if (element.message_type() != nullptr) {
        SimplifyNumbers(*element.message_type(), value);
      } else {
        SimplifyNumber(element.cpp_type(), value);
      }
    };
    if (!field.is_repeated()) {
      simplify(*found);
    } else {
      for (Json& value : *found) simplify(value);
    }
  }
}

OrderedJson Number(double value) {
  return std::isfinite(value) ? OrderedJson(value) : OrderedJson(nullptr);
}

// An integer where all are equal.
OrderedJson Mean(const std::vector<int64_t>& values) {
  if (values.empty()) return 0;
  if (std::equal(values.begin() + 1, values.end(), values.begin())) return values.front();
  const int64_t sum = std::accumulate(values.begin(), values.end(), int64_t{0});
  return static_cast<double>(sum) / static_cast<double>(values.size());
}

absl::StatusOr<OrderedJson> ReadObject(const std::string& path) {
  if (!std::filesystem::exists(path)) return OrderedJson::object();
  std::ifstream file(path);
  OrderedJson json = OrderedJson::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a JSON object"));
  }
  return json;
}

// The sample's kinds in its own order, then the others by name.
std::vector<std::string> KindsInOrder(const OrderedJson& summary) {
  static constexpr std::string_view kFirst[] = {"prose", "code", "dialogue"};
  std::vector<std::string> kinds;
  for (const auto& [kind, entry] : summary.items()) kinds.push_back(kind);
  std::sort(kinds.begin(), kinds.end(), [](const std::string& a, const std::string& b) {
    const auto* place_a = std::find(std::begin(kFirst), std::end(kFirst), a);
    const auto* place_b = std::find(std::begin(kFirst), std::end(kFirst), b);
    return std::tie(place_a, a) < std::tie(place_b, b);
  });
  return kinds;
}

// One line where all entries have one policy.
std::string Policies(const std::vector<std::pair<std::string, std::string>>& policy_of_kind) {
  std::set<std::string> different;
  for (const auto& [kind, policy] : policy_of_kind) different.insert(policy);
  if (different.size() == 1) return absl::StrCat("policy: ", *different.begin(), "\n");
  std::string text;
  for (const auto& [kind, policy] : policy_of_kind) {
    absl::StrAppend(&text, "policy of ", kind, ": ", policy, "\n");
  }
  return text;
}

std::string Cell(const std::string& key, const OrderedJson& value) {
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
  const int32_t factor = policy.scoring().refinement_factor();
  std::string text =
      absl::StrCat(policy.preset(), ": ", DescribeSegmentation(policy.segmentation()), ", ",
                   Choice(v1::Scoring::Method_Name(policy.scoring().method()), kMethod),
                   factor > 1 ? absl::StrCat(" refined ", factor, "×") : "", ", ",
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
  SimplifyNumbers(*message.GetDescriptor(), json);
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

OrderedJson SummaryEntry(const Capture& capture, const CompressResult& result) {
  const v1::Plan& plan = result.end.plan();
  const v1::Receipt& receipt = result.end.receipt();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const bool measured = receipt.layers_size() > 0;
  std::vector<int64_t> kept;
  for (const v1::LayerPlan& layer : plan.layers()) kept.push_back(layer.num_kept_tokens());
  std::vector<int64_t> pages;
  for (const LayerOutput& layer : result.layers) pages.push_back(layer.result.num_pages());
  const auto bytes_in = static_cast<double>(result.end.bytes_in());
  const auto bytes_out = static_cast<double>(result.end.bytes_out());
  return {
      {"tokens", capture.shape.num_tokens()},
      {"kept_tokens", Mean(kept)},
      {"semantic_blocks", plan.num_blocks()},
      {"pages_per_layer", Mean(pages)},
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

absl::Status MergeSummary(const std::string& path, const std::string& key,
                          const OrderedJson& entry) {
  absl::StatusOr<OrderedJson> summary = ReadObject(path);
  if (!summary.ok()) return summary.status();
  (*summary)[key] = entry;
  OrderedJson ordered = OrderedJson::object();
  for (const std::string& kind : KindsInOrder(*summary)) ordered[kind] = (*summary)[kind];
  const std::string text =
      ordered.dump(2, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  if (absl::Status status = (*file)->Write(text.data(), text.size()); !status.ok()) return status;
  return (*file)->Commit();
}

absl::StatusOr<std::string> SummaryTable(const std::string& path) {
  const absl::StatusOr<OrderedJson> summary = ReadObject(path);
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
  std::vector<std::pair<std::string, std::string>> policies;
  for (const std::string& kind : KindsInOrder(*summary)) {
    const OrderedJson& entry = (*summary)[kind];
    if (!entry.is_object()) continue;
    rows[0].push_back(kind);
    for (size_t i = 0; i < std::size(kRows); ++i) {
      rows[i + 1].push_back(Cell(kRows[i], entry.value(kRows[i], OrderedJson())));
    }
    policies.emplace_back(kind, Cell("policy", entry.value("policy", OrderedJson())));
  }
  return absl::StrCat(Table(rows), Policies(policies));
}

}  // namespace dynsplit::cli
