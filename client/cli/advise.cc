// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/flags.h"
#include "client/cli/report.h"

namespace dynsplit::cli {
namespace {

struct Flags {
  ConnectionFlags connection;
  v1::AdviseRequest request;
  bool json = false;
};

std::string HumanSeconds(double seconds) {
  return std::isnan(seconds) ? "-" : HumanDuration(absl::Seconds(seconds));
}

std::string HumanAdvice(const v1::AdviseResponse& advice) {
  const std::vector<std::vector<std::string>> rows = {
      {"", "as it is", "compressed"},
      {"seconds from the end of prefill", HumanSeconds(advice.plain_seconds()),
       HumanSeconds(advice.compressed_seconds())},
      {"attention mass", "1", Decimal(advice.expected_retained_attention_mass(), 4)},
      {"attention output error", "0", Decimal(advice.expected_output_relative_error(), 4)},
      {"divergence, nats a token", "0", Decimal(advice.expected_divergence(), 4)},
  };
  const std::string verdict = advice.compress()
                                  ? absl::StrCat("compress: ", DescribePolicy(advice.policy()))
                                  : std::string("do not compress");
  const double break_even = advice.break_even_bytes_per_second();
  return absl::StrCat(verdict, "\n", advice.reason(), "\n\n", Table(rows), "\npays below ",
                      break_even > 0 ? HumanBytes(break_even) + "/s" : "no throughput",
                      " of the link\n");
}

int Run(const Flags& flags) {
  const auto client = flags.connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  const absl::StatusOr<v1::AdviseResponse> advice = (*client)->Advise(flags.request);
  if (!advice.ok()) return PrintError(advice.status());
  std::cout << (flags.json ? ToJson(*advice).dump(2) + "\n" : HumanAdvice(*advice));
  return kExitOk;
}

// A required count of the shape.
template <typename T, typename Set>
void AddCount(CLI::App& command, const std::string& name, const std::string& description, Set set) {
  command.add_option_function<T>(name, set, description)
      ->required()
      ->check(CLI::PositiveNumber)
      ->group("Model and context");
}

void AddShape(CLI::App& command, v1::SequenceShape& shape) {
  AddCount<int32_t>(command, "--layers", "Layers",
                    [&shape](int32_t count) { shape.set_num_layers(count); });
  AddCount<int32_t>(command, "--query-heads", "Query heads",
                    [&shape](int32_t count) { shape.set_num_query_heads(count); });
  AddCount<int32_t>(command, "--kv-heads", "KV heads",
                    [&shape](int32_t count) { shape.set_num_kv_heads(count); });
  AddCount<int32_t>(command, "--head-dim", "Elements of a head",
                    [&shape](int32_t count) { shape.set_head_dim(count); });
  AddCount<int64_t>(command, "--tokens", "Tokens of the context",
                    [&shape](int64_t count) { shape.set_num_tokens(count); });
}

}  // namespace

void AddAdvise(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand(
      "advise", "Ask whether compressing between prefill and decode pays, and how");
  auto flags = std::make_shared<Flags>();
  v1::AdviseRequest& request = flags->request;
  AddShape(command, *request.mutable_shape());
  AddEnum<v1::DType>(command, "--dtype", "Type of K and V; default: bfloat16",
                     [&request](v1::DType dtype) { request.set_dtype(dtype); })
      ->group("Model and context");
  command
      .add_option_function<double>(
          "--link", [&request](double rate) { request.set_link_bytes_per_second(rate); },
          "Throughput from prefill to decode, bytes per second: 12.5e9")
      ->required()
      ->check(CLI::PositiveNumber);
  command
      .add_option_function<double>(
          "--goal", [&request](double goal) { request.set_time_to_first_token_seconds(goal); },
          "Seconds from the end of prefill; default: as soon as possible")
      ->check(CLI::PositiveNumber);
  AddEnum<v1::Evidence>(command, "--evidence",
                        "The most the engine knows about attention; default: none",
                        [&request](v1::Evidence evidence) { request.add_evidence(evidence); })
      ->group("Options");
  command
      .add_option_function<double>(
          "--min-mass", [&request](double mass) { request.set_min_retained_attention_mass(mass); },
          "Smallest acceptable attention mass; default 0.9")
      ->check(CLI::Range(0.0, 1.0));
  command
      .add_option_function<double>(
          "--max-divergence",
          [&request](double nats) { request.set_max_expected_divergence(nats); },
          "Largest acceptable expected divergence, nats a token; default: any")
      ->check(CLI::PositiveNumber);
  flags->connection.AddTo(command);
  command.add_flag("--json", flags->json, "Machine-readable answer on stdout");
  command.callback([flags, &exit_code] { exit_code = Run(*flags); });
}

}  // namespace dynsplit::cli
