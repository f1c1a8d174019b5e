// SPDX-License-Identifier: Apache-2.0
//
// Regions that go with their owner, however it ends, and memory that is passed as a descriptor. The
// owner that dies is this program again, running OwnerPeer.
#include "client/cpp/region_owner.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "client/cpp/shared_memory.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/sequences.h"

extern char** environ;

namespace dynsplit::e2e {
namespace {

constexpr const char* kPeerTarget = "DYNSPLIT_TEST_OWNER_TARGET";
constexpr size_t kBytes = 64 << 10;

int NumRegions(SessionServer& server) {
  const auto regions = server.client().ListRegions();
  EXPECT_TRUE(regions.ok()) << regions.status();
  return regions.ok() ? regions->regions_size() : -1;
}

v1::RegisterRegionRequest Owned(const SharedMemory& memory, const std::string& name,
                                const std::string& owner) {
  v1::RegisterRegionRequest request = memory.Registration(name, true);
  request.set_owner(owner);
  return request;
}

TEST(RegionOwnerTest, RegionsGoWithTheirOwnerAndOthersStay) {
  SessionServer server;
  const auto memory = *SharedMemory::Create(kBytes);
  auto owner = server.client().AttachRegionOwner();
  auto other = server.client().AttachRegionOwner();
  ASSERT_TRUE(owner.ok() && other.ok()) << owner.status() << other.status();
  EXPECT_TRUE((*owner)->attached());
  EXPECT_EQ((*owner)->token().size(), 16U);
  EXPECT_NE((*owner)->token(), (*other)->token());
  const auto first = server.client().RegisterRegion(Owned(*memory, "a", (*owner)->token()));
  ASSERT_TRUE(first.ok()) << first.status();
  // Renewed by its owner alone.
  const auto again = server.client().RegisterRegion(Owned(*memory, "a", (*owner)->token()));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->generation(), first->generation());
  for (const std::string& stranger : {std::string(), (*other)->token()}) {
    EXPECT_TRUE(absl::IsAlreadyExists(
        server.client().RegisterRegion(Owned(*memory, "a", stranger)).status()));
  }
  ASSERT_TRUE(server.client().RegisterRegion(Owned(*memory, "b", (*other)->token())).ok());
  ASSERT_TRUE(server.client().RegisterRegion(memory->Registration("c", false)).ok());
  const auto regions = server.client().ListRegions();
  ASSERT_EQ(regions->regions_size(), 3);
  EXPECT_TRUE(regions->regions(0).owned());
  EXPECT_FALSE(regions->regions(2).owned());
  EXPECT_EQ(regions->regions(0).kind(), v1::Region::KIND_POSIX_SHM);
  const std::string token = (*owner)->token();
  owner->reset();
  EXPECT_TRUE(Eventually([&] { return NumRegions(server) == 2; }));
  EXPECT_TRUE(
      absl::IsNotFound(server.client().RegisterRegion(Owned(*memory, "a", token)).status()));
  EXPECT_TRUE(absl::IsNotFound(
      server.client().RegisterRegion(Owned(*memory, "a", std::string(16, 'x'))).status()));
}

TEST(RegionOwnerTest, WhoUsesARegionFinishesWithIt) {
  SessionServer server;
  const Sequence sequence = RandomSequence();
  auto memory = *SharedMemory::Create(kBytes);
  auto owner = *server.client().AttachRegionOwner();
  const auto region = server.client().RegisterRegion(Owned(*memory, "kv", owner->token()));
  ASSERT_TRUE(region.ok()) << region.status();
  CompressJob job = OpenJob(sequence, sequence.tokens());
  InputTensor& key = *std::find_if(job.tensors.begin(), job.tensors.end(), [](const auto& tensor) {
    return tensor.kind == v1::TENSOR_KIND_KEY;
  });
  std::memcpy(memory->bytes().data(), key.bytes.data(), key.bytes.size());
  key.region = SliceOf("kv", region->generation(), 0);
  job.on_progress = [&](const Progress&) {
    if (owner == nullptr) return;  // accepted: the request has the region
    owner.reset();
    EXPECT_TRUE(Eventually([&] { return NumRegions(server) == 0; }));
  };
  const absl::StatusOr<CompressResult> opened = server.client().OpenSession(job);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const std::string id = opened->end.session().session_id();
  EXPECT_TRUE(server.Fetch(id).layers[0].keys == sequence.keys[0]);
  job.on_progress = nullptr;
  EXPECT_TRUE(absl::IsNotFound(server.client().OpenSession(job).status()));
  server.Release(id);
  EXPECT_TRUE(server.server().ReturnsToBaseline());
}

// The owner that is killed; disabled so that only the next test runs it.
TEST(OwnerPeer, DISABLED_HoldsARegion) {
  const char* target = std::getenv(kPeerTarget);
  ASSERT_NE(target, nullptr);
  const auto client = *Client::Connect(target);
  const auto memory = *SharedMemory::Create(kBytes);
  const auto owner = client->AttachRegionOwner();
  ASSERT_TRUE(owner.ok()) << owner.status();
  ASSERT_TRUE(client->RegisterRegion(Owned(*memory, "peer", (*owner)->token())).ok());
  shm_unlink(("/" + memory->key()).c_str());  // it will not come to the destructor
  while (true) pause();
}

TEST(RegionOwnerTest, KilledOwnersLeaveNothing) {
  SessionServer server;
  ASSERT_EQ(setenv(kPeerTarget, ("unix:" + server.server().unix_socket()).c_str(), 1), 0);
  std::string program = "/proc/self/exe";
  std::string filter = "--gtest_filter=OwnerPeer.DISABLED_HoldsARegion";
  std::string disabled = "--gtest_also_run_disabled_tests";
  std::string brief = "--gtest_brief=1";
  std::array<char*, 5> arguments = {program.data(), filter.data(), disabled.data(), brief.data(),
                                    nullptr};
  pid_t peer = -1;
  ASSERT_EQ(posix_spawn(&peer, program.c_str(), nullptr, nullptr, arguments.data(), environ), 0);
  unsetenv(kPeerTarget);
  const bool registered = Eventually([&] { return NumRegions(server) == 1; });
  kill(peer, SIGKILL);
  EXPECT_EQ(waitpid(peer, nullptr, 0), peer);
  EXPECT_TRUE(registered);
  EXPECT_TRUE(Eventually([&] { return NumRegions(server) == 0; }));
}

TEST(RegionOwnerTest, OwnersAreCountedAndOffWithTheRegions) {
  ServerConfig config = SessionConfig();
  config.max_regions = 2;
  SessionServer server(config);
  auto a = server.client().AttachRegionOwner();
  const auto b = server.client().AttachRegionOwner();
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(server.client().AttachRegionOwner().status()));
  a->reset();
  EXPECT_TRUE(Eventually([&] { return server.client().AttachRegionOwner().ok(); }));
  SessionServer off(TestConfig());
  EXPECT_TRUE(absl::IsUnimplemented(off.client().AttachRegionOwner().status()));
}

