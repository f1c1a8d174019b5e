// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/frame.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream.h>
#include <google/protobuf/message_lite.h>
#include <google/protobuf/wire_format_lite.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/status.h"

namespace dynsplit::wire {
namespace {

using ::google::protobuf::internal::WireFormatLite;
using ::google::protobuf::io::CodedInputStream;
using ::google::protobuf::io::CodedOutputStream;

using Request = v1::CompressRequest;
using Response = v1::CompressResponse;

constexpr int kTensor = Request::kTensorFieldNumber;
constexpr int kOffset = Request::kOffsetFieldNumber;
constexpr int kCrc32c = Request::kCrc32CFieldNumber;
constexpr int kLast = Request::kLastFieldNumber;
constexpr int kTensorCrc32c = Request::kTensorCrc32CFieldNumber;
constexpr int kData = Request::kDataFieldNumber;
static_assert(Response::kTensorFieldNumber == kTensor);
static_assert(Response::kOffsetFieldNumber == kOffset);
static_assert(Response::kCrc32CFieldNumber == kCrc32c);
static_assert(Response::kLastFieldNumber == kLast);
static_assert(Response::kTensorCrc32CFieldNumber == kTensorCrc32c);
static_assert(Response::kDataFieldNumber == kData);
static_assert(int{Request::kBeginFieldNumber} == int{Response::kAcceptedFieldNumber});
static_assert(int{Request::kEndFieldNumber} == int{Response::kEndFieldNumber});

constexpr bool IsControlField(int field) {
  return field == Request::kBeginFieldNumber || field == Request::kEndFieldNumber ||
         field == Response::kSequenceFieldNumber || field == Response::kLayerFieldNumber;
}

constexpr uint32_t Tag(int field, WireFormatLite::WireType type) {
  return WireFormatLite::MakeTag(field, type);
}
constexpr uint32_t kTensorTag = Tag(kTensor, WireFormatLite::WIRETYPE_VARINT);
constexpr uint32_t kOffsetTag = Tag(kOffset, WireFormatLite::WIRETYPE_VARINT);
constexpr uint32_t kCrc32cTag = Tag(kCrc32c, WireFormatLite::WIRETYPE_FIXED32);
constexpr uint32_t kLastTag = Tag(kLast, WireFormatLite::WIRETYPE_VARINT);
constexpr uint32_t kTensorCrc32cTag = Tag(kTensorCrc32c, WireFormatLite::WIRETYPE_FIXED32);
constexpr uint32_t kDataTag = Tag(kData, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);

// The slices of one message as protobuf input; reads what it is given, in place.
class SliceInputStream final : public google::protobuf::io::ZeroCopyInputStream {
 public:
  explicit SliceInputStream(const std::vector<grpc::Slice>& slices) : slices_(slices) {}

  bool Next(const void** data, int* size) override {
    while (next_ < slices_.size()) {
      const grpc::Slice& slice = slices_[next_++];
      const size_t skipped = std::exchange(within_, 0);
      if (skipped == slice.size()) continue;
      *data = slice.begin() + skipped;
      *size = static_cast<int>(slice.size() - skipped);
      consumed_ += *size;
      return true;
    }
    return false;
  }

  void BackUp(int count) override {
    --next_;
    within_ = slices_[next_].size() - static_cast<size_t>(count);
    consumed_ -= count;
  }

  bool Skip(int count) override {
    const void* data = nullptr;
    int size = 0;
    while (count > 0) {
      if (!Next(&data, &size)) return false;
      if (size > count) BackUp(size - count);
      count -= std::min(size, count);
    }
    return true;
  }

  int64_t ByteCount() const override { return consumed_; }

