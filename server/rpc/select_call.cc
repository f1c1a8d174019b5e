// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/select_call.h"

#include <algorithm>
#include <atomic>
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

// What one device does of a call.
struct Part {
  Device* device = nullptr;
  std::vector<StepSpec> steps;
  std::vector<SessionUse> sessions;
  std::vector<size_t> places;  // of the steps in the call
  absl::StatusOr<SelectResult> result = absl::UnknownError("not run");
};

struct SelectCall {
  Services& services;
  v1::SelectResponse& response;
  grpc::CallbackServerContext& context;
  grpc::ServerUnaryReactor& reactor;
  absl::Time started;
  AnswerBudget answer;
  std::vector<Part> parts;
  std::atomic<size_t> num_running = 0;  // parts
};

Part& PartOf(SelectCall& call, Device& device) {
  for (Part& part : call.parts) {
    if (part.device == &device) return part;
  }
  Part& part = call.parts.emplace_back();
  part.device = &device;
  return part;
}

absl::Status Prepare(const v1::SelectRequest& request, SelectCall& call) {
  absl::StatusOr<std::string> tenant = TenantFromProto(request.tenant(), "tenant");
  if (!tenant.ok()) return tenant.status();
  absl::StatusOr<std::vector<StepSpec>> steps = StepsFromProto(request);
  if (!steps.ok()) return steps.status();
  for (size_t i = 0; i < steps->size(); ++i) {
    StepSpec& step = (*steps)[i];
    absl::StatusOr<SessionUse> session = call.services.sessions.Use(step.session_id, *tenant);
    if (!session.ok()) return session.status();
    Part& part = PartOf(call, call.services.devices.Of((*session)->backend()));
    part.steps.push_back(std::move(step));
    part.sessions.push_back(*std::move(session));
    part.places.push_back(i);
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
  Executor& executor = services.devices.Of(session->backend()).executor();
  executor.Submit([&store = services.sessions, session = std::move(session)](
                      Backend& /*backend*/, Stream& stream) mutable {
    if (absl::Status status = store.Restore(*session.get(), stream); !status.ok()) {
      Log(LogLevel::kInfo, "a session stays in host memory",
          {{"error", std::string_view(status.message().data(), status.message().size())}});
    }
  });
}

// The parts' results in the order of the call's steps; the first error where one failed.
absl::StatusOr<SelectResult> Join(SelectCall& call) {
  SelectResult joined;
  for (Part& part : call.parts) {
    if (!part.result.ok()) return part.result.status();
    SelectResult& result = *part.result;
    if (call.parts.size() == 1) return std::move(result);
    joined.device_seconds = std::max(joined.device_seconds, result.device_seconds);
    joined.memory.insert(joined.memory.end(), result.memory.begin(), result.memory.end());
    for (size_t i = 0; i < part.places.size(); ++i) {
      joined.steps.resize(std::max(joined.steps.size(), part.places[i] + 1));
      joined.steps[part.places[i]] = std::move(result.steps[i]);
    }
  }
  return joined;
}

void Answer(SelectCall& call) {
  const absl::StatusOr<SelectResult> result = Join(call);
  if (!result.ok()) {
    for (Part& part : call.parts) part.sessions.clear();
    return FinishCall(call, result.status());
  }
  SelectToProto(*result, call.response);
  call.response.set_device_seconds(result->device_seconds);
  call.response.set_total_seconds(absl::ToDoubleSeconds(absl::Now() - call.started));
  Record(call, *result);
  std::vector<Part> parts = std::move(call.parts);
  Services& services = call.services;
  FinishCall(call, absl::OkStatus());  // request and response are gone from here on
  for (Part& part : parts) {
    for (SessionUse& session : part.sessions) RestoreLater(services, std::move(session));
  }
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
      .parts = {}});
  if (absl::Status status = Prepare(request, *call); !status.ok()) {
    call->parts.clear();
    FinishCall(*call, status);
    return reactor;
  }
  // The last part's end may come before the loop's: nothing of the call is touched after it.
  const size_t num_parts = call->parts.size();
  call->num_running = num_parts;
  for (size_t i = 0; i < num_parts; ++i) {
    Part& part = call->parts[i];
    part.device->selects().Submit({.steps = part.steps,
                                   .sessions = part.sessions,
                                   .answer = &call->answer,
                                   .abandoned = [call] { return call->context.IsCancelled(); },
                                   .done =
                                       [call, &part](absl::StatusOr<SelectResult> result) {
                                         part.result = std::move(result);
                                         if (--call->num_running == 0) Answer(*call);
                                       }});
  }
  return reactor;
}

}  // namespace dynsplit::rpc
