// SPDX-License-Identifier: Apache-2.0
//
// The region side socket: a client's packets, and what becomes of them. The input is a list of
// steps: a packet (what is attached, the token's length, the token), a look-up, a removal, time.
// A plain model says what each must return; in the end no descriptor may be left open.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "server/runtime/passed_files.h"

namespace {

using dynsplit::FileDescriptor;
using dynsplit::PassedFile;
using dynsplit::PassedFiles;

constexpr int32_t kMostFiles = 3;
constexpr absl::Duration kKeep = absl::Seconds(30);
constexpr size_t kMostSteps = 64;

void Check(bool condition) {
  if (!condition) std::abort();
}

class Input {
 public:
  Input(const uint8_t* data, size_t size) : left_(reinterpret_cast<const char*>(data), size) {}
  bool empty() const { return left_.empty(); }
  size_t Byte() { return static_cast<unsigned char>(Bytes(1)[0]); }
  // Zeros behind the end.
  std::string Bytes(size_t size) {
    std::string bytes(left_.substr(0, size));
    left_.remove_prefix(bytes.size());
    bytes.resize(size);
    return bytes;
  }

 private:
  std::string_view left_;
};

FileDescriptor Memory(int seals) {
  FileDescriptor file(memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  Check(file.valid() && fcntl(file.number(), F_ADD_SEALS, seals) == 0);
  return file;
}

// What clients attach. Made once.
struct Attachments {
  const FileDescriptor sealed = Memory(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  const FileDescriptor half_sealed = Memory(F_SEAL_SHRINK | F_SEAL_SEAL);
  const FileDescriptor unsealed = Memory(0);
  const FileDescriptor other{open("/dev/null", O_RDWR | O_CLOEXEC)};

  int Choose(size_t choice) const {
    const std::array<int, 4> files = {sealed.number(), half_sealed.number(), unsealed.number(),
                                      other.number()};
    return files.at(choice % files.size());
  }
};

void Send(int socket, std::string data, const std::vector<int>& files) {
  alignas(cmsghdr) std::array<char, CMSG_SPACE(4 * sizeof(int))> control{};
  iovec part = {.iov_base = data.data(), .iov_len = data.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!files.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(files.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(files.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), files.data(), files.size() * sizeof(int));
  }
  Check(sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(data.size()));
}

class Session {
 public:
  Session() {
    std::array<int, 2> ends = {-1, -1};
    Check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) == 0);
    client_ = FileDescriptor(ends[0]);
    server_ = FileDescriptor(ends[1]);
  }

  void Step(const Attachments& attachments, Input& input) {
    switch (input.Byte() % 4) {
      case 0:
        return Packet(attachments, input);
      case 1: {
        const std::string token = Token(input);
        return Check(files_.Find(token).ok() == Waits(token));
      }
      case 2: {
        const std::string token = Token(input);
        files_.Remove(token);
        expiries_.erase(token);
        return;
      }
      default:
        now_ += absl::Seconds(input.Byte());
        files_.Sweep();
        std::erase_if(expiries_, [this](const auto& entry) { return now_ >= entry.second; });
        return Check(files_.size() == static_cast<int64_t>(expiries_.size()));
    }
  }

 private:
  bool Waits(const std::string& token) const {
    const auto found = expiries_.find(token);
    return found != expiries_.end() && now_ < found->second;
  }

  // Of a packet that was sent, or any other.
  std::string Token(Input& input) {
    const size_t choice = input.Byte();
    if (choice < sent_.size()) return sent_[choice];
    return input.Bytes(choice % 32);
  }

  void Packet(const Attachments& attachments, Input& input) {
    std::vector<int> files(input.Byte() % 5);
    const size_t choices = input.Byte();
    for (size_t i = 0; i < files.size(); ++i) files[i] = attachments.Choose(choices >> (2 * i));
    std::string data = input.Bytes(input.Byte() % 40);
    Check(absl::IsUnavailable(dynsplit::ReceivePassedFile(server_.number()).status()));
    Send(client_.number(), data, files);
    absl::StatusOr<PassedFile> passed = dynsplit::ReceivePassedFile(server_.number());
    if (data.empty() && files.empty()) return Check(absl::IsCancelled(passed.status()));
    if (data.size() != PassedFiles::kTokenBytes || files.size() != 1) {
      return Check(absl::IsInvalidArgument(passed.status()));
    }
    Check(passed.ok() && passed->token == data && passed->file.valid());
    Keep(data, files[0] == attachments.sealed.number(), *std::move(passed));
  }

  void Keep(const std::string& token, bool sealed, PassedFile passed) {
    const absl::Status status = files_.Add(std::move(passed));
    if (!sealed) return Check(absl::IsInvalidArgument(status));
    std::erase_if(expiries_, [this](const auto& entry) { return now_ >= entry.second; });
    if (expiries_.contains(token)) return Check(absl::IsAlreadyExists(status));
    if (expiries_.size() == kMostFiles) return Check(absl::IsResourceExhausted(status));
    Check(status.ok());
    expiries_[token] = now_ + kKeep;
    sent_.push_back(token);
  }

  FileDescriptor client_;
  FileDescriptor server_;
  absl::Time now_ = absl::UnixEpoch();
  PassedFiles files_{{.max_files = kMostFiles, .keep = kKeep, .now = [this] { return now_; }}};
  std::map<std::string, absl::Time> expiries_;  // the model
  std::vector<std::string> sent_;
};

// Among the numbers that a run can reach: the kernel gives out the lowest that is free.
int NumOpenDescriptors() {
  constexpr int kMostDescriptors = 64;
  int count = 0;
  for (int number = 0; number < kMostDescriptors; ++number) count += fcntl(number, F_GETFD) >= 0;
  return count;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto& attachments = *new Attachments();
  const int open_before = NumOpenDescriptors();
  {
    Input input(data, size);
    Session session;
    for (size_t step = 0; step < kMostSteps && !input.empty(); ++step) {
      session.Step(attachments, input);
    }
  }
  Check(NumOpenDescriptors() == open_before);
  return 0;
}
