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
#include "server/runtime/trace.h"

namespace dynsplit::rpc {
namespace {

constexpr const char* kServiceNames[] = {"dynsplit.v1.Compression", "dynsplit.v1.Info",
                                         "dynsplit.v1.Sessions", "dynsplit.v1.Memory"};
// Layers side by side on a GPU: one on its way to the device, one that is computed, one on its way
// back, and one whose results the host reads. On a CPU they would only share the processors.
constexpr int32_t kDefaultGpuWorkers = 4;
constexpr int32_t kDefaultCpuWorkers = 2;
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

Server::Server(ServerConfig config, std::vector<std::unique_ptr<Backend>> backends)
    : config_(std::move(config)), backends_(std::move(backends)) {}

absl::Status Server::StartDevices() {
  std::vector<Backend*> backends;
  for (const std::unique_ptr<Backend>& backend : backends_) backends.push_back(backend.get());
  const bool all = config_.regions == "all";
  if (!config_.region_socket.empty()) region_files_ = std::make_unique<PassedFiles>();
  regions_ = std::make_unique<RegionStore>(
      RegionStore::Options{.allow_shm = all || config_.regions == "shm",
                           .allow_cuda_ipc = all || config_.regions == "cuda-ipc",
                           .max_regions = config_.max_regions,
                           .max_owners = config_.max_regions,
                           .files = region_files_.get()},
      backends);
  sessions_ = std::make_unique<SessionStore>(
      SessionStore::Options{.max_sessions = config_.max_sessions,
                            .max_device_bytes = config_.session_device_bytes,
                            .max_host_bytes = config_.session_host_bytes,
                            .max_tenant_bytes = config_.tenant_session_bytes});
  const int32_t default_workers =
      backends.front()->info().name == "cpu" ? kDefaultCpuWorkers : kDefaultGpuWorkers;
  absl::StatusOr<std::unique_ptr<DeviceSet>> devices =
      DeviceSet::Create({.num_workers = config_.workers == 0 ? default_workers : config_.workers,
                         .max_request_bytes = config_.max_request_bytes,
                         .max_in_flight_bytes = config_.max_in_flight_bytes,
                         .max_queue = config_.max_queue,
                         .queue_timeout = config_.queue_timeout},
                        backends, *regions_, *metrics_);
  if (!devices.ok()) return devices.status();
  devices_ = *std::move(devices);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(
    ServerConfig config, std::vector<std::unique_ptr<Backend>> backends, std::string version) {
  std::unique_ptr<Server> server(new Server(std::move(config), std::move(backends)));
  const ServerConfig& options = server->config_;
  const BackendInfo& device = server->backends_.front()->info();
  server->metrics_ = std::make_unique<Metrics>(version, device.name, device.device);
  if (!options.trace.empty()) {
    if (absl::Status status = OpenTrace(options.trace); !status.ok()) return status;
  }
  absl::StatusOr<std::unique_ptr<ProfileStore>> profiles =
      ProfileStore::Create({.default_name = options.default_profile,
                            .directory = options.profile_directory,
                            .max_stored = options.max_profiles});
  if (!profiles.ok()) return profiles.status();
  server->profiles_ = *std::move(profiles);
  if (absl::Status status = server->StartDevices(); !status.ok()) return status;
  server->services_.reset(new Services{.config = options,
                                       .version = std::move(version),
                                       .devices = *server->devices_,
                                       .profiles = *server->profiles_,
                                       .metrics = *server->metrics_,
                                       .experience = server->experience_,
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
    devices_->Drain(kDrainRetryAfterMs);
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
  std::vector<const Device*> failed;  // told of already
  while (!stopping_.WaitForNotificationWithTimeout(kWatchPeriod)) {
    sessions_->Sweep();
    regions_->Sweep();
    for (const std::unique_ptr<Device>& device : devices_->all()) {
      const absl::Status status = device->backend().Healthy();
      if (status.ok() || std::find(failed.begin(), failed.end(), device.get()) != failed.end()) {
        continue;
      }
      failed.push_back(device.get());
      Log(LogLevel::kError, "the device has failed",
          {{"device", std::string_view(device->name())},
           {"error", std::string_view(status.message().data(), status.message().size())}});
    }
    if (!devices_->Healthy().ok() && !not_serving_) SetServing(false);
  }
}

absl::Status Server::ReadyStatus() const {
  if (absl::Status status = devices_->Healthy(); !status.ok()) return status;
  if (not_serving_) return absl::UnavailableError("draining");
  return absl::OkStatus();
}

Metrics::Live Server::live() const {
  const SessionStore::Totals sessions = sessions_->totals();
  const std::vector<RegionStore::Info> regions = regions_->List();
  Metrics::Live live = {.streams = services_->num_streams,
                        .sessions = sessions.num_sessions,
                        .session_device_bytes = sessions.device_bytes,
                        .session_host_bytes = sessions.host_bytes,
                        .sessions_opened = sessions.opened,
                        .sessions_released = sessions.released,
                        .sessions_expired = sessions.expired,
                        .sessions_lost = sessions.lost,
                        .demotions = sessions.demotions,
                        .restorations = sessions.restorations,
                        .regions = static_cast<int64_t>(regions.size()),
                        .draining = not_serving_,
                        .devices = {}};
  for (const RegionStore::Info& region : regions) live.region_bytes += region.byte_size;
  for (const std::unique_ptr<Device>& device : devices_->all()) {
    Metrics::LiveDevice one = device->live();
    live.reserved_bytes += one.reserved_bytes;
    live.capacity_bytes += device->capacity_bytes();
    live.queue_depth += one.queue_depth;
    live.device_bytes += one.device_bytes;
    live.host_bytes += one.host_bytes;
    live.devices.push_back(std::move(one));
  }
  return live;
}

}  // namespace dynsplit::rpc
