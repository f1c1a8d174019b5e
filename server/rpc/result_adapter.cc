// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/result_adapter.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "proto/wire/status.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/quality.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/tensor_adapter.h"

namespace dynsplit::rpc {
namespace {

v1::LayerPlan LayerPlanToProto(const LayerPlan& plan, const Hash128& hash) {
  v1::LayerPlan wire;
  wire.set_layer(plan.layer);
  wire.set_num_groups(plan.groups);
  wire.set_num_kept_tokens(plan.num_kept);
  wire.set_dense(plan.dense);
  wire.set_budget_raised_by_protection(plan.raised_by_protection);
  wire.set_budget_raised_by_quality_floor(plan.raised_by_quality_floor);
  wire.set_hash(ToHex(hash));
  return wire;
}

v1::LayerReceipt ReceiptToProto(const LayerReceipt& receipt) {
  v1::LayerReceipt wire;
  wire.set_layer(receipt.layer);
  wire.set_retained_attention_mass_mean(receipt.mass_mean);
  wire.set_retained_attention_mass_min(receipt.mass_min);
  wire.set_output_relative_error_mean(receipt.error_mean);
  wire.set_output_relative_error_max(receipt.error_max);
  return wire;
}

v1::Receipt SummarizeReceipts(const EndOutput& output) {
  v1::Receipt wire;
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const auto count = static_cast<double>(output.receipts.size());
  double mass_mean = 0;
  double mass_min = std::numeric_limits<double>::infinity();
  double error_mean = 0;
  double error_max = 0;
  for (const LayerReceipt& receipt : output.receipts) {
    *wire.add_layers() = ReceiptToProto(receipt);
    mass_mean += receipt.mass_mean / count;  // NaN of any layer stays
    error_mean += receipt.error_mean / count;
    mass_min = std::min(mass_min, receipt.mass_min);
    error_max = std::max(error_max, receipt.error_max);
  }
  wire.set_retained_attention_mass_mean(mass_mean);
  wire.set_retained_attention_mass_min(mass_mean == mass_mean ? mass_min : kNaN);
  wire.set_output_relative_error_mean(error_mean);
  wire.set_output_relative_error_max(error_mean == error_mean ? error_max : kNaN);
  wire.set_num_queries(static_cast<int32_t>(output.num_queries));
  const Loss& loss = QualityTable::Builtin().LossOf(output.plan.policy.preset);
  wire.set_expected_divergence(loss.Divergence(mass_mean, error_mean));
  return wire;
}

v1::Plan PlanToProto(const EndOutput& output) {
  v1::Plan wire;
  *wire.mutable_shape() = ShapeToProto(output.plan.shape);
  *wire.mutable_policy() = PolicyToProto(output.plan.policy);
  wire.set_policy_version(output.plan.policy_version);
  wire.set_evidence(EvidenceToProto(output.plan.evidence));
  wire.set_num_blocks(output.plan.segmentation.num_blocks());
  for (size_t i = 0; i < output.plan.layers.size(); ++i) {
    *wire.add_layers() = LayerPlanToProto(output.plan.layers[i], output.layer_hashes[i]);
  }
  wire.set_hash(ToHex(output.plan_hash));
  wire.set_fallback_preset(output.plan.fallback_preset);
  return wire;
}

}  // namespace

v1::SequenceResult SequenceToProto(const SequenceOutput& output, uint32_t first_tensor_id) {
  v1::SequenceResult wire;
  wire.set_num_blocks(output.num_blocks);
  wire.set_open_block_begin(output.open_block_begin);
  for (const ResultTensor& tensor : output.tensors) {
    *wire.add_tensors() = TensorToProto(tensor, first_tensor_id++, std::nullopt);
  }
  return wire;
}

v1::LayerResult LayerToProto(const ComputedLayer& output, uint32_t first_tensor_id) {
  v1::LayerResult wire;
  *wire.mutable_plan() = LayerPlanToProto(*output.plan, output.hash);
  if (output.receipt.has_value()) *wire.mutable_receipt() = ReceiptToProto(*output.receipt);
  for (const ResultTensor& tensor : output.tensors) {
    *wire.add_tensors() = TensorToProto(tensor, first_tensor_id++, output.plan->layer);
  }
  wire.set_num_pages(output.num_pages);
  return wire;
}

v1::CompressEnd EndToProto(const EndOutput& output) {
  v1::CompressEnd wire;
  if (output.profile.has_value()) {
    *wire.mutable_profile() = ProfileToProto(*output.profile);
  } else if (!output.plan.layers.empty()) {
    *wire.mutable_plan() = PlanToProto(output);
    if (!output.receipts.empty()) *wire.mutable_receipt() = SummarizeReceipts(output);
  }
  wire.set_bytes_in(output.bytes_in);
  wire.set_bytes_out(output.bytes_out);
  wire.set_shadow_bytes_out(output.shadow_bytes_out);
  wire.set_representation_salt(output.representation_salt);
  v1::StageSeconds& seconds = *wire.mutable_seconds();
  seconds.set_receive(output.seconds.receive);
  seconds.set_host_to_device(output.seconds.host_to_device);
  seconds.set_score(output.seconds.score);
  seconds.set_split(output.seconds.split);
  seconds.set_select(output.seconds.select);
  seconds.set_gather(output.seconds.gather);
  seconds.set_receipt(output.seconds.receipt);
  seconds.set_device_to_host(output.seconds.device_to_host);
  return wire;
}

v1::DelimiterProfile ProfileToProto(const DelimiterProfile& profile) {
  v1::DelimiterProfile wire;
  wire.set_name(profile.name());
  wire.set_description(profile.description());
  for (const DelimiterWeight& weight : profile.weights()) {
    v1::DelimiterWeight& added = *wire.add_weights();
    added.set_token_id(weight.token_id);
    added.set_weight(weight.weight);
    added.set_sentence_end(weight.sentence_end);
    added.set_text(weight.text);
    added.set_num_occurrences(weight.num_occurrences);
    added.set_score(weight.score);
  }
  return wire;
}

grpc::Status ErrorToGrpc(const absl::Status& status) {
  const ErrorDetails details = GetErrorDetails(status);
  if (details.kind.empty() && !details.retry_after_ms.has_value()) {
    return wire::ToGrpc(status);  // may carry the wire library's own details
  }
  wire::RichError error;
  error.code = status.code();
  error.message = std::string(status.message());
  if (details.kind == "field") {
    error.fields.push_back({details.subject, details.problem});
  } else if (details.kind == "precondition") {
    error.preconditions.push_back({details.type, details.subject, details.problem});
  } else if (details.kind == "resource") {
    error.resource_type = details.type;
    error.resource_name = details.subject;
  } else if (details.kind == "reason") {
    error.reason = details.type;
  }
  error.retry_after_ms = details.retry_after_ms;
  return wire::ToGrpc(error);
}

const char* CodeName(absl::StatusCode code) {
  static const auto& names = *new std::array<std::string, 17>([] {
    std::array<std::string, 17> made;
    for (int i = 0; i < 17; ++i) {
      made[static_cast<size_t>(i)] = absl::StatusCodeToString(static_cast<absl::StatusCode>(i));
    }
    return made;
  }());
  const auto index = static_cast<size_t>(code);
  return index < names.size() ? names[index].c_str() : "UNKNOWN";
}

}  // namespace dynsplit::rpc