TEST(RegionOwnerTest, OwnersDoNotDelayTheServersEnd) {
  auto server = std::make_unique<SessionServer>();
  const auto client = server->AnotherClient();
  const auto owner = client->AttachRegionOwner();
  ASSERT_TRUE(owner.ok());
  const absl::Time start = absl::Now();
  server->server().server().Shutdown();
  EXPECT_LT(absl::Now() - start, absl::Seconds(3));
  EXPECT_TRUE(Eventually([&] { return !(*owner)->attached(); }));
}

class SealedMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "dynsplit-fd-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    ServerConfig config = SessionConfig();
    config.region_socket = socket();
    server_ = std::make_unique<SessionServer>(config);
  }
  void TearDown() override {
    server_.reset();
    EXPECT_FALSE(std::filesystem::exists(socket()));
    std::filesystem::remove_all(directory_);
  }
  std::string socket() const { return directory_ + "/regions.sock"; }

  std::string directory_;
  std::unique_ptr<SessionServer> server_;
};

TEST_F(SealedMemoryTest, CarriesTensors) {
  const auto memory = SharedMemory::CreateSealed(kBytes, socket());
  ASSERT_TRUE(memory.ok()) << memory.status();
  v1::RegisterRegionRequest request = (*memory)->Registration("kv", true);
  const auto region = server_->client().RegisterRegion(request);
  ASSERT_TRUE(region.ok()) << region.status();
  const auto again = server_->client().RegisterRegion(request);  // renews, without a descriptor
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->generation(), region->generation());
  EXPECT_EQ(server_->client().ListRegions()->regions(0).kind(), v1::Region::KIND_MEMFD);
  request.set_name("other");
  EXPECT_TRUE(absl::IsNotFound(server_->client().RegisterRegion(request).status()))
      << "the descriptor was taken";

  const Sequence sequence = RandomSequence();
  CompressJob job = OpenJob(sequence, sequence.tokens());
  InputTensor& key = *std::find_if(job.tensors.begin(), job.tensors.end(), [](const auto& tensor) {
    return tensor.kind == v1::TENSOR_KIND_KEY;
  });
  std::memcpy((*memory)->bytes().data(), key.bytes.data(), key.bytes.size());
  key.region = SliceOf("kv", region->generation(), 0);
  const auto opened = server_->client().OpenSession(job);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const std::string id = opened->end.session().session_id();
  EXPECT_TRUE(server_->Fetch(id).layers[0].keys == sequence.keys[0]);
  server_->Release(id);
}

TEST_F(SealedMemoryTest, BoundsAndTokens) {
  const auto memory = *SharedMemory::CreateSealed(kBytes, socket());
  v1::RegisterRegionRequest request = memory->Registration("kv", true);
  request.set_byte_size(kBytes + 1);
  EXPECT_TRUE(absl::IsInvalidArgument(server_->client().RegisterRegion(request).status()));
  request.set_byte_size(kBytes);
  request.mutable_memfd()->set_offset_bytes(100);
  EXPECT_TRUE(absl::IsInvalidArgument(server_->client().RegisterRegion(request).status()));
  request.mutable_memfd()->set_offset_bytes(4096);
  EXPECT_TRUE(absl::IsInvalidArgument(server_->client().RegisterRegion(request).status()));
  for (const size_t size : {0U, 15U, 17U}) {
    request.mutable_memfd()->set_token(std::string(size, 't'));
    EXPECT_TRUE(absl::IsInvalidArgument(server_->client().RegisterRegion(request).status()));
  }
  request = memory->Registration("kv", true);  // refused ones have not taken the descriptor
  EXPECT_TRUE(server_->client().RegisterRegion(request).ok());
  EXPECT_TRUE(
      absl::IsUnavailable(SharedMemory::CreateSealed(kBytes, directory_ + "/nobody").status()));
}

}  // namespace
}  // namespace dynsplit::e2e
