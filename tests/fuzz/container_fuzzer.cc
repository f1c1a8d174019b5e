// SPDX-License-Identifier: Apache-2.0
//
// Repairs the two header checksums first: else nothing beyond them would ever be reached.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "client/cpp/container.h"
#include "proto/wire/crc32c.h"

namespace {

constexpr size_t kPrefixBytes = 32;

void Store(uint64_t value, size_t size, std::byte* to) {
  for (size_t i = 0; i < size; ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
}

void Repair(std::vector<std::byte>& file) {
  if (file.size() < kPrefixBytes) return;
  size_t header_bytes = 0;
  for (size_t i = 0; i < 4; ++i) header_bytes |= std::to_integer<size_t>(file[12 + i]) << (8 * i);
  header_bytes = std::min(header_bytes, file.size() - kPrefixBytes);
  Store(file.size(), 8, &file[16]);
  Store(dynsplit::wire::Crc32c(&file[0] + kPrefixBytes, header_bytes), 4, &file[24]);
  Store(dynsplit::wire::Crc32c(file.data(), 28), 4, &file[28]);
}

void Open(const std::vector<std::byte>& file) {
  const auto container = dynsplit::Container::Parse(file, nullptr);
  if (!container.ok()) return;
  (void)container->VerifySections();
  size_t bytes = 0;
  for (const dynsplit::ContainerSection& section : container->sections()) {
    bytes += section.bytes.size();
  }
  if (bytes > file.size()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::byte> file(size);
  std::transform(data, data + size, file.begin(), [](uint8_t b) { return std::byte{b}; });
  Open(file);
  Repair(file);
  Open(file);
  return 0;
}
