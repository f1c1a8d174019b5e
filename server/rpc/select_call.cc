// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/select_call.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "server/pipeline/errors.h"
#include "server/rpc/select_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/rpc/unary.h"
#include "server/runtime/log.h"
#include "server/runtime/select_batcher.h"

namespace dynsplit::rpc {
namespace {

// For what the answer holds beside the sequences.
constexpr int64_t kAnswerOverheadBytes = 1024;

struct SelectCall {
  Services& services;
  v1::SelectResponse& response;
  grpc::CallbackServerContext& context;
  grpc::ServerUnaryReactor& reactor;
  absl::Time started;
  AnswerBudget answer;
  std::vector<StepSpec> steps;
  std::vector<SessionUse> sessions;
};

absl::Status Prepare(const v1::SelectRequest& request, SelectCall& call) {
  absl::StatusOr<std::string> tenant = TenantFromProto(request.tenant(), "tenant");
  if (!tenant.ok()) return tenant.status();
  absl::StatusOr<std::vector<StepSpec>> steps = StepsFromProto(request);
  if (!steps.ok()) return steps.status();
  call.steps = *std::move(steps);
  for (const StepSpec& step : call.steps) {
    absl::StatusOr<SessionUse> session = call.services.sessions.Use(step.session_id, *tenant);
    if (!session.ok()) return session.status();
    call.sessions.push_back(*std::move(session));
  }
  return absl::OkStatus();
}

void FinishCall(const SelectCall& call, const absl::Status& status) {
  const double seconds = absl::ToDoubleSeconds(absl::Now() - call.started);
  call.services.metrics.Finished(
      {.method = "Select", .code = CodeName(status.code()), .seconds = seconds});
  Finish(call.reactor, status);
}

void Record(const SelectCall& call, const SelectResult& result) {
  SelectRecord record = {.total_seconds = call.response.total_seconds(),
                         .device_seconds = result.device_seconds,
                         .selected_tokens = 0,
                         .moved_rows = 0,
                         .chosen_rows = 0};
  for (const StepResult& step : result.steps) {
    const auto num_dense = static_cast<int64_t>(step.dense_layers.size());
    record.selected_tokens += (step.num_layers - num_dense) * step.groups * step.tokens_per_head;
    record.moved_rows += step.moved_rows;
    record.chosen_rows += step.chosen_rows;
  }
  call.services.metrics.Selected(record);
}

// K and V that were demoted go back to the device when it has room again.
void RestoreLater(Services& services, SessionUse session) {
  if (!services.sessions.ShouldRestore(*session.get())) return;
  services.executor.Submit([&store = services.sessions, session = std::move(session)](
                               Backend& /*backend*/, Stream& stream) mutable {
    if (absl::Status status = store.Restore(*session.get(), stream); !status.ok()) {
      Log(LogLevel::kInfo, "a session stays in host memory",
          {{"error", std::string_view(status.message().data(), status.message().size())}});
    }
  });
}

void Answer(SelectCall& call, const absl::StatusOr<SelectResult>& result) {
  if (!result.ok()) {
    call.sessions.clear();
    return FinishCall(call, result.status());
  }
  SelectToProto(*result, call.response);
  call.response.set_device_seconds(result->device_seconds);
  call.response.set_total_seconds(absl::ToDoubleSeconds(absl::Now() - call.started));
  Record(call, *result);
  std::vector<SessionUse> sessions = std::move(call.sessions);
  Services& services = call.services;
  FinishCall(call, absl::OkStatus());  // request and response are gone from here on
  for (SessionUse& session : sessions) RestoreLater(services, std::move(session));
}

}  // namespace

grpc::ServerUnaryReactor* StartSelectCall(Services& services, const v1::SelectRequest& request,
                                          v1::SelectResponse& response,
                                          grpc::CallbackServerContext& context) {
  grpc::ServerUnaryReactor* const reactor = context.DefaultReactor();
  const std::shared_ptr<SelectCall> call(new SelectCall{
      .services = services,
      .response = response,
      .context = context,
      .reactor = *reactor,
      .started = absl::Now(),
      .answer = AnswerBudget(services.config.max_message_bytes - kAnswerOverheadBytes),
      .steps = {},
      .sessions = {}});
  if (absl::Status status = Prepare(request, *call); !status.ok()) {
    call->sessions.clear();
    FinishCall(*call, status);
    return reactor;
  }
  services.selects.Submit(
      {.steps = call->steps,
       .sessions = call->sessions,
       .answer = &call->answer,
       .abandoned = [call] { return call->context.IsCancelled(); },
       .done = [call](absl::StatusOr<SelectResult> result) { Answer(*call, result); }});
  return reactor;
}

}  // namespace dynsplit::rpc
