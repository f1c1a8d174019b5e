// SPDX-License-Identifier: Apache-2.0
//
// A server of several devices: shares of the CPU, some of which break.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dynsplit/v1/info.grpc.pb.h"
#include "dynsplit/v1/memory.grpc.pb.h"
#include "server/cpu/cpu_backend.h"
#include "tests/e2e/sequences.h"
#include "tests/unit/runtime/hooked_backend.h"

namespace dynsplit::e2e {
namespace {

constexpr int kNumDevices = 2;
constexpr size_t kUuidBytes = 16;

class DevicesTest : public testing::Test {
 protected:
  DevicesTest() {
    std::vector<std::unique_ptr<Backend>> backends;
    for (int i = 0; i < kNumDevices; ++i) {
      auto backend =
          std::make_unique<HookedBackend>(*CreateCpuBackend({.num_threads = 1}),
                                          std::string(kUuidBytes, static_cast<char>('a' + i)));
      devices_.push_back(backend.get());
      backends.push_back(std::move(backend));
    }
    ServerConfig config = SessionConfig();
    config.regions = "all";
    server_ = std::make_unique<SessionServer>(config, std::move(backends));
    compression_ = v1::Compression::NewStub(server_->server().unix_channel());
  }

  // The next operation of that name breaks the device.
  void BreakAt(int device, std::string_view operation) {
    devices_[static_cast<size_t>(device)]->SetHook([operation](std::string_view now) {
      return now == operation ? DeviceFault() : absl::OkStatus();
    });
  }
  // Counts a device's operations from now on.
  void Count(int device, std::atomic<int>& operations) {
    devices_[static_cast<size_t>(device)]->SetHook([&operations](std::string_view) {
      ++operations;
      return absl::OkStatus();
    });
  }
  int64_t UsedBytes(int device) const {
    return devices_[static_cast<size_t>(device)]->device_bytes_in_use();
  }

  v1::ServerInfo Info() {
    const auto stub = v1::Info::NewStub(server_->server().unix_channel());
    grpc::ClientContext context;
    v1::ServerInfo info;
    EXPECT_TRUE(stub->GetServerInfo(&context, {}, &info).ok());
    return info;
  }

  absl::StatusOr<v1::SelectResponse> Select(const v1::SequenceStep& step) {
    return server_->client().Select(Request({step}));
  }

  std::vector<HookedBackend*> devices_;
  std::unique_ptr<SessionServer> server_;
  std::unique_ptr<v1::Compression::Stub> compression_;
};

TEST_F(DevicesTest, SessionsSpreadAndStayAndAnswerAsOnOneDevice) {
  SessionServer one;
  std::vector<Sequence> sequences;
  std::vector<std::string> ids;
  for (int i = 0; i < 4; ++i) {
    sequences.push_back(
        RandomSequence({.num_tokens = 96 + 5 * i, .seed = static_cast<uint64_t>(i + 1)}));
    ids.push_back(server_->OpenAll(sequences.back()));
  }
  EXPECT_GT(UsedBytes(0), 0);
  EXPECT_GT(UsedBytes(1), 0);
  const int64_t used[] = {UsedBytes(0), UsedBytes(1)};
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::string alone = one.OpenAll(sequences[i]);
    EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequences[i], ids[i]))) ==
                AnswerOf(one.Select(StepOf(sequences[i], alone))));
    EXPECT_TRUE(server_->Fetch(ids[i]).layers[1].keys == one.Fetch(alone).layers[1].keys);
  }
  EXPECT_EQ(UsedBytes(0), used[0]);
  EXPECT_EQ(UsedBytes(1), used[1]);
  const v1::ServerInfo info = Info();
  ASSERT_EQ(info.devices_size(), kNumDevices);
  std::set<std::string> names;
  for (int i = 0; i < kNumDevices; ++i) {
    const v1::DeviceInfo& device = info.devices(i);
    names.insert(device.name());
    EXPECT_TRUE(device.healthy());
    EXPECT_EQ(device.used_bytes(), used[i]);
    EXPECT_EQ(device.uuid(), std::string(kUuidBytes, static_cast<char>('a' + i)));
    EXPECT_GT(device.memory_bytes(), 0);
  }
  EXPECT_EQ(names.size(), size_t{kNumDevices});
  for (const std::string& id : ids) server_->Release(id);
  EXPECT_TRUE(server_->server().ReturnsToBaseline());
}

