// SPDX-License-Identifier: Apache-2.0
//
// Peak memory of both processes of a request of 1 GiB whose caller is slow to take results: input
// and output, and 64 MiB.
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/client.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

constexpr int64_t kSlack = int64_t{64} << 20;
constexpr int32_t kLayers = 32;
constexpr int64_t kTokens = 16384;
constexpr size_t kTensorBytes = size_t{kTokens} * 8 * 64 * 2;  // 16 MiB
#ifdef __SANITIZE_THREAD__
constexpr bool kMeasurable = false;  // its shadow is several times the memory
#else
constexpr bool kMeasurable = true;
#endif
constexpr char kTarget[] = "DYNSPLIT_MEMORY_TEST_TARGET";  // set in the client's process

// Peak resident memory of a process, bytes, since it was reset.
int64_t PeakBytes(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) << 10;
  }
  ADD_FAILURE() << "no peak of " << pid;
  return 0;
}

void ResetPeak(const std::string& pid) { std::ofstream("/proc/" + pid + "/clear_refs") << "5"; }

pid_t Spawn(std::vector<std::string> arguments, const std::vector<std::string>& extra = {}) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::vector<std::string> variables = extra;
  // What is freed must not count: AddressSanitizer keeps 256 MiB of it by default.
  const char* const asan_options = std::getenv("ASAN_OPTIONS");
  variables.push_back(absl::StrCat("ASAN_OPTIONS=", asan_options == nullptr ? "" : asan_options,
                                   ":quarantine_size_mb=8"));
  for (char** variable = environ; *variable != nullptr; ++variable)
    variables.emplace_back(*variable);
  std::vector<char*> envp;
  for (std::string& variable : variables) envp.push_back(variable.data());
  envp.push_back(nullptr);
  pid_t child = 0;
  EXPECT_EQ(posix_spawn(&child, argv[0], nullptr, nullptr, argv.data(), envp.data()), 0);
  return child;
}

CompressJob MakeJob(const std::vector<std::byte>& source, int32_t num_layers) {
  CompressJob job;
  v1::SequenceShape& shape = *job.begin.mutable_shape();
  shape.set_num_layers(num_layers);
  shape.set_num_query_heads(8);
  shape.set_num_kv_heads(8);
  shape.set_head_dim(64);
  shape.set_num_tokens(kTokens);
  job.begin.mutable_policy()->set_preset("streamingllm");
  job.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.25);
  job.begin.set_no_receipt(true);
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    for (const v1::TensorKind kind : {v1::TENSOR_KIND_KEY, v1::TENSOR_KIND_VALUE}) {
      InputTensor& tensor = job.tensors.emplace_back();
      tensor.kind = kind;
      tensor.layer = layer;
      tensor.dtype = v1::DTYPE_BFLOAT16;
      tensor.bytes = {source.data() + (job.tensors.size() - 1) * kTensorBytes, kTensorBytes};
    }
  }
  return job;
}

// The client's process: not a test of its own.
TEST(MemoryBound, DISABLED_Client) {
  const char* const target = std::getenv(kTarget);
  if (target == nullptr) GTEST_SKIP() << "run by MemoryBound.BothProcesses";
  const std::vector<std::byte> source(size_t{2} * kLayers * kTensorBytes, std::byte{0x3c});
  for (const int num_channels : {1, 4}) {
    auto client = Client::Connect(target, {.num_channels = num_channels});
    ASSERT_TRUE(client.ok()) << client.status();
    CompressJob job = MakeJob(source, kLayers);
    ResetPeak("self");
    const int64_t base = PeakBytes("self");
    int64_t output = 0;
    std::vector<LayerOutput> taken;
    job.on_layer = [&](LayerOutput layer) {
      absl::SleepFor(absl::Milliseconds(20));
      for (const OutputTensor& tensor : layer.tensors) {
        output += static_cast<int64_t>(tensor.data.size());
      }
      taken.push_back(std::move(layer));
      return absl::OkStatus();
    };
    const absl::StatusOr<CompressResult> result = (*client)->Compress(job);
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_EQ(result->sent_bytes, static_cast<int64_t>(source.size()));
    const int64_t beyond = PeakBytes("self") - base - output;
    RecordProperty(absl::StrCat("client_beyond_", num_channels), std::to_string(beyond));
    EXPECT_LE(beyond, kSlack) << num_channels << " streams; output " << output;
  }
}

TEST(MemoryBound, BothProcesses) {
  if (!kMeasurable) GTEST_SKIP() << "resident memory is not the program's own";
  std::string directory = (std::filesystem::temp_directory_path() / "dynsplitd-XXXXXX").string();
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  const std::string target = "unix:" + directory + "/d.sock";
  const pid_t server =
      Spawn({DYNSPLITD, "--backend", "cpu", "--listen", "", "--unix-socket", directory + "/d.sock",
             "--metrics-listen", "", "--log-level", "error", "--threads", "2"});
  // Before the first try: a connection that failed waits longer and longer for the next.
  ASSERT_TRUE(Eventually([&] { return std::filesystem::exists(directory + "/d.sock"); }));
  auto client = Client::Connect(target);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE(Eventually([&] { return (*client)->GetServerInfo().ok(); }));
  const std::string pid = std::to_string(server);
  ResetPeak(pid);
  const int64_t base = PeakBytes(pid);

  // What it may reserve: five layers, as many as four streams open, and are computed and sent.
  const std::vector<std::byte> source(size_t{10} * kTensorBytes, std::byte{0x3c});
  const std::string self = std::filesystem::read_symlink("/proc/self/exe");
  const pid_t child =
      Spawn({self, "--gtest_filter=MemoryBound.DISABLED_Client", "--gtest_also_run_disabled_tests"},
            {absl::StrCat(kTarget, "=", target)});
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  const int64_t peak = PeakBytes(pid) - base;
  CompressJob job = MakeJob(source, 5);
  job.begin.set_max_open_layers(3);
  const absl::StatusOr<CompressResult> five = (*client)->Compress(job);
  ASSERT_TRUE(five.ok()) << five.status();
  // Stricter than input and output: the server never holds all layers.
  EXPECT_LE(peak, five->accepted.reserved_bytes() + kSlack);
  RecordProperty("server_peak", std::to_string(peak));
  RecordProperty("server_reserved", std::to_string(five->accepted.reserved_bytes()));
  kill(server, SIGTERM);
  waitpid(server, nullptr, 0);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace dynsplit::e2e
