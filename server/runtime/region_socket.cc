// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/region_socket.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace dynsplit {
namespace {

constexpr int kBacklog = 64;
constexpr int kSweepPeriodMs = 1000;
constexpr mode_t kOwnerOnly = 0600;

// The peer at the other end runs as this process's user.
bool IsOwnUser(int socket) {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

// Never waits: an answer that the peer has no room for is its loss.
void Answer(int socket, std::string_view text) {
  (void)send(socket, text.data(), text.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
}

// Sockets of which only the user may connect to.
absl::StatusOr<FileDescriptor> Listen(const std::string& path) {
  const auto failed = [&](const char* call) {
    return absl::InvalidArgumentError(
        absl::StrCat("option region-socket is '", path, "': ", call, ": ", std::strerror(errno)));
  };
  FileDescriptor listener(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.valid()) return failed("socket");
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    errno = ENAMETOOLONG;
    return failed("bind");
  }
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  // Before anyone can connect: what bind creates has the mode of the socket.
  if (fchmod(listener.number(), kOwnerOnly) != 0) return failed("fchmod");
  if (bind(listener.number(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return failed("bind");
  }
  if (listen(listener.number(), kBacklog) != 0) {
    const absl::Status status = failed("listen");
    unlink(path.c_str());
    return status;
  }
  return listener;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RegionSocket>> RegionSocket::Start(const std::string& path,
                                                                  PassedFiles& files,
                                                                  Options options) {
  absl::StatusOr<FileDescriptor> listener = Listen(path);
  if (!listener.ok()) return listener.status();
  std::unique_ptr<RegionSocket> made(new RegionSocket(path, files, options));
  made->listener_ = *std::move(listener);
  made->stop_ = FileDescriptor(eventfd(0, EFD_CLOEXEC));
  if (!made->stop_.valid()) {
    return absl::InternalError(absl::StrCat("eventfd: ", std::strerror(errno)));
  }
  made->thread_ = std::thread([self = made.get()] { self->Run(); });
  return made;
}

RegionSocket::~RegionSocket() {
  if (thread_.joinable()) {
    (void)eventfd_write(stop_.number(), 1);
    thread_.join();
  }
  unlink(path_.c_str());
}

void RegionSocket::Run() {
  while (true) {
    // Full: those who come wait in the backlog, at most options_.patience.
    const bool full = std::cmp_greater_equal(connections_.size(), options_.max_connections);
    std::vector<pollfd> waits = {
        {.fd = stop_.number(), .events = POLLIN, .revents = 0},
        {.fd = full ? -1 : listener_.number(), .events = POLLIN, .revents = 0}};
    int timeout_ms = kSweepPeriodMs;
    const absl::Time now = absl::Now();
    for (const Connection& connection : connections_) {
      waits.push_back({.fd = connection.socket.number(), .events = POLLIN, .revents = 0});
      const int64_t left_ms = absl::ToInt64Milliseconds(connection.deadline - now) + 1;
      timeout_ms = static_cast<int>(std::clamp<int64_t>(left_ms, 0, timeout_ms));
    }
    if (poll(waits.data(), waits.size(), timeout_ms) < 0 && errno != EINTR) return;
    if (waits[0].revents != 0) return;
    size_t kept = 0;
    for (size_t i = 0; i < connections_.size(); ++i) {
      const bool over = (waits[i + 2].revents != 0 && Serve(connections_[i])) ||
                        absl::Now() >= connections_[i].deadline;
      if (!over) std::swap(connections_[kept++], connections_[i]);
    }
    connections_.resize(kept);
    if (waits[1].revents != 0) Accept();
    files_.Sweep();
  }
}

void RegionSocket::Accept() {
  FileDescriptor socket(
      accept4(listener_.number(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!socket.valid()) {
    // Out of descriptors: the poll would come back at once.
    if (errno == EMFILE || errno == ENFILE) absl::SleepFor(absl::Milliseconds(10));
    return;
  }
  if (!IsOwnUser(socket.number())) return Answer(socket.number(), "the peer is of another user");
  connections_.push_back(
      {.socket = std::move(socket), .deadline = absl::Now() + options_.patience});
}

bool RegionSocket::Serve(const Connection& connection) {
  absl::StatusOr<PassedFile> passed = ReceivePassedFile(connection.socket.number());
  if (absl::IsUnavailable(passed.status())) return false;
  absl::Status status = passed.status();
  if (status.ok()) status = files_.Add(*std::move(passed));
  const absl::string_view text = status.ok() ? "ok" : status.message();
  Answer(connection.socket.number(), {text.data(), text.size()});
  return true;
}

}  // namespace dynsplit
