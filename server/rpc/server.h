// SPDX-License-Identifier: Apache-2.0
//
// The whole server in one object: listeners, services, health, metrics, drain.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "server/pipeline/backend.h"
#include "server/rpc/services.h"
#include "server/runtime/http.h"
#include "server/runtime/passed_files.h"
#include "server/runtime/region_socket.h"

namespace dynsplit::rpc {

// Thread-safe.
class Server {
 public:
  // Listens and serves. One sentence of error where an address is taken, a profile is broken, ...
  // Requires: ValidateConfig(config) is OK; at least one backend, all of one kind.
  static absl::StatusOr<std::unique_ptr<Server>> Start(
      ServerConfig config, std::vector<std::unique_ptr<Backend>> backends, std::string version);
  ~Server();  // Shutdown() with nothing to wait for, where it was not called.
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  int port() const { return port_; }  // TCP; 0 = none
  int http_port() const { return http_ == nullptr ? 0 : http_->port(); }

  // Graceful end. Health turns NOT_SERVING and /readyz 503; after pre_stop_delay new requests get
  // UNAVAILABLE; requests in flight have drain_timeout to finish, the rest is cancelled. Blocks.
  void Shutdown();

  // OK while a device works, else a fault that made one unusable.
  absl::Status device_status() const { return devices_->Healthy(); }
  Metrics::Live live() const;

 private:
  struct Listener;

  Server(ServerConfig config, std::vector<std::unique_ptr<Backend>> backends);
  absl::Status StartDevices();
  absl::Status Listen(const std::string& address, bool unix_socket);
  absl::Status ReadyStatus() const;
  void SetServing(bool serving);
  void Watch();
  void Stop(absl::Duration drain_timeout);

  // Constant after Start. Destroyed in reverse: calls, then jobs, then what they use.
  const ServerConfig config_;
  const std::vector<std::unique_ptr<Backend>> backends_;
  std::unique_ptr<Metrics> metrics_;
  Experience experience_{QualityTable::Builtin()};
  std::unique_ptr<ProfileStore> profiles_;
  std::unique_ptr<PassedFiles> region_files_;
  std::unique_ptr<RegionStore> regions_;
  std::unique_ptr<SessionStore> sessions_;
  std::unique_ptr<Services> services_;
  std::unique_ptr<DeviceSet> devices_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<RegionSocket> region_socket_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  int port_ = 0;

  // Self-synchronised.
  std::atomic<bool> not_serving_ = false;  // draining, or about to
  absl::Notification stopping_;
  std::atomic<bool> stopped_ = false;
  std::thread watcher_;
};

}  // namespace dynsplit::rpc
