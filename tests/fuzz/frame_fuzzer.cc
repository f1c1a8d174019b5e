// SPDX-License-Identifier: Apache-2.0
//
// First byte: how to cut the rest into slices. What is parsed must agree with protobuf's own
// parser.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "dynsplit/v1/compression.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/frame.h"

namespace {

constexpr size_t kMaxDataBytes = 1024;

void Check(bool condition) {
  if (!condition) std::abort();
}

grpc::ByteBuffer Sliced(const uint8_t* data, size_t size, size_t step) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < size; at += step) {
    slices.emplace_back(data + at, std::min(step, size - at));
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t step = size_t{data[0]} + 1;
  auto frame = dynsplit::wire::ParseFrame(Sliced(data + 1, size - 1, step), kMaxDataBytes);
  dynsplit::v1::CompressRequest expected;
  const bool parses = expected.ParseFromArray(data + 1, static_cast<int>(size - 1));
  if (!frame.ok()) return 0;
  if (!frame->is_chunk()) {
    dynsplit::v1::CompressRequest request;
    dynsplit::v1::CompressResponse response;
    Check(frame->ParseControl(&request).ok() == parses);
    (void)frame->ParseControl(&response);
    return 0;
  }
  Check(frame->data_size() <= kMaxDataBytes);
  std::vector<std::byte> out(frame->data_size());
  const bool intact = frame->CopyTo(out.data()).ok();
  // Groups aside, of which this parser is more lenient inside, both agree.
  if (!parses) return 0;
  Check(frame->header().tensor == expected.tensor());
  Check(frame->header().offset == expected.offset());
  Check(frame->header().crc32c == expected.crc32c());
  Check(frame->header().last == expected.last());
  Check(frame->header().tensor_crc32c == expected.tensor_crc32c());
  Check(std::string(reinterpret_cast<const char*>(out.data()), out.size()) == expected.data());
  Check(intact == (dynsplit::wire::Crc32c(out.data(), out.size()) == expected.crc32c()));
  return 0;
}
