// SPDX-License-Identifier: Apache-2.0
//
// What bench_transport measures against: raw sockets, and a stream as generated code has it with
// gRPC's and the allocator's defaults. Each end is a process of its own.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dynsplit::bench {

// A child process; ends with the object.
class Child {
 public:
  explicit Child(std::vector<std::string> arguments);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  double CpuSeconds() const;  // of all its threads
  int64_t MinorFaults() const;
  int64_t PeakRssBytes() const;  // since the last ResetPeakRss
  void ResetPeakRss() const;
  // For programs that answer a line with a number.
  double Ask(const std::string& line);

 private:
  pid_t pid_ = 0;
  int to_ = -1;
  int from_ = -1;
};

// Of this process, all threads.
double OwnCpuSeconds();
int64_t OwnMinorFaults();
// A TCP port of the loopback interface that was free a moment ago.
int FreePort();

// A connection to RunRawServer.
class RawConnection {
 public:
  RawConnection(int port, const std::string& unix_path);  // port 0: the unix socket
  ~RawConnection();
  RawConnection(const RawConnection&) = delete;
  RawConnection& operator=(const RawConnection&) = delete;

  // Sends the bytes, 1 MiB a write, and waits until all were received in place.
  void Upload(const std::byte* data, size_t size);
  // 64 bytes there and back.
  void Ping();

 private:
  int fd_ = -1;
};

// Programs of child processes; they do not return.
[[noreturn]] void RunRawServer(int port, const std::string& unix_path);
[[noreturn]] void RunNaiveServer(int port);
// Uploads `bytes` for every line on stdin, and answers with the seconds that took.
[[noreturn]] void RunNaiveClient(int port, size_t bytes);

}  // namespace dynsplit::bench
