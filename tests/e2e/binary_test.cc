// SPDX-License-Identifier: Apache-2.0
//
// dynsplitd as a process: options, signals, socket files.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "tests/e2e/harness.h"

namespace dynsplit::e2e {
namespace {

class BinaryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "dynsplitd-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    socket_ = directory_ + "/d.sock";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // Starts dynsplitd; its output goes to Output().
  pid_t Start(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), DYNSPLITD);
    const std::string output = directory_ + "/output";
    const pid_t child = fork();
    if (child != 0) return child;
    if (freopen(output.c_str(), "w", stdout) == nullptr || dup2(1, 2) < 0) _exit(99);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    execv(DYNSPLITD, argv.data());
    _exit(98);
  }
  static int Wait(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  int RunToEnd(std::vector<std::string> arguments) { return Wait(Start(std::move(arguments))); }
  std::string Output() const {
    std::ostringstream text;
    text << std::ifstream(directory_ + "/output").rdbuf();
    return text.str();
  }
  bool Serving() const {
    for (int i = 0; i < 1000; ++i) {
      if (absl::StrContains(Output(), "\"serving\"")) return true;
      absl::SleepFor(absl::Milliseconds(10));
    }
    return false;
  }
  std::vector<std::string> ServeArguments() const {
    return {"--listen=127.0.0.1:0",
            "--metrics-listen=127.0.0.1:0",
            "--unix-socket=" + socket_,
            "--backend=cpu",
            "--threads=2",
            "--default-profile=smollm2_table7"};
  }

  std::string directory_;
  std::string socket_;
};

TEST_F(BinaryTest, VersionSelfTestAndConfig) {
  EXPECT_EQ(RunToEnd({"--version"}), 0);
  EXPECT_TRUE(absl::StrContains(Output(), "dynsplitd 0."));
  EXPECT_EQ(RunToEnd({"--self-test", "--backend=cpu"}), 0);
  EXPECT_TRUE(absl::StrContains(Output(), "self-test passed on cpu"));
  EXPECT_EQ(RunToEnd({"--check-config", "--max-queue=many"}), 78);
  EXPECT_TRUE(absl::StrContains(Output(), "max-queue is 'many'"));
  EXPECT_EQ(RunToEnd({"--check-config", "--config=" + directory_ + "/none"}), 78);
  EXPECT_NE(RunToEnd({"--no-such-flag"}), 0);
}

TEST_F(BinaryTest, FlagsWinOverEnvironmentOverFile) {
  std::ofstream(directory_ + "/conf") << "max-queue = 1\nmax-streams = 1\nthreads = 1\n";
  setenv("DYNSPLIT_MAX_STREAMS", "2", 1);
  setenv("DYNSPLIT_THREADS", "2", 1);
  EXPECT_EQ(RunToEnd({"--check-config", "--config", directory_ + "/conf", "--threads=3"}), 0);
  unsetenv("DYNSPLIT_MAX_STREAMS");
  unsetenv("DYNSPLIT_THREADS");
  for (const char* line : {"max-queue = 1\n", "max-streams = 2\n", "threads = 3\n"}) {
    EXPECT_TRUE(absl::StrContains(Output(), line)) << line;
  }
}

TEST_F(BinaryTest, ServesAndStopsOnSigterm) {
  const pid_t child = Start(ServeArguments());
  ASSERT_TRUE(Serving()) << Output();
  const std::unique_ptr<Stub> stub = v1::Compression::NewStub(
      grpc::CreateChannel("unix:" + socket_, grpc::InsecureChannelCredentials()));
  const Reply reply = Exchange(*stub, Call::kCompress, MakeScript());
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  kill(child, SIGTERM);
  EXPECT_EQ(Wait(child), 0);
  EXPECT_FALSE(std::filesystem::exists(socket_));
  EXPECT_TRUE(absl::StrContains(Output(), "\"stopped\""));
}

TEST_F(BinaryTest, ReplacesAStaleSocketAndSparesALiveOne) {
  const pid_t killed = Start(ServeArguments());
  ASSERT_TRUE(Serving()) << Output();
  kill(killed, SIGKILL);
  EXPECT_EQ(Wait(killed), -SIGKILL);
  EXPECT_TRUE(std::filesystem::exists(socket_));
  std::filesystem::remove(directory_ + "/output");

  const pid_t child = Start(ServeArguments());
  ASSERT_TRUE(Serving()) << Output();
  std::filesystem::rename(directory_ + "/output", directory_ + "/first");
  EXPECT_EQ(RunToEnd(ServeArguments()), 1);
  EXPECT_TRUE(absl::StrContains(Output(), "another server is listening")) << Output();
  EXPECT_TRUE(std::filesystem::exists(socket_));
  kill(child, SIGINT);
  EXPECT_EQ(Wait(child), 0);
}

}  // namespace
}  // namespace dynsplit::e2e
