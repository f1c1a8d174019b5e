// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/compression_call.h"

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/status.h"
#include "server/pipeline/errors.h"
#include "server/rpc/begin_adapter.h"
#include "server/rpc/begin_sessions.h"
#include "server/rpc/policy_adapter.h"
#include "server/rpc/result_adapter.h"
#include "server/rpc/session_adapter.h"
#include "server/runtime/log.h"
#include "server/runtime/session_work.h"

namespace dynsplit::rpc {
namespace {

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  return absl::FromChrono(deadline);
}

std::string TraceParentOf(const grpc::CallbackServerContext& context) {
  constexpr size_t kTraceParentBytes = 55;
  const auto found = context.client_metadata().find("traceparent");
  if (found == context.client_metadata().end() || found->second.size() != kTraceParentBytes) {
    return "";
  }
  return {found->second.data(), found->second.size()};
}

// Why admission refused, as a metric label; null where it did not.
const char* RejectionReason(const absl::Status& status, bool waited_out) {
  if (status.code() == absl::StatusCode::kUnavailable) return "draining";
  if (status.code() != absl::StatusCode::kResourceExhausted) return nullptr;
  if (GetErrorDetails(status).type == "REQUEST_TOO_LARGE") return "too_large";
  return waited_out ? "queue_timeout" : "queue_full";
}

// What goes on with something that exists is let finish.
bool StartsWork(Method method) { return method != Method::kAppend && method != Method::kFetch; }

class Reactor final : public CompressionReactor {
 public:
  explicit Reactor(std::shared_ptr<CompressionCall> call) : call_(std::move(call)) {
    call_->Start(this);
  }
  void OnReadDone(bool ok) override { call_->OnRead(ok); }
  void OnWriteDone(bool ok) override { call_->OnWritten(ok); }
  void OnCancel() override { call_->OnCancel(); }
  void OnDone() override {
    call_->OnDone();
    delete this;
  }

 private:
  const std::shared_ptr<CompressionCall> call_;
};

}  // namespace

CompressionReactor* StartCompressionCall(Services& services, Method method,
                                         grpc::CallbackServerContext& context) {
  return new Reactor(std::make_shared<CompressionCall>(services, method, context));
}

CompressionCall::CompressionCall(Services& services, Method method,
                                 const grpc::CallbackServerContext& context)
    : services_(services),
      method_(method),
      started_(absl::Now()),
      deadline_(DeadlineOf(context)),
      trace_parent_(TraceParentOf(context)) {}

void CompressionCall::Start(CompressionReactor* reactor) {
  const int64_t num_streams = ++services_.num_streams;
  {
    absl::MutexLock lock(&mu_);
    reactor_ = reactor;
  }
  if (services_.draining && StartsWork(method_)) {
    Fail(RetryLater(absl::StatusCode::kUnavailable, "the server is draining", kDrainRetryAfterMs),
         "draining");
  } else if (num_streams > services_.config.max_streams) {
    Fail(RetryLater(absl::StatusCode::kResourceExhausted,
                    absl::StrCat("the server has ", num_streams - 1, " streams open, its most"),
                    kDrainRetryAfterMs),
         "too_many_streams");
  } else {
    ReadNext();
  }
}

// -- in -------------------------------------------------------------------------------------------

void CompressionCall::ReadNext() {
  absl::MutexLock lock(&mu_);
  if (reactor_ != nullptr && !settled_.has_value()) reactor_->StartRead(&incoming);
}

void CompressionCall::OnRead(bool ok) {
  if (!ok) {
    // The client's side of the stream is closed. After End that is as it should be; a cancelled
    // call is settled by OnCancel.
    bool complete = false;
    {
      absl::MutexLock lock(&mu_);
      complete = phase_ == Phase::kEnded;
    }
    if (!complete) Fail(InvalidField("end", "is missing; the stream closed before it"));
    return;
  }
  absl::StatusOr<wire::Frame> frame = wire::ParseFrame(
      std::exchange(incoming, {}), static_cast<size_t>(services_.config.max_chunk_bytes));
  absl::Status status = frame.ok() ? HandleMessage(*std::move(frame)) : frame.status();
  if (!status.ok()) Fail(std::move(status));
}