 private:
  const std::vector<grpc::Slice>& slices_;
  size_t next_ = 0;    // first slice not yet handed out
  size_t within_ = 0;  // bytes of it handed out already
  int64_t consumed_ = 0;
};

absl::Status Malformed() {
  return absl::InvalidArgumentError("message is not a well-formed protobuf message");
}

// What a walk over the fields of one message found.
struct Fields {
  ChunkHeader header;
  bool chunk = false;    // any chunk field
  bool control = false;  // any control field
  size_t data_size = 0;
  size_t data_offset = 0;
};

// CodedInputStream would drop the upper bits of a length that needs more than 32.
bool ReadLength(CodedInputStream& input, int* length) {
  uint64_t varint = 0;
  if (!input.ReadVarint64(&varint) || varint > uint64_t{std::numeric_limits<int>::max()}) {
    return false;
  }
  *length = static_cast<int>(varint);
  return true;
}

// Reads one field. False where the bytes are not protobuf.
bool ReadField(uint32_t tag, CodedInputStream& input, Fields& fields) {
  uint64_t varint = 0;
  int size = 0;
  switch (tag) {
    case kTensorTag:
      fields.chunk = true;
      if (!input.ReadVarint64(&varint)) return false;
      fields.header.tensor = static_cast<uint32_t>(varint);
      return true;
    case kOffsetTag:
      fields.chunk = true;
      return input.ReadVarint64(&fields.header.offset);
    case kCrc32cTag:
      fields.chunk = true;
      return input.ReadLittleEndian32(&fields.header.crc32c);
    case kLastTag:
      fields.chunk = true;
      if (!input.ReadVarint64(&varint)) return false;
      fields.header.last = varint != 0;
      return true;
    case kTensorCrc32cTag:
      fields.chunk = true;
      return input.ReadLittleEndian32(&fields.header.tensor_crc32c);
    case kDataTag:
      fields.chunk = true;
      if (!ReadLength(input, &size)) return false;
      fields.data_size = static_cast<size_t>(size);
      fields.data_offset = static_cast<size_t>(input.CurrentPosition());
      return input.Skip(size);
    default:
      if (WireFormatLite::GetTagWireType(tag) != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
        return WireFormatLite::SkipField(&input, tag);
      }
      fields.control |= IsControlField(WireFormatLite::GetTagFieldNumber(tag));
      return ReadLength(input, &size) && input.Skip(size);
  }
}

// Walks the top-level fields. A known number with another wire type is an unknown field.
absl::StatusOr<Fields> WalkFields(const std::vector<grpc::Slice>& slices) {
  SliceInputStream stream(slices);
  CodedInputStream input(&stream);
  Fields fields;
  while (const uint32_t tag = input.ReadTag()) {
    if (WireFormatLite::GetTagFieldNumber(tag) == 0 || !ReadField(tag, input, fields)) {
      return Malformed();
    }
  }
  // ReadTag answers 0 both at the end and for a tag that is broken or zero.
  if (!input.ConsumedEntireMessage()) return Malformed();
  return fields;
}

}  // namespace

grpc::ByteBuffer EncodeChunk(const ChunkHeader& header, const std::byte* data, size_t size,
                             std::shared_ptr<const void> owner) {
  // tensor 6, offset 11, crc32c 5, last 2, tensor_crc32c 5, tag and length of data 6
  std::array<uint8_t, 35> bytes;
  uint8_t* end = bytes.data();
  end = CodedOutputStream::WriteTagToArray(kTensorTag, end);
  end = CodedOutputStream::WriteVarint32ToArray(header.tensor, end);
  if (header.offset != 0) {
    end = CodedOutputStream::WriteTagToArray(kOffsetTag, end);
    end = CodedOutputStream::WriteVarint64ToArray(header.offset, end);
  }
  end = CodedOutputStream::WriteTagToArray(kCrc32cTag, end);
  end = CodedOutputStream::WriteLittleEndian32ToArray(header.crc32c, end);
  if (header.last) {
    end = CodedOutputStream::WriteTagToArray(kLastTag, end);
    end = CodedOutputStream::WriteVarint32ToArray(1, end);
    end = CodedOutputStream::WriteTagToArray(kTensorCrc32cTag, end);
    end = CodedOutputStream::WriteLittleEndian32ToArray(header.tensor_crc32c, end);
  }
  end = CodedOutputStream::WriteTagToArray(kDataTag, end);
  end = CodedOutputStream::WriteVarint32ToArray(static_cast<uint32_t>(size), end);

  using Owner = std::shared_ptr<const void>;
  const std::array<grpc::Slice, 2> slices = {
      grpc::Slice(bytes.data(), static_cast<size_t>(end - bytes.data())),
      grpc::Slice(
          const_cast<std::byte*>(data), size, [](void* kept) { delete static_cast<Owner*>(kept); },
          new Owner(std::move(owner)))};
  return grpc::ByteBuffer(slices.data(), slices.size());
}

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message) {
  const size_t size = message.ByteSizeLong();
  grpc::Slice slice(size);
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

absl::StatusOr<Frame> ParseFrame(grpc::ByteBuffer&& buffer, size_t max_data_bytes) {
  Frame frame;
  grpc::ByteBuffer owned;  // gives the slices back on every way out
  owned.Swap(&buffer);
  if (owned.Length() > size_t{std::numeric_limits<int>::max()}) {
    return absl::InvalidArgumentError(
        absl::StrCat("message has ", owned.Length(), " bytes; must be less than 2^31"));
  }
  if (!owned.Valid() || !owned.Dump(&frame.slices_).ok()) return Malformed();
  absl::StatusOr<Fields> fields = WalkFields(frame.slices_);
  if (!fields.ok()) return fields.status();
  if (fields->chunk && fields->control) {
    return absl::InvalidArgumentError("message carries both chunk and control fields");
  }
  if (!fields->chunk) return frame;
  if (fields->data_size == 0 || fields->data_size > max_data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("data of tensor ", fields->header.tensor, " at offset ", fields->header.offset,
                     " has ", fields->data_size, " bytes; must be in [1, ", max_data_bytes, "]"));
  }
  frame.header_ = fields->header;
  frame.data_size_ = fields->data_size;
  frame.data_offset_ = fields->data_offset;
  return frame;
}

absl::Status Frame::CopyTo(std::byte* dst) const {
  size_t skip = data_offset_;
  size_t left = data_size_;
  uint32_t crc = 0;
  for (const grpc::Slice& slice : slices_) {
    if (left == 0) break;
    if (skip >= slice.size()) {
      skip -= slice.size();
      continue;
    }
    const size_t piece = std::min(slice.size() - skip, left);
    crc = CopyAndCrc32c(dst, slice.begin() + skip, piece, crc);
    dst += piece;
    left -= piece;
    skip = 0;
  }
  if (crc == header_.crc32c) return absl::OkStatus();
  return ChecksumMismatch(header_.tensor, header_.offset,
                          absl::StrCat("chunk of ", data_size_, " bytes"), header_.crc32c, crc);
}

absl::Status Frame::ParseControl(google::protobuf::MessageLite* message) const {
  SliceInputStream stream(slices_);
  if (message->ParseFromZeroCopyStream(&stream)) return absl::OkStatus();
  return Malformed();
}

}  // namespace dynsplit::wire
