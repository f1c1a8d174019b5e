// SPDX-License-Identifier: Apache-2.0
#include "server/rpc/server.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "proto/wire/channel.h"
#include "server/rpc/compression_service.h"
#include "server/rpc/info_service.h"
#include "server/rpc/memory_service.h"
#include "server/rpc/session_service.h"
#include "server/runtime/log.h"

namespace dynsplit::rpc {
namespace {

constexpr const char* kServiceNames[] = {"dynsplit.v1.Compression", "dynsplit.v1.Info",
                                         "dynsplit.v1.Sessions", "dynsplit.v1.Memory"};
constexpr int32_t kDefaultWorkers = 2;
// Steps side by side: one is on its way to the device while another returns.
constexpr int32_t kSelectWorkers = 4;
// Steps that gRPC's own threads wait for; it has at least twice as many.
constexpr int32_t kSelectVisitors = 2;
constexpr absl::Duration kWatchPeriod = absl::Milliseconds(250);
constexpr absl::Duration kDrainPollPeriod = absl::Milliseconds(10);

// The socket file of a server that is alive must not be taken: look first. A file that nobody
// listens behind is left to be replaced.
absl::Status CheckUnixSocketFree(const char* option, const std::string& path, int type) {
  struct stat status = {};
  if (lstat(path.c_str(), &status) != 0) {
    return errno == ENOENT ? absl::OkStatus()
                           : absl::InvalidArgumentError(absl::StrCat(
                                 "option ", option, " is '", path, "': ", std::strerror(errno)));
  }
  if (!S_ISSOCK(status.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("option ", option, " is '", path, "', which exists and is no socket"));
  }
  const int probe = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  if (probe < 0) return absl::InternalError(absl::StrCat("socket: ", std::strerror(errno)));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  const bool alive =
      connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  close(probe);
  if (!alive) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("option ", option, " is '", path, "', where another server is listening"));
}

}  // namespace

// gRPC fixes transport settings per server: same-host and remote listeners are separate ones.
struct Server::Listener {
  explicit Listener(Services& services)
      : compression(services), info(services), sessions(services), memory(services) {}

  CompressionService compression;
  InfoService info;
  SessionsService sessions;
  MemoryService memory;
  std::string unix_socket;  // path of the socket file; empty = TCP
  std::unique_ptr<grpc::Server> server;
};

