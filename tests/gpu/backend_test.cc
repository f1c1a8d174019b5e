// SPDX-License-Identifier: Apache-2.0
//
// Memory, streams and errors of the CUDA backend.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/cuda_backend.h"
#include "server/pipeline/errors.h"
#include "tests/gpu/gpu.h"
#include "tests/oracle/device_session.h"

namespace dynsplit {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

std::unique_ptr<Backend> MakeBackend(const CudaOptions& options) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend(options);
  EXPECT_TRUE(backend.ok()) << backend.status();
  return backend.ok() ? *std::move(backend) : nullptr;
}

Buffer Pattern(Backend& backend, int64_t size_bytes, int seed) {
  Buffer host = backend.AllocateHost(size_bytes).value();
  for (int64_t i = 0; i < size_bytes; ++i) {
    host.data()[i] = static_cast<std::byte>((i * 31 + i / 251 + seed) % 256);
  }
  return host;
}

TEST(CudaBackendTest, SaysWhatItIs) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  EXPECT_GE(CudaDeviceCount(), 1);
  EXPECT_EQ(gpu->info().name, "cuda");
  EXPECT_FALSE(gpu->info().device.empty());
  EXPECT_GT(gpu->info().memory_bytes, 0);
  EXPECT_EQ(gpu->info().uuid.size(), 16U);
  EXPECT_NE(gpu->info().uuid, std::string(16, '\0'));
}

TEST(CudaBackendTest, RefusesUnknownDevices) {
  for (int device : {-1, 1000}) {
    EXPECT_TRUE(absl::IsNotFound(CreateCudaBackend({.device = device}).status()));
  }
}

TEST(CudaBackendTest, BuffersAreAligned) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  auto stream = gpu->CreateStream().value();
  for (int64_t size : {1, 3, 255, 257, 100000}) {
    const Buffer device = gpu->Allocate(size, *stream).value();
    const Buffer host = gpu->AllocateHost(size).value();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(device.data()) % 256, 0U);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(host.data()) % 64, 0U);
    EXPECT_EQ(device.size_bytes(), size);
    EXPECT_EQ(host.size_bytes(), size);
  }
  EXPECT_TRUE(gpu->Allocate(0, *stream).value().empty());
  EXPECT_TRUE(gpu->AllocateHost(0).value().empty());
}

TEST(CudaBackendTest, CopiesThereAndBackAndReturnsAllMemory) {
  const auto backend = MakeBackend({.memory_limit_bytes = 64 * kMiB});
  ASSERT_NE(backend, nullptr);
  {
    auto stream = backend->CreateStream().value();
    const Buffer host = Pattern(*backend, 3 * kMiB + 5, 1);
    Buffer device = backend->ToDevice(host, *stream).value();
    EXPECT_EQ(backend->device_bytes_in_use(), host.size_bytes());
    const Buffer back = backend->ToHost(std::move(device), *stream).value();
    EXPECT_EQ(backend->device_bytes_in_use(), 0);
    EXPECT_EQ(backend->host_bytes_in_use(), 2 * host.size_bytes());
    ASSERT_TRUE(stream->Synchronize().ok());
    EXPECT_EQ(std::memcmp(host.data(), back.data(), static_cast<size_t>(host.size_bytes())), 0);
  }
  EXPECT_EQ(backend->device_bytes_in_use(), 0);
  EXPECT_EQ(backend->host_bytes_in_use(), 0);
}

TEST(CudaBackendTest, ToHostOnAnotherStreamKeepsTheSource) {
  // The buffer dies when ToHost returns, while the copy still waits behind other work.
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  auto first = gpu->CreateStream().value();
  auto second = gpu->CreateStream().value();
  constexpr int64_t kSize = 32 * kMiB;
  const Buffer host = Pattern(*gpu, kSize, 2);
  for (int round = 0; round < 8; ++round) {
    Buffer device = gpu->ToDevice(host, *first).value();
    ASSERT_TRUE(first->Synchronize().ok());
    const Buffer back = gpu->ToHost(std::move(device), *second).value();
    // Would take the freed memory at once, were it freed in the first stream's order.
    const Buffer other = Pattern(*gpu, kSize, 3);
    const Buffer overwriting = gpu->ToDevice(other, *first).value();
    ASSERT_TRUE(second->Synchronize().ok());
    ASSERT_TRUE(first->Synchronize().ok());
    ASSERT_EQ(std::memcmp(host.data(), back.data(), kSize), 0) << "round " << round;
  }
}

