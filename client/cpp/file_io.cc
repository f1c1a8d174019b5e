// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/file_io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"

namespace dynsplit {
namespace {

absl::Status Errno(const char* action, const std::string& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat("cannot ", action, " ", path));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return Errno("open", path);
  struct stat info {};
  absl::Status status;
  void* data = nullptr;
  if (fstat(fd, &info) != 0) {
    status = Errno("read", path);
  } else if (!S_ISREG(info.st_mode)) {
    status = absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  } else if (info.st_size > 0) {
    data = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) status = Errno("map", path);
  }
  close(fd);
  if (!status.ok()) return status;
  return std::shared_ptr<const MappedFile>(
      new MappedFile(static_cast<const std::byte*>(data), static_cast<size_t>(info.st_size)));
}

MappedFile::~MappedFile() {
  if (size_ > 0) munmap(const_cast<std::byte*>(data_), size_);
}

absl::StatusOr<std::unique_ptr<AtomicFile>> AtomicFile::Create(const std::string& path) {
  std::string partial = absl::StrCat(path, ".XXXXXX");
  const int fd = mkostemp(partial.data(), O_CLOEXEC);
  if (fd < 0) return Errno("create", partial);
  // mkostemp makes files private; this one shall have the mode of any other new file.
  const mode_t mask = umask(0);
  umask(mask);
  fchmod(fd, 0666 & ~mask);
  return std::unique_ptr<AtomicFile>(new AtomicFile(path, std::move(partial), fd));
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) close(fd_);
  if (!committed_) unlink(partial_path_.c_str());
}

absl::Status AtomicFile::Write(const void* data, size_t size) {
  const char* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = write(fd_, from, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return Errno("write", path_);
    from += written;
    size -= static_cast<size_t>(written);
  }
  return absl::OkStatus();
}

absl::Status AtomicFile::WriteZeros(size_t size) {
  static constexpr std::array<char, 4096> kZeros{};
  while (size > 0) {
    const size_t piece = std::min(size, kZeros.size());
    if (absl::Status status = Write(kZeros.data(), piece); !status.ok()) return status;
    size -= piece;
  }
  return absl::OkStatus();
}

absl::Status AtomicFile::Commit() {
  if (fsync(fd_) != 0) return Errno("write", path_);
  const int fd = std::exchange(fd_, -1);
  if (close(fd) != 0) return Errno("write", path_);
  if (rename(partial_path_.c_str(), path_.c_str()) != 0) return Errno("replace", path_);
  committed_ = true;
  return absl::OkStatus();
}

}  // namespace dynsplit