TEST_F(DevicesTest, OneSelectReadsSessionsOfAllDevices) {
  std::vector<Sequence> sequences;
  std::vector<v1::SequenceStep> steps;
  std::vector<std::string> alone;
  std::vector<std::string> ids;
  for (int i = 0; i < 5; ++i) {
    sequences.push_back(RandomSequence({.seed = static_cast<uint64_t>(i + 1)}));
    ids.push_back(server_->OpenAll(sequences.back()));
    steps.push_back(StepOf(sequences.back(), ids.back()));
    alone.push_back(AnswerOf(server_->Select(steps.back())));
  }
  std::atomic<int> first = 0, second = 0;
  Count(0, first);
  Count(1, second);
  const absl::StatusOr<v1::SelectResponse> together = server_->client().Select(Request(steps));
  ASSERT_TRUE(together.ok()) << together.status();
  EXPECT_GT(first, 0);
  EXPECT_GT(second, 0);
  ASSERT_EQ(together->sequences_size(), 5);
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(AnswerOf(together->sequences(i)) == alone[static_cast<size_t>(i)]) << i;
  }
  steps[3].set_tokens_per_head(1 << 20);
  const absl::Status refused = server_->client().Select(Request(steps)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
}

TEST_F(DevicesTest, AFaultTakesOneDeviceAndItsSessions) {
  const Sequence sequence = RandomSequence();
  const std::string lost = server_->OpenAll(sequence);   // on the first device
  const std::string stays = server_->OpenAll(sequence);  // on the second
  const std::string answer = AnswerOf(server_->Select(StepOf(sequence, stays)));
  BreakAt(0, "ScoreBlocks");
  absl::Status status = Select(StepOf(sequence, lost)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_TRUE(absl::StrContains(status.ToString(), "injected")) << status;
  status = Select(StepOf(sequence, lost)).status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence, stays))) == answer);
  EXPECT_TRUE(Eventually([&] { return server_->server().server().live().sessions_lost == 1; }));
  EXPECT_TRUE(absl::IsDataLoss(Select(StepOf(sequence, lost)).status())) << "also once forgotten";
  // New work goes to the device that is left, although the other has as much free memory.
  for (int i = 0; i < 4; ++i) {
    const Reply reply = Exchange(*compression_, Call::kCompress, MakeScript());
    EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  }
  const std::string another = server_->OpenAll(sequence);
  EXPECT_TRUE(AnswerOf(server_->Select(StepOf(sequence, another))) == answer);
  EXPECT_EQ(server_->server().Http("/readyz"), "ok\n");
  EXPECT_TRUE(server_->server().server().device_status().ok());
  const v1::ServerInfo info = Info();
  EXPECT_FALSE(info.devices(0).healthy());
  EXPECT_TRUE(info.devices(1).healthy());
  const std::string metrics = server_->server().Http("/metrics");
  for (int i = 0; i < kNumDevices; ++i) {
    const std::string series =
        absl::StrCat("dynsplit_device_healthy{device=\"", info.devices(i).name(), "\"} ", i);
    EXPECT_TRUE(absl::StrContains(metrics, series)) << series;
  }

  BreakAt(1, "ScoreBlocks");
  EXPECT_FALSE(Select(StepOf(sequence, stays)).ok());
  EXPECT_EQ(server_->server().Http("/readyz"), "<503>");
  EXPECT_FALSE(server_->server().server().device_status().ok());
  EXPECT_TRUE(absl::IsDataLoss(Select(StepOf(sequence, another)).status()));
  EXPECT_FALSE(Exchange(*compression_, Call::kCompress, MakeScript()).status.ok());
}

