// SPDX-License-Identifier: Apache-2.0
//
// Device memory of one process in another. The other process is this program again, running
// CudaIpcPeer: it exports, then waits to be told what to do, one byte at a time.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cuda_backend.h"
#include "server/pipeline/errors.h"
#include "tests/gpu/gpu.h"

extern char** environ;

namespace dynsplit {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kSharedBytes = 4 * kMiB;  // whole granules, so that the end is the end
constexpr int64_t kHandleBytes = 64;
constexpr uint8_t kExporterSeed = 17;
constexpr uint8_t kImporterSeed = 91;
constexpr char kCheckAndLeave = 'c';

// Where CudaIpcPeer finds its pipes.
constexpr int kPeerIn = 100;
constexpr int kPeerOut = 101;

std::vector<uint8_t> Pattern(int64_t size_bytes, uint8_t seed) {
  std::vector<uint8_t> bytes(static_cast<size_t>(size_bytes));
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<uint8_t>(i * 31 + i / 251 + seed);
  }
  return bytes;
}

void WriteDevice(Backend& backend, std::byte* data, const std::vector<uint8_t>& bytes) {
  auto stream = backend.CreateStream().value();
  const Buffer host = backend.AllocateHost(static_cast<int64_t>(bytes.size())).value();
  std::memcpy(host.data(), bytes.data(), bytes.size());
  EXPECT_TRUE(backend.Copy(data, host.data(), host.size_bytes(), *stream).ok());
  EXPECT_TRUE(stream->Synchronize().ok());
}

std::vector<uint8_t> ReadDevice(Backend& backend, const std::byte* data, int64_t size_bytes) {
  auto stream = backend.CreateStream().value();
  const Buffer host = backend.AllocateHost(size_bytes).value();
  EXPECT_TRUE(backend.Copy(host.data(), data, size_bytes, *stream).ok());
  EXPECT_TRUE(stream->Synchronize().ok());
  return {host.as<uint8_t>(), host.as<uint8_t>() + size_bytes};
}

