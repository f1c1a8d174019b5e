// SPDX-License-Identifier: Apache-2.0
//
// CRC32C (Castagnoli, reflected, pre- and post-inverted): 0xE3069283 for "123456789", 0 for no
// bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynsplit::wire {

// CRC32C of A followed by the n bytes at `data`, where seed_crc is the CRC32C of A.
uint32_t Crc32c(const void* data, size_t n, uint32_t seed_crc = 0);

// CRC32C of A followed by B from those of A and B; O(log length_b), reads no data.
uint32_t Crc32cCombine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

// memcpy and Crc32c(src, n, seed_crc) in one pass: each piece is copied while it is in the cache.
// The ranges must not overlap.
uint32_t CopyAndCrc32c(void* dst, const void* src, size_t n, uint32_t seed_crc = 0);

}  // namespace dynsplit::wire
