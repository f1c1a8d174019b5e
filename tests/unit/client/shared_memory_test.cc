// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/shared_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>

namespace dynsplit {
namespace {

TEST(SharedMemoryTest, IsThereByNameUntilTheObjectGoes) {
  auto memory = SharedMemory::Create(10'000);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const absl::Span<std::byte> bytes = (*memory)->bytes();
  ASSERT_EQ(bytes.size(), 10'000u);
  EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](auto b) { return b == std::byte{0}; }));
  bytes[9'999] = std::byte{7};

  const std::string path = "/" + (*memory)->key();
  const int fd = shm_open(path.c_str(), O_RDONLY, 0);
  ASSERT_GE(fd, 0);
  struct stat info {};
  ASSERT_EQ(fstat(fd, &info), 0);
  EXPECT_EQ(info.st_size, 10'000);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  char last = 0;
  EXPECT_EQ(pread(fd, &last, 1, 9'999), 1);
  EXPECT_EQ(last, 7);
  close(fd);

  memory->reset();
  EXPECT_LT(shm_open(path.c_str(), O_RDONLY, 0), 0);
}

TEST(SharedMemoryTest, NamesDifferAndFit) {
  const auto a = SharedMemory::Create(1);
  const auto b = SharedMemory::Create(1);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_NE((*a)->key(), (*b)->key());
  EXPECT_LE((*a)->key().size(), 200u);
  EXPECT_EQ((*a)->key().find('/'), std::string::npos);
  const v1::RegisterRegionRequest request = (*a)->Registration("r", true);
  EXPECT_EQ(request.posix_shm().key(), (*a)->key());
  EXPECT_EQ(request.byte_size(), 1);
}

TEST(SharedMemoryTest, ImpossibleSizesAreRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(SharedMemory::Create(0).status()));
  EXPECT_TRUE(absl::IsResourceExhausted(SharedMemory::Create(size_t{1} << 50).status()));
}

TEST(SharedMemoryTest, PlacedBytesLieWithinTheRegion) {
  const std::array<std::byte, 100> region{};
  v1::TensorDescriptor tensor;
  tensor.set_byte_size(10);
  EXPECT_TRUE(PlacedBytes(tensor, region).empty()) << "it came in the stream";
  v1::RegionSlice& slice = *tensor.mutable_location()->mutable_region();
  slice.set_offset_bytes(90);
  EXPECT_EQ(PlacedBytes(tensor, region).data(), region.data() + 90);
  EXPECT_EQ(PlacedBytes(tensor, region).size(), 10U);
  for (const int64_t offset : {int64_t{91}, int64_t{-1}, int64_t{101}, INT64_MAX}) {
    slice.set_offset_bytes(offset);
    EXPECT_TRUE(PlacedBytes(tensor, region).empty()) << offset;
  }
}

}  // namespace
}  // namespace dynsplit