TEST(CudaBackendTest, RefusesBeyondTheCapAndGoesOn) {
  const auto backend = MakeBackend({.memory_limit_bytes = 8 * kMiB});
  ASSERT_NE(backend, nullptr);
  auto stream = backend->CreateStream().value();
  Buffer first = backend->Allocate(6 * kMiB, *stream).value();
  const absl::Status refused = backend->Allocate(3 * kMiB, *stream).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_TRUE(GetErrorDetails(refused).retry_after_ms.has_value());
  EXPECT_TRUE(backend->Healthy().ok());
  EXPECT_EQ(backend->device_bytes_in_use(), 6 * kMiB);
  first.Reset();
  EXPECT_TRUE(backend->Allocate(8 * kMiB, *stream).ok());
  EXPECT_TRUE(stream->Synchronize().ok());
}

TEST(CudaBackendTest, OperationWithoutScratchMemoryIsRefusedNotFatal) {
  const auto backend = MakeBackend({.memory_limit_bytes = 2 * kMiB});
  ASSERT_NE(backend, nullptr);
  auto stream = backend->CreateStream().value();
  const Buffer all = backend->Allocate(2 * kMiB, *stream).value();
  SelectTokensParams params;
  params.block_scores = all.as<float>();
  params.groups = 1;
  // More tokens than can be ranked without scratch.
  params.num_tokens = params.num_blocks = 1 << 20;
  params.block_starts = all.as<int32_t>();
  params.protected_tokens = all.as<uint8_t>();
  params.num_kept = params.num_tokens;
  params.kept = params.kept_counts = all.as<int32_t>();
  EXPECT_TRUE(absl::IsResourceExhausted(backend->SelectTokens(params, *stream)));
  EXPECT_TRUE(backend->Healthy().ok());
  EXPECT_TRUE(stream->Synchronize().ok());
}

TEST(CudaBackendTest, PinnedMemoryIsCappedAndReused) {
  const auto backend = MakeBackend({.pinned_limit_bytes = 8 * kMiB});
  ASSERT_NE(backend, nullptr);
  Buffer first = backend->AllocateHost(5 * kMiB).value();
  const std::byte* const block = first.data();
  EXPECT_TRUE(absl::IsResourceExhausted(backend->AllocateHost(4 * kMiB).status()));
  first.Reset();
  Buffer again = backend->AllocateHost(5 * kMiB).value();
  EXPECT_EQ(again.data(), block);
  again.Reset();
  EXPECT_TRUE(backend->AllocateHost(7 * kMiB).ok()) << "the cached block makes room";
}

TEST(CudaBackendTest, BuffersOutliveStreamAndBackend) {
  auto backend = MakeBackend({.memory_limit_bytes = 8 * kMiB});
  ASSERT_NE(backend, nullptr);
  auto stream = backend->CreateStream().value();
  Buffer device = backend->Allocate(kMiB, *stream).value();
  Buffer host = backend->AllocateHost(kMiB).value();
  stream.reset();
  backend.reset();
  std::memset(host.data(), 1, kMiB);
  device.Reset();
  host.Reset();
}

// All 16-byte rows of `from`, copied by an operation to `to`.
absl::Status CopyByOperation(Backend& backend, const std::byte* from, std::byte* to,
                             int64_t size_bytes) {
  auto stream = backend.CreateStream().value();
  GatherPagesItem item;
  item.source = DenseView(from, DType::kBFloat16, size_bytes / 16, 1, 8);
  item.num_kept = size_bytes / 16;
  item.page_size = 1;
  item.pages = to;
  absl::Status status = backend.GatherPages({.items = {&item, 1}}, *stream);
  status.Update(stream->Synchronize());
  return status;
}

