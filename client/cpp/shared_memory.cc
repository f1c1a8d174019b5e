// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace dynsplit {
namespace {

constexpr size_t kTokenBytes = 16;
constexpr timeval kAnswerTimeout = {.tv_sec = 10, .tv_usec = 0};

class FileCloser {
 public:
  explicit FileCloser(int fd) : fd_(fd) {}
  ~FileCloser() { close(fd_); }
  FileCloser(const FileCloser&) = delete;
  FileCloser& operator=(const FileCloser&) = delete;

 private:
  const int fd_;
};

absl::StatusOr<std::string> RandomToken() {
  std::string token(kTokenBytes, '\0');
  if (getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) {
    return absl::ErrnoToStatus(errno, "cannot draw a name for shared memory");
  }
  return token;
}

absl::Status Send(int socket, std::string token, int fd) {
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  iovec part = {.iov_base = token.data(), .iov_len = token.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
    return absl::ErrnoToStatus(errno, "cannot pass shared memory");
  }
  return absl::OkStatus();
}

// Passes the descriptor under the token, and waits for the server's word.
absl::Status Pass(const std::string& path, const std::string& token, int fd) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("path of ", path.size(), " bytes: ", path));
  }
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  const int side = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (side < 0) return absl::ErrnoToStatus(errno, "socket");
  const FileCloser closer(side);
  if (connect(side, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot connect to ", path, ": ", std::strerror(errno)));
  }
  if (setsockopt(side, SOL_SOCKET, SO_RCVTIMEO, &kAnswerTimeout, sizeof(kAnswerTimeout)) != 0) {
    return absl::ErrnoToStatus(errno, "setsockopt");
  }
  if (absl::Status status = Send(side, token, fd); !status.ok()) return status;
  std::array<char, 256> answer{};
  const ssize_t size = recv(side, answer.data(), answer.size(), 0);
  if (size <= 0) return absl::UnavailableError(absl::StrCat("no answer from ", path));
  const absl::string_view text(answer.data(), static_cast<size_t>(size));
  if (text == "ok") return absl::OkStatus();
  return absl::FailedPreconditionError(text);
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
  const absl::StatusOr<std::string> random = RandomToken();
  if (!random.ok()) return random.status();
  std::string key = absl::StrCat("dynsplit-", absl::BytesToHexString(*random));
  const std::string path = "/" + key;
  const int fd = shm_open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot create shared memory ", path));
  const absl::StatusOr<std::byte*> data = Map(fd, size);
  close(fd);
  if (!data.ok()) {
    shm_unlink(path.c_str());
    return data.status();
  }
  return std::unique_ptr<SharedMemory>(new SharedMemory(std::move(key), "", *data, size));
}

absl::StatusOr<std::unique_ptr<SharedMemory>> SharedMemory::CreateSealed(
    size_t size, const std::string& region_socket) {
  if (size == 0) return absl::InvalidArgumentError("shared memory of 0 bytes");
  absl::StatusOr<std::string> token = RandomToken();
  if (!token.ok()) return token.status();
  const int fd = memfd_create("dynsplit", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return absl::ErrnoToStatus(errno, "memfd_create");
  const FileCloser closer(fd);
  const absl::StatusOr<std::byte*> data = Map(fd, size);
  if (!data.ok()) return data.status();
  std::unique_ptr<SharedMemory> memory(new SharedMemory("", *token, *data, size));
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return absl::ErrnoToStatus(errno, "cannot seal shared memory");
  }
  if (absl::Status status = Pass(region_socket, *token, fd); !status.ok()) return status;
  return memory;
}

SharedMemory::~SharedMemory() {
  munmap(data_, size_);
  if (!key_.empty()) shm_unlink(("/" + key_).c_str());
}

v1::RegisterRegionRequest SharedMemory::Registration(const std::string& name, bool writable) const {
  v1::RegisterRegionRequest request;
  request.set_name(name);
  request.set_byte_size(static_cast<int64_t>(size_));
  if (key_.empty()) {
    request.mutable_memfd()->set_token(token_);
  } else {
    request.mutable_posix_shm()->set_key(key_);
  }
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

absl::Span<const std::byte> PlacedBytes(const v1::TensorDescriptor& tensor,
                                        absl::Span<const std::byte> region) {
  const int64_t offset = tensor.location().region().offset_bytes();
  if (!tensor.location().has_region() || offset < 0 || tensor.byte_size() < 0 ||
      std::cmp_greater(offset, region.size()) ||
      std::cmp_greater(tensor.byte_size(), region.size() - static_cast<size_t>(offset))) {
    return {};
  }
  return region.subspan(static_cast<size_t>(offset), static_cast<size_t>(tensor.byte_size()));
}

}  // namespace dynsplit
