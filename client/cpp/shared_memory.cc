// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace dynsplit {
namespace {

absl::StatusOr<std::string> RandomKey() {
  std::array<char, 16> random{};
  if (getrandom(random.data(), random.size(), 0) != static_cast<ssize_t>(random.size())) {
    return absl::ErrnoToStatus(errno, "cannot draw a name for shared memory");
  }
  return absl::StrCat("dynsplit-",
                      absl::BytesToHexString(absl::string_view(random.data(), random.size())));
}

// Room is taken at once: a page that cannot be had later would be a SIGBUS.
absl::StatusOr<std::byte*> Map(int fd, size_t size) {
  int error = 0;
  do {
    error = posix_fallocate(fd, 0, static_cast<off_t>(size));
  } while (error == EINTR);
  if (error == ENOSPC || error == EFBIG) {
    return absl::ResourceExhaustedError(absl::StrCat("no room for ", size, " bytes shared memory"));
  }
  if (error != 0) return absl::ErrnoToStatus(error, "cannot size shared memory");
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return absl::ErrnoToStatus(errno, "cannot map shared memory");
  return static_cast<std::byte*>(data);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedMemory>> SharedMemory::Create(size_t size) {
  if (size == 0) return absl::InvalidArgumentError("shared memory of 0 bytes");
  absl::StatusOr<std::string> key = RandomKey();
  if (!key.ok()) return key.status();
  const std::string path = "/" + *key;
  const int fd = shm_open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot create shared memory ", path));
  const absl::StatusOr<std::byte*> data = Map(fd, size);
  close(fd);
  if (!data.ok()) {
    shm_unlink(path.c_str());
    return data.status();
  }
  return std::unique_ptr<SharedMemory>(new SharedMemory(*std::move(key), *data, size));
}

SharedMemory::~SharedMemory() {
  munmap(data_, size_);
  shm_unlink(("/" + key_).c_str());
}

v1::RegisterRegionRequest SharedMemory::Registration(const std::string& name, bool writable) const {
  v1::RegisterRegionRequest request;
  request.set_name(name);
  request.set_byte_size(static_cast<int64_t>(size_));
  request.mutable_posix_shm()->set_key(key_);
  request.set_writable(writable);
  return request;
}

v1::RegionSlice SliceOf(const std::string& name, uint64_t generation, int64_t offset_bytes) {
  v1::RegionSlice slice;
  slice.set_name(name);
  slice.set_generation(generation);
  slice.set_offset_bytes(offset_bytes);
  return slice;
}

}  // namespace dynsplit
