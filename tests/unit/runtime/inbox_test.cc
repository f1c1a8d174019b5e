// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/inbox.h"

#include <gtest/gtest.h>

#include <vector>

#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

RequestTensor Make(uint32_t id, int32_t layer, int64_t byte_size) {
  RequestTensor tensor;
  tensor.id = id;
  tensor.kind = layer < 0 ? TensorKind::kTokenIds : TensorKind::kKey;
  tensor.layer = layer;
  tensor.byte_size = byte_size;
  tensor.field = "tensors[" + std::to_string(id) + "]";
  return tensor;
}

class InboxTest : public testing::Test {
 protected:
  // Token ids and one tensor in each of four layers, 10 bytes each; ids 0, 1, 2, 3, 4.
  std::vector<RequestTensor> tensors_ = {Make(0, -1, 10), Make(1, 0, 10), Make(2, 1, 10),
                                         Make(3, 2, 10), Make(4, 3, 10)};
  Inbox inbox_{tensors_, 4, 2};

  std::string Field(const Chunk& chunk) {
    return GetErrorDetails(inbox_.Check(chunk).status()).subject;
  }
  void Receive(uint32_t id) {
    const Chunk chunk{.tensor = id, .offset = 0, .size = 10, .last = true};
    const absl::StatusOr<size_t> index = inbox_.Check(chunk);
    ASSERT_TRUE(index.ok()) << index.status();
    inbox_.Add(*index, chunk);
  }
};

TEST_F(InboxTest, TakesAscendingGaplessChunks) {
  for (uint64_t offset = 0; offset < 10; offset += 2) {
    const Chunk chunk{.tensor = 0, .offset = offset, .size = 2, .last = offset == 8};
    ASSERT_TRUE(inbox_.Check(chunk).ok());
    inbox_.Add(0, chunk);
    EXPECT_EQ(inbox_.sequence_complete(), offset == 8);
  }
}

TEST_F(InboxTest, RefusesWhatDoesNotContinue) {
  EXPECT_EQ(Field({.tensor = 9, .offset = 0, .size = 10, .last = true}), "tensor");
  EXPECT_EQ(Field({.tensor = 0, .offset = 1, .size = 9, .last = true}), "offset");
  EXPECT_EQ(Field({.tensor = 0, .offset = 0, .size = 11, .last = true}), "data");
  EXPECT_EQ(Field({.tensor = 0, .offset = 0, .size = UINT64_MAX, .last = true}), "data");
  EXPECT_EQ(Field({.tensor = 0, .offset = 0, .size = 10, .last = false}), "last");
  EXPECT_EQ(Field({.tensor = 0, .offset = 0, .size = 9, .last = true}), "last");
  Receive(0);
  EXPECT_EQ(Field({.tensor = 0, .offset = 10, .size = 1, .last = true}), "tensor");
}

TEST_F(InboxTest, TheWindowMovesWithTheLowestIncompleteLayer) {
  Receive(2);  // layer 1 before layer 0, within the window
  EXPECT_EQ(Field({.tensor = 3, .offset = 0, .size = 10, .last = true}), "max_open_layers");
  Receive(1);
  EXPECT_EQ(inbox_.lowest_incomplete_layer(), 2);
  // Without the sequence's tensors nothing can leave: the window stays at the beginning.
  EXPECT_EQ(Field({.tensor = 3, .offset = 0, .size = 10, .last = true}), "max_open_layers");
  Receive(0);
  Receive(4);
  Receive(3);
  EXPECT_TRUE(inbox_.all_complete());
  EXPECT_TRUE(inbox_.End(0, 5).ok());
}

TEST_F(InboxTest, EndNamesWhatIsMissing) {
  Receive(0);
  Receive(1);
  EXPECT_EQ(GetErrorDetails(inbox_.End(0, 4)).subject, "end.num_tensors");
  EXPECT_EQ(GetErrorDetails(inbox_.End(0, 5)).subject, "tensors[2]");
}

TEST(InboxEdgeTest, LayersWithoutTensorsAreComplete) {
  const std::vector<RequestTensor> none;
  Inbox inbox(none, 3, 1);
  EXPECT_TRUE(inbox.all_complete());
  EXPECT_TRUE(inbox.End(0, 0).ok());
}

class ShardedInboxTest : public InboxTest {
 protected:
  // Places and counts a whole tensor. False where it is early.
  bool Bring(uint32_t id, int32_t shard) {
    const Chunk chunk{.tensor = id, .offset = 0, .size = 10, .last = true, .shard = shard};
    const absl::StatusOr<size_t> index = sharded_.Check(chunk);
    EXPECT_TRUE(index.ok()) << index.status();
    if (!index.ok() || sharded_.Early(*index)) return false;
    sharded_.Claim(*index, chunk);
    sharded_.Add(*index, chunk);
    return true;
  }
  std::string ShardField(const Chunk& chunk) {
    return GetErrorDetails(sharded_.Check(chunk).status()).subject;
  }
  Inbox sharded_{tensors_, 4, 2, 2};
};

TEST_F(ShardedInboxTest, ChunksBeyondTheWindowAreEarly) {
  EXPECT_TRUE(Bring(2, 1));
  EXPECT_FALSE(Bring(3, 1));
  EXPECT_TRUE(Bring(0, 0));
  EXPECT_FALSE(Bring(3, 1));
  EXPECT_TRUE(Bring(1, 0));
  EXPECT_TRUE(Bring(3, 1));
  EXPECT_TRUE(Bring(4, 0));
  EXPECT_TRUE(sharded_.End(0, 3).ok());
  EXPECT_FALSE(sharded_.all_ended());
  EXPECT_TRUE(sharded_.End(1, 2).ok());
  EXPECT_TRUE(sharded_.all_ended());
}

TEST_F(ShardedInboxTest, ATensorStaysOnItsShardEvenBeforeItsFirstBytesAreThere) {
  const Chunk first{.tensor = 1, .offset = 0, .size = 4, .last = false, .shard = 1};
  sharded_.Claim(1, first);
  EXPECT_EQ(ShardField({.tensor = 1, .offset = 0, .size = 4, .last = false, .shard = 0}), "tensor");
  EXPECT_EQ(ShardField(first), "");
}

TEST_F(ShardedInboxTest, LayersAscendOnAShard) {
  EXPECT_TRUE(Bring(2, 1));
  EXPECT_EQ(ShardField({.tensor = 1, .offset = 0, .size = 10, .last = true, .shard = 1}), "tensor");
  EXPECT_EQ(ShardField({.tensor = 0, .offset = 0, .size = 10, .last = true, .shard = 1}), "tensor");
  EXPECT_EQ(ShardField({.tensor = 1, .offset = 0, .size = 10, .last = true, .shard = 0}), "");
}

TEST_F(ShardedInboxTest, EndsCountWhatTheirShardBrought) {
  EXPECT_TRUE(Bring(0, 0));
  EXPECT_EQ(GetErrorDetails(sharded_.End(0, 5)).subject, "end.num_tensors");
  EXPECT_TRUE(sharded_.End(0, 1).ok());
  EXPECT_EQ(GetErrorDetails(sharded_.End(1, 0)).subject, "tensors[1]");
}

}  // namespace
}  // namespace dynsplit
