// SPDX-License-Identifier: Apache-2.0
//
// What the caches of device and pinned memory promise: no call of the driver once they are warm,
// the order of streams, and giving back. And the clock of marks.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/cuda_backend.h"
#include "cuda/device_memory.h"
#include "server/pipeline/compress.h"
#include "tests/gpu/gpu.h"
#include "tests/oracle/random_tensors.h"
#include "tests/oracle/shapes.h"

namespace dynsplit {
namespace {

using Clock = Stream::Clock;

constexpr int64_t kMiB = int64_t{1} << 20;

std::unique_ptr<Backend> MakeBackend(const CudaOptions& options = {}) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend(options);
  EXPECT_TRUE(backend.ok()) << backend.status();
  return backend.ok() ? *std::move(backend) : nullptr;
}

// A layer as a request has it: staged in pinned memory, copied, checked, compressed, copied back.
class LayerRound {
 public:
  explicit LayerRound(Backend& backend) : backend_(backend) {
    spec_.shape = {.num_layers = 1,
                   .num_query_heads = kHeads,
                   .num_kv_heads = kHeads,
                   .num_tokens = kTokens,
                   .head_dim = kHeadDim};
    spec_.policy = FindPreset("snapkv").value()->policy;
    spec_.policy.budget.kept_ratio = 0.25;
    spec_.supply.num_window_queries = kWindow;
    spec_.key_dtype = spec_.value_dtype = DType::kFloat32;
  }

  void Run(Stream& stream, const std::vector<float>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(float));
    ASSERT_EQ(bytes, (2 * kTokens + kWindow) * kRowBytes);
    Buffer stage = backend_.AllocateHost(bytes).value();
    std::memcpy(stage.data(), values.data(), static_cast<size_t>(bytes));
    const auto context =
        PrepareSequence(spec_, std::span<const int32_t>(), nullptr, backend_, stream).value();
    ASSERT_TRUE(stream.Synchronize().ok());
    StageTimer timer(stream);
    const Buffer device = backend_.ToDevice(stage, stream).value();
    timer.End(LayerStage::kHostToDevice);
    LayerTensors tensors;
    tensors.keys = DenseView(device.data(), DType::kFloat32, kTokens, kHeads, kHeadDim);
    tensors.values =
        DenseView(device.data() + kTokens * kRowBytes, DType::kFloat32, kTokens, kHeads, kHeadDim);
    tensors.queries = DenseView(device.data() + 2 * kTokens * kRowBytes, DType::kFloat32, kWindow,
                                kHeads, kHeadDim);
    const FiniteCheck finite = EnqueueFiniteCheck({&tensors, 1}, backend_, stream).value();
    timer.End(LayerStage::kCheck);
    LayerResult result = EnqueueLayer(*context, tensors, true, backend_, timer).value();
    const Buffer keys = backend_.ToHost(std::move(result.pages.key_pages), stream).value();
    const Buffer pages = backend_.ToHost(std::move(result.pages.value_pages), stream).value();
    timer.End(LayerStage::kDeviceToHost);
    ASSERT_TRUE(stream.Synchronize().ok());
    ASSERT_TRUE(finite.Verdict().ok());
    ReadLayer(result);
    kept_ = result.decision.plan.kept;
    mass_ = result.receipt.mass_mean;
    spans_ = timer.Take();
    // The pages hold the rows of the kept tokens.
    ASSERT_FALSE(kept_.empty());
    const std::byte* last = stage.data() + (kTokens + kept_.back()) * kRowBytes;
    const int64_t slot = result.decision.plan.num_kept - 1;
    if (result.decision.plan.groups == 1) {
      EXPECT_EQ(std::memcmp(pages.data() + slot * kRowBytes, last, kRowBytes), 0);
    }
  }

  static std::vector<float> Values(uint64_t seed) {
    oracle::Random random(seed);
    std::vector<float> values(static_cast<size_t>((2 * kTokens + kWindow) * kRowBytes / 4));
    for (float& value : values) value = random.Normal();
    return values;
  }
  const std::vector<int32_t>& kept() const { return kept_; }
  double mass() const { return mass_; }
  const std::vector<StageSpan>& spans() const { return spans_; }

 private:
  static constexpr int64_t kTokens = 3000;
  static constexpr int64_t kWindow = 32;
  static constexpr int32_t kHeads = 2;
  static constexpr int32_t kHeadDim = 64;
  static constexpr int64_t kRowBytes = int64_t{4} * kHeads * kHeadDim;

  Backend& backend_;
  SequenceSpec spec_;
  std::vector<int32_t> kept_;
  double mass_ = 0;
  std::vector<StageSpan> spans_;
};

