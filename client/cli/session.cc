// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/flags.h"
#include "client/cli/report.h"
#include "client/cli/request.h"
#include "client/cli/session_report.h"

namespace dynsplit::cli {
namespace {

// What session, sessions get and sessions release say where to find one.
struct SessionFlags {
  ConnectionFlags connection;
  std::string id, tenant;
  bool json = false;
};

struct Flags : SessionFlags {
  CaptureFlags capture;
  PolicyFlags policy;
  v1::SessionOptions options;
  int32_t num_steps = 16;
  bool keep = false, with_tokens = false;
  std::string fetch;
};

struct Outcome {
  v1::SessionInfo session;
  std::optional<CompressResult> opened;
  StepsReport steps;
  std::optional<CompressResult> fetched;
  std::optional<int64_t> released_bytes;
};

absl::StatusOr<v1::SessionInfo> Get(Client& client, const std::string& id,
                                    const std::string& tenant) {
  v1::GetSessionRequest request;
  request.set_session_id(id);
  request.set_tenant(tenant);
  return client.GetSession(request);
}

absl::StatusOr<int64_t> Release(Client& client, const std::string& id, const std::string& tenant) {
  v1::ReleaseSessionRequest request;
  request.set_session_id(id);
  request.set_tenant(tenant);
  const auto response = client.ReleaseSession(request);
  if (!response.ok()) return response.status();
  return response->freed_bytes();
}

absl::Status Open(Client& client, const Flags& flags, const Capture& capture, Outcome& outcome) {
  CompressJob job = MakeJob(capture, flags.capture, flags.policy.Get());
  std::erase_if(job.tensors, [](const InputTensor& tensor) {
    return tensor.kind == v1::TENSOR_KIND_QUERIES;  // those of the steps
  });
  job.begin.set_tenant(flags.tenant);
  *job.begin.mutable_session() = flags.options;
  ProgressBar bar(!flags.json);
  job.on_progress = [&](const Progress& progress) {
    bar.Show(progress, capture.shape.num_layers());
  };
  absl::StatusOr<CompressResult> result = client.OpenSession(job);
  if (!result.ok()) return result.status();
  outcome.session = result->end.session();
  outcome.opened = *std::move(result);
  return absl::OkStatus();
}

absl::Status Fetch(Client& client, const Flags& flags, const Capture& capture, Outcome& outcome) {
  CompressJob job;
  job.begin.set_tenant(flags.tenant);
  job.begin.mutable_target()->set_session_id(outcome.session.session_id());
  job.begin.mutable_policy()->mutable_encoding()->set_key(v1::Encoding::FORMAT_AS_IS);
  job.begin.mutable_policy()->mutable_encoding()->set_value(v1::Encoding::FORMAT_AS_IS);
  absl::StatusOr<CompressResult> result = client.FetchSession(job);
  if (!result.ok()) return result.status();
  outcome.fetched = *std::move(result);
  return WriteResult(flags.fetch, capture, *outcome.fetched);
}

// All that is done with the session once it is there.
absl::Status Use(Client& client, const Flags& flags, const Capture& capture, Outcome& outcome) {
  StepsRequest request;
  request.session = outcome.session;
  request.num_steps =
      static_cast<int32_t>(std::min<int64_t>(flags.num_steps, capture.num_window_queries()));
  absl::StatusOr<StepsReport> steps = RunSteps(client, capture, request);
  if (!steps.ok()) return steps.status();
  outcome.steps = *std::move(steps);
  if (!flags.fetch.empty()) {
    if (absl::Status status = Fetch(client, flags, capture, outcome); !status.ok()) return status;
  }
  absl::StatusOr<v1::SessionInfo> now =
      Get(client, outcome.session.session_id(), outcome.session.tenant());
  if (!now.ok()) return now.status();
  outcome.session = *std::move(now);
  return absl::OkStatus();
}

// The session is released in any case, unless it is to be kept or was there before.
absl::StatusOr<Outcome> Serve(const Flags& flags, const Capture& capture) {
  const auto client = flags.connection.Connect();
  if (!client.ok()) return client.status();
  Outcome outcome;
  absl::Status status;
  if (flags.id.empty()) {
    status = Open(**client, flags, capture, outcome);
  } else {
    absl::StatusOr<v1::SessionInfo> found = Get(**client, flags.id, flags.tenant);
    status = found.status();
    if (found.ok()) outcome.session = *std::move(found);
  }
  if (!status.ok()) return status;
  status = Use(**client, flags, capture, outcome);
  if (!flags.keep && flags.id.empty()) {
    const auto freed = Release(**client, outcome.session.session_id(), outcome.session.tenant());
    status.Update(freed.status());
    if (freed.ok()) outcome.released_bytes = *freed;
  }
  if (!status.ok()) return status;
  return outcome;
}

void PrintHuman(const Flags& flags, const Outcome& outcome) {
  std::cout << DescribeSession(outcome.session);
  if (outcome.opened.has_value()) {
    std::cout << "opened    in " << HumanDuration(outcome.opened->elapsed) << ", "
              << outcome.opened->end.backend() << "\n";
  }
  std::cout << "\n" << DescribeSteps(outcome.steps);
  if (outcome.fetched.has_value()) {
    std::cout << "fetched   " << HumanBytes(static_cast<double>(outcome.fetched->received_bytes))
              << " in " << HumanDuration(outcome.fetched->elapsed) << " to " << flags.fetch << "\n";
  }
  if (outcome.released_bytes.has_value()) {
    std::cout << "released  " << HumanBytes(static_cast<double>(*outcome.released_bytes)) << "\n";
  } else {
    std::cout << "kept      go on with --id " << outcome.session.session_id() << "\n";
  }
}

void PrintJson(const Flags& flags, const Outcome& outcome) {
  nlohmann::json json = JsonSteps(outcome.steps, flags.with_tokens);
  json["session"] = ToJson(outcome.session);
  if (outcome.opened.has_value()) {
    json["open_seconds"] = absl::ToDoubleSeconds(outcome.opened->elapsed);
  }
  if (outcome.fetched.has_value()) json["fetched_bytes"] = outcome.fetched->received_bytes;
  if (outcome.released_bytes.has_value()) json["released_bytes"] = *outcome.released_bytes;
  std::cout << json.dump(2) << "\n";
}

int Run(const Flags& flags) {
  const absl::StatusOr<Capture> capture = LoadInput(flags.capture);
  if (!capture.ok()) return PrintError(capture.status());
  if (capture->num_window_queries() == 0) {
    return PrintError(absl::InvalidArgumentError(
        "the capture has no queries of its last tokens to make steps of"));
  }
  const absl::StatusOr<Outcome> outcome = Serve(flags, *capture);
  if (!outcome.ok()) return PrintError(outcome.status());
  if (flags.json) {
    PrintJson(flags, *outcome);
  } else {
    PrintHuman(flags, *outcome);
  }
  return kExitOk;
}

int RunGet(const SessionFlags& flags) {
  const auto client = flags.connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  const auto session = Get(**client, flags.id, flags.tenant);
  if (!session.ok()) return PrintError(session.status());
  std::cout << (flags.json ? ToJson(*session).dump(2) + "\n" : DescribeSession(*session));
  return kExitOk;
}

int RunRelease(const SessionFlags& flags) {
  const auto client = flags.connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  const auto freed = Release(**client, flags.id, flags.tenant);
  if (!freed.ok()) return PrintError(freed.status());
  if (flags.json) {
    std::cout << nlohmann::json({{"freed_bytes", *freed}}).dump(2) << "\n";
  } else {
    std::cout << "released  " << HumanBytes(static_cast<double>(*freed)) << "\n";
  }
  return kExitOk;
}

void AddOptions(CLI::App& command, v1::SessionOptions& options) {
  constexpr char kGroup[] = "Session";
  AddEnum<v1::SessionOptions::Residence>(
      command, "--residence", "Where K and V rest; default: device, host where it is full",
      [&options](v1::SessionOptions::Residence residence) { options.set_residence(residence); })
      ->group(kGroup);
  AddEnum<v1::SessionOptions::Summaries>(
      command, "--summaries", "Bits of the block summaries; default: float8-e4m3",
      [&options](v1::SessionOptions::Summaries summaries) { options.set_summaries(summaries); })
      ->group(kGroup);
  command
      .add_option_function<int32_t>(
          "--lease", [&options](int32_t seconds) { options.set_lease_seconds(seconds); },
          "Seconds it lives without being used; default 300")
      ->check(CLI::Range(1, 86400))
      ->group(kGroup);
  command
      .add_option_function<int64_t>(
          "--reserve", [&options](int64_t tokens) { options.set_reserve_tokens(tokens); },
          "Room for tokens appended later")
      ->check(CLI::NonNegativeNumber)
      ->group(kGroup);
}

}  // namespace

void AddSession(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand(
      "session", "Keep a captured cache in the server and choose tokens of it as a decoder would");
  auto flags = std::make_shared<Flags>();
  flags->capture.AddInputTo(command);
  flags->policy.AddTo(command);
  flags->connection.AddTo(command);
  AddOptions(command, flags->options);
  command.add_option("--steps", flags->num_steps, "Decode steps, from the last captured queries")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  CLI::Option* id = command.add_option("--id", flags->id, "Use this session instead of a new one");
  command.add_option("--tenant", flags->tenant, "Quota group; default \"default\"");
  command.add_flag("--keep", flags->keep, "Leave the session in the server")->excludes(id);
  command.add_option("--fetch", flags->fetch,
                     "Write K and V: .safetensors, or a container (.dskv) for any other name");
  CLI::Option* json = command.add_flag("--json", flags->json, "Machine-readable answer on stdout");
  command.add_flag("--with-tokens", flags->with_tokens, "Also list the last step's tokens")
      ->needs(json);
  command.callback([flags, &exit_code] { exit_code = Run(*flags); });
}

void AddSessions(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand("sessions", "Sessions that the server holds");
  command.require_subcommand(1);
  auto flags = std::make_shared<SessionFlags>();
  CLI::App& get = *command.add_subcommand("get", "State and memory of one");
  CLI::App& release = *command.add_subcommand("release", "End one and free its memory");
  for (CLI::App* sub : {&get, &release}) {
    sub->add_option("id", flags->id, "Session")->required();
    sub->add_option("--tenant", flags->tenant, "Quota group; default \"default\"");
    flags->connection.AddTo(*sub);
    sub->add_flag("--json", flags->json, "Machine-readable answer on stdout");
  }
  get.callback([flags, &exit_code] { exit_code = RunGet(*flags); });
  release.callback([flags, &exit_code] { exit_code = RunRelease(*flags); });
}

}  // namespace dynsplit::cli
