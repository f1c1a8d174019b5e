// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "client/cpp/capture.h"

namespace dynsplit {
namespace {

using ::testing::HasSubstr;

std::string File(const std::string& header, const std::string& data) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
  return file + header + data;
}

absl::StatusOr<Safetensors> Parse(const std::string& file) {
  // A copy of exactly the file's size, so that address sanitizer sees reads beyond.
  auto owner = std::make_shared<std::vector<std::byte>>(file.size());
  for (size_t i = 0; i < file.size(); ++i) (*owner)[i] = static_cast<std::byte>(file[i]);
  const absl::Span<const std::byte> bytes(*owner);
  return Safetensors::Parse(bytes, owner);
}

constexpr char kGood[] =
    R"({"__metadata__":{"k":"v"},"b":{"dtype":"I32","shape":[2,1],"data_offsets":[3,11]},)"
    R"("a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})";

TEST(SafetensorsTest, ReadsInFileOrder) {
  const absl::StatusOr<Safetensors> file = Parse(File(kGood, "abc01234567"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata().at("k"), "v");
  ASSERT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(file->tensors()[0].name, "a");
  EXPECT_THAT(file->tensors()[1].shape, ::testing::ElementsAre(2, 1));
  EXPECT_EQ(file->tensors()[1].bytes[0], std::byte{'0'});
  EXPECT_EQ(file->Find("b"), &file->tensors()[1]);
  EXPECT_EQ(file->Find("c"), nullptr);
}

TEST(SafetensorsTest, EmptyTensorsAndNoTensors) {
  EXPECT_TRUE(Parse(File("{}", "")).ok());
  const auto file = Parse(File(R"({"z":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},)"
                               R"("s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
                               "1234"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->Find("z")->bytes.empty());
  EXPECT_EQ(file->Find("s")->bytes.size(), 4u);
}

struct Attack {
  const char* expected;  // in the message
  std::string header;
  std::string data;
};

std::vector<Attack> Attacks() {
  const auto one = [](const std::string& fields) { return "{\"t\":{" + fields + "}}"; };
  return {
      {"not JSON", "{", ""},
      {"not JSON", "{} x", ""},
      {"not JSON", std::string("\xFF\xFE", 2), ""},
      {"not JSON", std::string(100'000, '['), ""},
      {"not a JSON object", "[]", ""},
      {"not a JSON object", "3", ""},
      {"occurs twice", R"({"t":{},"t":{}})", ""},
      {"occurs twice", R"({"t":{"dtype":"U8","dtype":"F32","shape":[],"data_offsets":[0,1]}})",
       "x"},
      {"not an object", R"({"t":5})", ""},
      {"is not an object", R"({"__metadata__":[]})", ""},
      {"is not a string", R"({"__metadata__":{"a":1}})", ""},
      {"needs dtype", one(R"("shape":[1],"data_offsets":[0,1])"), "x"},
      {"needs dtype", one(R"("dtype":3,"shape":[1],"data_offsets":[0,1])"), "x"},
      {"needs dtype", one(R"("dtype":"U8","shape":1,"data_offsets":[0,1])"), "x"},
      {"needs dtype", one(R"("dtype":"U8","shape":[1],"data_offsets":[0])"), "x"},
      {"needs dtype", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1,1])"), "x"},
      {"unknown dtype", one(R"("dtype":"F4","shape":[1],"data_offsets":[0,1])"), "x"},
      {"not sizes", one(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"), "x"},
      {"not sizes", one(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), "x"},
      {"not sizes", one(R"("dtype":"U8","shape":["1"],"data_offsets":[0,1])"), "x"},
      {"not sizes", one(R"("dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1])"),
       "x"},
      {"not sizes", one(R"("dtype":"U8","shape":[1],"data_offsets":[-1,0])"), "x"},
      {"the file holds", one(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), "x"},
      {"the file holds", one(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"), "x"},
      {"the file holds", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,9223372036854775807])"),
       "x"},
      {"its shape needs 2", one(R"("dtype":"U8","shape":[2],"data_offsets":[0,1])"), "x"},
      {"more than 2^64",
       one(R"("dtype":"F64","shape":[2147483648,2147483648],"data_offsets":[0,0])"), ""},
      {"overlaps",
       R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       "abc"},
      {"overlaps",
       R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
       "ab"},
      {"hole", one(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), "ab"},
      {"belong to no tensor", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), "ab"},
      {"belong to no tensor", "{}", "x"},
  };
}

TEST(SafetensorsTest, AttacksAreRefused) {
  for (const Attack& attack : Attacks()) {
    const absl::Status status = Parse(File(attack.header, attack.data)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << attack.header.substr(0, 100);
    EXPECT_THAT(std::string(status.message()), HasSubstr(attack.expected));
  }
}

TEST(SafetensorsTest, HeaderLengthBombs) {
  for (const uint64_t length : {uint64_t{3}, uint64_t{1} << 31, uint64_t{1} << 63, ~uint64_t{0}}) {
    std::string file(10, ' ');
    for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i));
    EXPECT_TRUE(absl::IsInvalidArgument(Parse(file).status())) << length;
  }
}

TEST(SafetensorsTest, EveryTruncation) {
  const std::string file = File(kGood, "abc01234567");
  for (size_t n = 0; n < file.size(); ++n) {
    EXPECT_TRUE(absl::IsInvalidArgument(Parse(file.substr(0, n)).status())) << n;
  }
}

TEST(SafetensorsTest, FlippedBytesNeverLeadOutside) {
  const std::string file = File(kGood, "abc01234567");
  for (size_t at = 0; at < file.size(); ++at) {
    for (const int flip : {1, 2, 4, 8, 16, 32, 64, 128, 255}) {
      std::string changed = file;
      changed[at] = static_cast<char>(changed[at] ^ flip);
      const absl::StatusOr<Safetensors> parsed = Parse(changed);
      if (!parsed.ok()) continue;
      size_t bytes = 0;
      for (const SafetensorsTensor& tensor : parsed->tensors()) {
        for (const std::byte byte : tensor.bytes) bytes += byte != std::byte{0} ? 1 : 1;
      }
      EXPECT_EQ(bytes, 11u) << at;
    }
  }
}

class SafetensorsFileTest : public ::testing::Test {
 protected:
  SafetensorsFileTest() : path_(::testing::TempDir() + "/dynsplit_test.safetensors") {}
  ~SafetensorsFileTest() override { std::filesystem::remove(path_); }

  const std::string path_;
};

TEST_F(SafetensorsFileTest, WriterAndReaderAgree) {
  const std::string data = "0123456789ab";
  const auto bytes = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(data.data()), 12);
  const std::vector<SafetensorsTensor> tensors = {
      {"x", "BF16", {2, 3}, bytes}, {"empty", "F32", {0}, {}}, {"y", "U8", {5}, bytes.first(5)}};
  ASSERT_TRUE(WriteSafetensors(path_, {{"k", "v \"quoted\""}}, tensors).ok());
  const absl::StatusOr<Safetensors> file = Safetensors::Load(path_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata().at("k"), "v \"quoted\"");
  EXPECT_EQ(file->Find("x")->shape, tensors[0].shape);
  EXPECT_EQ(file->Find("x")->bytes, tensors[0].bytes);
  EXPECT_EQ(file->Find("y")->bytes, tensors[2].bytes);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file->Find("x")->bytes.data()) % 64, 0u);
}

