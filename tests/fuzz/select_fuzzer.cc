// SPDX-License-Identifier: Apache-2.0
//
// A SelectRequest, as any caller may make it. What passes must hold what the work relies on; what
// does not must be the caller's fault.
#include <cstdint>
#include <cstdlib>

#include "dynsplit/v1/sessions.pb.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/select_adapter.h"

namespace {

void Check(bool condition) {
  if (!condition) std::abort();
}

void CheckStep(const dynsplit::StepSpec& step) {
  Check(!step.session_id.empty());
  Check(step.first_layer >= 0 && step.num_layers >= 0 && step.tokens_per_head >= 0);
  Check(step.num_queries >= 1 && step.num_queries <= dynsplit::rpc::kMaxStepQueries);
  Check(!IsQuantized(step.query_dtype) && step.query_dtype != dynsplit::DType::kInt32);
  Check(step.query_data.empty() || !step.query_region.has_value());
  if (!step.gather.has_value()) return;
  Check(step.gather->keys.has_value() == step.gather->values.has_value());
  Check(step.gather->keys.has_value() || !step.gather->key_scales.has_value());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const google::protobuf::LogSilencer silencer;  // of strings that are not UTF-8
  dynsplit::v1::SelectRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto steps = dynsplit::rpc::StepsFromProto(request);
  if (steps.ok()) {
    Check(static_cast<int>(steps->size()) == request.sequences_size());
    for (const dynsplit::StepSpec& step : *steps) CheckStep(step);
    return 0;
  }
  Check(steps.status().code() == absl::StatusCode::kInvalidArgument ||
        steps.status().code() == absl::StatusCode::kUnimplemented);
  Check(!dynsplit::rpc::ErrorToGrpc(steps.status()).ok());
  return 0;
}
