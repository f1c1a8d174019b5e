// SPDX-License-Identifier: Apache-2.0
//
// The side socket against clients that keep to nothing: it must take what is right, answer, never
// block, and leave no descriptor open.
#include "server/runtime/region_socket.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/time/clock.h"

namespace dynsplit {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

int NumOpenDescriptors() {
  int count = 0;
  DIR* directory = opendir("/proc/self/fd");
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

FileDescriptor Memory(int seals, int64_t size = 4096) {
  FileDescriptor file(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(ftruncate(file.number(), size), 0);
  if (seals != 0) {
    EXPECT_EQ(fcntl(file.number(), F_ADD_SEALS, seals), 0);
  }
  return file;
}

bool Send(int socket, const std::string& data, const std::vector<int>& files) {
  std::string bytes = data;
  iovec part = {.iov_base = bytes.data(), .iov_len = bytes.size()};
  std::vector<char> control(CMSG_SPACE(files.size() * sizeof(int)));
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!files.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(files.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), files.data(), files.size() * sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL) >= 0;
}

std::string Answer(int socket) {
  constexpr timeval kTimeout = {.tv_sec = 5, .tv_usec = 0};
  EXPECT_EQ(setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &kTimeout, sizeof(kTimeout)), 0);
  std::array<char, 256> answer{};
  const ssize_t size = recv(socket, answer.data(), answer.size(), 0);
  return size < 0 ? "<nothing>" : std::string(answer.data(), static_cast<size_t>(size));
}

std::string Token(char fill) { return std::string(PassedFiles::kTokenBytes, fill); }

class Pair {
 public:
  Pair() {
    std::array<int, 2> ends = {-1, -1};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
    client = FileDescriptor(ends[0]);
    server = FileDescriptor(ends[1]);
  }
  FileDescriptor client, server;
};

TEST(ReceivePassedFileTest, OneTokenWithOneDescriptor) {
  const Pair pair;
  EXPECT_TRUE(absl::IsUnavailable(ReceivePassedFile(pair.server.number()).status()));
  const FileDescriptor memory = Memory(kSeals);
  ASSERT_TRUE(Send(pair.client.number(), Token('a'), {memory.number()}));
  const auto passed = ReceivePassedFile(pair.server.number());
  ASSERT_TRUE(passed.ok()) << passed.status();
  EXPECT_EQ(passed->token, Token('a'));
  struct stat sent = {};
  struct stat received = {};
  ASSERT_EQ(fstat(memory.number(), &sent), 0);
  ASSERT_EQ(fstat(passed->file.number(), &received), 0);
  EXPECT_EQ(sent.st_ino, received.st_ino);
  EXPECT_EQ(fcntl(passed->file.number(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
}

TEST(ReceivePassedFileTest, AnythingElseIsRefusedAndClosed) {
  const FileDescriptor memory = Memory(kSeals);
  std::mt19937_64 random(7);
  const int before = NumOpenDescriptors();
  for (int round = 0; round < 2000; ++round) {
    const Pair pair;
    const size_t size = random() % 3 == 0 ? PassedFiles::kTokenBytes : random() % 40;
    std::string data(size, '\0');
    for (char& c : data) c = static_cast<char>(random());
    const std::vector<int> files(random() % 3 == 0 ? 1 : random() % 254, memory.number());
    ASSERT_TRUE(Send(pair.client.number(), data, files)) << size << " " << files.size();
    const auto passed = ReceivePassedFile(pair.server.number());
    const bool good = size == PassedFiles::kTokenBytes && files.size() == 1;
    EXPECT_EQ(passed.ok(), good) << size << " bytes, " << files.size() << " descriptors";
    if (!good) {
      EXPECT_TRUE(absl::IsInvalidArgument(passed.status()) || absl::IsCancelled(passed.status()));
    }
  }
  EXPECT_EQ(NumOpenDescriptors(), before);
}

TEST(ReceivePassedFileTest, PeersThatCloseAreSeen) {
  Pair pair;
  pair.client = FileDescriptor();
  EXPECT_TRUE(absl::IsCancelled(ReceivePassedFile(pair.server.number()).status()));
}

TEST(PassedFilesTest, TakesSealedMemoryForAWhile) {
  absl::Time now = absl::UnixEpoch();
  PassedFiles files({.max_files = 2, .keep = absl::Seconds(30), .now = [&] { return now; }});
  const auto add = [&](char token, FileDescriptor file) {
    return files.Add({.token = Token(token), .file = std::move(file)});
  };
  for (const int seals :
       {0, F_SEAL_SHRINK | F_SEAL_GROW, F_SEAL_GROW | F_SEAL_SEAL, F_SEAL_SHRINK | F_SEAL_SEAL}) {
    EXPECT_TRUE(absl::IsInvalidArgument(add('a', Memory(seals)))) << seals;
  }
  EXPECT_TRUE(
      absl::IsInvalidArgument(add('a', FileDescriptor(open("/dev/null", O_RDWR | O_CLOEXEC)))));
  EXPECT_EQ(files.size(), 0);
  EXPECT_TRUE(add('a', Memory(kSeals)).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(add('a', Memory(kSeals))));
  EXPECT_TRUE(add('b', Memory(kSeals | F_SEAL_FUTURE_WRITE)).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(add('c', Memory(kSeals))));
  EXPECT_TRUE(files.Find(Token('a')).ok());
  EXPECT_TRUE(files.Find(Token('a')).ok()) << "finding is not taking";
  files.Remove(Token('a'));
  EXPECT_TRUE(absl::IsNotFound(files.Find(Token('a')).status()));
  now += absl::Seconds(30);
  EXPECT_TRUE(absl::IsNotFound(files.Find(Token('b')).status()));
  files.Sweep();
  EXPECT_EQ(files.size(), 0);
}

class RegionSocketTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "dynsplit-rs-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    Start({});
  }
  void TearDown() override {
    socket_.reset();
    std::filesystem::remove_all(directory_);
  }
  void Start(RegionSocket::Options options) {
    socket_.reset();
    auto started = RegionSocket::Start(path(), files_, options);
    ASSERT_TRUE(started.ok()) << started.status();
    socket_ = *std::move(started);
  }
  std::string path() const { return directory_ + "/s"; }
  FileDescriptor Connect() const {
    FileDescriptor client(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path().copy(address.sun_path, sizeof(address.sun_path) - 1);
    EXPECT_EQ(
        connect(client.number(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    return client;
  }

  std::string directory_;
  PassedFiles files_;
  std::unique_ptr<RegionSocket> socket_;
};

TEST_F(RegionSocketTest, TakesMemoryAndAnswers) {
  struct stat facts = {};
  ASSERT_EQ(lstat(path().c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0600U);
  const FileDescriptor memory = Memory(kSeals);
  const FileDescriptor client = Connect();
  ASSERT_TRUE(Send(client.number(), Token('a'), {memory.number()}));
  EXPECT_EQ(Answer(client.number()), "ok");
  EXPECT_EQ(Answer(client.number()), "") << "one object a connection";
  EXPECT_TRUE(files_.Find(Token('a')).ok());
  const FileDescriptor second = Connect();
  ASSERT_TRUE(Send(second.number(), Token('b'), {}));
  EXPECT_TRUE(absl::StrContains(Answer(second.number()), "descriptor"));
  EXPECT_FALSE(RegionSocket::Start(path(), files_).ok()) << "the path is taken";
}

TEST_F(RegionSocketTest, HostileClientsNeitherBlockNorLeak) {
  Start({.max_connections = 4, .patience = absl::Milliseconds(100)});
  const FileDescriptor memory = Memory(kSeals);
  const FileDescriptor loose = Memory(0);
  std::mt19937_64 random(11);
  const int before = NumOpenDescriptors();
  {
    std::vector<FileDescriptor> silent;  // more than the server holds, and they say nothing
    for (int i = 0; i < 20; ++i) silent.push_back(Connect());
    for (int round = 0; round < 200; ++round) {
      const FileDescriptor client = Connect();
      const int file = random() % 2 == 0 ? loose.number() : memory.number();
      // Never what is right: at least two descriptors, or none, or a token of another size.
      const std::vector<int> files(random() % 2 == 0 ? 0 : 2 + random() % 200, file);
      Send(client.number(), std::string(1 + random() % 64, 'x'), files);
      if (random() % 2 == 0) Answer(client.number());
    }
    const FileDescriptor good = Connect();
    ASSERT_TRUE(Send(good.number(), Token('g'), {memory.number()}));
    EXPECT_EQ(Answer(good.number()), "ok");
  }
  files_.Remove(Token('g'));
  EXPECT_EQ(files_.size(), 0);
  int open = 0;
  for (int i = 0; i < 300 && (open = NumOpenDescriptors()) != before; ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_EQ(open, before);
}

}  // namespace
}  // namespace dynsplit
