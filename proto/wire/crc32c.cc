// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/crc32c.h"

#include <isa-l/crc.h>

#include <algorithm>
#include <array>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace dynsplit::wire {
namespace {

// Polynomials over GF(2) modulo the CRC's, reflected: bit 31 is the coefficient of x^0.
constexpr uint32_t kPolynomial = 0x82F63B78;
constexpr uint32_t kOne = uint32_t{1} << 31;
constexpr uint32_t kX = uint32_t{1} << 30;

constexpr uint32_t MultiplyModulo(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t coefficient = kOne; coefficient != 0; coefficient >>= 1) {
    if ((a & coefficient) != 0) product ^= b;
    b = (b & 1) != 0 ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

// Entry k is x^(8 * 2^k): a shift by 2^k bytes.
constexpr std::array<uint32_t, 64> MakeShifts() {
  std::array<uint32_t, 64> shifts{};
  uint32_t power = kX;
  for (int i = 0; i < 3; ++i) power = MultiplyModulo(power, power);
  for (uint32_t& shift : shifts) {
    shift = power;
    power = MultiplyModulo(power, power);
  }
  return shifts;
}
constexpr std::array<uint32_t, 64> kShifts = MakeShifts();

// From here on a copy passes the caches by: what is large is read long after, by another core or a
// device, and a line that is written whole need not be fetched first. That halves the traffic.
constexpr size_t kStreamBytes = size_t{4} << 10;

#ifdef __SSE2__
void StreamCopy(std::byte* dst, const std::byte* src, size_t n) {
  constexpr size_t kLine = 64;
  const size_t head = std::min(n, (kLine - reinterpret_cast<uintptr_t>(dst) % kLine) % kLine);
  std::memcpy(dst, src, head);
  auto* to = reinterpret_cast<__m128i*>(dst + head);
  const auto* from = reinterpret_cast<const __m128i*>(src + head);
  for (n -= head; n >= kLine; n -= kLine, to += 4, from += 4) {
    const __m128i a = _mm_loadu_si128(from);
    const __m128i b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2);
    const __m128i d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  std::memcpy(to, from, n);
}
// Orders streamed stores before whatever tells others of them.
void EndStreams() { _mm_sfence(); }
#else
void StreamCopy(std::byte* dst, const std::byte* src, size_t n) { std::memcpy(dst, src, n); }
void EndStreams() {}
#endif

}  // namespace

uint32_t Crc32c(const void* data, size_t n, uint32_t seed_crc) {
  constexpr size_t kMaxPiece = size_t{1} << 30;  // crc32_iscsi takes an int
  auto* bytes = static_cast<unsigned char*>(const_cast<void*>(data));
  uint32_t state = ~seed_crc;
  while (n > 0) {
    const size_t piece = std::min(n, kMaxPiece);
    state = crc32_iscsi(bytes, static_cast<int>(piece), state);
    bytes += piece;
    n -= piece;
  }
  return ~state;
}

uint32_t Crc32cCombine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  for (size_t k = 0; length_b != 0; ++k, length_b >>= 1) {
    if ((length_b & 1) != 0) crc_a = MultiplyModulo(kShifts[k], crc_a);
  }
  return crc_a ^ crc_b;
}

uint32_t CopyAndCrc32c(void* dst, const void* src, size_t n, uint32_t seed_crc) {
  constexpr size_t kPiece = size_t{16} << 10;  // half of a 32 KiB first-level cache
  auto* to = static_cast<std::byte*>(dst);
  const auto* from = static_cast<const std::byte*>(src);
  const bool streams = n >= kStreamBytes;
  uint32_t crc = seed_crc;
  while (n > 0) {
    const size_t piece = std::min(n, kPiece);
    crc = Crc32c(from, piece, crc);
    if (streams) {
      StreamCopy(to, from, piece);
    } else {
      std::memcpy(to, from, piece);
    }
    to += piece;
    from += piece;
    n -= piece;
  }
  if (streams) EndStreams();
  return crc;
}

}  // namespace dynsplit::wire
