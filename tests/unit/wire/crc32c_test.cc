// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/crc32c.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace dynsplit::wire {
namespace {

std::vector<uint8_t> RandomBytes(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(n);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

// Bit by bit, from the definition.
uint32_t ReferenceCrc32c(const std::vector<uint8_t>& bytes) {
  uint32_t state = 0xFFFFFFFF;
  for (const uint8_t byte : bytes) {
    state ^= byte;
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) * 0x82F63B78);
  }
  return ~state;
}

// Vectors of RFC 3720 appendix B.4 and the catalogue's check value.
TEST(Crc32cTest, KnownVectors) {
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c(nullptr, 0), 0u);
  std::vector<uint8_t> bytes(32, 0);
  EXPECT_EQ(Crc32c(bytes.data(), bytes.size()), 0x8A9136AAu);
  bytes.assign(32, 0xFF);
  EXPECT_EQ(Crc32c(bytes.data(), bytes.size()), 0x62A8AB43u);
  std::iota(bytes.begin(), bytes.end(), uint8_t{0});
  EXPECT_EQ(Crc32c(bytes.data(), bytes.size()), 0x46DD794Eu);
}

TEST(Crc32cTest, AgreesWithDefinitionAtAllSmallSizesAndAlignments) {
  for (size_t n = 0; n < 200; ++n) {
    const std::vector<uint8_t> bytes = RandomBytes(n, static_cast<uint32_t>(n));
    std::vector<uint8_t> shifted(n + 7);
    for (size_t shift = 0; shift < 7; ++shift) {
      if (n > 0) std::memcpy(shifted.data() + shift, bytes.data(), n);
      EXPECT_EQ(Crc32c(shifted.data() + shift, n), ReferenceCrc32c(bytes)) << n << " " << shift;
    }
  }
}

TEST(Crc32cTest, SeedContinues) {
  const std::vector<uint8_t> bytes = RandomBytes(1000, 1);
  const uint32_t whole = Crc32c(bytes.data(), bytes.size());
  for (const size_t cut : std::vector<size_t>{0, 1, 7, 500, 999, 1000}) {
    const uint32_t head = Crc32c(bytes.data(), cut);
    EXPECT_EQ(Crc32c(bytes.data() + cut, bytes.size() - cut, head), whole) << cut;
  }
}

TEST(Crc32cTest, CombineEqualsCrcOfConcatenation) {
  const std::vector<uint8_t> bytes = RandomBytes(70'001, 2);
  const uint32_t whole = Crc32c(bytes.data(), bytes.size());
  for (const size_t cut : std::vector<size_t>{0, 1, 2, 3, 63, 64, 4096, 65'536, 70'000, 70'001}) {
    const uint32_t head = Crc32c(bytes.data(), cut);
    const uint32_t tail = Crc32c(bytes.data() + cut, bytes.size() - cut);
    EXPECT_EQ(Crc32cCombine(head, tail, bytes.size() - cut), whole) << cut;
  }
}

TEST(Crc32cTest, CombineIsAssociativeBeyond32BitLengths) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 100; ++i) {
    const auto a = static_cast<uint32_t>(random());
    const auto b = static_cast<uint32_t>(random());
    const auto c = static_cast<uint32_t>(random());
    const uint64_t length_b = random() >> (1 + i % 60);
    const uint64_t length_c = random() >> (1 + i % 60);
    EXPECT_EQ(Crc32cCombine(Crc32cCombine(a, b, length_b), c, length_c),
              Crc32cCombine(a, Crc32cCombine(b, c, length_c), length_b + length_c));
  }
}

TEST(Crc32cTest, CopyCopiesAndChecks) {
  for (const size_t n : std::vector<size_t>{0, 1, 16'383, 16'384, 16'385, 100'003}) {
    const std::vector<uint8_t> source = RandomBytes(n, 4);
    std::vector<uint8_t> target(n + 1, 0xA5);
    EXPECT_EQ(CopyAndCrc32c(target.data(), source.data(), n, 77), Crc32c(source.data(), n, 77));
    EXPECT_EQ(target.back(), 0xA5) << "wrote past the end";
    target.pop_back();
    EXPECT_EQ(target, source);
  }
}

}  // namespace
}  // namespace dynsplit::wire
