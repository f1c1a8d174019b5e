// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/config.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "server/cpu/cpu_backend.h"
#include "server/runtime/log.h"
#include "server/runtime/self_test.h"

namespace dynsplit {
namespace {

bool Mentions(const absl::Status& status, const std::string& text) {
  return absl::StrContains(status.message(), text);
}

TEST(ConfigTest, DefaultsAreValidAndSurviveTheirOwnText) {
  const ServerConfig defaults;
  EXPECT_TRUE(ValidateConfig(defaults).ok()) << ValidateConfig(defaults);
  std::string text;
  for (const ConfigOption& option : ConfigOptions()) {
    text += std::string(option.name) + " = " + option.get(defaults) + "\n";
  }
  ServerConfig copy;
  copy.max_queue = 5;
  ASSERT_TRUE(ApplyConfigText(text, copy).ok());
  for (const ConfigOption& option : ConfigOptions()) {
    EXPECT_EQ(option.get(copy), option.get(defaults)) << option.name;
  }
}

TEST(ConfigTest, EnvironmentWinsOverFile) {
  ServerConfig config;
  ASSERT_TRUE(ApplyConfigText("# comment\nmax-queue = 5\n threads=3 # trailing\n", config).ok());
  const std::map<std::string, std::string> variables = {{"DYNSPLIT_MAX_QUEUE", "6"}};
  ASSERT_TRUE(ApplyEnvironment(
                  [&](const char* name) {
                    const auto found = variables.find(name);
                    return found == variables.end() ? nullptr : found->second.c_str();
                  },
                  config)
                  .ok());
  EXPECT_EQ(config.max_queue, 6);
  EXPECT_EQ(config.threads, 3);
}

TEST(ConfigTest, WrongValuesAreRefusedByName) {
  ServerConfig config;
  EXPECT_TRUE(Mentions(SetOption("max-queue", "many", config), "max-queue is 'many'"));
  EXPECT_TRUE(Mentions(SetOption("no-such", "1", config), "no-such"));
  EXPECT_TRUE(Mentions(ApplyConfigText("\nreflection = maybe", config), "line 2"));
  EXPECT_TRUE(Mentions(ApplyConfigText("just words", config), "line 1"));
  const std::pair<const char*, const char*> wrong[] = {
      {"listen", "nowhere"},       {"metrics-listen", "h:99999"},
      {"backend", "tpu"},          {"threads", "-1"},
      {"max-chunk-bytes", "5MiB"}, {"max-message-bytes", "1KiB"},
      {"max-request-bytes", "1"},  {"max-streams", "0"},
      {"log-level", "loud"},       {"max-in-flight-bytes", "1GiB"}};
  for (const auto& [name, value] : wrong) {
    ServerConfig changed;
    ASSERT_TRUE(SetOption(name, value, changed).ok()) << name;
    const absl::Status status = ValidateConfig(changed);
    EXPECT_FALSE(status.ok()) << name;
    EXPECT_TRUE(Mentions(status, "option ")) << status;
  }
  ServerConfig deaf;
  deaf.listen.clear();
  EXPECT_FALSE(ValidateConfig(deaf).ok());
}

TEST(ConfigTest, UnitsOfBytesAndTime) {
  int64_t bytes = 0;
  EXPECT_TRUE(ParseBytes("3GiB", bytes).ok());
  EXPECT_EQ(bytes, int64_t{3} << 30);
  for (const char* wrong : {"", "-1", "9999999999TiB", "1.5GiB", "4GB", "GiB"}) {
    EXPECT_FALSE(ParseBytes(wrong, bytes).ok()) << wrong;
  }
  absl::Duration duration;
  EXPECT_TRUE(ParseDuration("250ms", duration).ok());
  EXPECT_EQ(duration, absl::Milliseconds(250));
  EXPECT_TRUE(ParseDuration("2", duration).ok());
  EXPECT_EQ(duration, absl::Seconds(2));
  for (const char* wrong : {"", "-1s", "nan", "inf", "25h", "soon"}) {
    EXPECT_FALSE(ParseDuration(wrong, duration).ok()) << wrong;
  }
}

TEST(LogTest, LinesAreJsonWhateverTheFieldsHold) {
  EXPECT_EQ(FormatLogLine(LogLevel::kWarning, "said \"no\"",
                          {{"n", int64_t{3}}, {"ok", false}, {"s", std::string_view("a\n\xff")}}),
            "{\"level\":\"warning\",\"msg\":\"said \\\"no\\\"\",\"n\":3,\"ok\":false,"
            "\"s\":\"a\\n\xef\xbf\xbd\"}");
}

TEST(SelfTestTest, PassesOnTheCpu) {
  auto backend = CreateCpuBackend({.num_threads = 2, .memory_limit_bytes = 0});
  ASSERT_TRUE(backend.ok());
  EXPECT_TRUE(SelfTest(**backend).ok()) << SelfTest(**backend);
}

TEST(ConfigTest, DevicesAreACountOrAList) {
  EXPECT_EQ(ParseDevices("1").value(), (std::vector<int32_t>{0}));
  EXPECT_EQ(ParseDevices("3").value(), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(ParseDevices("2,0").value(), (std::vector<int32_t>{2, 0}));
  for (const char* wrong : {"", "0", "-1", "65", "x", "1,", ",1", "0,0", "1,-2", "1024,0"}) {
    EXPECT_FALSE(ParseDevices(wrong).ok()) << wrong;
  }
  ServerConfig config;
  EXPECT_TRUE(ValidateConfig(config).ok());
  config.devices = "0,2";
  EXPECT_TRUE(ValidateConfig(config).ok());
  config.device = 1;
  EXPECT_EQ(ValidateConfig(config).message(), "options device and devices are both set");
  config.device = 0;
  config.devices = "0,0";
  EXPECT_FALSE(ValidateConfig(config).ok());
}

TEST(ConfigTest, RegionSocketNeedsSharedMemory) {
  ServerConfig config;
  config.region_socket = "/run/regions.sock";
  EXPECT_TRUE(absl::IsInvalidArgument(ValidateConfig(config)));
  config.regions = "cuda-ipc";
  EXPECT_TRUE(absl::IsInvalidArgument(ValidateConfig(config)));
  for (const char* regions : {"shm", "all"}) {
    config.regions = regions;
    EXPECT_TRUE(ValidateConfig(config).ok()) << regions;
  }
  config.region_socket = std::string(108, 'p');
  EXPECT_TRUE(absl::IsInvalidArgument(ValidateConfig(config)));
}

}  // namespace
}  // namespace dynsplit