absl::Status CompressionCall::HandleMessage(wire::Frame frame) {
  Phase phase = Phase::kBegin;
  {
    absl::MutexLock lock(&mu_);
    phase = phase_;
  }
  if (phase == Phase::kEnded) return InvalidField("end", "must be the last message");
  if (frame.is_chunk()) {
    if (phase == Phase::kBegin) return InvalidField("begin", "must be the first message");
    return HandleChunks(std::move(frame));
  }
  v1::CompressRequest message;
  if (absl::Status status = frame.ParseControl(&message); !status.ok()) return status;
  if (message.has_begin() == message.has_end()) {
    return InvalidField("begin", "a message must hold exactly one of begin, end and data");
  }
  if (message.has_begin()) {
    if (phase != Phase::kBegin) return InvalidField("begin", "must come once");
    return HandleBegin(message.begin());
  }
  if (phase == Phase::kBegin) return InvalidField("begin", "must be the first message");
  return HandleEnd(message.end());
}

absl::Status CompressionCall::HandleBegin(const v1::Begin& begin) {
  absl::StatusOr<RequestSpec> spec = BeginRequest(begin, method_, services_);
  if (!spec.ok()) return spec.status();
  const int64_t bytes = ReservationBytes(*spec, services_.backend().name != "cpu");
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kWaiting;
    request_id_ = spec->request_id;
    tenant_ = spec->tenant;
  }
  if (bytes > services_.config.max_request_bytes) {
    Fail(WithReason(absl::StatusCode::kResourceExhausted, "REQUEST_TOO_LARGE",
                    absl::StrCat("the request needs ", bytes, " bytes of memory with ",
                                 "max_open_layers ", spec->max_open_layers, "; the server allows ",
                                 services_.config.max_request_bytes)),
         "too_large");
    return absl::OkStatus();
  }
  const std::string tenant = spec->tenant;
  Admission& admission = services_.devices.Of(*spec->backend).admission();
  const Admission::Ticket ticket = admission.Request(
      tenant, bytes, deadline_,
      [self = shared_from_this(),
       spec = *std::move(spec)](absl::StatusOr<Reservation> reservation) mutable {
        self->OnAdmitted(std::move(spec), std::move(reservation));
      },
      StartsWork(method_) ? Admission::Draining::kRefuse : Admission::Draining::kAdmit);
  bool over = false;
  {
    absl::MutexLock lock(&mu_);
    ticket_ = ticket;
    admission_ = &admission;
    over = settled_.has_value();
  }
  if (over) admission.Cancel(ticket);  // cancelled before the ticket was known
  return absl::OkStatus();
}

void CompressionCall::OnAdmitted(RequestSpec spec, absl::StatusOr<Reservation> reservation) {
  if (!reservation.ok()) {
    spec.appending.Reset();  // before the caller hears of it, and tries again
    const bool waited_out = absl::Now() - started_ >= services_.config.queue_timeout;
    return Fail(reservation.status(), RejectionReason(reservation.status(), waited_out));
  }
  services_.metrics.Waited(absl::ToDoubleSeconds(reservation->waited()));
  v1::CompressResponse response;
  v1::Accepted& accepted = *response.mutable_accepted();
  accepted.set_request_id(spec.request_id);
  *accepted.mutable_policy() = PolicyToProto(spec.sequence.policy);
  accepted.set_reserved_bytes(reservation->bytes());
  accepted.set_backend(services_.backend().name);
  accepted.set_max_chunk_bytes(services_.config.max_chunk_bytes);
  encoder_.emplace(spec.max_chunk_bytes, spec.fetch_resume);
  tensor_crcs_.assign(spec.tensors.size(), 0);
  {
    std::vector<Outgoing> first;
    first.push_back({.message = wire::EncodeMessage(response)});
    Enqueue(std::move(first));
  }
  Executor& executor = services_.devices.Of(*spec.backend).executor();
  absl::StatusOr<std::shared_ptr<Request>> request =
      Request::Create(std::move(spec), executor, *std::move(reservation), shared_from_this());
  if (!request.ok()) return Fail(request.status());
  bool over = false;
  {
    absl::MutexLock lock(&mu_);
    over = settled_.has_value();
    if (!over) {
      request_ = *request;
      phase_ = Phase::kReceiving;
    }
  }
  if (over) return (*request)->Cancel();
  (*request)->Start();
  ReadNext();
}

