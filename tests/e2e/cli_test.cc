// SPDX-License-Identifier: Apache-2.0
//
// dynsplit as a process against a real server: answers, files, exit codes.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/cpp/container.h"
#include "client/cpp/safetensors.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/sample.h"

namespace dynsplit::e2e {
namespace {

using Json = nlohmann::json;

struct Outcome {
  int exit_code = -1;  // minus the signal's number where one ended it
  std::string out, err;
};

class CliTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "dynsplit-cli-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string Path(const std::string& name) const { return directory_ + "/" + name; }
  static std::string Read(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
  }

  // Runs the program to its end.
  Outcome Run(std::vector<std::string> arguments) const {
    const std::string out = Path("stdout");
    const std::string err = Path("stderr");
    arguments.insert(arguments.begin(), DYNSPLIT_CLI);
    std::vector<char*> argv;
    argv.reserve(arguments.size() + 1);
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    // Not fork: this process has the server's threads.
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    constexpr int kCreate = O_WRONLY | O_CREAT | O_TRUNC;
    posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, out.c_str(), kCreate, 0600);
    posix_spawn_file_actions_addopen(&files, STDERR_FILENO, err.c_str(), kCreate, 0600);
    pid_t child = 0;
    const int failed = posix_spawn(&child, DYNSPLIT_CLI, &files, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&files);
    if (failed != 0) {
      ADD_FAILURE() << "cannot start " << DYNSPLIT_CLI;
      return {};
    }
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), Read(out), Read(err)};
  }
  // The same, with the server as target.
  Outcome Ask(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--target", "unix:" + server_->unix_socket()});
    return Run(std::move(arguments));
  }
  static Json Parse(const std::string& text) {
    Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    EXPECT_FALSE(json.is_discarded()) << text;
    return json;
  }

  static TestServer* server_;
  std::string directory_;
};
TestServer* CliTest::server_ = nullptr;

std::string Sample(const std::string& kind) { return DataPath("sample/" + kind + ".safetensors"); }

TEST_F(CliTest, CompressedContainerCanBeInspected) {
  const std::string container = Path("prose.dskv");
  const Outcome compress = Ask({"compress", Sample("prose"), "-o", container, "--json"});
  ASSERT_EQ(compress.exit_code, 0) << compress.err;
  EXPECT_EQ(compress.err, "");
  const Json answer = Parse(compress.out);
  ASSERT_TRUE(answer["plan"]["layers"].is_array()) << compress.out;
  EXPECT_EQ(answer["plan"]["layers"].size(), 3U);
  EXPECT_EQ(answer["plan"]["shape"]["num_tokens"], 1283);  // a number, not protobuf's "1283"
  EXPECT_LT(answer["bytes_out"].get<int64_t>(), answer["bytes_in"].get<int64_t>() / 2);
  EXPECT_GT(answer["receipt"]["retained_attention_mass_mean"].get<double>(), 0.5);

  const Outcome inspect = Run({"inspect", container, "--json"});
  ASSERT_EQ(inspect.exit_code, 0) << inspect.err;
  const Json header = Parse(inspect.out);
  EXPECT_EQ(header["format"], "container");
  EXPECT_EQ(header["plan"], answer["plan"]);
  EXPECT_EQ(header["receipt"], answer["receipt"]);
  EXPECT_EQ(header["representation_salt"], answer["representation_salt"]);
  EXPECT_EQ(header["bytes_out"], answer["bytes_out"]);
  EXPECT_EQ(header["metadata"]["text.kind"], "prose");
  EXPECT_EQ(header["file_bytes"].get<uint64_t>(), std::filesystem::file_size(container));

  const absl::StatusOr<Container> loaded = Container::Load(container);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_TRUE(loaded->VerifySections().ok());
  const Capture capture = LoadData("sample/prose.safetensors");
  const ContainerSection* ids = loaded->Find(v1::TENSOR_KIND_TOKEN_IDS, -1);
  ASSERT_NE(ids, nullptr);
  EXPECT_EQ(ids->bytes.size(), capture.token_ids.size() * 4);
  EXPECT_NE(loaded->Find(v1::TENSOR_KIND_KEY_PAGES, 2), nullptr);

  // One byte anywhere in the tensors, and the file is refused.
  std::string bytes = Read(container);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  std::ofstream(Path("broken.dskv"), std::ios::binary) << bytes;
  const Outcome broken = Run({"inspect", Path("broken.dskv")});
  EXPECT_EQ(broken.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(broken.err, "DATA_LOSS")) << broken.err;
}

