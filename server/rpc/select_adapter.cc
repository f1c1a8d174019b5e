// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/select_adapter.h"

#include <string>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/rpc/tensor_adapter.h"

namespace dynsplit::rpc {
namespace {

std::optional<RegionName> NameFromProto(bool present, const v1::RegionSlice& slice) {
  if (!present) return std::nullopt;
  return RegionName{
      .name = slice.name(), .generation = slice.generation(), .offset_bytes = slice.offset_bytes()};
}

absl::Status DecodeGather(const v1::GatherRows& wire, const std::string& field,
                          GatherSpec& gather) {
  gather.generation = wire.generation();
  gather.keys = NameFromProto(wire.has_key_region(), wire.key_region());
  gather.values = NameFromProto(wire.has_value_region(), wire.value_region());
  gather.key_scales = NameFromProto(wire.has_key_scale_region(), wire.key_scale_region());
  gather.value_scales = NameFromProto(wire.has_value_scale_region(), wire.value_scale_region());
  gather.held = NameFromProto(wire.has_held_region(), wire.held_region());
  if (gather.keys.has_value() != gather.values.has_value()) {
    return InvalidField(field + (gather.keys.has_value() ? ".value_region" : ".key_region"),
                        "is missing; rows of K and V go to regions both or neither");
  }
  if (!gather.keys.has_value() &&
      (gather.key_scales.has_value() || gather.value_scales.has_value())) {
    return InvalidField(
        field + (gather.key_scales.has_value() ? ".key_scale_region" : ".value_scale_region"),
        "is set without key_region and value_region");
  }
  return absl::OkStatus();
}

absl::Status DecodeQueries(const v1::SequenceStep& wire, StepSpec& step) {
  const absl::StatusOr<DType> dtype = DTypeFromProto(wire.dtype(), step.field + ".dtype");
  if (!dtype.ok()) return dtype.status();
  step.query_dtype = *dtype;
  if (step.query_dtype != DType::kFloat32 && step.query_dtype != DType::kFloat16 &&
      step.query_dtype != DType::kBFloat16) {
    return InvalidField(step.field + ".dtype", absl::StrCat("is ", std::string(DTypeName(*dtype)),
                                                            "; must be fp32, fp16 or bf16"));
  }
  switch (wire.queries_case()) {
    case v1::SequenceStep::kQueryData:
      step.query_data = wire.query_data();
      return absl::OkStatus();
    case v1::SequenceStep::kQueryRegion:
      step.query_region = NameFromProto(true, wire.query_region());
      return absl::OkStatus();
    case v1::SequenceStep::QUERIES_NOT_SET:
      break;
  }
  return InvalidField(step.field + ".query_data", "is missing, and so is query_region");
}

absl::Status DecodeStep(const v1::SequenceStep& wire, StepSpec& step) {
  const std::string& field = step.field;
  if (wire.session_id().empty()) return InvalidField(field + ".session_id", "is missing");
  step.session_id = wire.session_id();
  const auto at_least_zero = [&](const char* name, int64_t value) {
    if (value >= 0) return absl::OkStatus();
    return InvalidField(absl::StrCat(field, ".", name),
                        absl::StrCat("is ", value, "; must be >= 0"));
  };
  absl::Status status = at_least_zero("first_layer", wire.first_layer());
  status.Update(at_least_zero("num_layers", wire.num_layers()));
  status.Update(at_least_zero("tokens_per_head", wire.tokens_per_head()));
  if (!status.ok()) return status;
  step.first_layer = wire.first_layer();
  step.num_layers = wire.num_layers();
  step.tokens_per_head = wire.tokens_per_head();
  step.num_queries = wire.num_queries() == 0 ? 1 : wire.num_queries();
  if (step.num_queries < 1 || step.num_queries > kMaxStepQueries) {
    return InvalidField(
        field + ".num_queries",
        absl::StrCat("is ", step.num_queries, "; must be in [1, ", kMaxStepQueries, "]"));
  }
  status = DecodeQueries(wire, step);
  if (!status.ok()) return status;
  step.token_region = NameFromProto(wire.has_token_region(), wire.token_region());
  step.with_pages = wire.with_pages();
  step.with_scores = wire.with_scores();
  if (!wire.has_gather()) return absl::OkStatus();
  return DecodeGather(wire.gather(), field + ".gather", step.gather.emplace());
}

void Assign(Bytes bytes, std::string* to) {
  to->assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

void Assign(const std::vector<int32_t>& values, std::string* to) {
  to->assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int32_t));
}

}  // namespace

absl::StatusOr<std::vector<StepSpec>> StepsFromProto(const v1::SelectRequest& request) {
  if (request.sequences_size() < 1 || request.sequences_size() > kMaxSequences) {
    return InvalidField("sequences", absl::StrCat("has ", request.sequences_size(),
                                                  " entries; must have 1 to ", kMaxSequences));
  }
  std::vector<StepSpec> steps(static_cast<size_t>(request.sequences_size()));
  absl::flat_hash_set<std::string> ids;
  for (int i = 0; i < request.sequences_size(); ++i) {
    StepSpec& step = steps[static_cast<size_t>(i)];
    step.field = absl::StrCat("sequences[", i, "]");
    absl::Status status = DecodeStep(request.sequences(i), step);
    if (!status.ok()) return status;
    if (!ids.insert(step.session_id).second) {
      return InvalidField(step.field + ".session_id", "names a session that an entry before names");
    }
  }
  return steps;
}

void SelectToProto(const SelectResult& result, v1::SelectResponse& response) {
  for (const StepResult& step : result.steps) {
    v1::SequenceSelection& wire = *response.add_sequences();
    wire.set_num_tokens(step.num_tokens);
    wire.set_first_layer(step.first_layer);
    wire.set_num_layers(step.num_layers);
    wire.set_num_groups(step.groups);
    wire.set_tokens_per_head(step.tokens_per_head);
    wire.set_budget_raised_by_protection(step.raised_by_protection);
    wire.mutable_dense_layers()->Add(step.dense_layers.begin(), step.dense_layers.end());
    Assign(step.tokens, wire.mutable_tokens());
    for (const std::vector<int32_t>& pages : step.pages) Assign(pages, wire.add_pages());
    for (const Bytes scores : step.scores) Assign(scores, wire.add_scores());
    wire.set_generation(step.generation);
    wire.set_moved_rows(step.moved_rows);
    wire.set_chosen_rows(step.chosen_rows);
    for (const MovedLayer& layer : step.moved) {
      v1::MovedRows& rows = *wire.add_moved();
      rows.set_num_rows(layer.num_rows);
      Assign(layer.slots, rows.mutable_slots());
      Assign(layer.keys, rows.mutable_keys());
      Assign(layer.values, rows.mutable_values());
      Assign(layer.key_scales, rows.mutable_key_scales());
      Assign(layer.value_scales, rows.mutable_value_scales());
    }
    Assign(step.held, wire.mutable_held_tokens());
  }
}

}  // namespace dynsplit::rpc