std::shared_ptr<Request> CompressionCall::request() {
  absl::MutexLock lock(&mu_);
  return request_;
}

absl::Status CompressionCall::HandleChunks(wire::Frame frame) {
  const std::shared_ptr<Request> request = this->request();
  if (request == nullptr) return absl::CancelledError("the call is over");
  const Chunk chunk = {.tensor = frame.header().tensor,
                       .offset = frame.header().offset,
                       .size = frame.data_size(),
                       .last = frame.header().last};
  while (true) {
    absl::StatusOr<Request::ChunkPlace> place = request->Place(chunk);
    if (!place.ok()) return place.status();
    if (place->data != nullptr) {
      absl::Status status = ReceiveChunk(frame, chunk, *place, *request);
      if (status.ok()) ReadNext();
      return status;
    }
    absl::MutexLock lock(&mu_);
    if (!std::exchange(room_, false)) {
      parked_ = std::move(frame);
      return absl::OkStatus();
    }
  }
}

void CompressionCall::OnRoom() {
  std::optional<wire::Frame> frame;
  {
    absl::MutexLock lock(&mu_);
    frame = std::exchange(parked_, std::nullopt);
    if (!frame.has_value()) room_ = true;
  }
  if (!frame.has_value()) return;
  absl::Status status = HandleChunks(*std::move(frame));
  if (!status.ok()) Fail(std::move(status));
}

absl::Status CompressionCall::ReceiveChunk(const wire::Frame& frame, const Chunk& chunk,
                                           const Request::ChunkPlace& place, Request& request) {
  const wire::ChunkHeader& header = frame.header();
  if (absl::Status status = frame.CopyTo(place.data); !status.ok()) {
    services_.metrics.ChecksumFailed();
    return status;
  }
  uint32_t& crc = tensor_crcs_[place.tensor_index];
  crc = wire::Crc32cCombine(crc, header.crc32c, chunk.size);
  if (chunk.last && crc != header.tensor_crc32c) {
    services_.metrics.ChecksumFailed();
    return wire::ChecksumMismatch(chunk.tensor, 0, "tensor", header.tensor_crc32c, crc);
  }
  request.Commit(place, chunk);
  return absl::OkStatus();
}

absl::Status CompressionCall::HandleEnd(const v1::End& end) {
  const std::shared_ptr<Request> request = this->request();
  if (request == nullptr) return absl::CancelledError("the call is over");
  if (absl::Status status = request->End(end.num_tensors()); !status.ok()) return status;
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kEnded;
  }
  ReadNext();  // to see the client close, or say too much
  return absl::OkStatus();
}

// -- out ------------------------------------------------------------------------------------------

void CompressionCall::OnSequence(SequenceOutput output) { Enqueue(encoder_->Encode(output)); }

void CompressionCall::OnLayer(ComputedLayer output) {
  absl::StatusOr<std::vector<Outgoing>> messages = encoder_->Encode(output);
  if (!messages.ok()) return Fail(messages.status());
  Enqueue(*std::move(messages));
}

void CompressionCall::OnEnd(EndOutput output) {
  absl::MutexLock lock(&mu_);
  end_ = std::move(output);
  Pump();
}

void CompressionCall::OnError(absl::Status status) { Fail(std::move(status)); }

void CompressionCall::Enqueue(std::vector<Outgoing> messages) {
  absl::MutexLock lock(&mu_);
  if (settled_.has_value()) return;
  for (Outgoing& message : messages) queue_.push_back(std::move(message));
  Pump();
}

void CompressionCall::Pump() {
  if (reactor_ == nullptr || writing_ || finished_) return;
  if (!settled_.has_value()) {
    if (!queue_.empty()) {
      outgoing = queue_.front().message;
    } else if (end_.has_value()) {
      outgoing = EncodeEnd();
    } else {
      return;
    }
    writing_ = true;
    write_started_ = absl::Now();
    reactor_->StartWrite(&outgoing);
    return;
  }
  if (!let_go_) return;
  finished_ = true;
  RecordFinish(*settled_);
  reactor_->Finish(settled_->ok() ? grpc::Status::OK : ErrorToGrpc(*settled_));
}