TEST(CudaMemoryTest, ASecondEqualLayerMakesTheDriverAllocateNothing) {
  const auto backend = MakeBackend();
  ASSERT_NE(backend, nullptr);
  const auto stream = backend->CreateStream().value();
  LayerRound round(*backend);
  const std::vector<float> first = LayerRound::Values(1);
  const std::vector<float> second = LayerRound::Values(2);
  round.Run(*stream, first);
  const std::vector<int32_t> kept = round.kept();
  const double mass = round.mass();
  const DriverAllocations before = CountDriverAllocations();
  EXPECT_GT(before.device, 0);
  EXPECT_GT(before.pinned, 0);
  for (int i = 0; i < 3; ++i) {
    round.Run(*stream, second);
    EXPECT_NE(round.kept(), kept);
    round.Run(*stream, first);
    // Memory that others used before holds nothing that matters.
    EXPECT_EQ(round.kept(), kept);
    EXPECT_EQ(round.mass(), mass);
  }
  const DriverAllocations after = CountDriverAllocations();
  EXPECT_EQ(after.device, before.device);
  EXPECT_EQ(after.pinned, before.pinned);
  EXPECT_EQ(backend->device_bytes_in_use(), 0);
  EXPECT_EQ(backend->host_bytes_in_use(), 0);
}

TEST(CudaMemoryTest, StagesAreTimedInOrderOnTheHostsClock) {
  const auto backend = MakeBackend();
  ASSERT_NE(backend, nullptr);
  const auto stream = backend->CreateStream().value();
  LayerRound round(*backend);
  const std::vector<float> values = LayerRound::Values(1);
  constexpr auto kTolerance = std::chrono::milliseconds(1);  // of the calibration
  // The second one after the clocks are to be set anew.
  for (const auto pause : {std::chrono::milliseconds(0), std::chrono::milliseconds(4500)}) {
    std::this_thread::sleep_for(pause);
    const Clock::time_point begin = Clock::now();
    round.Run(*stream, values);
    const Clock::time_point end = Clock::now();
    ASSERT_EQ(round.spans().size(), 7U);
    Clock::time_point last = begin - kTolerance;
    for (const StageSpan& span : round.spans()) {
      EXPECT_GE(span.begin, last) << StageName(span.stage);
      EXPECT_GT(span.end, span.begin) << StageName(span.stage);
      last = span.end;
    }
    EXPECT_LE(last, end + kTolerance);
  }
}

class DevicePoolTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NE(Gpu(), nullptr);
    pool_ = DevicePool::Create(0, 64 * kMiB).value();
    first_ = StreamHandle::Create(0).value();
    second_ = StreamHandle::Create(0).value();
    pool_->Attach(first_);
    pool_->Attach(second_);
  }
  void TearDown() override {
    pool_->Detach(first_);
    pool_->Detach(second_);
    EXPECT_EQ(pool_->bytes_kept(), 0);
    EXPECT_EQ(pool_->bytes_in_use(), 0);
  }

  std::shared_ptr<DevicePool> pool_;
  std::shared_ptr<StreamHandle> first_, second_;
};

TEST_F(DevicePoolTest, ABlockIsTakenAgainByItsOwnStreamOnly) {
  Buffer buffer = pool_->Allocate(3 * kMiB, first_).value();
  std::byte* const data = buffer.data();
  buffer.Reset();
  EXPECT_EQ(pool_->bytes_in_use(), 0);
  EXPECT_EQ(pool_->bytes_kept(), 3 * kMiB);
  const Buffer other = pool_->Allocate(3 * kMiB, second_).value();
  EXPECT_NE(other.data(), data);
  const Buffer much_smaller = pool_->Allocate(2 * kMiB, first_).value();
  EXPECT_NE(much_smaller.data(), data);
  const Buffer again = pool_->Allocate(3 * kMiB - 100, first_).value();
  EXPECT_EQ(again.data(), data);
  EXPECT_EQ(again.size_bytes(), 3 * kMiB - 100);
  EXPECT_EQ(pool_->bytes_kept(), 0);
  EXPECT_EQ(pool_->bytes_in_use(), 8 * kMiB - 100);
}

TEST_F(DevicePoolTest, TheCapIsOnLiveBytesAndTakesBackWhatIsKept) {
  Buffer buffer = pool_->Allocate(60 * kMiB, first_).value();
  EXPECT_TRUE(absl::IsResourceExhausted(pool_->Allocate(5 * kMiB, second_).status()));
  buffer.Reset();
  EXPECT_EQ(pool_->bytes_kept(), 60 * kMiB);
  buffer = pool_->Allocate(62 * kMiB, second_).value();
  EXPECT_LE(pool_->bytes_kept(), 2 * kMiB);
}

TEST_F(DevicePoolTest, WhatAnotherStreamUsedLastIsKeptForThatOne) {
  Buffer buffer = pool_->Allocate(kMiB, first_).value();
  std::byte* const data = buffer.data();
  pool_->FreeOn(buffer, second_);
  buffer.Reset();
  EXPECT_NE(pool_->Allocate(kMiB, first_).value().data(), data);
  EXPECT_EQ(pool_->Allocate(kMiB, second_).value().data(), data);
}

TEST_F(DevicePoolTest, BuffersMayOutliveTheirStream) {
  Buffer buffer = pool_->Allocate(kMiB, first_).value();
  pool_->Detach(first_);
  buffer.Reset();
  EXPECT_EQ(pool_->bytes_kept(), 0);
  EXPECT_EQ(pool_->bytes_in_use(), 0);
}

}  // namespace
}  // namespace dynsplit