Server::Server(ServerConfig config, std::unique_ptr<Backend> backend)
    : config_(std::move(config)), backend_(std::move(backend)) {}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerConfig config,
                                                      std::unique_ptr<Backend> backend,
                                                      std::string version) {
  std::unique_ptr<Server> server(new Server(std::move(config), std::move(backend)));
  const ServerConfig& options = server->config_;
  const BackendInfo& device = server->backend_->info();
  server->metrics_ = std::make_unique<Metrics>(version, device.name, device.device);
  absl::StatusOr<std::unique_ptr<ProfileStore>> profiles =
      ProfileStore::Create({.default_name = options.default_profile,
                            .directory = options.profile_directory,
                            .max_stored = options.max_profiles});
  if (!profiles.ok()) return profiles.status();
  server->profiles_ = *std::move(profiles);
  server->admission_ =
      std::make_unique<Admission>(Admission::Options{.capacity_bytes = options.max_in_flight_bytes,
                                                     .max_queue = options.max_queue,
                                                     .queue_timeout = options.queue_timeout});
  absl::StatusOr<std::unique_ptr<Executor>> executor =
      Executor::Create(*server->backend_, options.workers == 0 ? kDefaultWorkers : options.workers);
  if (!executor.ok()) return executor.status();
  server->executor_ = *std::move(executor);
  executor = Executor::Create(*server->backend_, kSelectWorkers, kSelectVisitors);
  if (!executor.ok()) return executor.status();
  server->selects_ = *std::move(executor);
  const bool all = options.regions == "all";
  if (!options.region_socket.empty()) server->region_files_ = std::make_unique<PassedFiles>();
  server->regions_ = std::make_unique<RegionStore>(
      RegionStore::Options{.allow_shm = all || options.regions == "shm",
                           .allow_cuda_ipc = all || options.regions == "cuda-ipc",
                           .max_regions = options.max_regions,
                           .max_owners = options.max_regions,
                           .files = server->region_files_.get()},
      *server->backend_);
  server->sessions_ = std::make_unique<SessionStore>(
      SessionStore::Options{.max_sessions = options.max_sessions,
                            .max_device_bytes = options.session_device_bytes,
                            .max_host_bytes = options.session_host_bytes,
                            .max_tenant_bytes = options.tenant_session_bytes},
      *server->backend_);
  server->services_.reset(new Services{.config = options,
                                       .version = std::move(version),
                                       .executor = *server->executor_,
                                       .admission = *server->admission_,
                                       .profiles = *server->profiles_,
                                       .metrics = *server->metrics_,
                                       .selects = *server->selects_,
                                       .regions = *server->regions_,
                                       .sessions = *server->sessions_});

  // Both are switches of the process, for all servers built afterwards.
  static std::once_flag once;
  std::call_once(once, [] { grpc::EnableDefaultHealthCheckService(true); });
  if (options.reflection) {
    static std::once_flag reflection_once;
    std::call_once(reflection_once,
                   [] { grpc::reflection::InitProtoReflectionServerBuilderPlugin(); });
  }
  if (!options.metrics_listen.empty()) {
    Server* self = server.get();
    absl::StatusOr<std::unique_ptr<HttpServer>> http = HttpServer::Start(
        options.metrics_listen, {.metrics = [self] { return self->metrics_->Text(self->live()); },
                                 .ready = [self] { return self->ReadyStatus(); }});
    if (!http.ok()) return http.status();
    server->http_ = *std::move(http);
  }
  if (!options.listen.empty()) {
    if (absl::Status status = server->Listen(options.listen, false); !status.ok()) return status;
  }
  if (!options.unix_socket.empty()) {
    if (absl::Status status = server->Listen(options.unix_socket, true); !status.ok()) {
      return status;
    }
  }
  if (server->region_files_ != nullptr) {
    absl::Status status =
        CheckUnixSocketFree("region-socket", options.region_socket, SOCK_SEQPACKET);
    if (!status.ok()) return status;
    unlink(options.region_socket.c_str());  // left behind: nobody listens
    absl::StatusOr<std::unique_ptr<RegionSocket>> socket =
        RegionSocket::Start(options.region_socket, *server->region_files_);
    if (!socket.ok()) return socket.status();
    server->region_socket_ = *std::move(socket);
  }
  server->SetServing(true);
  server->watcher_ = std::thread([self = server.get()] { self->Watch(); });
  return server;
}

absl::Status Server::Listen(const std::string& address, bool unix_socket) {
  if (unix_socket) {
    absl::Status status = CheckUnixSocketFree("unix-socket", address, SOCK_STREAM);
    if (!status.ok()) return status;
  }
  auto listener = std::make_unique<Listener>(*services_);
  const std::string target = unix_socket ? absl::StrCat("unix:", address) : address;
  grpc::ServerBuilder builder;
  int bound_port = 0;
  builder.AddListeningPort(target, grpc::InsecureServerCredentials(), &bound_port);
  builder.RegisterService(&listener->compression);
  builder.RegisterService(&listener->info);
  builder.RegisterService(&listener->sessions);
  builder.RegisterService(&listener->memory);
  builder.SetMaxReceiveMessageSize(config_.max_message_bytes);
  builder.SetMaxSendMessageSize(config_.max_message_bytes);
  // Two servers must not share a port unnoticed.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  for (const wire::TransportSetting& setting : wire::TransportSettings(wire::LocalityOf(target))) {
    builder.AddChannelArgument(setting.key, setting.value);
  }
  listener->server = builder.BuildAndStart();
  if (listener->server == nullptr || (!unix_socket && bound_port == 0)) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on '", address, "': address in use or not local"));
  }
  if (unix_socket) {
    listener->unix_socket = address;
  } else {
    port_ = bound_port;
    services_->port = bound_port;
  }
  listeners_.push_back(std::move(listener));
  return absl::OkStatus();
}

