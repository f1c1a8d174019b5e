// SPDX-License-Identifier: Apache-2.0
//
// Whole files: mapped for reading, replaced atomically when written.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace dynsplit {

// A read-only mapping of a regular file; the bytes live as long as the object.
class MappedFile {
 public:
  // NOT_FOUND, PERMISSION_DENIED or another code from errno; INVALID_ARGUMENT when not a regular
  // file.
  static absl::StatusOr<std::shared_ptr<const MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  absl::Span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* const data_;
  const size_t size_;
};

// Writes beside `path` and takes its place in Commit; without Commit nothing is left behind.
class AtomicFile {
 public:
  static absl::StatusOr<std::unique_ptr<AtomicFile>> Create(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  absl::Status Write(const void* data, size_t size);
  absl::Status WriteZeros(size_t size);
  // Durable and visible under the path on success. Requires that no Write failed; at most once.
  absl::Status Commit();

 private:
  AtomicFile(std::string path, std::string partial_path, int fd)
      : path_(std::move(path)), partial_path_(std::move(partial_path)), fd_(fd) {}

  const std::string path_;
  const std::string partial_path_;
  int fd_;
  bool committed_ = false;
};

}  // namespace dynsplit
