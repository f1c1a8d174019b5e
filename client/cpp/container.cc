// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/container.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/file_io.h"
#include "proto/wire/crc32c.h"

namespace dynsplit {
namespace {

constexpr std::array<uint8_t, 8> kMagic = {0x89, 'D', 'S', 'K', 'V', 0x0D, 0x0A, 0x1A};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kPrefixBytes = 32;
constexpr uint64_t kAlignment = 64;
constexpr uint64_t kMaxTensorBytes = uint64_t{1} << 40;
// Offset, checksum, tags and lengths of one tensor in the header.
constexpr uint64_t kTensorOverheadBytes = 64;

constexpr uint64_t AlignUp(uint64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

template <typename... Parts>
absl::Status Bad(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("container: ", parts...));
}

template <typename... Parts>
absl::Status Lost(const Parts&... parts) {
  return absl::DataLossError(absl::StrCat("container: ", parts...));
}

template <typename T>
T LoadLittleEndian(const std::byte* from) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | (std::to_integer<T>(from[i]) << (8 * i)));
  }
  return value;
}

template <typename T>
void StoreLittleEndian(T value, std::byte* to) {
  for (size_t i = 0; i < sizeof(T); ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
}

bool IsZero(absl::Span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

std::string NameOf(const v1::TensorDescriptor& tensor) {
  const std::string kind = v1::TensorKind_Name(tensor.kind());
  return tensor.has_layer() ? absl::StrCat(kind, " of layer ", tensor.layer()) : kind;
}

struct Prefix {
  uint64_t header_bytes = 0;
  uint32_t header_crc32c = 0;
};

absl::StatusOr<Prefix> ReadPrefix(absl::Span<const std::byte> file) {
  if (file.size() < kMagic.size() || std::memcmp(file.data(), kMagic.data(), kMagic.size()) != 0) {
    return Bad("not a container file");
  }
  if (file.size() < kPrefixBytes) return Lost("file is cut within its first 32 bytes");
  if (LoadLittleEndian<uint32_t>(&file[28]) != wire::Crc32c(file.data(), 28)) {
    return Lost("first 32 bytes do not have their checksum");
  }
  const auto version = LoadLittleEndian<uint32_t>(&file[8]);
  if (version != kVersion) return Bad("version is ", version, "; this reader knows ", kVersion);
  Prefix prefix;
  prefix.header_bytes = LoadLittleEndian<uint32_t>(&file[12]);
  prefix.header_crc32c = LoadLittleEndian<uint32_t>(&file[24]);
  const auto file_bytes = LoadLittleEndian<uint64_t>(&file[16]);
  if (file_bytes != file.size()) {
    return Lost("file has ", file.size(), " bytes; ", file_bytes, " were written");
  }
  if (prefix.header_bytes > std::min(file.size() - kPrefixBytes, kMaxContainerHeaderBytes)) {
    return Bad("header of ", prefix.header_bytes, " bytes is too large");
  }
  return prefix;
}

// Checks one tensor's entry against the file; `at` is where the previous section ended.
absl::Status CheckSection(const v1::ContainerTensor& entry, absl::Span<const std::byte> file,
                          uint64_t at) {
  const v1::TensorDescriptor& tensor = entry.tensor();
  if (tensor.byte_size() < 1 || std::cmp_greater(tensor.byte_size(), kMaxTensorBytes)) {
    return Bad(NameOf(tensor), " has ", tensor.byte_size(), " bytes; must be in [1, 2^40]");
  }
  const uint64_t offset = AlignUp(at);
  if (std::cmp_not_equal(entry.offset_bytes(), offset)) {
    return Bad(NameOf(tensor), " begins at ", entry.offset_bytes(), "; must be ", offset);
  }
  if (offset > file.size() || static_cast<uint64_t>(tensor.byte_size()) > file.size() - offset) {
    return Bad(NameOf(tensor), " ends beyond the file");
  }
  if (!IsZero(file.subspan(at, offset - at))) {
    return Lost("padding before ", NameOf(tensor), " is not zero");
  }
  return absl::OkStatus();
}

// Places the sections; returns the size of the file. Offsets are varints whose length depends on
// the header's length: repeat until it stands still. Lengths only grow, so this ends.
uint64_t PlaceSections(v1::ContainerHeader& header) {
  size_t header_bytes = 0;
  uint64_t end = kPrefixBytes + header.ByteSizeLong();
  while (header_bytes != header.ByteSizeLong()) {
    header_bytes = header.ByteSizeLong();
    end = kPrefixBytes + header_bytes;
    for (v1::ContainerTensor& entry : *header.mutable_tensors()) {
      entry.set_offset_bytes(static_cast<int64_t>(AlignUp(end)));
      end = AlignUp(end) + static_cast<uint64_t>(entry.tensor().byte_size());
    }
  }
  return end;
}

std::string SerializePrefixAndHeader(const v1::ContainerHeader& header, uint64_t file_bytes) {
  const size_t header_bytes = header.ByteSizeLong();
  std::string prefix_and_header(kPrefixBytes, '\0');
  {
    google::protobuf::io::StringOutputStream stream(&prefix_and_header);
    google::protobuf::io::CodedOutputStream output(&stream);
    output.SetSerializationDeterministic(true);  // equal containers are equal files
    header.SerializeToCodedStream(&output);
  }
  auto* prefix = reinterpret_cast<std::byte*>(prefix_and_header.data());
  std::memcpy(prefix, kMagic.data(), kMagic.size());
  StoreLittleEndian(kVersion, prefix + 8);
  StoreLittleEndian(static_cast<uint32_t>(header_bytes), prefix + 12);
  StoreLittleEndian(file_bytes, prefix + 16);
  StoreLittleEndian(wire::Crc32c(prefix + kPrefixBytes, header_bytes), prefix + 24);
  StoreLittleEndian(wire::Crc32c(prefix, 28), prefix + 28);
  return prefix_and_header;
}

}  // namespace

absl::StatusOr<Container> Container::Load(const std::string& path) {
  auto file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::Span<const std::byte> bytes = (*file)->bytes();
  absl::StatusOr<Container> parsed = Parse(bytes, *std::move(file));
  if (parsed.ok()) return parsed;
  return absl::Status(parsed.status().code(), absl::StrCat(path, ": ", parsed.status().message()));
}

absl::StatusOr<Container> Container::Parse(absl::Span<const std::byte> file,
                                           std::shared_ptr<const void> owner) {
  const absl::StatusOr<Prefix> prefix = ReadPrefix(file);
  if (!prefix.ok()) return prefix.status();
  const absl::Span<const std::byte> header = file.subspan(kPrefixBytes, prefix->header_bytes);
  if (wire::Crc32c(header.data(), header.size()) != prefix->header_crc32c) {
    return Lost("header does not have its checksum");
  }
  Container result;
  result.owner_ = std::move(owner);
  result.file_bytes_ = file.size();
  if (!result.header_.ParseFromArray(header.data(), static_cast<int>(header.size()))) {
    return Bad("header is not a ContainerHeader");
  }
  uint64_t at = kPrefixBytes + prefix->header_bytes;
  std::set<uint32_t> ids;
  for (const v1::ContainerTensor& entry : result.header_.tensors()) {
    if (absl::Status status = CheckSection(entry, file, at); !status.ok()) return status;
    if (!ids.insert(entry.tensor().id()).second) {
      return Bad("tensor id ", entry.tensor().id(), " occurs twice");
    }
    const auto offset = static_cast<uint64_t>(entry.offset_bytes());
    const auto size = static_cast<uint64_t>(entry.tensor().byte_size());
    result.sections_.push_back({entry.tensor(), file.subspan(offset, size)});
    at = offset + size;
  }
  if (at != file.size()) return Bad(file.size() - at, " bytes at the end belong to no tensor");
  return result;
}

absl::Status Container::VerifySections() const {
  for (size_t i = 0; i < sections_.size(); ++i) {
    const ContainerSection& section = sections_[i];
    const uint32_t expected = header_.tensors(static_cast<int>(i)).crc32c();
    if (wire::Crc32c(section.bytes.data(), section.bytes.size()) != expected) {
      return Lost(NameOf(section.descriptor), " does not have its checksum");
    }
  }
  return absl::OkStatus();
}

const ContainerSection* Container::Find(v1::TensorKind kind, int32_t layer) const {
  for (const ContainerSection& section : sections_) {
    const int32_t of = section.descriptor.has_layer() ? section.descriptor.layer() : -1;
    if (section.descriptor.kind() == kind && of == layer) return &section;
  }
  return nullptr;
}

uint64_t ContainerSizeBound(const v1::ContainerHeader& header,
                            absl::Span<const ContainerSection> sections) {
  uint64_t bound = kPrefixBytes + header.ByteSizeLong() + kAlignment;
  for (const ContainerSection& section : sections) {
    bound += section.descriptor.ByteSizeLong() + kTensorOverheadBytes + section.bytes.size() +
             kAlignment;
  }
  return bound;
}

absl::Status WriteContainer(const std::string& path, v1::ContainerHeader header,
                            absl::Span<const ContainerSection> sections) {
  header.clear_tensors();
  for (const ContainerSection& section : sections) {
    if (section.bytes.empty() ||
        std::cmp_not_equal(section.descriptor.byte_size(), section.bytes.size())) {
      return Bad(NameOf(section.descriptor), " has ", section.bytes.size(),
                 " bytes; its descriptor says ", section.descriptor.byte_size());
    }
    v1::ContainerTensor& entry = *header.add_tensors();
    *entry.mutable_tensor() = section.descriptor;
    entry.mutable_tensor()->set_id(static_cast<uint32_t>(header.tensors_size()));
    entry.mutable_tensor()->clear_location();
    entry.set_crc32c(wire::Crc32c(section.bytes.data(), section.bytes.size()));
  }
  const uint64_t end = PlaceSections(header);
  if (header.ByteSizeLong() > kMaxContainerHeaderBytes) return Bad("header is too large");

  const std::string prefix_and_header = SerializePrefixAndHeader(header, end);
  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  absl::Status status = (*file)->Write(prefix_and_header.data(), prefix_and_header.size());
  uint64_t at = prefix_and_header.size();
  for (const ContainerSection& section : sections) {
    if (!status.ok()) return status;
    status = (*file)->WriteZeros(AlignUp(at) - at);
    if (status.ok()) status = (*file)->Write(section.bytes.data(), section.bytes.size());
    at = AlignUp(at) + section.bytes.size();
  }
  return status.ok() ? (*file)->Commit() : status;
}

}  // namespace dynsplit
