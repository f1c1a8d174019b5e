// SPDX-License-Identifier: Apache-2.0
//
// HTTP for machines that watch: /metrics, /healthz (alive: this thread answers, whatever the device
// does) and /readyz (200 while new requests are welcome, else 503 with the reason).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace dynsplit {

class HttpServer {
 public:
  struct Handlers {
    std::function<std::string()> metrics;
    std::function<absl::Status()> ready;  // OK, or why not
  };
  // Binds "host:port" (port 0 = any free one) and serves from its own threads until destroyed.
  // UNAVAILABLE when the address is taken or wrong.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address,
                                                           Handlers handlers);
  ~HttpServer();
  int port() const { return port_; }

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl, int port);
  std::unique_ptr<Impl> impl_;
  int port_ = 0;
};

}  // namespace dynsplit
