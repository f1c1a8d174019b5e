// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "proto/wire/status.h"
#include "tests/unit/client/fake_server.h"

namespace dynsplit {
namespace {

using ::testing::HasSubstr;

std::string RandomBytes(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::string bytes(n, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

std::string Text(const OutputTensor& tensor) {
  const absl::Span<const std::byte> bytes = tensor.data.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

class ClientTest : public ::testing::Test {
 protected:
  ClientTest() : client_(Connect({})) {
    for (size_t layer = 0; layer < 3; ++layer) {
      keys_.push_back(RandomBytes(300'000 + layer * 4096 + layer, static_cast<uint32_t>(layer)));
    }
  }

  std::unique_ptr<Client> Connect(ClientOptions options) {
    options.timeout = absl::Seconds(30);
    auto client = Client::Connect(server_.target(), std::move(options));
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  CompressJob Job() const {
    CompressJob job;
    job.begin.set_request_id("test");
    // Given in descending order; sent in ascending.
    for (size_t layer = keys_.size(); layer > 0; --layer) {
      InputTensor& tensor = job.tensors.emplace_back();
      tensor.kind = v1::TENSOR_KIND_KEY;
      tensor.layer = static_cast<int32_t>(layer - 1);
      tensor.dtype = v1::DTYPE_INT8;
      tensor.bytes = AsBytes(keys_[layer - 1]);
    }
    return job;
  }

  absl::Status CompressWith(const FakeFaults& faults) {
    server_.compression().set_faults(faults);
    return client_->Compress(Job()).status();
  }

  FakeServer server_;
  std::unique_ptr<Client> client_;
  std::vector<std::string> keys_;
};

TEST_F(ClientTest, BytesComeBack) {
  const absl::StatusOr<CompressResult> result = client_->Compress(Job());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->accepted.request_id(), "test");
  EXPECT_EQ(result->end.backend(), "fake");
  ASSERT_EQ(result->layers.size(), keys_.size());
  int64_t bytes = 0;
  for (size_t layer = 0; layer < keys_.size(); ++layer) {
    const OutputTensor* pages =
        FindTensor(result->layers[layer].tensors, v1::TENSOR_KIND_KEY_PAGES);
    ASSERT_NE(pages, nullptr);
    EXPECT_EQ(Text(*pages), keys_[layer]);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pages->data.bytes().data()) % AlignedBuffer::kAlignment,
              0u);
    bytes += static_cast<int64_t>(keys_[layer].size());
  }
  EXPECT_EQ(result->sent_bytes, bytes);
  EXPECT_EQ(result->received_bytes, bytes);
}

TEST_F(ClientTest, ServersChunkLimitIsKept) {
  FakeFaults faults;
  faults.max_chunk_bytes = 5000;
  server_.compression().set_faults(faults);
  ASSERT_TRUE(client_->Compress(Job()).ok());
  EXPECT_EQ(server_.compression().largest_chunk(), 5000u);
}

TEST_F(ClientTest, OwnChunkSizeIsKeptBothWays) {
  ClientOptions options;
  options.chunk_bytes = 4096;
  ASSERT_TRUE(Connect(options)->Compress(Job()).ok());
  EXPECT_EQ(server_.compression().largest_chunk(), 4096u);
  EXPECT_EQ(server_.compression().begin().max_chunk_bytes(), 4096);
}

TEST_F(ClientTest, LayerCallbackTakesLayersInOrder) {
  CompressJob job = Job();
  std::vector<int32_t> layers;
  job.on_layer = [&](LayerOutput layer) {
    layers.push_back(layer.result.plan().layer());
    EXPECT_EQ(Text(layer.tensors.at(0)), keys_.at(static_cast<size_t>(layers.back())));
    return absl::OkStatus();
  };
  const absl::StatusOr<CompressResult> result = client_->Compress(job);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(layers, ::testing::ElementsAre(0, 1, 2));
  EXPECT_TRUE(result->layers.empty());
}

TEST_F(ClientTest, LayerCallbackErrorEndsTheCall) {
  CompressJob job = Job();
  int calls = 0;
  job.on_layer = [&](const LayerOutput&) {
    ++calls;
    return absl::ResourceExhaustedError("disk full");
  };
  EXPECT_EQ(client_->Compress(job).status(), absl::ResourceExhaustedError("disk full"));
  EXPECT_EQ(calls, 1);
}

TEST_F(ClientTest, ProgressEndsComplete) {
  CompressJob job = Job();
  Progress last;
  job.on_progress = [&](const Progress& progress) {
    EXPECT_GE(progress.received_bytes, last.received_bytes);
    last = progress;
  };
  ASSERT_TRUE(client_->Compress(job).ok());
  EXPECT_EQ(last.received_layers, 3);
  EXPECT_EQ(last.sent_bytes, last.total_bytes);
}

TEST_F(ClientTest, OwnerIsReleasedInTheEnd) {
  auto owner = std::make_shared<std::string>(RandomBytes(1 << 20, 9));
  CompressJob job = Job();
  job.tensors[0].bytes = AsBytes(*owner);
  const std::weak_ptr<std::string> watch = owner;
  job.owner = std::move(owner);
  ASSERT_TRUE(client_->Compress(job).ok());
  job.owner.reset();
  for (int i = 0; i < 500 && !watch.expired(); ++i) absl::SleepFor(absl::Milliseconds(10));
  EXPECT_TRUE(watch.expired());
}

// Without an owner the memory may be overwritten as soon as the call is over, however it ended.
TEST_F(ClientTest, MemoryIsFreeAfterTheCall) {
  for (int i = 0; i < 20; ++i) {
    auto bytes = std::make_unique<std::string>(RandomBytes(4 << 20, 1));
    CompressJob job = Job();
    job.tensors[0].bytes = AsBytes(*bytes);
    Cancellation cancellation;
    job.cancellation = &cancellation;
    std::thread canceller([&] {
      absl::SleepFor(absl::Microseconds(300 * i));
      cancellation.Cancel();
    });
    const absl::Status status = client_->Compress(job).status();
    bytes.reset();  // address sanitizer would see a late reader
    canceller.join();
    EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
  }
}

TEST_F(ClientTest, CancellationBeforeTheCall) {
  Cancellation cancellation;
  cancellation.Cancel();
  CompressJob job = Job();
  job.cancellation = &cancellation;
  EXPECT_TRUE(absl::IsCancelled(client_->Compress(job).status()));
}

TEST_F(ClientTest, DeadlineHolds) {
  FakeFaults faults;
  faults.never_answer = true;
  server_.compression().set_faults(faults);
  CompressJob job = Job();
  job.timeout = absl::Milliseconds(100);
  EXPECT_TRUE(absl::IsDeadlineExceeded(client_->Compress(job).status()));
}

TEST_F(ClientTest, ServersErrorsArriveWithDetails) {
  wire::RichError error;
  error.code = absl::StatusCode::kInvalidArgument;
  error.message = "begin.shape.num_tokens is 0";
  error.fields = {{"begin.shape.num_tokens", "is 0; must be in [1, 2147483647]"}};
  FakeFaults faults;
  faults.refuse_begin = wire::ToGrpc(error);
  EXPECT_EQ(wire::ReadError(CompressWith(faults)), error);
  faults = {};
  faults.refuse_end = wire::ToGrpc(error);
  EXPECT_EQ(wire::ReadError(CompressWith(faults)), error);
}

TEST_F(ClientTest, CorruptChunkIsDataLoss) {
  FakeFaults faults;
  faults.corrupt_chunk = true;
  const absl::Status status = CompressWith(faults);
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_EQ(wire::ReadError(status).reason, wire::kChecksumMismatch);
}

TEST_F(ClientTest, CorruptTensorChecksumIsDataLoss) {
  FakeFaults faults;
  faults.corrupt_tensor_crc = true;
  const absl::Status status = CompressWith(faults);
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("whole tensor"));
}

TEST_F(ClientTest, HugeTensorIsRefusedBeforeItIsAllocated) {
  FakeFaults faults;
  faults.huge_tensor = true;
  EXPECT_TRUE(absl::IsResourceExhausted(CompressWith(faults)));
}

TEST_F(ClientTest, ProtocolViolationsAreInternal) {
  client_ = Connect({.chunk_bytes = 4096});
  for (bool FakeFaults::*fault :
       {&FakeFaults::skip_bytes, &FakeFaults::forget_accepted, &FakeFaults::forget_end,
        &FakeFaults::layers_descend, &FakeFaults::unknown_tensor, &FakeFaults::early_end}) {
    FakeFaults faults;
    faults.*fault = true;
    const absl::Status status = CompressWith(faults);
    EXPECT_TRUE(absl::IsInternal(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("protocol"));
  }
}

TEST_F(ClientTest, TensorsInRegionsAreNamedAndNotSent) {
  CompressJob job = Job();
  InputTensor& tensor = job.tensors[1];
  tensor.kind = v1::TENSOR_KIND_VALUE;
  tensor.bytes = {static_cast<const std::byte*>(nullptr), 4096};
  tensor.region.emplace().set_name("kv");
  tensor.region->set_offset_bytes(64);
  tensor.region->set_generation(9);
  const absl::StatusOr<CompressResult> result = client_->Compress(job);
  ASSERT_TRUE(result.ok()) << result.status();
  const v1::Begin begin = server_.compression().begin();
  ASSERT_EQ(begin.tensors_size(), 3);
  EXPECT_EQ(begin.tensors(1).byte_size(), 4096);
  EXPECT_EQ(begin.tensors(1).location().region().name(), "kv");
  EXPECT_EQ(begin.tensors(1).location().region().offset_bytes(), 64);
  EXPECT_EQ(begin.tensors(1).location().region().generation(), 9U);
  EXPECT_EQ(server_.compression().tensors().size(), 2U);
  EXPECT_EQ(result->sent_bytes, static_cast<int64_t>(keys_[0].size() + keys_[2].size()));
}

TEST_F(ClientTest, EmptyTensorIsRefusedHere) {
  CompressJob job = Job();
  job.tensors[1].bytes = {};
  EXPECT_TRUE(absl::IsInvalidArgument(client_->Compress(job).status()));
}

TEST_F(ClientTest, CallsSideBySideOverSeveralChannels) {
  const std::unique_ptr<Client> client = Connect({.num_channels = 3});
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 5; ++j) good += client->Compress(Job()).ok() ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 30);
}

TEST_F(ClientTest, HealthIsRead) { EXPECT_TRUE(client_->CheckHealth().ok()); }

TEST_F(ClientTest, MissingServiceIsUnimplemented) {
  EXPECT_TRUE(absl::IsUnimplemented(client_->GetServerInfo().status()));
}

TEST(ClientConnectTest, BadOptionsAreRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect("").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect("x:1", {.chunk_bytes = 4095}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect("x:1", {.num_channels = 0}).status()));
}

TEST(ClientConnectTest, NobodyThere) {
  auto client = Client::Connect("unix:/nonexistent/dynsplit.sock");
  ASSERT_TRUE(client.ok());
  EXPECT_TRUE(absl::IsUnavailable((*client)->CheckHealth()));
}

}  // namespace
}  // namespace dynsplit
