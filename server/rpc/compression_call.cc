// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/compression_call.h"

#include <algorithm>
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

// Between a stream's end and word that it was cancelled.
constexpr absl::Duration kCancelGrace = absl::Milliseconds(100);

// What goes on with something that exists is let finish.
bool StartsWork(Method method) { return method != Method::kAppend && method != Method::kFetch; }

class Reactor final : public FrameReactor {
 public:
  Reactor(std::shared_ptr<FrameStream> stream, Services& services)
      : stream_(std::move(stream)), services_(services) {}
  void Start() { stream_->Start(this); }
  void OnReadDone(bool ok) override { stream_->OnRead(ok); }
  void OnWriteDone(bool ok) override { stream_->OnWritten(ok); }
  void OnCancel() override { stream_->OnCancel(); }
  void OnDone() override {
    stream_->OnDone();
    --services_.num_streams;
    delete this;
  }

 private:
  const std::shared_ptr<FrameStream> stream_;
  Services& services_;
};

}  // namespace

FrameReactor* StartCompressionCall(Services& services, Method method,
                                   grpc::CallbackServerContext& context) {
  auto stream = std::make_shared<FrameStream>(static_cast<size_t>(services.config.max_chunk_bytes),
                                              DeadlineOf(context));
  auto* const reactor = new Reactor(stream, services);
  std::make_shared<CompressionCall>(services, method, context)->Begin(std::move(stream));
  reactor->Start();
  return reactor;
}

CompressionCall::CompressionCall(Services& services, Method method,
                                 const grpc::CallbackServerContext& context)
    : services_(services),
      method_(method),
      started_(absl::Now()),
      deadline_(DeadlineOf(context)),
      trace_parent_(TraceParentOf(context)) {}

void CompressionCall::Begin(std::shared_ptr<FrameStream> stream) {
  const int64_t num_streams = ++services_.num_streams;
  stream->SetOwner(shared_from_this(), 0);
  {
    absl::MutexLock lock(&mu_);
    shards_.push_back({.stream = std::move(stream)});
  }
  if (services_.draining && StartsWork(method_)) {
    Fail(RetryLater(absl::StatusCode::kUnavailable, "the server is draining", kDrainRetryAfterMs),
         "draining");
  } else if (num_streams > services_.config.max_streams) {
    Fail(RetryLater(absl::StatusCode::kResourceExhausted,
                    absl::StrCat("the server has ", num_streams - 1, " streams open, its most"),
                    kDrainRetryAfterMs),
         "too_many_streams");
  }
}

// -- in -------------------------------------------------------------------------------------------

FrameStream::Handled CompressionCall::OnFrame(int32_t shard, const wire::Frame& frame) {
  absl::StatusOr<Handled> handled = HandleFrame(shard, frame);
  if (handled.ok()) return *handled;
  Fail(handled.status());
  return Handled::kDone;
}

void CompressionCall::OnMalformed(int32_t /*shard*/, absl::Status status) { Fail(status); }

void CompressionCall::OnHalfClosed(int32_t shard) {
  {
    absl::MutexLock lock(&mu_);
    if (shards_[static_cast<size_t>(shard)].ended) return;  // as it should be
    if (std::exchange(closed_early_, true)) return;
  }
  // A cancelled stream looks closed a moment before OnCancelled says why.
  close_alarm_.Set(absl::ToChronoTime(absl::Now() + kCancelGrace),
                   [weak = weak_from_this()](bool expired) {
                     const auto self = expired ? weak.lock() : nullptr;
                     if (self == nullptr) return;
                     self->Fail(InvalidField("end", "is missing; the stream closed before it"));
                   });
}

absl::StatusOr<FrameStream::Handled> CompressionCall::HandleFrame(int32_t shard,
                                                                  const wire::Frame& frame) {
  Phase phase = Phase::kBegin;
  bool ended = false;
  {
    absl::MutexLock lock(&mu_);
    if (settled_.has_value()) return Handled::kDone;
    phase = phase_;
    ended = shards_[static_cast<size_t>(shard)].ended;
  }
  if (ended) return InvalidField("end", "must be the last message");
  if (frame.is_chunk()) {
    if (phase == Phase::kBegin) return InvalidField("begin", "must be the first message");
    return HandleChunk(shard, frame);
  }
  v1::CompressRequest message;
  if (absl::Status status = frame.ParseControl(&message); !status.ok()) return status;
  if (message.has_begin() == message.has_end()) {
    return InvalidField("begin", "a message must hold exactly one of begin, end and data");
  }
  if (message.has_begin()) {
    if (phase != Phase::kBegin) return InvalidField("begin", "must come once");
    absl::Status status = message.begin().shard_index() > 0 ? HandleLaterShard(message.begin())
                                                            : HandleBegin(message.begin());
    if (!status.ok()) return status;
    return Handled::kPause;
  }
  if (phase == Phase::kBegin) return InvalidField("begin", "must be the first message");
  absl::Status status = HandleEnd(shard, message.end());
  if (!status.ok()) return status;
  return Handled::kDone;
}

