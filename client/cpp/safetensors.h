// SPDX-License-Identifier: Apache-2.0
//
// The safetensors file format, read with suspicion:
//
//     8 bytes   n, length of the header, little endian
//     n bytes   JSON object: name -> {dtype, shape, data_offsets: [begin, end]}, and "__metadata__"
//     rest      tensor bytes; the offsets count from here, cover all of it, and do not overlap
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace dynsplit {

// Largest header read, bytes.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = uint64_t{16} << 20;

struct SafetensorsTensor {
  std::string name;
  std::string dtype;  // "BF16", "F32", "I32", ...
  std::vector<int64_t> shape;
  // Row major, little endian. Aligned to nothing: copy before reading wider elements.
  absl::Span<const std::byte> bytes;
};

// Bytes of one element; 0 for a type this reader does not know.
int64_t SafetensorsDTypeBytes(std::string_view dtype);

// An opened file. Immutable; tensors point into memory it keeps.
class Safetensors {
 public:
  // Maps the file. A file changed while mapped may change under the reader.
  static absl::StatusOr<Safetensors> Load(const std::string& path);
  // The same from memory that `owner` keeps. INVALID_ARGUMENT says what is wrong.
  static absl::StatusOr<Safetensors> Parse(absl::Span<const std::byte> file,
                                           std::shared_ptr<const void> owner);

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // In file order.
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }
  // Null when there is none of that name.
  const SafetensorsTensor* Find(std::string_view name) const;
  const std::shared_ptr<const void>& owner() const { return owner_; }

 private:
  std::shared_ptr<const void> owner_;
  std::map<std::string, std::string> metadata_;
  std::vector<SafetensorsTensor> tensors_;
};

// Replaces `path` atomically. Tensors are written in the given order; equal input gives equal
// bytes. INVALID_ARGUMENT where a name occurs twice or bytes do not fit shape and dtype.
absl::Status WriteSafetensors(const std::string& path,
                              const std::map<std::string, std::string>& metadata,
                              absl::Span<const SafetensorsTensor> tensors);

}  // namespace dynsplit
