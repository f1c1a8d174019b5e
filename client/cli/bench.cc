// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <iostream>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/flags.h"
#include "client/cli/report.h"
#include "client/cli/request.h"

namespace dynsplit::cli {
namespace {

struct Flags {
  ConnectionFlags connection;
  CaptureFlags capture;
  PolicyFlags policy;
  int num_requests = 50;
  int parallel = 1;
  int warmup = 3;
  bool json = false, no_receipt = false;
};

// What all threads measured.
struct Samples {
  absl::Mutex mu;
  std::vector<double> seconds ABSL_GUARDED_BY(mu);
  std::vector<double> server_seconds ABSL_GUARDED_BY(mu);
  int64_t sent_bytes ABSL_GUARDED_BY(mu) = 0;
  int64_t received_bytes ABSL_GUARDED_BY(mu) = 0;
  absl::Status error ABSL_GUARDED_BY(mu);
};

double Percentile(const std::vector<double>& sorted, double share) {
  const auto rank =
      static_cast<size_t>(std::lround(share * static_cast<double>(sorted.size() - 1)));
  return sorted[rank];
}

// Requests one after another until none is left or one failed.
void Work(Client& client, const CompressJob& job, std::atomic<int>& left, Samples& samples) {
  while (left.fetch_sub(1) > 0) {
    const absl::StatusOr<CompressResult> result = client.Compress(job);
    absl::MutexLock lock(&samples.mu);
    if (!result.ok()) {
      samples.error.Update(result.status());
      left.store(0);
      return;
    }
    samples.seconds.push_back(absl::ToDoubleSeconds(result->elapsed));
    samples.server_seconds.push_back(result->end.total_seconds());
    samples.sent_bytes += result->sent_bytes;
    samples.received_bytes += result->received_bytes;
  }
}

absl::Duration RunRound(Client& client, const CompressJob& job, int parallel, int num_requests,
                        Samples& samples) {
  std::atomic<int> left{num_requests};
  const absl::Time start = absl::Now();
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(parallel));
  for (int i = 0; i < parallel; ++i) {
    threads.emplace_back([&] { Work(client, job, left, samples); });
  }
  for (std::thread& thread : threads) thread.join();
  return absl::Now() - start;
}

int Report(const Flags& flags, absl::Duration wall, Samples& samples) {
  absl::MutexLock lock(&samples.mu);
  if (!samples.error.ok()) return PrintError(samples.error);
  std::sort(samples.seconds.begin(), samples.seconds.end());
  std::sort(samples.server_seconds.begin(), samples.server_seconds.end());
  const double seconds = absl::ToDoubleSeconds(wall);
  const auto sent = static_cast<double>(samples.sent_bytes);
  const auto received = static_cast<double>(samples.received_bytes);
  const double p50 = Percentile(samples.seconds, 0.50);
  const double p99 = Percentile(samples.seconds, 0.99);
  const double server_p50 = Percentile(samples.server_seconds, 0.50);
  if (flags.json) {
    std::cout << nlohmann::json({{"requests", samples.seconds.size()},
                                 {"parallel", flags.parallel},
                                 {"wall_seconds", seconds},
                                 {"requests_per_second",
                                  static_cast<double>(samples.seconds.size()) / seconds},
                                 {"latency_p50_seconds", p50},
                                 {"latency_p90_seconds", Percentile(samples.seconds, 0.90)},
                                 {"latency_p99_seconds", p99},
                                 {"latency_max_seconds", samples.seconds.back()},
                                 {"server_p50_seconds", server_p50},
                                 {"sent_bytes_per_second", sent / seconds},
                                 {"received_bytes_per_second", received / seconds}})
                     .dump(2)
              << "\n";
    return kExitOk;
  }
  const auto duration = [](double value) { return HumanDuration(absl::Seconds(value)); };
  std::cout << Table(
      {{"requests", "parallel", "req/s", "p50", "p90", "p99", "max", "server p50", "in", "out"},
       {HumanCount(static_cast<int64_t>(samples.seconds.size())), absl::StrCat(flags.parallel),
        Decimal(static_cast<double>(samples.seconds.size()) / seconds, 1), duration(p50),
        duration(Percentile(samples.seconds, 0.90)), duration(p99),
        duration(samples.seconds.back()), duration(server_p50),
        absl::StrCat(HumanBytes(sent / seconds), "/s"),
        absl::StrCat(HumanBytes(received / seconds), "/s")}});
  return kExitOk;
}

int Run(const Flags& flags) {
  const absl::StatusOr<Capture> capture = LoadInput(flags.capture);
  if (!capture.ok()) return PrintError(capture.status());
  const auto client = flags.connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  CompressJob job = MakeJob(*capture, flags.capture, flags.policy.Get());
  job.begin.set_no_receipt(flags.no_receipt);
  Samples warm;
  RunRound(**client, job, flags.parallel, flags.warmup, warm);
  {
    absl::MutexLock lock(&warm.mu);
    if (!warm.error.ok()) return PrintError(warm.error);
  }
  Samples samples;
  const absl::Duration wall = RunRound(**client, job, flags.parallel, flags.num_requests, samples);
  return Report(flags, wall, samples);
}

}  // namespace

void AddBench(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand("bench", "Repeat a request and report its latency");
  auto flags = std::make_shared<Flags>();
  flags->capture.AddTo(command);
  flags->policy.AddTo(command);
  flags->connection.AddTo(command);
  command.add_option("-n,--requests", flags->num_requests, "Requests to measure")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command.add_option("-j,--parallel", flags->parallel, "Requests at a time")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command.add_option("--warmup", flags->warmup, "Requests before measuring")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  command.add_flag("--no-receipt", flags->no_receipt, "Do not measure what compression cost");
  command.add_flag("--json", flags->json, "Machine-readable answer on stdout");
  command.callback([flags, &exit_code] { exit_code = Run(*flags); });
}

}  // namespace dynsplit::cli
