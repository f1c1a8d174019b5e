// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/frame.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/status.h"

namespace dynsplit::wire {
namespace {

using ::testing::HasSubstr;

std::string Bytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

// The bytes in slices of the given sizes, the last repeated.
grpc::ByteBuffer Sliced(const std::string& bytes, const std::vector<size_t>& sizes) {
  std::vector<grpc::Slice> slices;
  size_t at = 0;
  for (size_t i = 0; at < bytes.size(); ++i) {
    const size_t n = std::min(sizes[std::min(i, sizes.size() - 1)], bytes.size() - at);
    slices.emplace_back(bytes.data() + at, n);
    at += n;
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

grpc::ByteBuffer Whole(const std::string& bytes) { return Sliced(bytes, {bytes.size() + 1}); }

std::string RandomText(size_t n) {
  std::mt19937 random(static_cast<uint32_t>(n));
  std::string text(n, '\0');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

v1::CompressRequest SampleChunk(size_t n) {
  v1::CompressRequest chunk;
  chunk.set_tensor(300);
  chunk.set_offset(uint64_t{5} << 33);
  chunk.set_data(RandomText(n));
  chunk.set_crc32c(Crc32c(chunk.data().data(), n));
  chunk.set_last(true);
  chunk.set_tensor_crc32c(0x01020304);
  return chunk;
}

std::string Payload(const Frame& frame, absl::Status* status) {
  std::string data(frame.data_size() + 1, '#');
  *status = frame.CopyTo(reinterpret_cast<std::byte*>(data.data()));
  EXPECT_EQ(data.back(), '#') << "wrote past the end";
  data.pop_back();
  return data;
}

void ExpectIsSample(grpc::ByteBuffer buffer, const v1::CompressRequest& sample) {
  const absl::StatusOr<Frame> frame = ParseFrame(std::move(buffer), kMaxChunkDataBytes);
  ASSERT_TRUE(frame.ok()) << frame.status();
  ASSERT_TRUE(frame->is_chunk());
  EXPECT_EQ(frame->header().tensor, sample.tensor());
  EXPECT_EQ(frame->header().offset, sample.offset());
  EXPECT_EQ(frame->header().crc32c, sample.crc32c());
  EXPECT_EQ(frame->header().last, sample.last());
  EXPECT_EQ(frame->header().tensor_crc32c, sample.tensor_crc32c());
  absl::Status status;
  EXPECT_EQ(Payload(*frame, &status), sample.data());
  EXPECT_TRUE(status.ok()) << status;
}

TEST(FrameTest, EncodedChunkIsTheProtobufMessage) {
  for (const size_t n : {size_t{1}, size_t{127}, size_t{128}, kDefaultChunkDataBytes}) {
    const v1::CompressRequest sample = SampleChunk(n);
    const ChunkHeader header = {sample.tensor(), sample.offset(), sample.crc32c(), true,
                                sample.tensor_crc32c()};
    const grpc::ByteBuffer buffer =
        EncodeChunk(header, reinterpret_cast<const std::byte*>(sample.data().data()), n, nullptr);
    v1::CompressRequest request;
    ASSERT_TRUE(request.ParseFromString(Bytes(buffer)));
    EXPECT_EQ(request.SerializeAsString(), sample.SerializeAsString());
    v1::CompressResponse response;
    ASSERT_TRUE(response.ParseFromString(Bytes(buffer)));
    EXPECT_EQ(response.data(), sample.data());
    EXPECT_EQ(response.tensor_crc32c(), sample.tensor_crc32c());
  }
}

TEST(FrameTest, PayloadIsNotCopiedAndOwnerLivesAsLongAsTheSlice) {
  auto owner = std::make_shared<std::string>(RandomText(4096));
  const std::weak_ptr<std::string> watch = owner;
  const auto* data = reinterpret_cast<const std::byte*>(owner->data());
  {
    const grpc::ByteBuffer buffer = EncodeChunk({1, 0, 0, false, 0}, data, 4096, std::move(owner));
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(buffer.Dump(&slices).ok());
    EXPECT_TRUE(std::any_of(slices.begin(), slices.end(), [data](const grpc::Slice& slice) {
      return slice.begin() == reinterpret_cast<const uint8_t*>(data);
    }));
    EXPECT_FALSE(watch.expired());
  }
  EXPECT_TRUE(watch.expired());
}

TEST(FrameTest, RoundTripThroughOddSlices) {
  for (const size_t n : std::vector<size_t>{1, 2, 100, 5000}) {
    const v1::CompressRequest sample = SampleChunk(n);
    const std::string bytes = sample.SerializeAsString();
    for (const std::vector<size_t>& sizes : std::vector<std::vector<size_t>>{
             {1}, {2}, {3}, {7, 1}, {1, 64}, {13, 1, 1, 1, 4096}, {bytes.size() - 1, 1}}) {
      ExpectIsSample(Sliced(bytes, sizes), sample);
    }
  }
}

TEST(FrameTest, EveryCutIntoThreeSlices) {
  const v1::CompressRequest sample = SampleChunk(12);
  const std::string bytes = sample.SerializeAsString();
  for (size_t first = 1; first < bytes.size(); ++first) {
    for (size_t second = 1; first + second < bytes.size(); ++second) {
      ExpectIsSample(Sliced(bytes, {first, second, bytes.size()}), sample);
    }
  }
}

TEST(FrameTest, EmptySlicesBetween) {
  const v1::CompressRequest sample = SampleChunk(50);
  const std::string bytes = sample.SerializeAsString();
  std::vector<grpc::Slice> slices;
  for (const char& c : bytes) {
    slices.emplace_back();
    slices.emplace_back(&c, 1);
  }
  slices.emplace_back();
  ExpectIsSample(grpc::ByteBuffer(slices.data(), slices.size()), sample);
}

// The fields of a message, one string each.
std::vector<std::string> FieldsOf(const v1::CompressRequest& sample) {
  std::vector<std::string> fields;
  v1::CompressRequest one;
  one.set_tensor(sample.tensor());
  fields.push_back(one.SerializeAsString());
  one.Clear();
  one.set_offset(sample.offset());
  fields.push_back(one.SerializeAsString());
  one.Clear();
  one.set_crc32c(sample.crc32c());
  fields.push_back(one.SerializeAsString());
  one.Clear();
  one.set_last(sample.last());
  fields.push_back(one.SerializeAsString());
  one.Clear();
  one.set_tensor_crc32c(sample.tensor_crc32c());
  fields.push_back(one.SerializeAsString());
  one.Clear();
  one.set_data(sample.data());
  fields.push_back(one.SerializeAsString());
  return fields;
}

TEST(FrameTest, AllFieldOrders) {
  const v1::CompressRequest sample = SampleChunk(33);
  const std::vector<std::string> fields = FieldsOf(sample);
  std::vector<size_t> order(fields.size());
  std::iota(order.begin(), order.end(), size_t{0});
  int count = 0;
  do {
    std::string bytes;
    for (const size_t i : order) bytes += fields[i];
    ExpectIsSample(Sliced(bytes, {5, 11}), sample);
    ++count;
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(count, 720);
}

TEST(FrameTest, UnknownFieldsAnywhereAreIgnored) {
  using std::string_literals::operator""s;
  const std::vector<std::string> unknown = {
      "\x50\x01"s,                              // field 10, varint
      "\x55\x01\x02\x03\x04"s,                  // field 10, fixed32
      "\x51\x01\x02\x03\x04\x05\x06\x07\x08"s,  // field 10, fixed64
      "\x52\x03"
      "abc"s,                                   // field 10, bytes
      "\x53\x50\x01\x54"s,                      // field 10, group that holds a varint
      "\x12\x01z"s,                             // field 2 with the wire type of bytes
      "\x79\x01\x02\x03\x04\x05\x06\x07\x08"s,  // field 15 as fixed64
      "\xF8\xFF\xFF\xFF\x0F\x01"s,              // the largest field number
  };
  const v1::CompressRequest sample = SampleChunk(40);
  const std::vector<std::string> fields = FieldsOf(sample);
  for (const std::string& extra : unknown) {
    for (size_t at = 0; at <= fields.size(); ++at) {
      std::string bytes;
      for (size_t i = 0; i <= fields.size(); ++i) {
        if (i == at) bytes += extra;
        if (i < fields.size()) bytes += fields[i];
      }
      ExpectIsSample(Sliced(bytes, {3}), sample);
    }
  }
}

TEST(FrameTest, LastOccurrenceOfAScalarCounts) {
  v1::CompressRequest other = SampleChunk(9);
  other.set_tensor(1);
  const v1::CompressRequest sample = SampleChunk(20);
  ExpectIsSample(Whole(other.SerializeAsString() + sample.SerializeAsString()), sample);
}

TEST(FrameTest, ZeroHeaderFieldsMayBeAbsent) {
  v1::CompressRequest sample;
  sample.set_data("payload");
  sample.set_crc32c(Crc32c("payload", 7));
  ExpectIsSample(Whole(sample.SerializeAsString()), sample);
}

TEST(FrameTest, ControlMessages) {
  v1::CompressRequest request;
  request.mutable_begin()->set_request_id("abc");
  absl::StatusOr<Frame> frame = ParseFrame(EncodeMessage(request), 10);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_FALSE(frame->is_chunk());
  v1::CompressRequest parsed;
  ASSERT_TRUE(frame->ParseControl(&parsed).ok());
  EXPECT_EQ(parsed.begin().request_id(), "abc");

  v1::CompressResponse response;
  response.mutable_layer()->set_num_pages(9);
  response.mutable_layer()->mutable_plan()->set_hash(RandomText(0));
  frame = ParseFrame(Sliced(response.SerializeAsString(), {1}), 10);
  ASSERT_TRUE(frame.ok()) << frame.status();
  v1::CompressResponse parsed_response;
  ASSERT_TRUE(frame->ParseControl(&parsed_response).ok());
  EXPECT_EQ(parsed_response.layer().num_pages(), 9);

  frame = ParseFrame(Whole(""), 10);
  ASSERT_TRUE(frame.ok());
  EXPECT_FALSE(frame->is_chunk());
  ASSERT_TRUE(frame->ParseControl(&parsed).ok());
  EXPECT_FALSE(parsed.has_begin());
}

TEST(FrameTest, ControlMessageWhoseInnerBytesAreBrokenIsRefusedWhenParsed) {
  absl::StatusOr<Frame> frame = ParseFrame(Whole(std::string("\x0A\x02\x0A\x05", 4)), 10);
  ASSERT_TRUE(frame.ok());
  v1::CompressRequest parsed;
  EXPECT_EQ(frame->ParseControl(&parsed).code(), absl::StatusCode::kInvalidArgument);
}

TEST(FrameTest, ChecksumMismatchNamesTensorAndOffset) {
  v1::CompressRequest sample = SampleChunk(1000);
  (*sample.mutable_data())[500] ^= 1;
  const absl::StatusOr<Frame> frame = ParseFrame(Sliced(sample.SerializeAsString(), {64}), 1000);
  ASSERT_TRUE(frame.ok());
  absl::Status status;
  Payload(*frame, &status);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tensor 300, offset 42949672960"));
  const RichError error = ReadError(status);
  EXPECT_EQ(error.reason, kChecksumMismatch);
  EXPECT_EQ(error.metadata.at("tensor"), "300");
  EXPECT_EQ(error.metadata.at("offset"), "42949672960");
}

TEST(FrameTest, DataLimitIsExact) {
  const std::string bytes = SampleChunk(100).SerializeAsString();
  EXPECT_TRUE(ParseFrame(Whole(bytes), 100).ok());
  const absl::Status status = ParseFrame(Whole(bytes), 99).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("has 100 bytes; must be in [1, 99]"));
}

struct Malformed {
  const char* name;
  std::string bytes;
};

std::vector<Malformed> MalformedMessages() {
  using std::string_literals::operator""s;
  return {
      {"field number zero", "\x00\x01"s},
      {"field number zero as bytes", "\x02\x01z"s},
      {"end group without start", "\x54"s},
      {"group without end", "\x53\x50\x01"s},
      {"group closed by another", "\x53\x5C"s},
      {"wire type 6", "\x56"s},
      {"wire type 7", "\x57"s},
      {"tag varint without end", "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"s},
      {"tag cut", "\x80"s},
      {"tensor without value", "\x10"s},
      {"tensor varint of eleven bytes", "\x10\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"s},
      {"crc cut", "\x25\x01\x02\x03"s},
      {"data length cut", "\x7A\x80"s},
      {"data shorter than its length", "\x7A\x05xyz"s},
      {"data length of 2^31", "\x7A\x80\x80\x80\x80\x08xyz"s},
      {"data length of 2^32 - 1", "\x7A\xFF\xFF\xFF\xFF\x0Fxyz"s},
      {"data length of 2^63", "\x7A\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01xyz"s},
      {"unknown bytes longer than the message", "\x52\x7F"s},
      {"begin longer than the message", "\x0A\x7F"s},
      {"no data", "\x10\x05"s},
      {"empty data", "\x10\x05\x7A\x00"s},
      {"chunk and begin", "\x0A\x00\x10\x05\x7A\x01z"s},
      {"chunk and layer", "\x7A\x01z\x4A\x00"s},
      {"last and end", "\x28\x01\x32\x00"s},
  };
}

TEST(FrameTest, MalformedMessagesAreInvalid) {
  for (const Malformed& malformed : MalformedMessages()) {
    for (const size_t slice : std::vector<size_t>{1, 2, 100}) {
      const absl::Status status = ParseFrame(Sliced(malformed.bytes, {slice}), 100).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << malformed.name;
    }
  }
}

TEST(FrameTest, EveryTruncationIsRefusedOrLacksData) {
  const std::string bytes = SampleChunk(20).SerializeAsString();
  for (size_t n = 1; n < bytes.size(); ++n) {
    EXPECT_EQ(ParseFrame(Sliced(bytes.substr(0, n), {3}), 100).status().code(),
              absl::StatusCode::kInvalidArgument)
        << n;
  }
}

// Whatever one flipped byte makes of a chunk, this parser and protobuf's agree on it.
TEST(FrameTest, AgreesWithProtobufOnEveryFlippedByte) {
  const std::string bytes = SampleChunk(20).SerializeAsString();
  for (size_t at = 0; at < bytes.size(); ++at) {
    for (int flip = 1; flip < 256; ++flip) {
      std::string changed = bytes;
      changed[at] = static_cast<char>(changed[at] ^ flip);
      const absl::StatusOr<Frame> frame = ParseFrame(Sliced(changed, {9}), 100);
      v1::CompressRequest expected;
      const bool parses = expected.ParseFromString(changed);
      if (!frame.ok() || !frame->is_chunk()) continue;
      ASSERT_TRUE(parses) << at << " " << flip;
      EXPECT_EQ(frame->header().tensor, expected.tensor());
      EXPECT_EQ(frame->header().offset, expected.offset());
      EXPECT_EQ(frame->header().crc32c, expected.crc32c());
      EXPECT_EQ(frame->header().last, expected.last());
      absl::Status status;
      EXPECT_EQ(Payload(*frame, &status), expected.data());
      EXPECT_EQ(status.ok(),
                Crc32c(expected.data().data(), expected.data().size()) == expected.crc32c());
    }
  }
}

}  // namespace
}  // namespace dynsplit::wire
