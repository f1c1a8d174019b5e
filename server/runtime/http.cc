// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/http.h"

#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
// Third-party header that is not clean under our warnings.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wshadow"
#include "httplib.h"
#pragma GCC diagnostic pop

namespace dynsplit {

struct HttpServer::Impl {
  httplib::Server server;
  Handlers handlers;
  std::thread thread;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl, int port)
    : impl_(std::move(impl)), port_(port) {}

HttpServer::~HttpServer() {
  impl_->server.stop();
  if (impl_->thread.joinable()) impl_->thread.join();
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& address,
                                                              Handlers handlers) {
  const size_t colon = address.rfind(':');
  int port = -1;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port)) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address '", address, "' must be host:port"));
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);  // [::1]
  }
  auto impl = std::make_unique<Impl>();
  impl->handlers = std::move(handlers);
  // Scrapers and probes: few, short requests.
  impl->server.new_task_queue = [] { return new httplib::ThreadPool(2); };
  impl->server.set_keep_alive_max_count(1);
  impl->server.set_read_timeout(5);
  impl->server.set_write_timeout(5);
  impl->server.set_payload_max_length(0);
  // Without the default SO_REUSEPORT two servers could share a port unnoticed.
  impl->server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  const Handlers& h = impl->handlers;
  impl->server.Get("/metrics", [&h](const httplib::Request&, httplib::Response& response) {
    response.set_content(h.metrics(), "text/plain; version=0.0.4; charset=utf-8");
  });
  impl->server.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("ok\n", "text/plain");
  });
  impl->server.Get("/readyz", [&h](const httplib::Request&, httplib::Response& response) {
    const absl::Status status = h.ready();
    response.status = status.ok() ? 200 : 503;
    response.set_content(status.ok() ? "ok\n" : absl::StrCat(status.message(), "\n"), "text/plain");
  });
  if (port == 0) {
    port = impl->server.bind_to_any_port(host);
  } else if (!impl->server.bind_to_port(host, port)) {
    port = -1;
  }
  if (port <= 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen for HTTP on '", address, "': address in use or not local"));
  }
  impl->thread = std::thread([server = &impl->server] { server->listen_after_bind(); });
  while (!impl->server.is_running()) std::this_thread::yield();
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl), port));
}

}  // namespace dynsplit
