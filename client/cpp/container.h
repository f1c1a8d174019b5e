// SPDX-License-Identifier: Apache-2.0
//
// A compressed sequence in a file that describes itself (.dskv):
//
//      0   8  magic 89 'D' 'S' 'K' 'V' 0D 0A 1A   (text-mode transfers break it)
//      8   4  version, 1
//     12   4  header_bytes n
//     16   8  file_bytes
//     24   4  CRC32C of the header
//     28   4  CRC32C of bytes 0..27
//     32   n  header: dynsplit.v1.ContainerHeader
//             zeros up to a multiple of 64
//             tensor sections in header order, each beginning at a multiple of 64, zeros between
//
// Integers are little endian. The file ends with the last section (or the header). Every byte is
// under a checksum or must be zero, so that no single flipped bit goes unseen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dynsplit/v1/container.pb.h"

namespace dynsplit {

inline constexpr uint64_t kMaxContainerHeaderBytes = uint64_t{64} << 20;

struct ContainerSection {
  v1::TensorDescriptor descriptor;
  absl::Span<const std::byte> bytes;
};

// A parsed container. Immutable; sections point into memory it keeps.
class Container {
 public:
  // Maps and parses a file; checks everything but the sections' checksums.
  static absl::StatusOr<Container> Load(const std::string& path);
  // The same from memory that `owner` keeps. DATA_LOSS where a checksum or padding is wrong or the
  // file is cut, INVALID_ARGUMENT where it is no container of this version or contradicts itself.
  static absl::StatusOr<Container> Parse(absl::Span<const std::byte> file,
                                         std::shared_ptr<const void> owner);

  // Reads every section. DATA_LOSS names the tensor that does not have its checksum.
  absl::Status VerifySections() const;

  const v1::ContainerHeader& header() const { return header_; }
  // In header order; 64-byte aligned when loaded from a file.
  const std::vector<ContainerSection>& sections() const { return sections_; }
  uint64_t file_bytes() const { return file_bytes_; }
  // Null when there is none. layer -1 = of the whole sequence.
  const ContainerSection* Find(v1::TensorKind kind, int32_t layer) const;

 private:
  std::shared_ptr<const void> owner_;
  v1::ContainerHeader header_;
  std::vector<ContainerSection> sections_;
  uint64_t file_bytes_ = 0;
};

// Most bytes a container of these sections can take, for a header as given without tensors.
uint64_t ContainerSizeBound(const v1::ContainerHeader& header,
                            absl::Span<const ContainerSection> sections);

// Replaces `path` atomically. header.tensors is made from the sections; their ids are renumbered
// from 1 and locations dropped. INVALID_ARGUMENT where a descriptor's byte_size is not that of its
// bytes, or the header grows beyond kMaxContainerHeaderBytes.
absl::Status WriteContainer(const std::string& path, v1::ContainerHeader header,
                            absl::Span<const ContainerSection> sections);

}  // namespace dynsplit