Server::~Server() { Stop(absl::ZeroDuration()); }

void Server::Shutdown() {
  SetServing(false);
  Log(LogLevel::kInfo, "draining",
      {{"streams", int64_t{services_->num_streams}},
       {"pre_stop_delay_seconds", absl::ToDoubleSeconds(config_.pre_stop_delay)},
       {"drain_timeout_seconds", absl::ToDoubleSeconds(config_.drain_timeout)}});
  absl::SleepFor(config_.pre_stop_delay);
  Stop(config_.drain_timeout);
}

void Server::Stop(absl::Duration drain_timeout) {
  if (stopped_.exchange(true)) return;
  if (services_ != nullptr) {
    services_->draining = true;
    admission_->Drain(kDrainRetryAfterMs);
    const absl::Time deadline = absl::Now() + drain_timeout;
    while (services_->num_streams > 0 && absl::Now() < deadline) absl::SleepFor(kDrainPollPeriod);
    if (const int64_t left = services_->num_streams; left > 0) {
      Log(LogLevel::kWarning, "cancelling what did not finish in time", {{"streams", left}});
    }
  }
  // Cancels calls that are left, and returns once their reactors are gone.
  for (const std::unique_ptr<Listener>& listener : listeners_) {
    listener->server->Shutdown(absl::ToChronoTime(absl::Now()));
  }
  for (const std::unique_ptr<Listener>& listener : listeners_) {
    listener->server->Wait();
    listener->server.reset();
    if (!listener->unix_socket.empty()) unlink(listener->unix_socket.c_str());
  }
  region_socket_.reset();
  stopping_.Notify();
  if (watcher_.joinable()) watcher_.join();
  http_.reset();
}

void Server::SetServing(bool serving) {
  not_serving_ = !serving;
  for (const std::unique_ptr<Listener>& listener : listeners_) {
    grpc::HealthCheckServiceInterface* health = listener->server->GetHealthCheckService();
    if (health == nullptr) continue;
    for (const char* name : kServiceNames) health->SetServingStatus(name, serving);
    health->SetServingStatus("", serving);
  }
}

void Server::Watch() {
  while (!stopping_.WaitForNotificationWithTimeout(kWatchPeriod)) {
    sessions_->Sweep();
    regions_->Sweep();
    const absl::Status status = backend_->Healthy();
    if (status.ok() || not_serving_) continue;
    Log(LogLevel::kError, "the device has failed",
        {{"error", std::string_view(status.message().data(), status.message().size())}});
    SetServing(false);
  }
}

absl::Status Server::ReadyStatus() const {
  if (absl::Status status = backend_->Healthy(); !status.ok()) return status;
  if (not_serving_) return absl::UnavailableError("draining");
  return absl::OkStatus();
}

Metrics::Live Server::live() const {
  const SessionStore::Totals sessions = sessions_->totals();
  int64_t region_bytes = 0;
  const std::vector<RegionStore::Info> regions = regions_->List();
  for (const RegionStore::Info& region : regions) region_bytes += region.byte_size;
  return {.reserved_bytes = admission_->reserved_bytes(),
          .capacity_bytes = config_.max_in_flight_bytes,
          .queue_depth = admission_->queue_depth(),
          .streams = services_->num_streams,
          .device_bytes = backend_->device_bytes_in_use(),
          .host_bytes = backend_->host_bytes_in_use(),
          .sessions = sessions.num_sessions,
          .session_device_bytes = sessions.device_bytes,
          .session_host_bytes = sessions.host_bytes,
          .sessions_opened = sessions.opened,
          .sessions_released = sessions.released,
          .sessions_expired = sessions.expired,
          .demotions = sessions.demotions,
          .restorations = sessions.restorations,
          .regions = static_cast<int64_t>(regions.size()),
          .region_bytes = region_bytes,
          .device_healthy = backend_->Healthy().ok(),
          .draining = not_serving_};
}

}  // namespace dynsplit::rpc