TEST_F(SafetensorsFileTest, WriterRefusesWhatDoesNotFit) {
  const std::byte byte{};
  const absl::Span<const std::byte> one(&byte, 1);
  for (const std::vector<SafetensorsTensor>& tensors : std::vector<std::vector<SafetensorsTensor>>{
           {{"x", "U8", {2}, one}},
           {{"x", "F3", {1}, one}},
           {{"x", "U8", {-1}, one}},
           {{"x", "U8", {1}, one}, {"x", "U8", {1}, one}}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(WriteSafetensors(path_, {}, tensors)));
  }
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(SafetensorsFileTest, MissingFileAndFolder) {
  EXPECT_TRUE(absl::IsNotFound(Safetensors::Load(path_).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Safetensors::Load(::testing::TempDir()).status()));
  EXPECT_TRUE(absl::IsNotFound(WriteSafetensors("/nonexistent/x", {}, {})));
}

TEST(CaptureTest, SamplesLoad) {
  for (const char* kind : {"prose", "code", "dialogue"}) {
    const auto capture =
        LoadCapture(std::string(DYNSPLIT_TEST_DATA "/sample/") + kind + ".safetensors");
    ASSERT_TRUE(capture.ok()) << capture.status();
    EXPECT_EQ(capture->text_kind, kind);
    EXPECT_EQ(capture->shape.num_layers(), 3);
    EXPECT_EQ(capture->shape.num_query_heads(), 9);
    EXPECT_GT(capture->shape.num_tokens(), 1000);
    EXPECT_EQ(capture->num_window_queries(), 64);
    std::string text;
    for (int64_t t = 0; t < capture->shape.num_tokens(); ++t) text += capture->token_text(t);
    EXPECT_EQ(text, capture->text);
    const Capture::Layer& layer = capture->layers.at(1);
    const size_t row = 9 * 64 * 2;
    EXPECT_EQ(layer.queries.size(), 64 * row);
    EXPECT_EQ(capture->WindowQueries(layer, 16).size(), 16 * row);
    EXPECT_EQ(capture->WindowQueries(layer, 16).end(), layer.queries.end());
  }
}

TEST(CaptureTest, WhatIsMissingIsNamed) {
  std::ifstream stream(DYNSPLIT_TEST_DATA "/sample/code.safetensors", std::ios::binary);
  std::ostringstream whole;
  whole << stream.rdbuf();
  const std::string file = whole.str();
  // Names and words of equal length, so that offsets stay right.
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"layers.1.value", "layers.9.value"},
                                                        {"layers.2.query", "layers.9.query"},
                                                        {"token_offsets", "token_0ffsets"},
                                                        {"\"token_ids\"", "\"taken_ids\""},
                                                        {"kv-capture/1", "kv-capture/2"},
                                                        {"dynsplit.model", "dynsplit.m0del"},
                                                        {"num_kv_heads", "num_xx_heads"},
                                                        {"layer_ids", "later_ids"}}) {
    std::string changed = file;
    changed.replace(changed.find(from), from.size(), to);
    const auto parsed = Parse(changed);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_TRUE(absl::IsInvalidArgument(ReadCapture(*parsed).status())) << from;
  }
}

}  // namespace
}  // namespace dynsplit