TEST_F(CliTest, InspectShowsPeopleWhatIsInTheFile) {
  const std::string container = Path("code.dskv");
  ASSERT_EQ(Ask({"compress", Sample("code"), "-o", container, "--quiet"}).exit_code, 0);
  const Outcome inspect = Run({"inspect", container});
  EXPECT_EQ(inspect.exit_code, 0) << inspect.err;
  for (const char* text : {"all checksums right", "1,171 tokens", "dynsplit: dynamic(20±19",
                           "key_pages", "kept_tokens", "bfloat16"}) {
    EXPECT_TRUE(absl::StrContains(inspect.out, text)) << text << " is not in\n" << inspect.out;
  }
}

TEST_F(CliTest, SafetensorsOutputCanBeRead) {
  const std::string path = Path("dialogue.safetensors");
  const Outcome compress =
      Ask({"compress", Sample("dialogue"), "-o", path, "--preset", "snapkv", "--ratio", "0.25"});
  ASSERT_EQ(compress.exit_code, 0) << compress.err;
  const absl::StatusOr<Safetensors> file = Safetensors::Load(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata().at("dynsplit.format"), "kv-compressed/1");
  EXPECT_EQ(Parse(file->metadata().at("dynsplit.plan"))["policy"]["preset"], "snapkv");
  constexpr int64_t kKept = 1157 / 4;
  const SafetensorsTensor* kept = file->Find("layers.1.kept_tokens");
  ASSERT_NE(kept, nullptr);
  EXPECT_EQ(kept->shape, (std::vector<int64_t>{3, kKept}));
  const SafetensorsTensor* pages = file->Find("layers.1.key_pages");
  ASSERT_NE(pages, nullptr);
  EXPECT_EQ(pages->dtype, "BF16");
  EXPECT_EQ(pages->shape, (std::vector<int64_t>{(kKept + 15) / 16, 16, 3, 64}));
  EXPECT_EQ(Run({"inspect", path}).exit_code, 0);
}

TEST_F(CliTest, PlanSaysWhatWouldBeKept) {
  const Outcome plan =
      Ask({"plan", Sample("prose"), "--ratio", "0.5", "--layers", "0,2", "--json"});
  ASSERT_EQ(plan.exit_code, 0) << plan.err;
  const Json answer = Parse(plan.out);
  ASSERT_EQ(answer["plan"]["layers"].size(), 2U);
  EXPECT_EQ(answer["plan"]["layers"][1]["num_kept_tokens"], 1283 / 2);
  EXPECT_EQ(answer["plan"]["hash"].get<std::string>().size(), 32U);
  EXPECT_EQ(answer["bytes_out"], 0);

  const Outcome compress =
      Ask({"compress", Sample("prose"), "--ratio", "0.5", "--layers", "0,2", "--json"});
  ASSERT_EQ(compress.exit_code, 0) << compress.err;
  EXPECT_EQ(Parse(compress.out)["plan"]["hash"], answer["plan"]["hash"]);
}

TEST_F(CliTest, QuietPrintsTheSummaryOrNothing) {
  const Outcome silent = Ask({"compress", Sample("code"), "--quiet"});
  EXPECT_EQ(silent.exit_code, 0);
  EXPECT_EQ(silent.out + silent.err, "");

  const std::string summary = Path("summary.json");
  Outcome last;
  for (const char* kind : {"dialogue", "prose", "code"}) {
    last = Ask({"compress", Sample(kind), "--quiet", "--tokens", "234", "--summary", summary});
    ASSERT_EQ(last.exit_code, 0) << last.err;
  }
  EXPECT_EQ(last.err, "");
  const std::vector<std::string> lines = absl::StrSplit(last.out, '\n');
  const std::vector<std::string> title = absl::StrSplit(lines[0], ' ', absl::SkipEmpty());
  EXPECT_EQ(title, (std::vector<std::string>{"text", "prose", "code", "dialogue"}));
  int num_policies = 0;
  for (const std::string& line : lines) num_policies += absl::StartsWith(line, "policy") ? 1 : 0;
  EXPECT_EQ(num_policies, 1) << last.out;

  const auto json = nlohmann::ordered_json::parse(Read(summary), nullptr, false);
  ASSERT_TRUE(json.is_object());
  std::vector<std::string> kinds;
  for (const auto& [kind, entry] : json.items()) {
    kinds.push_back(kind);
    for (const char* field :
         {"tokens", "kept_tokens", "semantic_blocks", "pages_per_layer", "bytes_in", "bytes_out"}) {
      EXPECT_TRUE(entry[field].is_number_integer()) << kind << " " << field << ": " << entry[field];
    }
    EXPECT_EQ(entry["kept_tokens"], 234);
    EXPECT_EQ(entry["pages_per_layer"], 15);
    EXPECT_TRUE(entry["retained_attention_mass_mean"].is_number_float());
  }
  EXPECT_EQ(kinds, (std::vector<std::string>{"prose", "code", "dialogue"}));

  // Where policies differ, each is named.
  const Outcome mixed =
      Ask({"compress", Sample("code"), "--quiet", "--preset", "snapkv", "--summary", summary});
  EXPECT_TRUE(absl::StrContains(mixed.out, "policy of prose: dynsplit: ")) << mixed.out;
  EXPECT_TRUE(absl::StrContains(mixed.out, "policy of code: snapkv: ")) << mixed.out;
}

