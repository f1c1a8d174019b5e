// SPDX-License-Identifier: Apache-2.0
//
// The end of a call: what it tells the caller, the metrics and the log.
#include <algorithm>
#include <limits>

#include "absl/time/clock.h"
#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/frame.h"
#include "server/rpc/begin_adapter.h"
#include "server/rpc/compression_call.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/runtime/log.h"
#include "server/runtime/session_work.h"

namespace dynsplit::rpc {

grpc::ByteBuffer CompressionCall::EncodeEnd() {
  v1::CompressResponse response;
  v1::CompressEnd& end = *response.mutable_end();
  end = EndToProto(*end_);
  if (end_->opened != nullptr) {
    // Not before: nothing is kept of a call that does not get here.
    services_.sessions.Publish(end_->opened);
    published_ = end_->opened->id();
    end_->session = Snapshot(*end_->opened, services_.sessions);
    end_->opened.reset();  // released, it goes at once
  }
  if (end_->session.has_value()) {
    *end.mutable_session() = SessionToProto(*end_->session, services_.endpoint());
  }
  absl::Duration sending;
  for (const Shard& shard : shards_) sending = std::max(sending, shard.stream->sending());
  end.mutable_seconds()->set_send(absl::ToDoubleSeconds(sending));
  end.set_total_seconds(absl::ToDoubleSeconds(absl::Now() - started_));
  end.set_backend(services_.backend().name);
  RecordResult(end);
  return wire::EncodeMessage(response);
}

void CompressionCall::RecordResult(const v1::CompressEnd& end) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  if (method_ == Method::kAppend) {
    const SequenceShape& appended = end_->stored_shape;
    services_.metrics.Appended(appended.num_tokens * appended.num_layers * appended.num_kv_heads);
  }
  if (end_->plan.layers.empty()) return;
  const v1::StageSeconds& seconds = end.seconds();
  const SequenceShape& shape = end_->plan.shape;
  int64_t tokens_kept = 0;
  for (const LayerPlan& layer : end_->plan.layers) tokens_kept += layer.num_kept;
  const int64_t tokens_in = shape.num_tokens * shape.num_layers;
  if (method_ == Method::kCompress) {
    RecordExperience(end, static_cast<double>(tokens_kept) / static_cast<double>(tokens_in));
  }
  services_.metrics.Returned({
      .preset = end_->plan.policy.preset,
      .evidence = EvidenceName(end_->plan.evidence),
      .fallback_preset = end_->plan.fallback_preset,
      .receive_seconds = seconds.receive(),
      .host_to_device_seconds = seconds.host_to_device(),
      .score_seconds = seconds.score(),
      .split_seconds = seconds.split(),
      .select_seconds = seconds.select(),
      .gather_seconds = seconds.gather(),
      .receipt_seconds = seconds.receipt(),
      .device_to_host_seconds = seconds.device_to_host(),
      .send_seconds = seconds.send(),
      .bytes_in = end.bytes_in(),
      .bytes_out = end.bytes_out(),
      .tokens_in = tokens_in * shape.num_kv_heads,
      .tokens_kept = tokens_kept * shape.num_kv_heads,
      .num_blocks = end_->plan.segmentation.num_blocks(),
      .mass_mean = end.has_receipt() ? end.receipt().retained_attention_mass_mean() : kNaN,
      .mass_min = end.has_receipt() ? end.receipt().retained_attention_mass_min() : kNaN,
      .error_mean = end.has_receipt() ? end.receipt().output_relative_error_mean() : kNaN,
      .shadow = end_->shadow_bytes_out > 0,
  });
}

void CompressionCall::RecordExperience(const v1::CompressEnd& end, double kept_ratio) {
  const Plan& plan = end_->plan;
  if (request_ == nullptr || !IsPresetItself(plan.policy)) return;
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const v1::StageSeconds& stages = end.seconds();
  // The stages together (but for the check for NaN, which has no figure) are too long where layers
  // ran side by side, the call where its caller was slow.
  const double stage_sum = stages.host_to_device() + stages.score() + stages.split() +
                           stages.select() + stages.gather() + stages.receipt() +
                           stages.device_to_host();
  const double elapsed = end.total_seconds() - absl::ToDoubleSeconds(waited_);
  // A shadow's plan is that of the originals, and it moved all of them. What it would have kept,
  // its bytes tell but for the filling of pages: a preset leaves bits as they are.
  const bool shadow = end_->shadow_bytes_out > 0;
  if (shadow) {
    kept_ratio = static_cast<double>(end_->shadow_bytes_out) / static_cast<double>(end.bytes_out());
  }
  services_.experience.Record(
      {.shape = plan.shape,
       .dtype = request_->spec().sequence.key_dtype,
       .preset = plan.policy.preset,
       .kept_ratio = kept_ratio,
       .mass = end.has_receipt() ? end.receipt().retained_attention_mass_mean() : kNaN,
       .error = end.has_receipt() ? end.receipt().output_relative_error_mean() : kNaN,
       .bytes_in = end.bytes_in(),
       .seconds = shadow ? 0 : std::min(stage_sum, elapsed)});
}

void CompressionCall::RecordFinish(const absl::Status& status) {
  const double seconds = absl::ToDoubleSeconds(absl::Now() - started_);
  const char* code = CodeName(status.code());
  services_.metrics.Finished({.method = MethodName(method_), .code = code, .seconds = seconds});
  // A request's own numbers; of its contents nothing.
  Log(status.ok() ? LogLevel::kInfo : LogLevel::kWarning, "request",
      {{"method", std::string_view(MethodName(method_))},
       {"code", std::string_view(code)},
       {"error", std::string_view(status.message().data(), status.message().size())},
       {"request_id", std::string_view(request_id_)},
       {"tenant", std::string_view(tenant_)},
       {"traceparent", std::string_view(trace_parent_)},
       {"seconds", seconds},
       {"bytes_in", end_.has_value() ? end_->bytes_in : int64_t{0}},
       {"bytes_out", end_.has_value() ? end_->bytes_out : int64_t{0}}});
}

}  // namespace dynsplit::rpc
