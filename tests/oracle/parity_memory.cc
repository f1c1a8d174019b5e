// SPDX-License-Identifier: Apache-2.0
//
// Memory that stays: operations read and write it wherever it lies.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "tests/oracle/device_session.h"
#include "tests/oracle/numbers.h"
#include "tests/oracle/parity_suite.h"
#include "tests/oracle/tolerance.h"

namespace dynsplit::oracle {
namespace {

// Anonymous memory as another process would share it.
class Mapping {
 public:
  explicit Mapping(int64_t size_bytes)
      : size_bytes_(static_cast<size_t>(size_bytes)),
        data_(mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                   0)) {}
  ~Mapping() { munmap(data_, size_bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool ok() const { return data_ != MAP_FAILED; }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  size_t size_bytes_;
  void* data_;
};

int64_t BytesInUse(const Backend& backend, Residence residence) {
  return residence == Residence::kDevice ? backend.device_bytes_in_use()
                                         : backend.host_bytes_in_use();
}

// All tokens of `from`, head-major and without padding, at `to`; quantised types with their scales.
GatherPagesItem HeadMajorCopy(const TensorView& from, std::byte* to, float* scales) {
  const int64_t row_bytes = from.head_dim * DTypeBytes(from.dtype);
  return {.source = from,
          .num_kept = from.num_tokens,
          .page_size = 1,
          .scale_granularity = from.scale_granularity,
          .out_dtype = from.dtype,
          .rotation = {},
          .pages = to,
          .scales = from.scales == nullptr ? nullptr : scales,
          .slot_stride_bytes = row_bytes,
          .head_stride_bytes = from.num_tokens * row_bytes};
}

TensorView HeadMajorView(const TensorView& like, const std::byte* data, const float* scales) {
  TensorView view = DenseView(data, like.dtype, like.num_tokens, like.num_heads, like.head_dim);
  view.token_stride_bytes = like.head_dim * DTypeBytes(like.dtype);
  view.head_stride_bytes = like.num_tokens * view.token_stride_bytes;
  view.scales = like.scales == nullptr ? nullptr : scales;
  view.scale_granularity = like.scale_granularity;
  return view;
}

}  // namespace

void CheckResidentMemory(Backend& backend, const ParityShape& shape) {
  const HostTensor source = HostTensor::Cache(shape, 71);
  const TensorView host = source.view();
  const int64_t row_bytes = shape.head_dim * DTypeBytes(shape.dtype);
  const int64_t num_rows = shape.num_tokens * shape.num_kv_heads;
  std::vector<std::byte> expected(static_cast<size_t>(num_rows * row_bytes));
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    for (int32_t h = 0; h < shape.num_kv_heads; ++h) {
      std::memcpy(expected.data() + (h * shape.num_tokens + t) * row_bytes,
                  ElementAddress(host, t, h, 0), static_cast<size_t>(row_bytes));
    }
  }
  DeviceSession session(backend);
  const TensorView device = session.Upload(source);
  auto scales = session.Poisoned<float>(num_rows);
  auto scales_again = session.Poisoned<float>(num_rows);
  for (Residence residence : {Residence::kDevice, Residence::kHost}) {
    SCOPED_TRACE(residence == Residence::kDevice ? "device" : "host");
    auto resident = backend.AllocateResident(num_rows * row_bytes, residence);
    ASSERT_TRUE(resident.ok()) << resident.status();
    ASSERT_EQ(reinterpret_cast<uintptr_t>(resident->data()) % 256, 0U);
    const GatherPagesItem store = HeadMajorCopy(device, resident->data(), scales.data());
    ASSERT_TRUE(backend.GatherPages({.items = {&store, 1}}, session.stream()).ok());
    // Operations read it where it lies; read back, it is what was written.
    auto again = session.Poisoned<std::byte>(num_rows * row_bytes);
    const TensorView view = HeadMajorView(device, resident->data(), scales.data());
    const GatherPagesItem load = HeadMajorCopy(view, again.data(), scales_again.data());
    ASSERT_TRUE(backend.GatherPages({.items = {&load, 1}}, session.stream()).ok());
    ExpectSameBits(session.Read(std::move(again)), expected, "rows");  // waits
    if (residence == Residence::kHost) {
      EXPECT_EQ(std::memcmp(resident->data(), expected.data(), expected.size()), 0);
    }
  }
}

void CheckCopies(Backend& backend) {
  constexpr int64_t kBytes = (int64_t{5} << 20) + 13;
  DeviceSession session(backend);
  Mapping mapping(kBytes);
  ASSERT_TRUE(mapping.ok());
  std::array<Buffer, 5> buffers = {
      backend.Allocate(kBytes, session.stream()).value(),
      backend.AllocateResident(kBytes, Residence::kDevice).value(),
      backend.AllocateResident(kBytes, Residence::kHost).value(),
      backend.AllocateHost(kBytes).value(),
      backend.RegisterHost(mapping.data(), kBytes).value(),
  };
  Buffer pattern = backend.AllocateHost(kBytes).value();
  const Buffer result = backend.AllocateHost(kBytes).value();
  const auto copy = [&](const Buffer& to, const Buffer& from, int64_t offset, int64_t size) {
    const absl::Status status =
        backend.Copy(to.data() + offset, from.data() + offset, size, session.stream());
    ASSERT_TRUE(status.ok()) << status;
  };
  int round = 0;
  for (size_t from = 0; from < buffers.size(); ++from) {
    for (size_t to = 0; to < buffers.size(); ++to) {
      if (from == to) continue;
      SCOPED_TRACE("from " + std::to_string(from) + " to " + std::to_string(to));
      ++round;
      for (int64_t i = 0; i < kBytes; ++i) {
        pattern.data()[i] = static_cast<std::byte>((i * 2654435761 >> 9) + round);
      }
      copy(buffers[from], pattern, 0, kBytes);
      copy(buffers[to], buffers[from], 0, 7);  // in two parts, the second at an odd address
      copy(buffers[to], buffers[from], 7, kBytes - 7);
      copy(buffers[to], buffers[from], 3, 0);
      copy(result, buffers[to], 0, kBytes);
      ASSERT_TRUE(session.stream().Synchronize().ok());
      ASSERT_EQ(std::memcmp(result.data(), pattern.data(), kBytes), 0);
    }
  }
  ASSERT_EQ(std::memcmp(mapping.data(), buffers[4].data(), 1), 0);
  buffers = {};  // what is registered goes before its mapping does
}

void CheckResidentLimits(Backend& backend) {
  for (Residence residence : {Residence::kDevice, Residence::kHost}) {
    SCOPED_TRACE(residence == Residence::kDevice ? "device" : "host");
    const int64_t before = BytesInUse(backend, residence);
    {
      const auto buffer = backend.AllocateResident(1'000'003, residence);
      ASSERT_TRUE(buffer.ok()) << buffer.status();
      EXPECT_EQ(buffer->size_bytes(), 1'000'003);
      EXPECT_GE(BytesInUse(backend, residence), before + 1'000'003);
    }
    EXPECT_EQ(BytesInUse(backend, residence), before);
    // More than any machine has.
    EXPECT_EQ(backend.AllocateResident(int64_t{1} << 55, residence).status().code(),
              absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(BytesInUse(backend, residence), before);
  }
}

}  // namespace dynsplit::oracle
