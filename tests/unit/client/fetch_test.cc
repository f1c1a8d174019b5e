// SPDX-License-Identifier: Apache-2.0
//
// Fetches that break and go on: wherever the stream breaks, the whole comes out, nothing complete
// is sent twice, and what changed on the way is found out.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/client.h"
#include "proto/wire/status.h"
#include "tests/unit/client/fake_server.h"

namespace dynsplit {
namespace {

constexpr size_t kChunk = 4096;

std::string RandomBytes(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::string bytes(n, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

std::string Text(const OutputTensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.data.bytes().data()), tensor.data.size()};
}

class FetchTest : public testing::Test {
 protected:
  FetchTest() {
    for (uint32_t layer = 0; layer < 3; ++layer) {
      layers_.push_back({RandomBytes(9000, 2 * layer), RandomBytes(5000, 2 * layer + 1)});
    }
    server_.sessions().set_layers(layers_);
    client_ =
        *Client::Connect(server_.target(), {.timeout = absl::Seconds(30), .chunk_bytes = kChunk});
  }

  absl::StatusOr<CompressResult> Fetch(PartialFetch* partial, int64_t break_after_bytes) {
    server_.sessions().set_break_after_bytes(break_after_bytes);
    CompressJob job;
    job.begin.mutable_target()->set_session_id("s");
    job.partial = partial;
    return client_->FetchSession(job);
  }

  void ExpectWhole(const absl::StatusOr<CompressResult>& result) const {
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_EQ(result->layers.size(), layers_.size());
    for (size_t l = 0; l < layers_.size(); ++l) {
      ASSERT_EQ(result->layers[l].tensors.size(), layers_[l].size());
      for (size_t i = 0; i < layers_[l].size(); ++i) {
        EXPECT_EQ(Text(result->layers[l].tensors[i]), layers_[l][i]) << "layer " << l << "," << i;
      }
    }
  }

  static constexpr int64_t kTotal = 3 * 14000;
  FakeServer server_;
  std::vector<std::vector<std::string>> layers_;
  std::unique_ptr<Client> client_;
};

TEST_F(FetchTest, GoesOnWhereverItBroke) {
  for (int64_t at = 0; at <= kTotal; at += at % 14000 == 0 || at % 14000 == 9000 ? 1 : 999) {
    const int64_t before = server_.sessions().sent_bytes();
    PartialFetch partial;
    const auto broken = Fetch(&partial, at);
    ASSERT_TRUE(absl::IsUnavailable(broken.status())) << broken.status();
    ExpectWhole(Fetch(&partial, -1));
    EXPECT_EQ(server_.sessions().sent_bytes() - before, kTotal) << "broken after " << at;
    EXPECT_EQ(partial.num_layers, 0);
    EXPECT_FALSE(partial.open.has_value());
  }
}

TEST_F(FetchTest, GoesOnAfterManyBreaks) {
  PartialFetch partial;
  int breaks = 0;
  absl::StatusOr<CompressResult> result = Fetch(&partial, 1501);
  for (; !result.ok() && breaks < 100; ++breaks) {
    ASSERT_TRUE(absl::IsUnavailable(result.status())) << result.status();
    result = Fetch(&partial, breaks == 50 ? -1 : 1501);
  }
  ExpectWhole(result);
  EXPECT_EQ(server_.sessions().sent_bytes(), kTotal);
}

TEST_F(FetchTest, CallbackHasEachLayerOnce) {
  PartialFetch partial;
  std::vector<int32_t> delivered;
  CompressJob job;
  job.begin.mutable_target()->set_session_id("s");
  job.partial = &partial;
  job.on_layer = [&](LayerOutput layer) {
    delivered.push_back(layer.result.plan().layer());
    return absl::OkStatus();
  };
  for (const int64_t at : {int64_t{14000}, int64_t{13000}, int64_t{15000}, int64_t{-1}}) {
    server_.sessions().set_break_after_bytes(at);
    EXPECT_EQ(client_->FetchSession(job).ok(), at < 0);
  }
  EXPECT_EQ(delivered, (std::vector<int32_t>{0, 1, 2}));
}

TEST_F(FetchTest, BytesChangedInBetweenAreDataLossThenSentAgain) {
  PartialFetch partial;
  ASSERT_FALSE(Fetch(&partial, 20000).ok());
  ASSERT_TRUE(partial.open.has_value());
  partial.open->tensors[0].data.data()[17] ^= std::byte{1};
  const auto spoilt = Fetch(&partial, -1);
  EXPECT_TRUE(absl::IsDataLoss(spoilt.status())) << spoilt.status();
  ExpectWhole(Fetch(&partial, -1));
}

TEST_F(FetchTest, SessionThatGrewIsFoundOut) {
  PartialFetch partial;
  ASSERT_FALSE(Fetch(&partial, 20000).ok());
  for (auto& layer : layers_) layer[0] += "more";
  server_.sessions().set_layers(layers_);
  const auto grown = Fetch(&partial, -1);
  EXPECT_TRUE(absl::IsFailedPrecondition(grown.status())) << grown.status();
  partial = {};
  ExpectWhole(Fetch(&partial, -1));
}

}  // namespace
}  // namespace dynsplit