TEST(CudaBackendTest, ResidentMemoryIsExactAndAligned) {
  const auto backend = MakeBackend({.memory_limit_bytes = 64 * kMiB});
  ASSERT_NE(backend, nullptr);
  for (Residence residence : {Residence::kDevice, Residence::kHost}) {
    SCOPED_TRACE(residence == Residence::kDevice ? "device" : "host");
    for (int64_t size : {int64_t{1}, int64_t{257}, 3 * kMiB + 17}) {
      const Buffer buffer = backend->AllocateResident(size, residence).value();
      EXPECT_EQ(buffer.size_bytes(), size);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 256, 0U);
      const bool on_device = residence == Residence::kDevice;
      EXPECT_EQ(backend->device_bytes_in_use(), on_device ? size : 0);
      EXPECT_EQ(backend->host_bytes_in_use(), on_device ? 0 : size);
    }
    EXPECT_EQ(backend->device_bytes_in_use(), 0);
    EXPECT_EQ(backend->host_bytes_in_use(), 0);
    EXPECT_TRUE(backend->AllocateResident(0, residence).value().empty());
  }
}

TEST(CudaBackendTest, ResidentAndPassingMemoryShareTheCaps) {
  const auto backend =
      MakeBackend({.memory_limit_bytes = 8 * kMiB, .pinned_limit_bytes = 8 * kMiB});
  ASSERT_NE(backend, nullptr);
  auto stream = backend->CreateStream().value();

  Buffer resident = backend->AllocateResident(5 * kMiB, Residence::kDevice).value();
  EXPECT_TRUE(absl::IsResourceExhausted(backend->Allocate(4 * kMiB, *stream).status()));
  const Buffer passing = backend->Allocate(3 * kMiB, *stream).value();
  const absl::Status refused = backend->AllocateResident(1, Residence::kDevice).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_TRUE(GetErrorDetails(refused).retry_after_ms.has_value());
  resident.Reset();
  EXPECT_TRUE(backend->AllocateResident(5 * kMiB, Residence::kDevice).ok());

  // Also beyond what the allocator could round without overflow.
  EXPECT_TRUE(
      absl::IsResourceExhausted(backend->AllocateResident(INT64_MAX, Residence::kDevice).status()));
  EXPECT_TRUE(
      absl::IsResourceExhausted(backend->AllocateResident(INT64_MAX, Residence::kHost).status()));

  backend->AllocateHost(5 * kMiB).value().Reset();  // stays cached, and makes room when needed
  Buffer pinned = backend->AllocateResident(7 * kMiB, Residence::kHost).value();
  EXPECT_TRUE(absl::IsResourceExhausted(backend->AllocateHost(2 * kMiB).status()));
  EXPECT_TRUE(
      absl::IsResourceExhausted(backend->AllocateResident(2 * kMiB, Residence::kHost).status()));
  pinned.Reset();
  EXPECT_TRUE(backend->AllocateResident(8 * kMiB, Residence::kHost).ok());
  EXPECT_EQ(backend->host_bytes_in_use(), 0);
  EXPECT_TRUE(backend->Healthy().ok());
}

TEST(CudaBackendTest, ResidentBuffersOutliveTheBackend) {
  auto backend = MakeBackend({.memory_limit_bytes = 8 * kMiB});
  ASSERT_NE(backend, nullptr);
  std::vector<std::byte> mapped(kMiB);
  Buffer device = backend->AllocateResident(kMiB, Residence::kDevice).value();
  Buffer host = backend->AllocateResident(kMiB, Residence::kHost).value();
  Buffer registered = backend->RegisterHost(mapped.data(), kMiB).value();
  backend.reset();
  std::memset(host.data(), 1, kMiB);
  device.Reset();
  host.Reset();
  registered.Reset();
}

TEST(CudaBackendTest, RegisteredHostMemoryIsReadAndWrittenInPlace) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  const int64_t host_baseline = gpu->host_bytes_in_use();
  void* const memory =
      mmap(nullptr, 2 * kMiB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* const mapped = static_cast<std::byte*>(memory);
  for (int round = 0; round < 2; ++round) {  // the second shows that the first let go
    const Buffer region = gpu->RegisterHost(mapped, 2 * kMiB).value();
    EXPECT_EQ(region.size_bytes(), 2 * kMiB);
    EXPECT_EQ(gpu->host_bytes_in_use(), host_baseline) << "not this backend's to count";
    for (int64_t i = 0; i < kMiB; ++i) mapped[i] = static_cast<std::byte>((i + round) % 253);
    ASSERT_TRUE(CopyByOperation(*gpu, region.data(), region.data() + kMiB, kMiB).ok());
    EXPECT_EQ(std::memcmp(mapped, mapped + kMiB, kMiB), 0);
  }
  ASSERT_EQ(munmap(memory, 2 * kMiB), 0);
}