bool ReadAll(int fd, char* data, size_t size) {
  while (size > 0) {
    const ssize_t got = read(fd, data, size);
    if (got <= 0) return false;
    data += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

// A process that has exported kSharedBytes of kExporterSeed's pattern.
class Peer {
 public:
  Peer() {
    std::signal(SIGPIPE, SIG_IGN);  // a peer that died is seen by its exit status
    std::array<int, 2> to_peer = {-1, -1};
    std::array<int, 2> from_peer = {-1, -1};
    EXPECT_EQ(pipe2(to_peer.data(), O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(from_peer.data(), O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, to_peer[0], kPeerIn);
    posix_spawn_file_actions_adddup2(&actions, from_peer[1], kPeerOut);
    std::string program = "/proc/self/exe";
    std::string filter = "--gtest_filter=CudaIpcPeer.DISABLED_Exports";
    std::string disabled = "--gtest_also_run_disabled_tests";
    std::string brief = "--gtest_brief=1";
    std::array<char*, 5> arguments = {program.data(), filter.data(), disabled.data(), brief.data(),
                                      nullptr};
    EXPECT_EQ(posix_spawn(&pid_, program.c_str(), &actions, nullptr, arguments.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(to_peer[0]);
    close(from_peer[1]);
    to_peer_ = to_peer[1];
    from_peer_ = from_peer[0];
    handle_.resize(kHandleBytes);
    if (!ReadAll(from_peer_, handle_.data(), handle_.size())) {
      ADD_FAILURE() << "the other process exported nothing";
    }
  }
  ~Peer() {
    close(to_peer_);  // the end of the pipe says: leave without a check
    close(from_peer_);
    if (pid_ > 0) {
      EXPECT_EQ(Wait(), 0);
    }
  }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  const std::string& handle() const { return handle_; }
  // Exit status of the process, which first checks that its memory holds kImporterSeed's pattern.
  int CheckAndLeave() {
    EXPECT_EQ(write(to_peer_, &kCheckAndLeave, 1), 1);
    return Wait();
  }

 private:
  int Wait() {
    int status = -1;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    pid_ = -1;
    return status;
  }

  pid_t pid_ = -1;
  int to_peer_ = -1;
  int from_peer_ = -1;
  std::string handle_;
};

// The other process; disabled so that only Peer runs it.
TEST(CudaIpcPeer, DISABLED_Exports) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const Buffer shared = gpu->AllocateResident(kSharedBytes, Residence::kDevice).value();
  WriteDevice(*gpu, shared.data(), Pattern(kSharedBytes, kExporterSeed));
  const std::string handle = gpu->ExportHandle(shared).value();
  ASSERT_EQ(handle.size(), static_cast<size_t>(kHandleBytes));
  ASSERT_EQ(write(kPeerOut, handle.data(), handle.size()), kHandleBytes);
  char command = 0;
  if (!ReadAll(kPeerIn, &command, 1)) return;
  ASSERT_EQ(command, kCheckAndLeave);
  EXPECT_EQ(ReadDevice(*gpu, shared.data(), kSharedBytes), Pattern(kSharedBytes, kImporterSeed));
}

TEST(CudaIpcTest, ReadsAndWritesMemoryOfAnotherProcess) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  Peer peer;
  const int64_t baseline = gpu->device_bytes_in_use();
  Buffer memory = gpu->ImportHandle(peer.handle(), 0, kSharedBytes).value();
  EXPECT_EQ(memory.size_bytes(), kSharedBytes);
  EXPECT_EQ(gpu->device_bytes_in_use(), baseline) << "not this process's to count";
  EXPECT_EQ(ReadDevice(*gpu, memory.data(), kSharedBytes), Pattern(kSharedBytes, kExporterSeed));
  WriteDevice(*gpu, memory.data(), Pattern(kSharedBytes, kImporterSeed));
  memory.Reset();
  EXPECT_EQ(peer.CheckAndLeave(), 0) << "the exporter did not see what was written";
}

TEST(CudaIpcTest, ImportsOneAllocationManyTimes) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const Peer peer;
  constexpr int64_t kOffset = kMiB + 256;
  Buffer whole = gpu->ImportHandle(peer.handle(), 0, kSharedBytes).value();
  Buffer part = gpu->ImportHandle(peer.handle(), kOffset, kMiB).value();
  EXPECT_EQ(part.data(), whole.data() + kOffset);
  whole.Reset();
  const std::vector<uint8_t> all = Pattern(kSharedBytes, kExporterSeed);
  const std::vector<uint8_t> expected(all.begin() + kOffset, all.begin() + kOffset + kMiB);
  EXPECT_EQ(ReadDevice(*gpu, part.data(), kMiB), expected) << "still mapped for its second user";
  part.Reset();
  whole = gpu->ImportHandle(peer.handle(), 0, kSharedBytes).value();
  EXPECT_EQ(ReadDevice(*gpu, whole.data(), kSharedBytes), all) << "mapped anew";
}

TEST(CudaIpcTest, ChecksBoundsAgainstTheAllocation) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const Peer peer;
  struct Range {
    int64_t offset_bytes, size_bytes;
    const char* field;
  };
  for (const Range& range :
       {Range{0, kSharedBytes + 1, "byte_size"}, Range{1, kSharedBytes, "byte_size"},
        Range{kSharedBytes, 1, "byte_size"}, Range{INT64_MAX, INT64_MAX, "byte_size"},
        Range{0, 0, "byte_size"}, Range{0, -1, "byte_size"},
        Range{-1, 1, "cuda_ipc.offset_bytes"}}) {
    const absl::Status status =
        gpu->ImportHandle(peer.handle(), range.offset_bytes, range.size_bytes).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(GetErrorDetails(status).subject, range.field);
  }
  EXPECT_TRUE(gpu->ImportHandle(peer.handle(), kSharedBytes - 1, 1).ok());
}

TEST(CudaIpcTest, BadHandlesLeaveTheBackendHealthy) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  std::string gone;
  {
    const Peer peer;
    gone = peer.handle();
  }
  std::string noise(kHandleBytes, '\0');
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = static_cast<char>(i * 37 + 11);
  for (const std::string& handle :
       {std::string(), std::string("short"), std::string(kHandleBytes + 1, 'x'),
        std::string(kHandleBytes, '\0'), noise, gone}) {
    const absl::Status status = gpu->ImportHandle(handle, 0, 1).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(GetErrorDetails(status).subject, "cuda_ipc.handle");
  }
  ASSERT_TRUE(gpu->Healthy().ok()) << gpu->Healthy();
  // No launch mistakes what was refused for its own error.
  const Buffer rows = gpu->AllocateResident(kMiB, Residence::kDevice).value();
  const Buffer copy = gpu->AllocateResident(kMiB, Residence::kDevice).value();
  WriteDevice(*gpu, rows.data(), Pattern(kMiB, 3));
  auto stream = gpu->CreateStream().value();
  GatherPagesItem item;
  item.source = DenseView(rows.data(), DType::kBFloat16, kMiB / 16, 1, 8);
  item.num_kept = kMiB / 16;
  item.page_size = 1;
  item.pages = copy.data();
  EXPECT_TRUE(gpu->GatherPages({.items = {&item, 1}}, *stream).ok());
  EXPECT_TRUE(stream->Synchronize().ok());
  EXPECT_EQ(ReadDevice(*gpu, copy.data(), kMiB), Pattern(kMiB, 3));
}

TEST(CudaIpcTest, ExportsOnlyDeviceMemoryOfItsOwn) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  auto stream = gpu->CreateStream().value();
  const Buffer pooled = gpu->Allocate(kMiB, *stream).value();
  const Buffer pinned = gpu->AllocateResident(kMiB, Residence::kHost).value();
  Buffer resident = gpu->AllocateResident(kMiB, Residence::kDevice).value();
  const Buffer inner(resident.data() + 256, 256, nullptr);
  for (const Buffer* buffer : {&pooled, &pinned, &inner}) {
    EXPECT_TRUE(absl::IsInvalidArgument(gpu->ExportHandle(*buffer).status()));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(gpu->ExportHandle(Buffer()).status()));
  EXPECT_TRUE(gpu->ExportHandle(resident).ok());
  const Buffer stale(resident.data(), resident.size_bytes(), nullptr);
  resident.Reset();
  EXPECT_TRUE(absl::IsInvalidArgument(gpu->ExportHandle(stale).status()));
  EXPECT_TRUE(gpu->Healthy().ok());
}

}  // namespace
}  // namespace dynsplit
