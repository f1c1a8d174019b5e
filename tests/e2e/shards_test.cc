// SPDX-License-Identifier: Apache-2.0
//
// One request as several streams: the same results, and one end for all.
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/cpp/client.h"
#include "proto/wire/crc32c.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

// 17 MiB of keys and values: enough for the client to spread them over four streams.
Script LargeScript() {
  return MakeScript({.num_layers = 4, .head_dim = 64, .num_tokens = 8192, .num_queries = 16});
}

CompressJob JobOf(const Script& script) {
  CompressJob job;
  job.begin = script.begin;
  for (const Tensor& tensor : script.tensors) {
    InputTensor& input = job.tensors.emplace_back();
    input.kind = tensor.descriptor.kind();
    if (tensor.descriptor.has_layer()) input.layer = tensor.descriptor.layer();
    input.dtype = tensor.descriptor.dtype();
    input.bytes = {reinterpret_cast<const std::byte*>(tensor.bytes.data()), tensor.bytes.size()};
  }
  return job;
}

void Erase(Script& script, v1::TensorKind kind) {
  std::erase_if(script.tensors,
                [kind](const Tensor& tensor) { return tensor.descriptor.kind() == kind; });
}

void ExpectSame(const CompressResult& a, const CompressResult& b) {
  EXPECT_EQ(a.end.plan().hash(), b.end.plan().hash());
  EXPECT_EQ(a.received_bytes, b.received_bytes);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t layer = 0; layer < a.layers.size(); ++layer) {
    ASSERT_EQ(a.layers[layer].tensors.size(), b.layers[layer].tensors.size());
    for (size_t i = 0; i < a.layers[layer].tensors.size(); ++i) {
      EXPECT_EQ(a.layers[layer].tensors[i].data.bytes(), b.layers[layer].tensors[i].data.bytes())
          << "layer " << layer << ", tensor " << i;
    }
  }
}