void CompressionCall::OnWritten(bool ok) {
  std::shared_ptr<Request> layer_sent;
  std::shared_ptr<Request> over;
  std::deque<Outgoing> sent;  // freed outside the lock
  {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    sending_ += absl::Now() - write_started_;
    outgoing.Clear();
    if (ok && !settled_.has_value()) {
      if (queue_.empty()) {  // that was the end
        settled_ = absl::OkStatus();
        let_go_ = true;
        over = std::exchange(request_, nullptr);
      } else {
        sent.push_back(std::move(queue_.front()));
        queue_.pop_front();
        if (sent.front().ends_layer) layer_sent = request_;
      }
    }
    if (ok || settled_.has_value()) Pump();
  }
  if (!ok) OnCancel();  // the client is gone
  sent.clear();
  if (layer_sent != nullptr) layer_sent->LayerSent();
}

// -- over -----------------------------------------------------------------------------------------

bool CompressionCall::Settle(absl::Status status) {
  std::shared_ptr<Request> request;
  std::deque<Outgoing> unsent;
  std::optional<wire::Frame> parked;
  Admission::Ticket ticket = 0;
  Admission* admission = nullptr;
  {
    absl::MutexLock lock(&mu_);
    if (settled_.has_value() || reactor_ == nullptr) return false;
    settled_ = std::move(status);
    request = std::exchange(request_, nullptr);
    unsent.swap(queue_);
    parked = std::exchange(parked_, std::nullopt);
    ticket = ticket_;
    admission = admission_;
  }
  // Before the caller hears of the end, and tries again.
  if (admission != nullptr) admission->Cancel(ticket);
  if (request != nullptr) request->Cancel();
  absl::MutexLock lock(&mu_);
  let_go_ = true;
  Pump();
  return true;
}

void CompressionCall::Fail(absl::Status status, const char* rejection) {
  if (Settle(std::move(status)) && rejection != nullptr) services_.metrics.Rejected(rejection);
}

void CompressionCall::OnCancel() {
  const bool late = absl::Now() >= deadline_;
  std::string published;
  std::string tenant;
  const char* phase = "send";
  {
    absl::MutexLock lock(&mu_);
    if (phase_ == Phase::kBegin || phase_ == Phase::kWaiting) phase = "queue";
    if (phase_ == Phase::kReceiving) phase = "receive";
    published.swap(published_);
    tenant = tenant_;
  }
  // The caller may not have heard of it.
  if (!published.empty()) (void)services_.sessions.Release(published, tenant);
  if (Settle(late ? absl::DeadlineExceededError("the deadline passed")
                  : absl::CancelledError("the caller cancelled"))) {
    services_.metrics.Cancelled(phase);
  }
}

void CompressionCall::OnDone() {
  {
    absl::MutexLock lock(&mu_);
    reactor_ = nullptr;
  }
  --services_.num_streams;
}

// -- records --------------------------------------------------------------------------------------

grpc::ByteBuffer CompressionCall::EncodeEnd() {
  v1::CompressResponse response;
  v1::CompressEnd& end = *response.mutable_end();
  end = EndToProto(*end_);
  if (end_->opened != nullptr) {
    // Not before: nothing is kept of a call that does not get here.
    services_.sessions.Publish(end_->opened);
    published_ = end_->opened->id();
    end_->session = Snapshot(*end_->opened, services_.sessions);
  }
  if (end_->session.has_value()) {
    *end.mutable_session() = SessionToProto(*end_->session, services_.endpoint());
  }
  end.mutable_seconds()->set_send(absl::ToDoubleSeconds(sending_));
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
      .tokens_in = shape.num_tokens * shape.num_layers * shape.num_kv_heads,
      .tokens_kept = tokens_kept * shape.num_kv_heads,
      .num_blocks = end_->plan.segmentation.num_blocks(),
      .mass_mean = end.has_receipt() ? end.receipt().retained_attention_mass_mean() : kNaN,
      .mass_min = end.has_receipt() ? end.receipt().retained_attention_mass_min() : kNaN,
      .error_mean = end.has_receipt() ? end.receipt().output_relative_error_mean() : kNaN,
      .shadow = end_->shadow_bytes_out > 0,
  });
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
