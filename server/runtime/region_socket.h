// SPDX-License-Identifier: Apache-2.0
//
// The side socket over which clients pass descriptors of memory (MemFd in memory.proto). One
// thread; whatever clients do, it holds few connections, each for a short time.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/runtime/file_descriptor.h"
#include "server/runtime/passed_files.h"

namespace dynsplit {

class RegionSocket {
 public:
  struct Options {
    int max_connections = 16;
    absl::Duration patience = absl::Seconds(1);  // with a client that has connected
  };

  // Listens at `path`, for this user alone. INVALID_ARGUMENT where the path cannot be bound.
  // `files` outlives the object.
  static absl::StatusOr<std::unique_ptr<RegionSocket>> Start(const std::string& path,
                                                             PassedFiles& files, Options options);
  static absl::StatusOr<std::unique_ptr<RegionSocket>> Start(const std::string& path,
                                                             PassedFiles& files) {
    return Start(path, files, Options());
  }
  ~RegionSocket();  // removes the socket file
  RegionSocket(const RegionSocket&) = delete;
  RegionSocket& operator=(const RegionSocket&) = delete;

 private:
  struct Connection {
    FileDescriptor socket;
    absl::Time deadline;
  };

  RegionSocket(std::string path, PassedFiles& files, Options options)
      : path_(std::move(path)), files_(files), options_(options) {}
  void Run();
  void Accept();
  // True when the connection is over.
  bool Serve(const Connection& connection);

  // Constant after Start.
  const std::string path_;
  PassedFiles& files_;
  const Options options_;
  FileDescriptor listener_;
  FileDescriptor stop_;  // an eventfd

  std::vector<Connection> connections_;  // of the thread
  std::thread thread_;
};

}  // namespace dynsplit