TEST_F(CliTest, AdviseSaysWhetherItPays) {
  const std::vector<std::string> shape = {
      "advise",   "--layers", "32",         "--query-heads", "32",         "--kv-heads",    "8",
      "--tokens", "131072",   "--head-dim", "128",           "--evidence", "window-queries"};
  const auto with = [&shape](std::vector<std::string> more) {
    more.insert(more.begin(), shape.begin(), shape.end());
    return more;
  };
  const Outcome slow = Ask(with({"--link", "1e8", "--json"}));
  ASSERT_EQ(slow.exit_code, 0) << slow.err;
  const Json advice = Parse(slow.out);
  EXPECT_TRUE(advice["compress"].get<bool>());
  EXPECT_EQ(advice["policy"]["preset"], "dynsplit");
  EXPECT_LT(advice["compressed_seconds"].get<double>(), advice["plain_seconds"].get<double>());

  const Outcome human = Ask(with({"--link", "1e8"}));
  ASSERT_EQ(human.exit_code, 0) << human.err;
  EXPECT_TRUE(absl::StrContains(human.out, "compress: dynsplit")) << human.out;
  EXPECT_TRUE(absl::StrContains(human.out, "pays below")) << human.out;
  const Outcome fast = Ask(with({"--link", "1e15"}));
  EXPECT_EQ(fast.exit_code, 0) << fast.err;
  EXPECT_TRUE(absl::StrContains(fast.out, "do not compress")) << fast.out;
  const Outcome all = Ask(with({"--link", "1e8", "--min-mass", "1"}));
  EXPECT_TRUE(absl::StrContains(all.out, "no throughput")) << all.out;

  EXPECT_EQ(Ask(shape).exit_code, 2) << "no link";
  const Outcome wrong = Ask(with({"--link", "1e8", "--kv-heads", "5"}));
  EXPECT_NE(wrong.exit_code, 0);
}

TEST_F(CliTest, ServeCheckTellsAHealthyServerFromNone) {
  const Outcome healthy = Ask({"serve-check"});
  EXPECT_EQ(healthy.exit_code, 0) << healthy.out << healthy.err;
  EXPECT_TRUE(absl::StrContains(healthy.out, "SERVING")) << healthy.out;
  const Outcome json = Ask({"serve-check", "--json"});
  EXPECT_EQ(Parse(json.out)["ok"], true);

  const Outcome none =
      Run({"serve-check", "--target", "unix:" + Path("nobody.sock"), "--timeout", "5"});
  EXPECT_EQ(none.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(none.err, "UNAVAILABLE")) << none.err;
}

