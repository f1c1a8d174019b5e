// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/container.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "proto/wire/crc32c.h"

namespace dynsplit {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<Container> Parse(const std::string& file) {
  auto owner = std::make_shared<std::vector<std::byte>>(file.size());
  for (size_t i = 0; i < file.size(); ++i) (*owner)[i] = static_cast<std::byte>(file[i]);
  const absl::Span<const std::byte> bytes(*owner);
  return Container::Parse(bytes, owner);
}

absl::Status ParseAndVerify(const std::string& file) {
  const absl::StatusOr<Container> container = Parse(file);
  return container.ok() ? container->VerifySections() : container.status();
}

template <typename T>
void Store(T value, std::string& file, size_t at) {
  for (size_t i = 0; i < sizeof(T); ++i) file[at + i] = static_cast<char>(value >> (8 * i));
}

// A file around any header, with all checksums right.
std::string Craft(const std::string& header, const std::string& rest) {
  std::string file = std::string(
                         "\x89"
                         "DSKV\r\n\x1A") +
                     std::string(24, '\0') + header + rest;
  Store(uint32_t{1}, file, 8);
  Store(static_cast<uint32_t>(header.size()), file, 12);
  Store(uint64_t{file.size()}, file, 16);
  Store(wire::Crc32c(header.data(), header.size()), file, 24);
  Store(wire::Crc32c(file.data(), 28), file, 28);
  return file;
}

class ContainerTest : public ::testing::Test {
 protected:
  ContainerTest() : path_(::testing::TempDir() + "/dynsplit_test.dskv") {
    header_.mutable_shape()->set_num_tokens(3);
    header_.set_representation_salt("salt");
    (*header_.mutable_metadata())["model"] = "test";
    (*header_.mutable_metadata())["text.kind"] = "prose";
    Add(v1::TENSOR_KIND_TOKEN_IDS, -1, "abcdefghijkl");
    Add(v1::TENSOR_KIND_KEY_PAGES, 0, std::string(100, 'k'));
    Add(v1::TENSOR_KIND_VALUE_PAGES, 0, std::string(64, 'v'));
  }
  ~ContainerTest() override { std::filesystem::remove(path_); }

  void Add(v1::TensorKind kind, int32_t layer, std::string bytes) {
    data_.push_back(std::make_unique<std::string>(std::move(bytes)));
    ContainerSection& section = sections_.emplace_back();
    section.descriptor.set_kind(kind);
    if (layer >= 0) section.descriptor.set_layer(layer);
    section.descriptor.set_byte_size(static_cast<int64_t>(data_.back()->size()));
    section.bytes = {reinterpret_cast<const std::byte*>(data_.back()->data()),
                     data_.back()->size()};
  }

  std::string Written() {
    EXPECT_TRUE(WriteContainer(path_, header_, sections_).ok());
    std::ifstream stream(path_, std::ios::binary);
    std::ostringstream whole;
    whole << stream.rdbuf();
    return whole.str();
  }

  const std::string path_;
  v1::ContainerHeader header_;
  std::vector<std::unique_ptr<std::string>> data_;
  std::vector<ContainerSection> sections_;
};

TEST_F(ContainerTest, RoundTrip) {
  const std::string file = Written();
  const absl::StatusOr<Container> container = Container::Load(path_);
  ASSERT_TRUE(container.ok()) << container.status();
  EXPECT_TRUE(container->VerifySections().ok());
  EXPECT_EQ(container->header().representation_salt(), "salt");
  EXPECT_EQ(container->file_bytes(), file.size());
  ASSERT_EQ(container->sections().size(), sections_.size());
  for (size_t i = 0; i < sections_.size(); ++i) {
    EXPECT_EQ(container->sections()[i].bytes, sections_[i].bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(container->sections()[i].bytes.data()) % 64, 0u);
  }
  EXPECT_EQ(container->Find(v1::TENSOR_KIND_VALUE_PAGES, 0), &container->sections()[2]);
  EXPECT_EQ(container->Find(v1::TENSOR_KIND_TOKEN_IDS, -1), &container->sections()[0]);
  EXPECT_EQ(container->Find(v1::TENSOR_KIND_VALUE_PAGES, 1), nullptr);
}

TEST_F(ContainerTest, SizeBoundHoldsAndEqualInputGivesEqualBytes) {
  const std::string file = Written();
  EXPECT_LE(file.size(), ContainerSizeBound(header_, sections_));
  EXPECT_EQ(Written(), file);
}

TEST_F(ContainerTest, HeaderOnly) {
  sections_.clear();
  EXPECT_TRUE(ParseAndVerify(Written()).ok());
}

TEST_F(ContainerTest, ManySectionsSettleTheirOffsets) {
  for (int32_t layer = 1; layer < 300; ++layer) {
    Add(v1::TENSOR_KIND_PAGE_TABLE, layer, std::string(static_cast<size_t>(layer), 'p'));
  }
  const std::string file = Written();
  EXPECT_TRUE(ParseAndVerify(file).ok());
  EXPECT_LE(file.size(), ContainerSizeBound(header_, sections_));
}

TEST_F(ContainerTest, EveryTruncationIsSeen) {
  const std::string file = Written();
  for (size_t n = 0; n < file.size(); ++n) {
    EXPECT_FALSE(ParseAndVerify(file.substr(0, n)).ok()) << n;
  }
  EXPECT_FALSE(ParseAndVerify(file + '\0').ok());
}

TEST_F(ContainerTest, EveryFlippedBitIsSeen) {
  const std::string file = Written();
  for (size_t at = 0; at < file.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = file;
      changed[at] = static_cast<char>(changed[at] ^ (1 << bit));
      EXPECT_FALSE(ParseAndVerify(changed).ok()) << at << " " << bit;
    }
  }
}