// Tests with errors of CUDA calls, or without memory left for tools, are named apart: sanitizers
// leave them out.

TEST(CudaMemoryTest, RefusesHostMemoryItCannotPin) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  void* const memory =
      mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* const mapped = static_cast<std::byte*>(memory);
  {
    const Buffer region = gpu->RegisterHost(mapped, kMiB).value();
    const absl::Status twice = gpu->RegisterHost(mapped, kMiB).status();
    EXPECT_TRUE(absl::IsInvalidArgument(twice)) << twice;
  }
  ASSERT_EQ(munmap(memory, kMiB), 0);
  EXPECT_FALSE(gpu->RegisterHost(mapped, kMiB).ok()) << "nothing is mapped there";
  ASSERT_TRUE(gpu->Healthy().ok()) << gpu->Healthy();
  // No launch mistakes what was refused for its own error.
  const Buffer rows = gpu->AllocateResident(kMiB, Residence::kHost).value();
  std::memset(rows.data(), 7, kMiB);
  const Buffer copy = gpu->AllocateResident(kMiB, Residence::kHost).value();
  ASSERT_TRUE(CopyByOperation(*gpu, rows.data(), copy.data(), kMiB).ok());
  EXPECT_EQ(std::memcmp(rows.data(), copy.data(), kMiB), 0);
}

TEST(CudaMemoryTest, ResidentMemoryTakesBackWhatThePoolCaches) {
  const auto backend = MakeBackend({});
  ASSERT_NE(backend, nullptr);
  auto stream = backend->CreateStream().value();
  const int64_t size = backend->info().memory_bytes / 10 * 7;
  backend->Allocate(size, *stream).value().Reset();
  ASSERT_TRUE(stream->Synchronize().ok());
  const absl::StatusOr<Buffer> resident = backend->AllocateResident(size, Residence::kDevice);
  EXPECT_TRUE(resident.ok()) << resident.status();
  EXPECT_EQ(backend->device_bytes_in_use(), size);
  EXPECT_TRUE(backend->Healthy().ok());
}

TEST(CudaBackendTest, StreamsOfManyThreadsDoNotDisturbEachOther) {
  Backend* const gpu = Gpu();
  ASSERT_NE(gpu, nullptr);
  constexpr int kThreads = 8;
  std::vector<int> mismatches(kThreads, 0);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([gpu, thread, &mismatches] {
      auto stream = gpu->CreateStream().value();
      for (int round = 0; round < 20; ++round) {
        const int64_t size = kMiB + 4096 * thread + round;
        const Buffer host = Pattern(*gpu, size, thread + round);
        Buffer device = gpu->ToDevice(host, *stream).value();
        // 16-byte rows, kept in order: the pages are the source.
        const int64_t num_tokens = size / 16;
        Buffer kept_host = gpu->AllocateHost(num_tokens * 4).value();
        for (int32_t t = 0; t < num_tokens; ++t) kept_host.as<int32_t>()[t] = t;
        const Buffer kept = gpu->ToDevice(kept_host, *stream).value();
        Buffer pages = gpu->Allocate((num_tokens + 15) / 16 * 16 * 16, *stream).value();
        GatherPagesItem item;
        item.source = DenseView(device.data(), DType::kBFloat16, num_tokens, 1, 8);
        item.kept = kept.as<int32_t>();
        item.num_kept = num_tokens;
        item.pages = pages.data();
        if (!gpu->GatherPages({.items = {&item, 1}}, *stream).ok())
          ++mismatches[static_cast<size_t>(thread)];
        const Buffer back = gpu->ToHost(std::move(pages), *stream).value();
        if (!stream->Synchronize().ok() ||
            std::memcmp(back.data(), host.data(), static_cast<size_t>(num_tokens * 16)) != 0) {
          ++mismatches[static_cast<size_t>(thread)];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(mismatches, std::vector<int>(kThreads, 0));
}

}  // namespace
}  // namespace dynsplit
