// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/transport_peers.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <thread>

#include "absl/time/clock.h"
#include "dynsplit/v1/compression.grpc.pb.h"

namespace dynsplit::bench {
namespace {

constexpr size_t kPingBytes = 64;
constexpr size_t kWriteBytes = size_t{1} << 20;

void Require(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

double SecondsOf(clockid_t clock) {
  timespec time = {};
  Require(clock_gettime(clock, &time) == 0, "clock_gettime");
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

sockaddr_un UnixAddress(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  return address;
}

template <typename Address>
int Bound(const Address& address) {
  const int fd =
      socket(reinterpret_cast<const sockaddr*>(&address)->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  Require(bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0, "bind");
  Require(listen(fd, 16) == 0, "listen");
  return fd;
}

bool ReceiveAll(int fd, void* data, size_t size) {
  auto* to = static_cast<std::byte*>(data);
  while (size > 0) {
    const ssize_t n = recv(fd, to, std::min(size, kWriteBytes), 0);
    if (n <= 0) return false;
    to += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

void SendAll(int fd, const void* data, size_t size) {
  const auto* from = static_cast<const std::byte*>(data);
  while (size > 0) {
    const ssize_t n = send(fd, from, std::min(size, kWriteBytes), MSG_NOSIGNAL);
    Require(n > 0, "send");
    from += n;
    size -= static_cast<size_t>(n);
  }
}

// A length and so many bytes, or length 0 and a ping; each is answered with kPingBytes.
void ServeRaw(int fd) {
  std::vector<std::byte> place;
  std::array<std::byte, kPingBytes> head = {};
  while (ReceiveAll(fd, head.data(), head.size())) {
    uint64_t size = 0;
    std::memcpy(&size, head.data(), sizeof(size));
    if (place.size() < size) place.resize(size);
    if (!ReceiveAll(fd, place.data(), size)) break;
    SendAll(fd, head.data(), head.size());
  }
  close(fd);
}

class NaiveService final : public v1::Compression::Service {
 public:
  grpc::Status Compress(
      grpc::ServerContext* /*context*/,
      grpc::ServerReaderWriter<v1::CompressResponse, v1::CompressRequest>* stream) override {
    v1::CompressRequest request;
    while (stream->Read(&request)) {
      const size_t end = request.offset() + request.data().size();
      if (place_.size() < end) place_.resize(end);
      std::memcpy(place_.data() + request.offset(), request.data().data(), request.data().size());
    }
    v1::CompressResponse response;
    response.mutable_end();
    stream->Write(response);
    return grpc::Status::OK;
  }

 private:
  std::vector<char> place_;  // one upload at a time
};

}  // namespace

Child::Child(std::vector<std::string> arguments) {
  std::array<int, 2> in = {};
  std::array<int, 2> out = {};
  Require(pipe2(in.data(), O_CLOEXEC) == 0 && pipe2(out.data(), O_CLOEXEC) == 0, "pipe2");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const int error = posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  Require(error == 0, arguments.front().c_str());
  close(in[0]);
  close(out[1]);
  to_ = in[1];
  from_ = out[0];
}

Child::~Child() {
  close(to_);
  close(from_);
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

double Child::CpuSeconds() const {
  clockid_t clock = 0;
  Require(clock_getcpuclockid(pid_, &clock) == 0, "clock_getcpuclockid");
  return SecondsOf(clock);
}

int64_t Child::MinorFaults() const {
  std::ifstream file("/proc/" + std::to_string(pid_) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string skipped;
  for (int i = 0; i < 7; ++i) fields >> skipped;  // state .. flags
  int64_t faults = 0;
  fields >> faults;
  return faults;
}

int64_t Child::PeakRssBytes() const {
  std::ifstream file("/proc/" + std::to_string(pid_) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) << 10;
  }
  return 0;
}

void Child::ResetPeakRss() const {
  std::ofstream("/proc/" + std::to_string(pid_) + "/clear_refs") << "5";
}

double Child::Ask(const std::string& line) {
  const std::string request = line + "\n";
  Require(write(to_, request.data(), request.size()) > 0, "write to child");
  std::string answer;
  for (char c = 0; read(from_, &c, 1) == 1 && c != '\n';) answer += c;
  return std::atof(answer.c_str());
}

int64_t OwnMinorFaults() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

double OwnCpuSeconds() { return SecondsOf(CLOCK_PROCESS_CPUTIME_ID); }

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  Require(bind(fd, reinterpret_cast<const sockaddr*>(&address), size) == 0 &&
              getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0,
          "bind");
  close(fd);
  return ntohs(address.sin_port);
}

RawConnection::RawConnection(int port, const std::string& unix_path)
    : fd_(socket(port != 0 ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  const int one = 1;
  if (port != 0) setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  const sockaddr_in tcp = Loopback(port);
  const sockaddr_un local = UnixAddress(unix_path);
  for (int i = 0; i < 200; ++i) {
    const int failed = port != 0
                           ? connect(fd_, reinterpret_cast<const sockaddr*>(&tcp), sizeof(tcp))
                           : connect(fd_, reinterpret_cast<const sockaddr*>(&local), sizeof(local));
    if (failed == 0) return;
    absl::SleepFor(absl::Milliseconds(20));
  }
  Require(false, "connect");
}

RawConnection::~RawConnection() { close(fd_); }

void RawConnection::Upload(const std::byte* data, size_t size) {
  std::array<std::byte, kPingBytes> head = {};
  const uint64_t length = size;
  std::memcpy(head.data(), &length, sizeof(length));
  SendAll(fd_, head.data(), head.size());
  SendAll(fd_, data, size);
  Require(ReceiveAll(fd_, head.data(), head.size()), "recv");
}

void RawConnection::Ping() { Upload(nullptr, 0); }

void RunRawServer(int port, const std::string& unix_path) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const std::array<pollfd, 2> listeners = {
      pollfd{.fd = Bound(Loopback(port)), .events = POLLIN, .revents = 0},
      pollfd{.fd = Bound(UnixAddress(unix_path)), .events = POLLIN, .revents = 0}};
  while (true) {
    auto ready = listeners;
    poll(ready.data(), ready.size(), -1);
    for (const pollfd& listener : ready) {
      if (listener.revents == 0) continue;
      const int fd = accept4(listener.fd, nullptr, nullptr, SOCK_CLOEXEC);
      const int one = 1;
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));  // fails on unix sockets
      std::thread([fd] { ServeRaw(fd); }).detach();
    }
  }
}

void RunNaiveServer(int port) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  NaiveService service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:" + std::to_string(port), grpc::InsecureServerCredentials());
  builder.RegisterService(&service);
  builder.BuildAndStart()->Wait();
  std::exit(0);
}

void RunNaiveClient(int port, size_t bytes) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  auto stub = v1::Compression::NewStub(
      grpc::CreateChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials()));
  const std::string source(bytes, 'x');
  for (std::string line; std::getline(std::cin, line);) {
    const absl::Time start = absl::Now();
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    const auto stream = stub->Compress(&context);
    for (size_t offset = 0; offset < bytes; offset += kWriteBytes) {
      v1::CompressRequest request;
      request.set_offset(offset);
      request.set_data(source.substr(offset, kWriteBytes));
      stream->Write(request);
    }
    stream->WritesDone();
    v1::CompressResponse response;
    while (stream->Read(&response)) continue;
    Require(stream->Finish().ok(), "naive upload");
    std::cout << absl::ToDoubleSeconds(absl::Now() - start) << std::endl;
  }
  std::exit(0);
}

}  // namespace dynsplit::bench
