// SPDX-License-Identifier: Apache-2.0
//
// Memory objects that clients have passed as descriptors (MemFd), until they register them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/runtime/file_descriptor.h"

namespace dynsplit {

// A packet of a client: its token, and what it attached.
struct PassedFile {
  std::string token;
  FileDescriptor file;
};

// Reads one packet from a connected SOCK_SEQPACKET socket without waiting, and checks that it is
// one token with one descriptor. Whatever else came with it is closed. UNAVAILABLE where there is
// no packet yet, CANCELLED where the peer closed, INVALID_ARGUMENT otherwise.
absl::StatusOr<PassedFile> ReceivePassedFile(int socket);

// Thread-safe.
class PassedFiles {
 public:
  static constexpr size_t kTokenBytes = 16;

  struct Options {
    int32_t max_files = 64;
    absl::Duration keep = absl::Seconds(30);
    std::function<absl::Time()> now = absl::Now;
  };

  PassedFiles() : PassedFiles(Options()) {}
  explicit PassedFiles(Options options) : options_(std::move(options)) {}

  // INVALID_ARGUMENT for what is no memfd sealed against resizing, ALREADY_EXISTS for a token in
  // use, RESOURCE_EXHAUSTED beyond max_files.
  absl::Status Add(PassedFile passed);
  // Another descriptor of the object; NOT_FOUND. It stays until Remove or its time is over.
  absl::StatusOr<FileDescriptor> Find(std::string_view token) const;
  void Remove(std::string_view token);
  // Closes what nobody came for.
  void Sweep();
  int64_t size() const;

 private:
  struct Entry {
    FileDescriptor file;
    absl::Time expiry;
  };

  const Options options_;
  mutable absl::Mutex mu_;
  std::map<std::string, Entry, std::less<>> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
