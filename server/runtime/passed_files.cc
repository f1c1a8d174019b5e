// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/passed_files.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

// One more descriptor than is wanted: further ones the kernel closes, and says so.
constexpr size_t kMostDescriptors = 2;

// Takes every descriptor of the message, so that none is left open.
std::vector<FileDescriptor> TakeDescriptors(msghdr& message) {
  std::vector<FileDescriptor> files;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      files.emplace_back(number);
    }
  }
  return files;
}

absl::Status CheckSeals(int file) {
  constexpr int kWanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  const int seals = fcntl(file, F_GET_SEALS);
  if (seals < 0) return absl::InvalidArgumentError("the descriptor is no memfd");
  if ((seals & kWanted) == kWanted) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "the memfd is not sealed with F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL");
}

}  // namespace

absl::StatusOr<PassedFile> ReceivePassedFile(int socket) {
  // A byte more than a token, to see what is longer.
  std::array<char, PassedFiles::kTokenBytes + 1> data{};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMostDescriptors * sizeof(int))> control{};
  iovec part = {.iov_base = data.data(), .iov_len = data.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t received = 0;
  do {
    received = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return absl::UnavailableError("no packet yet");
    return absl::CancelledError(std::strerror(errno));
  }
  std::vector<FileDescriptor> files = TakeDescriptors(message);
  if (received == 0 && files.empty()) return absl::CancelledError("the peer closed");
  if (std::cmp_not_equal(received, PassedFiles::kTokenBytes) ||
      (message.msg_flags & MSG_TRUNC) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a packet must be a token of ", PassedFiles::kTokenBytes, " bytes"));
  }
  if (files.size() != 1 || (message.msg_flags & MSG_CTRUNC) != 0) {
    return absl::InvalidArgumentError("a packet must have exactly one descriptor attached");
  }
  return PassedFile{.token = std::string(data.data(), PassedFiles::kTokenBytes),
                    .file = std::move(files.front())};
}

absl::Status PassedFiles::Add(PassedFile passed) {
  if (absl::Status status = CheckSeals(passed.file.number()); !status.ok()) return status;
  Sweep();
  absl::MutexLock lock(&mu_);
  if (entries_.contains(passed.token)) return absl::AlreadyExistsError("the token is in use");
  if (std::cmp_greater_equal(entries_.size(), options_.max_files)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("at most ", options_.max_files, " descriptors may wait to be registered"));
  }
  entries_[std::move(passed.token)] = {.file = std::move(passed.file),
                                       .expiry = options_.now() + options_.keep};
  return absl::OkStatus();
}

absl::StatusOr<FileDescriptor> PassedFiles::Find(std::string_view token) const {
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(token);
  if (found == entries_.end() || options_.now() >= found->second.expiry) {
    return NotFound("memfd", "of this token");
  }
  FileDescriptor file(fcntl(found->second.file.number(), F_DUPFD_CLOEXEC, 0));
  if (!file.valid()) return absl::InternalError(absl::StrCat("dup: ", std::strerror(errno)));
  return file;
}

void PassedFiles::Remove(std::string_view token) {
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(token);
  if (found != entries_.end()) entries_.erase(found);
}

void PassedFiles::Sweep() {
  absl::MutexLock lock(&mu_);
  const absl::Time now = options_.now();
  std::erase_if(entries_, [now](const auto& entry) { return now >= entry.second.expiry; });
}

int64_t PassedFiles::size() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int64_t>(entries_.size());
}

}  // namespace dynsplit
