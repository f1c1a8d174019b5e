// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/flags.h"
#include "client/cli/plots.h"
#include "client/cli/report.h"
#include "client/cli/request.h"

namespace dynsplit::cli {
namespace {

struct Flags {
  ConnectionFlags connection;
  CaptureFlags capture;
  PolicyFlags policy;
  std::string output, plots, summary;
  bool plan_only = false, json = false, shadow = false, no_receipt = false, quiet = false;
};

absl::StatusOr<CompressResult> Call(const Flags& flags, const Capture& capture) {
  const auto client = flags.connection.Connect();
  if (!client.ok()) return client.status();
  CompressJob job = MakeJob(capture, flags.capture, flags.policy.Get());
  job.begin.set_shadow(flags.shadow);
  job.begin.set_no_receipt(flags.no_receipt);
  ProgressBar bar(!flags.quiet && !flags.json);
  job.on_progress = [&](const Progress& progress) {
    bar.Show(progress, capture.shape.num_layers());
  };
  return flags.plan_only ? (*client)->Plan(job) : (*client)->Compress(job);
}

// Everything but the answer on the console.
absl::Status WriteFiles(const Flags& flags, const Capture& capture, const CompressResult& result) {
  if (!flags.output.empty()) {
    if (absl::Status status = WriteResult(flags.output, capture, result); !status.ok()) {
      return status;
    }
  }
  if (!flags.plots.empty()) {
    if (absl::Status status = PlotAll(MakePlotData(capture, result), flags.plots); !status.ok()) {
      return status;
    }
  }
  if (flags.summary.empty()) return absl::OkStatus();
  const std::string key = capture.text_kind.empty()
                              ? std::filesystem::path(flags.capture.input).stem().string()
                              : capture.text_kind;
  return MergeSummary(flags.summary, key, SummaryEntry(capture, result));
}

void PrintHuman(const Flags& flags, const Capture& capture, const CompressResult& result) {
  const v1::CompressEnd& end = result.end;
  std::cout << DescribePolicy(end.plan().policy()) << "\n";
  if (!end.plan().fallback_preset().empty()) {
    std::cout << "evidence was missing: fell back to " << end.plan().fallback_preset() << "\n";
  }
  std::cout << HumanCount(capture.shape.num_tokens()) << " tokens in "
            << HumanCount(end.plan().num_blocks()) << " semantic blocks, " << end.backend() << ", "
            << HumanDuration(result.elapsed) << "\n\n"
            << HumanReport(end.plan(), end.receipt()) << "\n";
  const int64_t out = flags.shadow ? end.shadow_bytes_out() : end.bytes_out();
  if (end.bytes_in() > 0 && !flags.plan_only) {
    std::cout << "bytes    " << HumanBytes(static_cast<double>(end.bytes_in())) << " -> "
              << HumanBytes(static_cast<double>(out)) << "  ("
              << Percent(static_cast<double>(out) / static_cast<double>(end.bytes_in()))
              << (flags.shadow ? ", shadow: originals returned)\n" : ")\n");
  }
  if (end.has_receipt() && !std::isnan(end.receipt().expected_divergence())) {
    std::cout << "loss     some " << Decimal(end.receipt().expected_divergence(), 3)
              << " nats a token expected\n";
  }
  std::cout << "plan     " << end.plan().hash() << "\n";
  if (!end.representation_salt().empty()) {
    std::cout << "salt     " << end.representation_salt() << "\n";
  }
  if (!flags.output.empty()) std::cout << "written  " << flags.output << "\n";
  if (!flags.plots.empty()) std::cout << "plots    " << flags.plots << "\n";
}

int Run(const Flags& flags) {
  const absl::StatusOr<Capture> capture = LoadInput(flags.capture);
  if (!capture.ok()) return PrintError(capture.status());
  const absl::StatusOr<CompressResult> result = Call(flags, *capture);
  if (!result.ok()) return PrintError(result.status());
  if (absl::Status status = WriteFiles(flags, *capture, *result); !status.ok()) {
    return PrintError(status);
  }
  if (flags.json) {
    std::cout << JsonReport(*result).dump(2) << "\n";
    return kExitOk;
  }
  if (!flags.quiet) PrintHuman(flags, *capture, *result);
  if (flags.summary.empty()) return kExitOk;
  const absl::StatusOr<std::string> table = SummaryTable(flags.summary);
  if (!table.ok()) return PrintError(table.status());
  std::cout << (flags.quiet ? "" : "\n") << *table;
  return kExitOk;
}

std::shared_ptr<Flags> AddCommon(CLI::App& command, int& exit_code) {
  auto flags = std::make_shared<Flags>();
  flags->capture.AddTo(command);
  flags->policy.AddTo(command);
  flags->connection.AddTo(command);
  CLI::Option* json = command.add_flag("--json", flags->json, "Machine-readable answer on stdout");
  command
      .add_flag("-q,--quiet", flags->quiet, "Neither progress nor answer; only --summary's table")
      ->excludes(json);
  command.add_option("--plots", flags->plots, "Folder for plots (PNG)");
  command.callback([flags, &exit_code] { exit_code = Run(*flags); });
  return flags;
}

}  // namespace

void AddCompress(CLI::App& app, int& exit_code) {
  CLI::App& command =
      *app.add_subcommand("compress", "Compress a captured key-value cache into pages");
  const std::shared_ptr<Flags> flags = AddCommon(command, exit_code);
  command.add_option("-o,--output", flags->output,
                     "Result: .safetensors, or a container (.dskv) for any other name");
  command.add_option("--summary", flags->summary,
                     "JSON file that collects one entry a text kind; prints them as a table");
  command.add_flag("--shadow", flags->shadow,
                   "Return the originals, report what compression would have done");
  command.add_flag("--no-receipt", flags->no_receipt, "Do not measure what compression cost");
}

void AddPlan(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand("plan", "Decide what would be kept; move nothing");
  AddCommon(command, exit_code)->plan_only = true;
}

}  // namespace dynsplit::cli