TEST_F(DevicesTest, RequestsUnderWayFailWithTheirDeviceAlone) {
  // Without a faulty device every request succeeds, so that each failure is the fault's.
  BreakAt(0, "GatherPages");
  std::atomic<int> num_faults = 0, num_ok = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      for (int request = 0; request < 6; ++request) {
        const Reply reply = Exchange(*compression_, Call::kCompress, MakeScript());
        if (reply.status.ok()) {
          ++num_ok;
        } else {
          EXPECT_EQ(reply.status.error_code(), grpc::INTERNAL) << reply.status.error_message();
          EXPECT_EQ(reply.error.reason, "DEVICE_FAULT");
          ++num_faults;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(num_faults, 0);
  EXPECT_GT(num_ok, 8 * 5 - 1) << "only those that were on the device";
  EXPECT_EQ(server_->server().Http("/readyz"), "ok\n");
  EXPECT_TRUE(Exchange(*compression_, Call::kCompress, MakeScript()).status.ok());
}

class DeviceMemoryTest : public DevicesTest {
 protected:
  v1::RegionSlice Register(const std::string& name, int device, int64_t bytes) {
    const auto memory = v1::Memory::NewStub(server_->server().unix_channel());
    v1::RegisterRegionRequest request;
    request.set_name(name);
    request.set_byte_size(bytes);
    request.set_writable(true);
    request.mutable_cuda_ipc()->set_handle(std::string(64, 'h'));
    request.mutable_cuda_ipc()->set_device_uuid(
        std::string(kUuidBytes, static_cast<char>('a' + device)));
    grpc::ClientContext context;
    v1::RegisterRegionResponse response;
    const grpc::Status status = memory->Register(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    v1::RegionSlice slice;
    slice.set_name(name);
    slice.set_generation(response.generation());
    return slice;
  }
};

TEST_F(DeviceMemoryTest, RequestsRunWhereTheirMemoryIs) {
  Script script = MakeScript();
  Tensor& keys = Find(script, v1::TENSOR_KIND_KEY, 0);
  Tensor& values = Find(script, v1::TENSOR_KIND_VALUE, 0);
  const auto bytes = static_cast<int64_t>(keys.bytes.size());
  for (int device = 0; device < kNumDevices; ++device) {
    std::atomic<int> operations[kNumDevices] = {0, 0};
    Count(0, operations[0]);
    Count(1, operations[1]);
    Script located = script;
    for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_VALUE}) {
      *Find(located, kind, 0).descriptor.mutable_location()->mutable_region() =
          Register(absl::StrCat("r", device, kind), device, bytes);
      Find(located, kind, 0).bytes.clear();
    }
    const Reply reply = Exchange(*compression_, Call::kCompress, located);
    EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
    EXPECT_GT(operations[device], 0);
    EXPECT_EQ(operations[1 - device], 0);
  }
  *keys.descriptor.mutable_location()->mutable_region() = Register("here", 0, bytes);
  *values.descriptor.mutable_location()->mutable_region() = Register("there", 1, bytes);
  keys.bytes.clear();
  values.bytes.clear();
  const Reply torn = Exchange(*compression_, Call::kCompress, script);
  EXPECT_EQ(torn.status.error_code(), grpc::INVALID_ARGUMENT) << torn.status.error_message();
  devices_[0]->SetHook({});
  devices_[1]->SetHook({});
}

TEST_F(DeviceMemoryTest, SelectRefusesMemoryOfAnotherDevice) {
  const Sequence sequence = RandomSequence();
  const std::string id = server_->OpenAll(sequence);  // on the first device
  v1::SequenceStep step = StepOf(sequence, id);
  *step.mutable_token_region() = Register("there", 1, 1 << 20);
  const absl::Status refused = Select(step).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  *step.mutable_token_region() = Register("here", 0, 1 << 20);
  const absl::Status taken = Select(step).status();
  EXPECT_TRUE(taken.ok()) << taken;
}

}  // namespace
}  // namespace dynsplit::e2e