class ShardsTest : public testing::Test {
 protected:
  std::unique_ptr<Client> Connect(int num_channels, ClientOptions options = {}) {
    options.num_channels = num_channels;
    auto client = Client::Connect("unix:" + server_.unix_socket(), options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  TestServer server_;
};

TEST_F(ShardsTest, AnyNumberOfStreamsGivesTheSameResult) {
  const Script script = LargeScript();
  const absl::StatusOr<CompressResult> one = Connect(1)->Compress(JobOf(script));
  ASSERT_TRUE(one.ok()) << one.status();
  for (const int num_channels : {2, 4}) {
    for (const int32_t open_layers : {0, 1, 4}) {
      CompressJob job = JobOf(script);
      job.begin.set_max_open_layers(open_layers);
      const absl::StatusOr<CompressResult> several = Connect(num_channels)->Compress(job);
      ASSERT_TRUE(several.ok()) << several.status();
      ExpectSame(*one, *several);
      EXPECT_EQ(several->sent_bytes, one->sent_bytes);
    }
  }
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

TEST_F(ShardsTest, GlobalScopePlanAndSmallResponseChunks) {
  Script script = LargeScript();
  script.begin.mutable_policy()->set_scope(v1::SCOPE_GLOBAL);
  const ClientOptions small = {.chunk_bytes = 4096};
  const absl::StatusOr<CompressResult> one = Connect(1)->Plan(JobOf(script));
  const absl::StatusOr<CompressResult> several = Connect(4, small)->Plan(JobOf(script));
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_TRUE(several.ok()) << several.status();
  ExpectSame(*one, *several);
}

TEST_F(ShardsTest, SessionsOpenAppendAndFetch) {
  Script script = LargeScript();
  Erase(script, v1::TENSOR_KIND_QUERIES);
  script.begin.clear_policy();
  script.begin.mutable_session()->set_reserve_tokens(16384);
  const std::unique_ptr<Client> client = Connect(4);
  const absl::StatusOr<CompressResult> opened = client->OpenSession(JobOf(script));
  ASSERT_TRUE(opened.ok()) << opened.status();
  const std::string id = opened->end.session().session_id();

  Script more = MakeScript(
      {.num_layers = 4, .head_dim = 64, .num_tokens = 8192, .num_queries = 0, .seed = 2});
  more.begin.clear_policy();
  more.begin.mutable_target()->set_session_id(id);
  more.begin.mutable_target()->set_position(8192);
  const absl::StatusOr<CompressResult> appended = client->AppendSession(JobOf(more));
  ASSERT_TRUE(appended.ok()) << appended.status();
  EXPECT_EQ(appended->end.session().shape().num_tokens(), 16384);

  CompressJob fetch;
  fetch.begin.mutable_target()->set_session_id(id);
  const absl::StatusOr<CompressResult> one = Connect(1)->FetchSession(fetch);
  const absl::StatusOr<CompressResult> several = client->FetchSession(fetch);
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_TRUE(several.ok()) << several.status();
  ExpectSame(*one, *several);
  EXPECT_GT(several->received_bytes, int64_t{32} << 20);
}

TEST_F(ShardsTest, ACallbacksErrorEndsAllStreams) {
  const Script script = LargeScript();
  CompressJob job = JobOf(script);
  job.on_layer = [](LayerOutput) { return absl::AbortedError("enough"); };
  EXPECT_TRUE(absl::IsAborted(Connect(4)->Compress(job).status()));
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

TEST_F(ShardsTest, ADeadlineEndsAllStreams) {
  const Script script = LargeScript();
  CompressJob job = JobOf(script);
  job.timeout = absl::Milliseconds(300);
  job.on_layer = [](LayerOutput) {
    absl::SleepFor(absl::Seconds(1));
    return absl::OkStatus();
  };
  EXPECT_TRUE(absl::IsDeadlineExceeded(Connect(4)->Compress(job).status()));
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

// -- by hand --------------------------------------------------------------------------------------

// The streams of one request, each with a connection of its own.
class ByHand {
 public:
  ByHand(const TestServer& server, size_t num_streams) : streams_(num_streams) {
    for (Stream& stream : streams_) {
      stream.stub = v1::Compression::NewStub(server.unix_channel());
      stream.context = std::make_unique<grpc::ClientContext>();
      stream.context->set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
    }
  }

  grpc::ClientContext& context(size_t i) { return *streams_[i].context; }
  CallStream& Open(size_t i) {
    streams_[i].call = streams_[i].stub->Compress(streams_[i].context.get());
    return *streams_[i].call;
  }
  // Opens stream i as that shard; shard 0 with the script's begin.
  void Begin(size_t i, const Script& script, int32_t shard, int32_t num_shards,
             const std::string& id = "shards") {
    v1::CompressRequest message;
    if (shard == 0) message = Messages(script).front();
    message.mutable_begin()->set_request_id(id);
    message.mutable_begin()->set_shard_index(shard);
    message.mutable_begin()->set_num_shards(num_shards);
    Open(i).Write(message);
  }
  void Accepted() {
    v1::CompressResponse response;
    ASSERT_TRUE(streams_[0].call->Read(&response));
    ASSERT_TRUE(response.has_accepted());
  }
  void Raw(size_t i, const v1::CompressRequest& message) { streams_[i].call->Write(message); }
  void Write(size_t i, const Tensor& tensor) { Raw(i, ChunkOf(tensor, 0, tensor.bytes.size())); }
  void Close(size_t i) { streams_[i].call->WritesDone(); }
  void End(size_t i, int32_t num_tensors) {
    v1::CompressRequest message;
    message.mutable_end()->set_num_tensors(num_tensors);
    streams_[i].call->Write(message);
    streams_[i].call->WritesDone();
  }
  // Reads to the end. The number of tensor bytes goes to `bytes`.
  wire::RichError Finish(size_t i, int64_t* bytes = nullptr) {
    for (v1::CompressResponse response; streams_[i].call->Read(&response);) {
      if (bytes != nullptr) *bytes += static_cast<int64_t>(response.data().size());
    }
    streams_[i].status = streams_[i].call->Finish();
    return wire::ReadError(streams_[i].status);
  }
  grpc::StatusCode code(size_t i) const { return streams_[i].status.error_code(); }
  std::string message(size_t i) const { return streams_[i].status.error_message(); }

 private:
  struct Stream {
    std::unique_ptr<v1::Compression::Stub> stub;
    std::unique_ptr<grpc::ClientContext> context;
    std::unique_ptr<CallStream> call;
    grpc::Status status;
  };
  std::vector<Stream> streams_;
};

using Code = grpc::StatusCode;

class ShardsByHandTest : public ShardsTest {
 protected:
  const Script script_ = MakeScript();  // ids; K, V and Q of two layers
};

TEST_F(ShardsByHandTest, LaterShardsMayComeFirst) {
  ByHand request(server_, 3);
  request.Begin(2, script_, 2, 3);
  request.Begin(1, script_, 1, 3);
  absl::SleepFor(absl::Milliseconds(100));
  request.Begin(0, script_, 0, 3);
  request.Accepted();
  request.Write(0, script_.tensors[0]);
  for (const size_t i : {size_t{1}, size_t{4}}) request.Write(0, script_.tensors[i]);
  for (const size_t i : {size_t{2}, size_t{3}, size_t{5}, size_t{6}}) {
    request.Write(1, script_.tensors[i]);
  }
  request.End(2, 0);
  request.End(1, 4);
  request.End(0, 3);
  int64_t bytes = 0;
  for (const size_t i : {0U, 1U, 2U}) {
    request.Finish(i, &bytes);
    EXPECT_EQ(request.code(i), Code::OK) << request.message(i);
  }
  const Reply whole =
      Exchange(*v1::Compression::NewStub(server_.unix_channel()), Call::kCompress, script_);
  int64_t expected = 0;
  for (const auto& [id, tensor] : whole.bytes) expected += static_cast<int64_t>(tensor.size());
  EXPECT_EQ(bytes, expected);
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

// A layer beyond the window waits on its stream until the lower one has come on another.
TEST_F(ShardsByHandTest, EarlyLayersWait) {
  Script script = script_;
  script.begin.set_max_open_layers(1);
  ByHand request(server_, 2);
  request.Begin(0, script, 0, 2);
  request.Begin(1, script, 1, 2);
  request.Accepted();
  for (const size_t i : {4U, 5U, 6U}) request.Write(1, script.tensors[i]);
  absl::SleepFor(absl::Milliseconds(100));
  for (const size_t i : {0U, 1U, 2U, 3U}) request.Write(0, script.tensors[i]);
  request.End(0, 4);
  request.End(1, 3);
  for (const size_t i : {0U, 1U}) {
    request.Finish(i);
    EXPECT_EQ(request.code(i), Code::OK) << request.message(i);
  }
}

TEST_F(ShardsByHandTest, CancellingOneEndsAll) {
  ByHand request(server_, 2);
  request.Begin(0, script_, 0, 2);
  request.Begin(1, script_, 1, 2);
  request.Accepted();
  request.Write(0, script_.tensors[0]);
  request.context(1).TryCancel();
  request.Finish(0);
  EXPECT_EQ(request.code(0), Code::CANCELLED);
  request.Finish(1);
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

TEST_F(ShardsByHandTest, CancellingBeforeAllHaveJoinedLeavesNothing) {
  ByHand request(server_, 3);
  request.Begin(0, script_, 0, 3);
  request.Begin(1, script_, 1, 3);
  ByHand waiting(server_, 1);
  waiting.Begin(0, script_, 1, 2, "nobody");
  absl::SleepFor(absl::Milliseconds(100));
  request.context(0).TryCancel();
  waiting.context(0).TryCancel();
  request.Finish(1);
  EXPECT_EQ(request.code(1), Code::CANCELLED);
  request.Finish(0);
  waiting.Finish(0);
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

// Each case breaks one rule on one of two shards; both end with the same status.
struct ShardFault {
  const char* name;
  Code code;
  const char* subject;
  void (*send)(ByHand& request, const Script& script);
};

class ShardFaultTest : public ShardsByHandTest, public testing::WithParamInterface<ShardFault> {};

TEST_P(ShardFaultTest, EndsBoth) {
  ByHand request(server_, 2);
  request.Begin(0, script_, 0, 2);
  request.Begin(1, script_, 1, 2);
  request.Accepted();
  GetParam().send(request, script_);
  for (const size_t i : {0U, 1U}) {
    const wire::RichError error = request.Finish(i);
    EXPECT_EQ(request.code(i), GetParam().code) << request.message(i);
    EXPECT_NE(request.message(i).find(GetParam().subject), std::string::npos) << request.message(i);
  }
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

INSTANTIATE_TEST_SUITE_P(
    Faults, ShardFaultTest,
    testing::Values(ShardFault{"Checksum", Code::DATA_LOSS, "",
                               [](ByHand& request, const Script& script) {
                                 request.Write(0, script.tensors[0]);
                                 Tensor wrong = script.tensors[1];
                                 v1::CompressRequest chunk = ChunkOf(wrong, 0, wrong.bytes.size());
                                 chunk.set_crc32c(chunk.crc32c() ^ 1);
                                 request.Raw(1, chunk);
                               }},
                    ShardFault{"TensorOnTwoShards", Code::INVALID_ARGUMENT, "comes whole on one",
                               [](ByHand& request, const Script& script) {
                                 const Tensor& key = script.tensors[1];
                                 request.Raw(0, ChunkOf(key, 0, 1000));
                                 absl::SleepFor(absl::Milliseconds(100));
                                 request.Raw(1, ChunkOf(key, 1000, key.bytes.size() - 1000));
                               }},
                    ShardFault{"LayersDescend", Code::INVALID_ARGUMENT, "layers ascend",
                               [](ByHand& request, const Script& script) {
                                 request.Write(1, script.tensors[4]);
                                 request.Write(1, script.tensors[1]);
                               }},
                    ShardFault{"EndCountsWrong", Code::INVALID_ARGUMENT, "end.num_tensors",
                               [](ByHand& request, const Script& script) {
                                 request.Write(1, script.tensors[1]);
                                 request.End(1, 2);
                               }},
                    ShardFault{"TensorsMissing", Code::INVALID_ARGUMENT, "tensors[1]",
                               [](ByHand& request, const Script& script) {
                                 request.Write(0, script.tensors[0]);
                                 request.End(0, 1);
                                 request.End(1, 0);
                               }},
                    ShardFault{"ClosedWithoutEnd", Code::INVALID_ARGUMENT, "end",
                               [](ByHand& request, const Script&) { request.Close(1); }},
                    ShardFault{"ChunkAfterEnd", Code::INVALID_ARGUMENT, "end",
                               [](ByHand& request, const Script& script) {
                                 v1::CompressRequest end;
                                 end.mutable_end()->set_num_tensors(0);
                                 request.Raw(1, end);
                                 request.Write(1, script.tensors[1]);
                               }}),
    [](const auto& each) { return std::string(each.param.name); });

// Who joins wrongly is refused alone.
TEST_F(ShardsByHandTest, WrongJoinersAreRefusedAlone) {
  ByHand request(server_, 2);
  request.Begin(0, script_, 0, 3);
  request.Begin(1, script_, 1, 3);
  ByHand wrong(server_, 3);
  absl::SleepFor(absl::Milliseconds(100));
  wrong.Begin(0, script_, 1, 3);  // again
  wrong.Begin(1, script_, 1, 2);  // of another number
  wrong.Begin(2, script_, 0, 3);  // another request of that id
  wrong.Finish(0);
  wrong.Finish(1);
  wrong.Finish(2);
  EXPECT_EQ(wrong.code(0), Code::INVALID_ARGUMENT);
  EXPECT_EQ(wrong.code(1), Code::INVALID_ARGUMENT);
  EXPECT_EQ(wrong.code(2), Code::ALREADY_EXISTS);
  ByHand last(server_, 1);
  last.Begin(0, script_, 2, 3);
  request.Accepted();  // all three are there
  request.context(0).TryCancel();
  request.Finish(0);
  request.Finish(1);
  last.Finish(0);
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

TEST_F(ShardsByHandTest, WaitingForShardsHasAnEnd) {
  ByHand first(server_, 1);
  first.Begin(0, script_, 0, 2, "alone");
  ByHand later(server_, 1);
  later.Begin(0, script_, 1, 2, "nobody");
  later.Finish(0);
  first.Finish(0);
  EXPECT_EQ(first.code(0), Code::FAILED_PRECONDITION) << first.message(0);
  EXPECT_EQ(later.code(0), Code::NOT_FOUND) << later.message(0);
  EXPECT_TRUE(server_.ReturnsToBaseline());
}

}  // namespace
}  // namespace dynsplit::e2e
