// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/file_io.h"

namespace dynsplit {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kPrefixBytes = 8;
constexpr char kMetadataKey[] = "__metadata__";

template <typename... Parts>
absl::Status Bad(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("safetensors: ", parts...));
}

// Text from a file, fit for a message.
std::string Quoted(const std::string& text) { return absl::StrCat("'", text.substr(0, 64), "'"); }

// Parses the header; refuses keys that occur twice, of which the library would keep the last.
absl::StatusOr<Json> ParseHeader(absl::Span<const std::byte> header) {
  std::vector<std::set<std::string>> keys;
  std::optional<std::string> twice;
  const auto watch = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) twice = key;
    }
    return true;
  };
  const auto* begin = reinterpret_cast<const char*>(header.data());
  Json json = Json::parse(begin, begin + header.size(), watch, /*allow_exceptions=*/false);
  if (json.is_discarded()) return Bad("header is not JSON");
  if (!json.is_object()) return Bad("header is not a JSON object");
  if (twice.has_value()) return Bad("key ", Quoted(*twice), " occurs twice");
  return json;
}

absl::StatusOr<std::map<std::string, std::string>> ReadMetadata(const Json& json) {
  if (!json.is_object()) return Bad(kMetadataKey, " is not an object");
  std::map<std::string, std::string> metadata;
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) return Bad(kMetadataKey, " ", Quoted(key), " is not a string");
    metadata.emplace(key, value.get_ref<const std::string&>());
  }
  return metadata;
}

// Bytes of a dense tensor, or nothing on overflow.
std::optional<uint64_t> DenseBytes(const std::vector<int64_t>& shape, int64_t element_bytes) {
  auto bytes = static_cast<uint64_t>(element_bytes);
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) return std::nullopt;
  }
  return bytes;
}

bool IsSize(const Json& json) {
  return json.is_number_unsigned() && json.get<uint64_t>() <= uint64_t{INT64_MAX};
}

absl::StatusOr<SafetensorsTensor> ReadTensor(const std::string& name, const Json& json,
                                             absl::Span<const std::byte> data) {
  if (!json.is_object()) return Bad("tensor ", Quoted(name), " is not an object");
  const auto dtype = json.find("dtype");
  const auto shape = json.find("shape");
  const auto offsets = json.find("data_offsets");
  if (dtype == json.end() || !dtype->is_string() || shape == json.end() || !shape->is_array() ||
      offsets == json.end() || !offsets->is_array() || offsets->size() != 2) {
    return Bad("tensor ", Quoted(name), " needs dtype, shape and two data_offsets");
  }
  SafetensorsTensor tensor;
  tensor.name = name;
  tensor.dtype = dtype->get_ref<const std::string&>();
  const int64_t element_bytes = SafetensorsDTypeBytes(tensor.dtype);
  if (element_bytes == 0) {
    return Bad("tensor ", Quoted(name), " has unknown dtype ", Quoted(tensor.dtype));
  }
  for (const Json& size : *shape) {
    if (!IsSize(size)) return Bad("tensor ", Quoted(name), " has a shape that is not sizes");
    tensor.shape.push_back(size.get<int64_t>());
  }
  if (!IsSize((*offsets)[0]) || !IsSize((*offsets)[1])) {
    return Bad("tensor ", Quoted(name), " has data_offsets that are not sizes");
  }
  const auto begin = (*offsets)[0].get<uint64_t>();
  const auto end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > data.size()) {
    return Bad("tensor ", Quoted(name), " has bytes [", begin, ", ", end, "); the file holds ",
               data.size());
  }
  const std::optional<uint64_t> expected = DenseBytes(tensor.shape, element_bytes);
  if (expected != end - begin) {
    return Bad("tensor ", Quoted(name), " has ", end - begin, " bytes; its shape needs ",
               expected.has_value() ? absl::StrCat(*expected) : "more than 2^64");
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return tensor;
}

// Sorts by place and checks that the tensors cover `data` without overlap.
absl::Status CheckCover(std::vector<SafetensorsTensor>& tensors, absl::Span<const std::byte> data) {
  std::sort(tensors.begin(), tensors.end(),
            [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
              return std::pair(a.bytes.data(), a.bytes.size()) <
                     std::pair(b.bytes.data(), b.bytes.size());
            });
  const std::byte* at = data.data();
  for (const SafetensorsTensor& tensor : tensors) {
    if (tensor.bytes.data() != at) {
      return Bad("tensor ", Quoted(tensor.name),
                 tensor.bytes.data() < at ? " overlaps another" : " is preceded by a hole");
    }
    at += tensor.bytes.size();
  }
  const auto rest = data.data() + data.size() - at;
  if (rest != 0) return Bad(rest, " bytes at the end belong to no tensor");
  return absl::OkStatus();
}

}  // namespace

