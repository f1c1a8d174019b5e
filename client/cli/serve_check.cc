// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/flags.h"
#include "client/cli/report.h"

namespace dynsplit::cli {
namespace {

struct Flags {
  ConnectionFlags connection;
  bool json = false;
};

struct Step {
  const char* name;
  absl::Status status;
  absl::Duration duration;
  std::string note;
};

// One layer of made-up values, enough to go through every stage.
class SyntheticSequence {
 public:
  SyntheticSequence() {
    for (size_t i = 0; i < ids_.size(); ++i) ids_[i] = static_cast<int32_t>(i % 97);
    for (auto* values : {&key_, &value_, &queries_}) {
      for (size_t i = 0; i < values->size(); ++i) {
        (*values)[i] = std::sin(0.37F * static_cast<float>(i) + static_cast<float>(values->size()));
      }
    }
  }

  CompressJob MakeJob() const {
    CompressJob job;
    v1::SequenceShape& shape = *job.begin.mutable_shape();
    shape.set_num_layers(1);
    shape.set_num_query_heads(kHeads);
    shape.set_num_kv_heads(kHeads);
    shape.set_num_tokens(kTokens);
    shape.set_head_dim(kDim);
    // Blocks and attention, but no delimiter profile, for a server need not have a default one.
    job.begin.mutable_policy()->set_preset("fixed_window");
    job.begin.mutable_policy()->mutable_budget()->set_kept_ratio(0.5);
    Add(job, v1::TENSOR_KIND_TOKEN_IDS, {}, v1::DTYPE_INT32, ids_);
    Add(job, v1::TENSOR_KIND_QUERIES, 0, v1::DTYPE_FLOAT32, queries_);
    Add(job, v1::TENSOR_KIND_KEY, 0, v1::DTYPE_FLOAT32, key_);
    Add(job, v1::TENSOR_KIND_VALUE, 0, v1::DTYPE_FLOAT32, value_);
    return job;
  }

 private:
  static constexpr int32_t kTokens = 128, kHeads = 2, kDim = 16, kWindow = 8;

  template <typename T>
  static void Add(CompressJob& job, v1::TensorKind kind, std::optional<int32_t> layer,
                  v1::DType dtype, const std::vector<T>& values) {
    InputTensor& tensor = job.tensors.emplace_back();
    tensor.kind = kind;
    tensor.layer = layer;
    tensor.dtype = dtype;
    tensor.bytes = {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
  }

  std::vector<int32_t> ids_ = std::vector<int32_t>(kTokens);
  std::vector<float> key_ = std::vector<float>(size_t{kTokens} * kHeads * kDim);
  std::vector<float> value_ = std::vector<float>(size_t{kTokens} * kHeads * kDim);
  std::vector<float> queries_ = std::vector<float>(size_t{kWindow} * kHeads * kDim);
};

template <typename Call>
void Try(const char* name, std::vector<Step>& steps, Call call) {
  const absl::Time start = absl::Now();
  std::string note;
  absl::Status status = call(note);
  steps.push_back({name, std::move(status), absl::Now() - start, std::move(note)});
}

std::vector<Step> Check(Client& client) {
  std::vector<Step> steps;
  Try("health", steps, [&](std::string& note) {
    note = "SERVING";
    return client.CheckHealth();
  });
  Try("server info", steps, [&](std::string& note) {
    const absl::StatusOr<v1::ServerInfo> info = client.GetServerInfo();
    if (!info.ok()) return info.status();
    note = absl::StrCat("dynsplitd ", info->version(), ", ", info->backend(), ", ", info->device(),
                        info->draining() ? ", draining" : "");
    return absl::OkStatus();
  });
  Try("compress", steps, [&](std::string& note) {
    const SyntheticSequence sequence;
    const absl::StatusOr<CompressResult> result = client.Compress(sequence.MakeJob());
    if (!result.ok()) return result.status();
    note = absl::StrCat(result->end.bytes_in(), " -> ", result->end.bytes_out(), " bytes, ",
                        result->layers.size(), " layer");
    return absl::OkStatus();
  });
  return steps;
}

int Run(const Flags& flags) {
  const auto client = flags.connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  const std::vector<Step> steps = Check(**client);
  bool all_ok = true;
  nlohmann::json json = {{"target", flags.connection.target}, {"steps", nlohmann::json::array()}};
  for (const Step& step : steps) {
    all_ok &= step.status.ok();
    if (!flags.json) {
      std::cout << (step.status.ok() ? "ok    " : "FAIL  ") << step.name
                << std::string(12 - std::string(step.name).size(), ' ')
                << HumanDuration(step.duration) << "  " << (step.status.ok() ? step.note : "")
                << "\n";
      if (!step.status.ok()) PrintError(step.status);
    }
    json["steps"].push_back(
        {{"name", step.name},
         {"ok", step.status.ok()},
         {"code", absl::StatusCodeToString(step.status.code())},
         {"detail", step.status.ok() ? step.note : std::string(step.status.message())},
         {"seconds", absl::ToDoubleSeconds(step.duration)}});
  }
  json["ok"] = all_ok;
  if (flags.json) std::cout << json.dump(2) << "\n";
  return all_ok ? kExitOk : kExitFailed;
}

}  // namespace

void AddServeCheck(CLI::App& app, int& exit_code) {
  CLI::App& command =
      *app.add_subcommand("serve-check", "Check that a server is healthy and compresses");
  auto flags = std::make_shared<Flags>();
  flags->connection.timeout_seconds = 30;
  flags->connection.AddTo(command);
  command.add_flag("--json", flags->json, "Machine-readable answer on stdout");
  command.callback([flags, &exit_code] { exit_code = Run(*flags); });
}

}  // namespace dynsplit::cli