TEST_F(ContainerTest, DamageIsDataLossAndNamesTheTensor) {
  std::string file = Written();
  file.back() = 'x';
  const absl::Status status = ParseAndVerify(file);
  EXPECT_TRUE(absl::IsDataLoss(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("TENSOR_KIND_VALUE_PAGES of layer 0"));
}

// One section of a crafted header whose checksums are all right.
std::string CraftSection(int64_t offset, int64_t size) {
  v1::ContainerHeader header;
  v1::ContainerTensor& entry = *header.add_tensors();
  entry.set_offset_bytes(offset);
  entry.mutable_tensor()->set_id(1);
  entry.mutable_tensor()->set_byte_size(size);
  return Craft(header.SerializeAsString(), std::string(200, '\0'));
}

TEST_F(ContainerTest, LyingHeadersAreRefused) {
  for (const auto& [offset, size] :
       std::vector<std::pair<int64_t, int64_t>>{{64, 1000},
                                                {64, 0},
                                                {64, -1},
                                                {64, INT64_MAX},
                                                {64, int64_t{1} << 41},
                                                {0, 10},
                                                {128, 10},
                                                {65, 10},
                                                {-64, 10},
                                                {INT64_MAX, 10},
                                                {INT64_MIN, 10},
                                                {64, 10}}) {  // 10 bytes: leaves a tail
    EXPECT_TRUE(absl::IsInvalidArgument(ParseAndVerify(CraftSection(offset, size))))
        << offset << " " << size;
  }
}

TEST_F(ContainerTest, HeaderBombsAreRefused) {
  std::string file = Craft("", "");
  for (const uint32_t bytes : {uint32_t{1}, uint32_t{1} << 27, uint32_t{0xFFFFFFFF}}) {
    Store(bytes, file, 12);
    Store(wire::Crc32c(file.data(), 28), file, 28);
    EXPECT_TRUE(absl::IsInvalidArgument(ParseAndVerify(file))) << bytes;
  }
  EXPECT_TRUE(absl::IsInvalidArgument(ParseAndVerify(Craft("\xFF\xFF", ""))));
  std::string version = Craft("", "");
  Store(uint32_t{2}, version, 8);
  Store(wire::Crc32c(version.data(), 28), version, 28);
  EXPECT_THAT(std::string(ParseAndVerify(version).message()), HasSubstr("version is 2"));
}

TEST_F(ContainerTest, DuplicateIdsAreRefused) {
  v1::ContainerHeader header;
  for (int i = 0; i < 2; ++i) {
    v1::ContainerTensor& entry = *header.add_tensors();
    entry.mutable_tensor()->set_id(7);
    entry.mutable_tensor()->set_byte_size(64);
    entry.set_offset_bytes(64 + 64 * i);
  }
  const std::string bytes = header.SerializeAsString();
  ASSERT_LT(bytes.size(), 32u);
  EXPECT_THAT(
      std::string(
          ParseAndVerify(Craft(bytes, std::string(64 - 32 - bytes.size() + 128, '\0'))).message()),
      HasSubstr("occurs twice"));
}

TEST_F(ContainerTest, WriterRefusesWrongSizesAndLeavesNothing) {
  sections_[1].descriptor.set_byte_size(5);
  EXPECT_TRUE(absl::IsInvalidArgument(WriteContainer(path_, header_, sections_)));
  EXPECT_FALSE(std::filesystem::exists(path_));
}

}  // namespace
}  // namespace dynsplit