TEST_F(CliTest, WrongUsageIsTwo) {
  const std::vector<std::vector<std::string>> wrong = {
      {},
      {"compres"},
      {"compress"},
      {"compress", Path("nothing.safetensors")},
      {"compress", Sample("code"), "--ratio", "0.5", "--tokens", "100"},
      {"compress", Sample("code"), "--ratio", "half"},
      {"compress", Sample("code"), "--scoring", "magic"},
      {"compress", Sample("code"), "--page-size", "17"},
      {"compress", Sample("code"), "--pin", "3-9"},
      {"compress", Sample("code"), "--quiet", "--json"},
      {"bench", Sample("code"), "--requests", "0"},
      {"session", Sample("code"), "--steps", "0"},
      {"session", Sample("code"), "--keep", "--id", "x"},
      {"sessions", "get"},
  };
  for (const std::vector<std::string>& arguments : wrong) {
    const Outcome outcome = Ask(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << testing::PrintToString(arguments);
    EXPECT_EQ(outcome.out, "") << testing::PrintToString(arguments);
    EXPECT_NE(outcome.err, "") << testing::PrintToString(arguments);
  }
  EXPECT_EQ(Run({"--help"}).exit_code, 0);
  EXPECT_TRUE(absl::StrContains(Run({"--version"}).out, "0."));
}

TEST_F(CliTest, ErrorsNameCodeAndField) {
  const Outcome preset = Ask({"compress", Sample("code"), "--preset", "no-such-method"});
  EXPECT_EQ(preset.exit_code, 1);
  EXPECT_EQ(preset.out, "");
  EXPECT_TRUE(absl::StrContains(preset.err, "NOT_FOUND")) << preset.err;
  EXPECT_TRUE(absl::StrContains(preset.err, "preset 'no-such-method'")) << preset.err;

  const Outcome ratio = Ask({"compress", Sample("code"), "--ratio", "1.5"});
  EXPECT_EQ(ratio.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(ratio.err, "INVALID_ARGUMENT")) << ratio.err;
  EXPECT_TRUE(absl::StrContains(ratio.err, "field policy.budget.kept_ratio")) << ratio.err;

  std::ofstream(Path("text.safetensors")) << "not a capture, but long enough to have a header";
  const Outcome file = Ask({"compress", Path("text.safetensors")});
  EXPECT_EQ(file.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(file.err, "INVALID_ARGUMENT")) << file.err;
}

// Width and height of a PNG file; zeros where it is none.
std::pair<uint32_t, uint32_t> PngSize(const std::string& bytes) {
  const std::string signature("\x89PNG\r\n\x1A\n", 8);
  if (bytes.size() < 24 || bytes.compare(0, 8, signature) != 0 ||
      bytes.compare(12, 4, "IHDR") != 0) {
    return {0, 0};
  }
  const auto number = [&bytes](size_t at) {
    uint32_t value = 0;
    for (size_t i = at; i < at + 4; ++i) value = value << 8 | static_cast<uint8_t>(bytes[i]);
    return value;
  };
  return {number(16), number(20)};
}

TEST_F(CliTest, PlotsArePictures) {
  const Outcome outcome =
      Ask({"compress", Sample("dialogue"), "--plots", Path("plots/dialogue"), "--quiet"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const char* name : {"text.png", "block_lengths.png", "budget.png", "receipt.png"}) {
    const std::string bytes = Read(Path(absl::StrCat("plots/dialogue/", name)));
    const auto [width, height] = PngSize(bytes);
    EXPECT_GE(width, 1000U) << name;
    EXPECT_LE(width, 3000U) << name;
    EXPECT_GE(height, 500U) << name;
    EXPECT_LE(height, 6000U) << name;
    EXPECT_GT(bytes.size(), 10'000U) << name << ": an empty page?";
    EXPECT_EQ(bytes.substr(bytes.size() - 8, 4), "IEND") << name;
  }
}

TEST_F(CliTest, CalibrationCanBeStoredAndShown) {
  const std::string input = DataPath("golden/calibration_input.safetensors");
  const Outcome calibrate = Ask({"calibrate", input, "--candidates", "28,198", "--store", "--name",
                                 "cli-test", "-o", Path("cli-test.csv")});
  ASSERT_EQ(calibrate.exit_code, 0) << calibrate.err;
  const Outcome show = Ask({"profile", "show", "cli-test"});
  EXPECT_EQ(show.exit_code, 0) << show.err;
  EXPECT_EQ(show.out, Read(Path("cli-test.csv")));
  EXPECT_TRUE(
      absl::StrContains(show.out, "\ntoken_id,text_escaped,weight,occurrences,sentence_end\n"));
  EXPECT_TRUE(absl::StrContains(show.out, "\n28,\\x2c,")) << show.out;
  const Outcome list = Ask({"profile", "list"});
  EXPECT_TRUE(absl::StrContains(list.out, "cli-test")) << list.out;
  const Outcome again = Ask(
      {"calibrate", input, "--candidates", "28,198", "--store", "--name", "cli-test", "--json"});
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(again.err, "ALREADY_EXISTS")) << again.err;
}

TEST_F(CliTest, SessionShowsWhatIsReadAndMoved) {
  const Outcome outcome = Ask({"session", Sample("prose"), "--ratio", "0.1", "--steps", "8"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  for (const char* text :
       {"session   ", "tokens    1,283 in 79 blocks", "K and V   2.8 MiB in device memory",
        "index     ", "dynsplit_index: dynamic(14±13, smollm2_table7), block-mean-key refined 4×, ",
        "128", "10.0 %", "select    p50 ", "over 8 steps of 3 layers",
        "step 1 moved 1,152 of 1,152 rows; steps 2 to 8 moved ", "released  2.9 MiB"}) {
    EXPECT_TRUE(absl::StrContains(outcome.out, text)) << text << " is not in\n" << outcome.out;
  }
}

TEST_F(CliTest, SessionCanBeKeptUsedAndReleased) {
  const std::string path = Path("session.safetensors");
  const Outcome kept = Ask({"session", Sample("code"), "--ratio", "0.2", "--keep", "--reserve",
                            "10", "--lease", "60", "--json", "--with-tokens", "--fetch", path});
  ASSERT_EQ(kept.exit_code, 0) << kept.err;
  const Json answer = Parse(kept.out);
  const std::string id = answer["session"]["session_id"].get<std::string>();
  EXPECT_EQ(answer["session"]["shape"]["num_tokens"], 1171);
  EXPECT_EQ(answer["session"]["capacity_tokens"], 1181);
  EXPECT_FALSE(answer.contains("released_bytes"));
  EXPECT_EQ(answer["steps"], 16);
  EXPECT_EQ(answer["tokens_per_head"], 234);
  EXPECT_GT(answer["select_p50_seconds"].get<double>(), 0);
  EXPECT_EQ(answer["moved_rows"][0], answer["chosen_rows"][0]);
  EXPECT_LT(answer["moved_rows"][15].get<int64_t>(), answer["chosen_rows"][15].get<int64_t>());
  ASSERT_EQ(answer["layers"].size(), 3U);
  for (const Json& layer : answer["layers"]) {
    ASSERT_EQ(layer["tokens"].size(), 3U);
    EXPECT_EQ(layer["tokens"][2].size(), 234U);
    EXPECT_GT(layer["attention_mass_mean"].get<double>(), 0.234);
    EXPECT_LE(layer["attention_mass_min"], layer["attention_mass_mean"]);
  }
  // What was fetched is the capture.
  const Capture capture = LoadData("sample/code.safetensors");
  const absl::StatusOr<Safetensors> file = Safetensors::Load(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const SafetensorsTensor* keys = file->Find("layers.2.key_pages");
  ASSERT_NE(keys, nullptr);
  EXPECT_EQ(keys->shape, (std::vector<int64_t>{74, 16, 3, 64}));
  EXPECT_TRUE(keys->bytes.subspan(0, capture.layers[2].key.size()) == capture.layers[2].key);
  EXPECT_EQ(Run({"inspect", path}).exit_code, 0);

  const Outcome again = Ask({"session", Sample("code"), "--id", id, "--json", "--with-tokens"});
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(Parse(again.out)["layers"], answer["layers"]);
  const Outcome get = Ask({"sessions", "get", id});
  EXPECT_EQ(get.exit_code, 0) << get.err;
  EXPECT_TRUE(absl::StrContains(get.out, "room for 1,181")) << get.out;
  const Outcome misfit = Ask({"session", Sample("prose"), "--id", id});
  EXPECT_EQ(misfit.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(misfit.err, "1171 tokens")) << misfit.err;

  const Outcome release = Ask({"sessions", "release", id, "--json"});
  EXPECT_EQ(release.exit_code, 0) << release.err;
  EXPECT_GT(Parse(release.out)["freed_bytes"].get<int64_t>(), 1171 * 3 * 3 * 64 * 4);
  const Outcome gone = Ask({"sessions", "get", id});
  EXPECT_EQ(gone.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(gone.err, "SESSION_RELEASED")) << gone.err;
  EXPECT_TRUE(server_->ReturnsToBaseline());
}

TEST_F(CliTest, BenchCountsItsRequests) {
  const Outcome bench = Ask(
      {"bench", Sample("code"), "-n", "4", "-j", "2", "--warmup", "1", "--no-receipt", "--json"});
  ASSERT_EQ(bench.exit_code, 0) << bench.err;
  const Json answer = Parse(bench.out);
  EXPECT_EQ(answer["requests"], 4);
  EXPECT_GT(answer["requests_per_second"].get<double>(), 0);
  EXPECT_GE(answer["latency_max_seconds"], answer["latency_p50_seconds"]);
}

}  // namespace
}  // namespace dynsplit::e2e