absl::Status CompressionCall::HandleBegin(const v1::Begin& begin) {
  absl::StatusOr<RequestSpec> spec = BeginRequest(begin, method_, services_);
  if (!spec.ok()) return spec.status();
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kWaiting;
    request_id_ = spec->request_id;
    tenant_ = spec->tenant;
  }
  if (spec->num_shards > 1) return OpenToShards(*std::move(spec));
  Admit(*std::move(spec));
  return absl::OkStatus();
}

// -- admission ------------------------------------------------------------------------------------

void CompressionCall::Admit(RequestSpec spec) {
  const int64_t bytes = ReservationBytes(spec, spec.backend->info().name != "cpu");
  if (bytes > services_.config.max_request_bytes) {
    spec.appending.Reset();
    return Fail(
        WithReason(absl::StatusCode::kResourceExhausted, "REQUEST_TOO_LARGE",
                   absl::StrCat("the request needs ", bytes, " bytes of memory with ",
                                "max_open_layers ", spec.max_open_layers, "; the server allows ",
                                services_.config.max_request_bytes)),
        "too_large");
  }
  const std::string tenant = spec.tenant;
  Admission& admission = services_.devices.Of(*spec.backend).admission();
  const Admission::Ticket ticket = admission.Request(
      tenant, bytes, deadline_,
      [self = shared_from_this(),
       spec = std::move(spec)](absl::StatusOr<Reservation> reservation) mutable {
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
}

void CompressionCall::OnAdmitted(RequestSpec spec, absl::StatusOr<Reservation> reservation) {
  if (!reservation.ok()) {
    spec.appending.Reset();  // before the caller hears of it, and tries again
    const bool waited_out = absl::Now() - started_ >= services_.config.queue_timeout;
    return Fail(reservation.status(), RejectionReason(reservation.status(), waited_out));
  }
  const absl::Duration waited = reservation->waited();
  services_.metrics.Waited(absl::ToDoubleSeconds(waited));
  v1::CompressResponse response;
  v1::Accepted& accepted = *response.mutable_accepted();
  accepted.set_request_id(spec.request_id);
  *accepted.mutable_policy() = PolicyToProto(spec.sequence.policy);
  accepted.set_reserved_bytes(reservation->bytes());
  accepted.set_backend(services_.backend().name);
  accepted.set_max_chunk_bytes(services_.config.max_chunk_bytes);
  encoder_.emplace(spec.max_chunk_bytes, spec.fetch_resume);
  tensor_crcs_.assign(spec.tensors.size(), 0);
  assigned_bytes_.assign(static_cast<size_t>(spec.num_shards), 0);
  {
    std::vector<Outgoing> first;
    first.emplace_back(wire::EncodeMessage(response));
    Enqueue(std::move(first));
  }
  Executor& executor = services_.devices.Of(*spec.backend).executor();
  absl::StatusOr<std::shared_ptr<Request>> request =
      Request::Create(std::move(spec), executor, *std::move(reservation), shared_from_this());
  if (!request.ok()) return Fail(request.status());
  std::vector<std::shared_ptr<FrameStream>> streams;
  {
    absl::MutexLock lock(&mu_);
    if (!settled_.has_value()) {
      request_ = *request;
      waited_ = waited;
      phase_ = Phase::kReceiving;
      streams = Streams();
    }
  }
  if (streams.empty()) return (*request)->Cancel();
  (*request)->Start();
  for (const std::shared_ptr<FrameStream>& stream : streams) stream->Resume();
}

// -- chunks ---------------------------------------------------------------------------------------

std::shared_ptr<Request> CompressionCall::request() {
  absl::MutexLock lock(&mu_);
  return request_;
}

absl::StatusOr<FrameStream::Handled> CompressionCall::HandleChunk(int32_t shard,
                                                                  const wire::Frame& frame) {
  const std::shared_ptr<Request> request = this->request();
  if (request == nullptr) return absl::CancelledError("the call is over");
  const Chunk chunk = {.tensor = frame.header().tensor,
                       .offset = frame.header().offset,
                       .size = frame.data_size(),
                       .last = frame.header().last,
                       .shard = shard};
  absl::StatusOr<Request::ChunkPlace> place = request->Place(chunk);
  if (!place.ok()) return place.status();
  if (place->data == nullptr) return Handled::kRetry;  // until OnRoom
  if (absl::Status status = ReceiveChunk(frame, chunk, *place, *request); !status.ok()) {
    return status;
  }
  return Handled::kDone;
}

void CompressionCall::OnRoom() {
  std::vector<std::shared_ptr<FrameStream>> streams;
  {
    absl::MutexLock lock(&mu_);
    streams = Streams();
  }
  for (const std::shared_ptr<FrameStream>& stream : streams) stream->Resume();
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

absl::Status CompressionCall::HandleEnd(int32_t shard, const v1::End& end) {
  const std::shared_ptr<Request> request = this->request();
  if (request == nullptr) return absl::CancelledError("the call is over");
  {
    absl::MutexLock lock(&mu_);
    shards_[static_cast<size_t>(shard)].ended = true;
    const bool all =
        std::all_of(shards_.begin(), shards_.end(), [](const Shard& other) { return other.ended; });
    if (all) phase_ = Phase::kEnded;
  }
  return request->End(shard, end.num_tensors());
}

// -- out ------------------------------------------------------------------------------------------

void CompressionCall::OnSequence(SequenceOutput output) { Enqueue(encoder_->Encode(output)); }

void CompressionCall::OnLayer(ComputedLayer output) {
  absl::StatusOr<std::vector<Outgoing>> messages = encoder_->Encode(output);
  if (!messages.ok()) return Fail(messages.status());
  // The layer's memory is free once all of it has left.
  const std::shared_ptr<const void> layer(this, [request = request()](const void*) {
    if (request != nullptr) request->LayerSent();
  });
  for (Outgoing& message : *messages) message.part_of = layer;
  Enqueue(*std::move(messages));
}

void CompressionCall::OnEnd(EndOutput output) {
  {
    absl::MutexLock lock(&mu_);
    end_ = std::move(output);
  }
  MaybeEnd();
}

void CompressionCall::OnError(absl::Status status) { Fail(status); }

void CompressionCall::Enqueue(std::vector<Outgoing> messages) {
  std::vector<std::shared_ptr<FrameStream>> streams;
  {
    absl::MutexLock lock(&mu_);
    streams = Streams();
  }
  if (streams.empty()) return;
  std::vector<std::vector<Outgoing>> by_shard(streams.size());
  for (Outgoing& message : messages) {
    size_t shard = 0;
    if (message.num_bytes() > 0) {
      const auto least = std::min_element(assigned_bytes_.begin(), assigned_bytes_.end());
      *least += message.num_bytes();
      shard = static_cast<size_t>(least - assigned_bytes_.begin());
    }
    by_shard[shard].push_back(std::move(message));
  }
  for (size_t i = 0; i < streams.size(); ++i) {
    if (!by_shard[i].empty()) streams[i]->Send(std::move(by_shard[i]));
  }
}

void CompressionCall::OnIdle(int32_t /*shard*/) { MaybeEnd(); }

void CompressionCall::MaybeEnd() {
  {
    absl::MutexLock lock(&mu_);
    if (settled_.has_value() || !end_.has_value()) return;
    for (const Shard& shard : shards_) {
      if (!shard.stream->idle()) return;
    }
    if (!std::exchange(end_sent_, true)) {
      std::vector<Outgoing> end;
      end.emplace_back(EncodeEnd());
      shards_.front().stream->Send(std::move(end));  // under the lock: else it might look idle
      return;
    }
  }
  Settle(absl::OkStatus());
}

// -- over -----------------------------------------------------------------------------------------

std::vector<std::shared_ptr<FrameStream>> CompressionCall::Streams() {
  std::vector<std::shared_ptr<FrameStream>> streams;
  if (settled_.has_value()) return streams;
  for (const Shard& shard : shards_) {
    if (shard.stream != nullptr) streams.push_back(shard.stream);
  }
  return streams;
}

bool CompressionCall::Settle(const absl::Status& status) {
  std::shared_ptr<Request> request;
  std::vector<std::shared_ptr<FrameStream>> streams;
  std::optional<RequestSpec> joining;
  std::optional<ShardKey> key;
  Admission::Ticket ticket = 0;
  Admission* admission = nullptr;
  {
    absl::MutexLock lock(&mu_);
    if (settled_.has_value()) return false;
    streams = Streams();
    settled_ = status;
    request = std::exchange(request_, nullptr);
    joining.swap(joining_);
    key.swap(key_);
    ticket = ticket_;
    admission = admission_;
  }
  // Before the caller hears of the end, and tries again.
  if (key.has_value()) {
    services_.shards.Leave(*key, this);
    join_alarm_.Cancel();
  }
  joining.reset();
  if (admission != nullptr) admission->Cancel(ticket);
  if (request != nullptr && !status.ok()) request->Cancel();
  request.reset();
  {
    absl::MutexLock lock(&mu_);
    RecordFinish(status);
  }
  const grpc::Status finish = status.ok() ? grpc::Status::OK : ErrorToGrpc(status);
  for (const std::shared_ptr<FrameStream>& stream : streams) stream->Finish(finish);
  return true;
}

void CompressionCall::Fail(const absl::Status& status, const char* rejection) {
  if (Settle(status) && rejection != nullptr) services_.metrics.Rejected(rejection);
}

void CompressionCall::OnCancelled(int32_t shard, bool late) {
  std::string published;
  std::string tenant;
  const char* phase = "send";
  {
    absl::MutexLock lock(&mu_);
    if (phase_ <= Phase::kWaiting) phase = "queue";
    if (phase_ == Phase::kReceiving) phase = "receive";
    // The end travels on the first stream.
    if (shard == 0 || !settled_.has_value()) published.swap(published_);
    tenant = tenant_;
  }
  // The caller may not have heard of it.
  if (!published.empty()) (void)services_.sessions.Release(published, tenant);
  if (Settle(late ? absl::DeadlineExceededError("the deadline passed")
                  : absl::CancelledError("the caller cancelled"))) {
    services_.metrics.Cancelled(phase);
  }
}

}  // namespace dynsplit::rpc