int64_t SafetensorsDTypeBytes(std::string_view dtype) {
  struct Entry {
    std::string_view name;
    int64_t bytes;
  };
  static constexpr std::array<Entry, 15> kTypes = {{{"BOOL", 1},
                                                    {"U8", 1},
                                                    {"I8", 1},
                                                    {"F8_E4M3", 1},
                                                    {"F8_E5M2", 1},
                                                    {"F16", 2},
                                                    {"BF16", 2},
                                                    {"I16", 2},
                                                    {"U16", 2},
                                                    {"I32", 4},
                                                    {"U32", 4},
                                                    {"F32", 4},
                                                    {"I64", 8},
                                                    {"U64", 8},
                                                    {"F64", 8}}};
  for (const Entry& entry : kTypes) {
    if (entry.name == dtype) return entry.bytes;
  }
  return 0;
}

absl::StatusOr<Safetensors> Safetensors::Load(const std::string& path) {
  auto file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::Span<const std::byte> bytes = (*file)->bytes();
  absl::StatusOr<Safetensors> parsed = Parse(bytes, *std::move(file));
  if (parsed.ok()) return parsed;
  return absl::Status(parsed.status().code(), absl::StrCat(path, ": ", parsed.status().message()));
}

absl::StatusOr<Safetensors> Safetensors::Parse(absl::Span<const std::byte> file,
                                               std::shared_ptr<const void> owner) {
  if (file.size() < kPrefixBytes) return Bad("file of ", file.size(), " bytes is too short");
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kPrefixBytes; ++i) {
    header_bytes |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  }
  const uint64_t limit = std::min(file.size() - kPrefixBytes, kMaxSafetensorsHeaderBytes);
  if (header_bytes > limit) return Bad("header of ", header_bytes, " bytes; at most ", limit);
  const absl::Span<const std::byte> data = file.subspan(kPrefixBytes + header_bytes);
  const absl::StatusOr<Json> json = ParseHeader(file.subspan(kPrefixBytes, header_bytes));
  if (!json.ok()) return json.status();

  Safetensors result;
  result.owner_ = std::move(owner);
  for (const auto& [name, value] : json->items()) {
    if (name == kMetadataKey) {
      auto metadata = ReadMetadata(value);
      if (!metadata.ok()) return metadata.status();
      result.metadata_ = *std::move(metadata);
      continue;
    }
    auto tensor = ReadTensor(name, value, data);
    if (!tensor.ok()) return tensor.status();
    result.tensors_.push_back(*std::move(tensor));
  }
  if (absl::Status status = CheckCover(result.tensors_, data); !status.ok()) return status;
  return result;
}

const SafetensorsTensor* Safetensors::Find(std::string_view name) const {
  for (const SafetensorsTensor& tensor : tensors_) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

absl::Status WriteSafetensors(const std::string& path,
                              const std::map<std::string, std::string>& metadata,
                              absl::Span<const SafetensorsTensor> tensors) {
  nlohmann::ordered_json header;
  header[kMetadataKey] = metadata;
  uint64_t offset = 0;
  for (const SafetensorsTensor& tensor : tensors) {
    const int64_t element_bytes = SafetensorsDTypeBytes(tensor.dtype);
    const bool negative = std::any_of(tensor.shape.begin(), tensor.shape.end(),
                                      [](int64_t size) { return size < 0; });
    if (element_bytes == 0 || negative || header.contains(tensor.name) ||
        DenseBytes(tensor.shape, element_bytes) != tensor.bytes.size()) {
      return Bad("tensor ", Quoted(tensor.name), " occurs twice, or its bytes do not fit ",
                 Quoted(tensor.dtype), " and its shape");
    }
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  // Text may come from a model's vocabulary: what is not UTF-8 becomes U+FFFD.
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((64 - (kPrefixBytes + text.size()) % 64) % 64, ' ');
  if (text.size() > kMaxSafetensorsHeaderBytes) return Bad("header is too large");
  std::array<std::byte, kPrefixBytes> prefix;
  for (size_t i = 0; i < kPrefixBytes; ++i) {
    prefix[i] = static_cast<std::byte>(uint64_t{text.size()} >> (8 * i));
  }
  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  absl::Status status = (*file)->Write(prefix.data(), prefix.size());
  status.Update((*file)->Write(text.data(), text.size()));
  for (const SafetensorsTensor& tensor : tensors) {
    if (!status.ok()) break;
    status = (*file)->Write(tensor.bytes.data(), tensor.bytes.size());
  }
  return status.ok() ? (*file)->Commit() : status;
}

}  // namespace dynsplit
