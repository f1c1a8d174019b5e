// SPDX-License-Identifier: Apache-2.0
//
// The inline byte road: client process (this one) to server process (dynsplitd on the CPU backend),
// beside raw sockets, memcpy and generated gRPC code of the same run.
//
// An upload is a Compress that keeps 64 tokens by recency without a receipt, so that what the
// server computes is a gather of next to nothing; a download is a Fetch of a session of the same
// tensors, which gathers them into pages (a copy) on the way. Rounds go through all rows in turn;
// a share is the median of the rounds' own ratios.
#include <sys/prctl.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/client.h"
#include "proto/wire/channel.h"
#include "tests/bench/report.h"
#include "tests/bench/transport_peers.h"

namespace dynsplit::bench {
namespace {

constexpr int32_t kLayers = 16;
constexpr int64_t kTokens = 8192;
constexpr int32_t kHeads = 8;
constexpr int32_t kHeadDim = 64;
constexpr size_t kTensorBytes = size_t{kTokens} * kHeads * kHeadDim * 2;
constexpr size_t kBytes = 2 * kLayers * kTensorBytes;  // 256 MiB
constexpr double kGiB = 1 << 30;
constexpr int kPings = 2000;

template <typename T>
T OrDie(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::cerr << value.status() << "\n";
  std::exit(1);
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double Percentile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
}

double Seconds(const std::function<void()>& work) {
  const absl::Time start = absl::Now();
  work();
  return absl::ToDoubleSeconds(absl::Now() - start);
}

// Until every connection answers: calls take them in turn, and one that failed rests a while.
void AwaitServer(Client& client, int num_channels) {
  int answers = 0;
  for (int i = 0; i < 1000 && answers < num_channels; ++i) {
    answers = client.GetServerInfo().ok() ? answers + 1 : 0;
    if (answers == 0) absl::SleepFor(absl::Milliseconds(20));
  }
}

CompressJob MakeJob(const std::vector<std::byte>& source) {
  CompressJob job;
  v1::SequenceShape& shape = *job.begin.mutable_shape();
  shape.set_num_layers(kLayers);
  shape.set_num_query_heads(kHeads);
  shape.set_num_kv_heads(kHeads);
  shape.set_head_dim(kHeadDim);
  shape.set_num_tokens(kTokens);
  job.begin.mutable_policy()->set_preset("streamingllm");
  job.begin.mutable_policy()->mutable_budget()->set_tokens_per_head(64);
  job.begin.set_no_receipt(true);
  for (int32_t layer = 0; layer < kLayers; ++layer) {
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

// Rounds of one way to move the bytes.
struct Samples {
  std::vector<double> seconds;
  double cpu_seconds = 0;  // both ends, all rounds
  double Rate() const { return kBytes / kGiB / Median(seconds); }
  double CpuPerGiB() const {
    return cpu_seconds / (static_cast<double>(seconds.size()) * kBytes / kGiB);
  }
};

// Median of the rounds' ratios of rates.
double Share(const Samples& samples, const Samples& ceiling) {
  std::vector<double> ratios;
  for (size_t i = 0; i < samples.seconds.size(); ++i) {
    ratios.push_back(ceiling.seconds[i] / samples.seconds[i]);
  }
  return Median(ratios);
}

class Bench {
 public:
  Bench(const std::string& self, const std::string& server, std::string directory)
      : directory_(std::move(directory)),
        server_path_(server),
        raw_port_(FreePort()),
        raw_({self, "raw", absl::StrCat(raw_port_), directory_ + "/raw"}),
        raw_tcp_(raw_port_, ""),
        raw_unix_(0, directory_ + "/raw"),
        port_(FreePort()),
        server_({server, "--backend", "cpu", "--listen", absl::StrCat("127.0.0.1:", port_),
                 "--unix-socket", directory_ + "/server", "--metrics-listen", "", "--log-level",
                 "error", "--default-profile", "smollm2_table7"}),
        naive_port_(FreePort()),
        naive_server_({self, "naive-server", absl::StrCat(naive_port_)}),
        naive_client_({self, "naive-client", absl::StrCat(naive_port_), absl::StrCat(kBytes)}),
        source_(kBytes),
        place_(kBytes, std::byte{1}),
        job_(MakeJob(source_)) {
    // Finite bf16 numbers.
    for (size_t i = 0; i < kBytes; ++i) source_[i] = std::byte{static_cast<uint8_t>(i % 61)};
  }

  void Run(int rounds);

 private:
  std::string Target(bool tcp) const {
    return tcp ? absl::StrCat("127.0.0.1:", port_) : "unix:" + directory_ + "/server";
  }
  Client& ClientOf(bool tcp, int streams) {
    std::unique_ptr<Client>& client = clients_[{tcp, streams}];
    if (client == nullptr) {
      client = OrDie(Client::Connect(Target(tcp), {.num_channels = streams}));
      AwaitServer(*client, streams);
    }
    return *client;
  }
  void Measure(const std::string& name, const Child& peer, const std::function<void()>& work);
  void Round();
  void Control();
  void Memory(int num_uploads, int streams, const std::string& target);
  void ReportRoads();

  const std::string directory_;
  const std::string server_path_;
  const int raw_port_;
  Child raw_;
  RawConnection raw_tcp_;  // each end keeps its place between rounds
  RawConnection raw_unix_;
  const int port_;
  Child server_;
  const int naive_port_;
  Child naive_server_;
  Child naive_client_;
  std::vector<std::byte> source_;
  std::vector<std::byte> place_;
  CompressJob job_;
  std::string session_;
  std::map<std::pair<bool, int>, std::unique_ptr<Client>> clients_;
  std::map<std::string, Samples> samples_;
  std::vector<double> faults_;         // of the server, per GiB of upload
  std::vector<double> client_faults_;  // of this process, per GiB of download
};

void Bench::Measure(const std::string& name, const Child& peer, const std::function<void()>& work) {
  Samples& samples = samples_[name];
  const double cpu = OwnCpuSeconds() + peer.CpuSeconds();
  samples.seconds.push_back(Seconds(work));
  samples.cpu_seconds += OwnCpuSeconds() + peer.CpuSeconds() - cpu;
}

void Bench::Round() {
  const auto upload = [&](bool over_tcp, int streams) {
    Client& client = ClientOf(over_tcp, streams);
    Measure(absl::StrCat("upload/", over_tcp ? "tcp/" : "unix/", streams), server_,
            [&] { OrDie(client.Compress(job_)); });
  };
  const auto download = [&](int streams) {
    Client& client = ClientOf(true, streams);
    CompressJob job;
    job.begin.mutable_target()->set_session_id(session_);
    Measure(absl::StrCat("download/tcp/", streams), server_,
            [&] { OrDie(client.FetchSession(job)); });
  };
  Measure("raw/tcp", raw_, [&] { raw_tcp_.Upload(source_.data(), kBytes); });
  Measure("memcpy", raw_, [&] { std::memcpy(place_.data(), source_.data(), kBytes); });
  const int64_t faults = server_.MinorFaults();
  upload(true, 1);
  faults_.push_back(static_cast<double>(server_.MinorFaults() - faults) / (kBytes / kGiB));
  upload(true, 2);
  Measure("raw/unix", raw_, [&] { raw_unix_.Upload(source_.data(), kBytes); });
  upload(false, 1);
  upload(false, 2);
  upload(true, 4);
  upload(true, 8);
  upload(false, 4);
  upload(false, 8);
  const int64_t own_faults = OwnMinorFaults();
  download(1);
  client_faults_.push_back(static_cast<double>(OwnMinorFaults() - own_faults) / (kBytes / kGiB));
  download(4);
  samples_["naive"].seconds.push_back(naive_client_.Ask("upload"));
}

void Bench::ReportRoads() {
  std::string control;
  std::ifstream("/proc/sys/net/ipv4/tcp_congestion_control") >> control;
  const bool bbr = control == "bbr";
  const std::string up = bbr ? "share >= 0.80" : "share >= 0.62";
  const std::string down = bbr ? "share >= 0.68" : "share >= 0.60";
  const auto row = [&](const std::string& name, const std::string& ceiling,
                       const std::string& target) {
    Row rate = Rate(absl::StrCat("transport/", name), samples_[name].Rate(), "GiB/s",
                    samples_[ceiling].Rate(), target);
    rate.share = Share(samples_[name], samples_[ceiling]);
    Report(rate);
  };
  row("raw/tcp", "memcpy", "");
  row("raw/unix", "memcpy", "");
  for (const int streams : {1, 2, 4, 8}) row(absl::StrCat("upload/tcp/", streams), "raw/tcp", up);
  for (const int streams : {1, 2, 4, 8}) {
    row(absl::StrCat("upload/unix/", streams), "raw/unix", "share >= 0.60");
  }
  for (const int streams : {1, 4}) row(absl::StrCat("download/tcp/", streams), "raw/tcp", down);
  for (const int streams : {1, 4}) {
    Report(Cost(absl::StrCat("transport/upload/tcp/", streams, "/cpu"),
                samples_[absl::StrCat("upload/tcp/", streams)].CpuPerGiB(), "s/GiB",
                samples_["raw/tcp"].CpuPerGiB(), "share >= 0.625"));
  }
  Row naive = Cost("transport/upload/tcp/4/time", 1 / samples_["upload/tcp/4"].Rate(), "s/GiB",
                   1 / samples_["raw/tcp"].Rate(), "peer >= 2.3");
  naive.peer = 1 / samples_["naive"].Rate();
  Report(naive);
  const auto faults = [](const std::string& name, const std::vector<double>& per_gib) {
    Report({.name = name,
            .value = Median(per_gib),
            .unit = "1/GiB",
            .ceiling = std::nullopt,
            .share = std::nullopt,
            .target = "value <= 1000",
            .peer = std::nullopt});
  };
  faults("transport/upload/server faults", faults_);
  faults("transport/download/client faults", client_faults_);
}

// Unary calls over the unix socket, alone and beside an upload.
void Bench::Control() {
  Client& client = ClientOf(false, 1);
  std::vector<double> raw;
  std::vector<double> idle;
  for (int i = 0; i < kPings; ++i) {
    raw.push_back(1e6 * Seconds([&] { raw_unix_.Ping(); }));
    idle.push_back(1e6 * Seconds([&] { OrDie(client.GetServerInfo()); }));
  }
  std::atomic<bool> over = false;
  std::thread uploads([&] {
    while (!over) OrDie(ClientOf(true, 2).Compress(job_));
  });
  std::vector<double> busy;
  for (int i = 0; i < kPings / 2; ++i) {
    busy.push_back(1e6 * Seconds([&] { OrDie(client.GetServerInfo()); }));
  }
  over = true;
  uploads.join();
  Report(Cost("transport/control/unix/p50", Percentile(idle, 0.5), "us", Percentile(raw, 0.5),
              "value <= 120"));
  Report(Cost("transport/control/unix/p99", Percentile(idle, 0.99), "us", Percentile(raw, 0.99),
              "value <= 250"));
  Report(Cost("transport/control/unix/during upload/p99", Percentile(busy, 0.99), "us",
              Percentile(raw, 0.99), "value <= 2000"));
}

// Peak memory of a fresh server beyond what it started with and what the uploads reserved for
// staging: negative where not all of that was needed. Eight senders are slow.
void Bench::Memory(int num_uploads, int streams, const std::string& target) {
  const std::string socket = directory_ + "/fresh";
  const Child fresh({server_path_, "--backend", "cpu", "--listen", "", "--unix-socket", socket,
                     "--metrics-listen", "", "--log-level", "error"});
  const auto client = OrDie(Client::Connect("unix:" + socket, {.num_channels = streams}));
  AwaitServer(*client, streams);
  fresh.ResetPeakRss();
  const int64_t base = fresh.PeakRssBytes();
  std::atomic<int64_t> reserved = 0;
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_uploads));
  for (int i = 0; i < num_uploads; ++i) {
    threads.emplace_back([&] {
      CompressJob job = job_;
      if (num_uploads > 1) {
        job.on_progress = [](const Progress&) { absl::SleepFor(absl::Milliseconds(30)); };
      }
      reserved += OrDie(client->Compress(job)).accepted.reserved_bytes();
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::error_code ignored;
  std::filesystem::remove(socket, ignored);
  Report({.name = absl::StrCat("transport/memory beyond staging/", num_uploads, " uploads/",
                               streams, " streams"),
          .value = static_cast<double>(fresh.PeakRssBytes() - base - reserved) / (1 << 20),
          .unit = "MiB",
          .ceiling = std::nullopt,
          .share = std::nullopt,
          .target = target,
          .peer = std::nullopt});
}

void Bench::Run(int rounds) {
  CompressJob open = job_;
  open.begin.clear_policy();
  open.begin.clear_no_receipt();
  open.begin.mutable_policy()->mutable_segmentation()->set_method(v1::Segmentation::METHOD_FIXED);
  session_ = OrDie(ClientOf(true, 1).OpenSession(open)).end.session().session_id();
  Round();  // warms all pages and connections
  samples_.clear();
  faults_.clear();
  client_faults_.clear();
  for (int i = 0; i < rounds; ++i) Round();
  ReportRoads();
  Control();
  Memory(1, 1, "value <= 32");
  Memory(1, 4, "value <= 32");
  Memory(8, 1, "value <= 64");
}

int Main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string role = arguments.empty() ? "" : arguments[0];
  if (role == "raw") RunRawServer(std::stoi(arguments.at(1)), arguments.at(2));
  if (role == "naive-server") RunNaiveServer(std::stoi(arguments.at(1)));
  if (role == "naive-client") {
    RunNaiveClient(std::stoi(arguments.at(1)), std::stoull(arguments.at(2)));
  }
  wire::InitProcessMemoryPolicy();
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe");
  const char* const named = std::getenv("DYNSPLITD");
  const std::string server =
      named != nullptr ? named : (self.parent_path() / DYNSPLITD_FROM_HERE).string();
  int rounds = 7;
  if (!role.empty() && !absl::SimpleAtoi(role, &rounds)) {
    std::cerr << "usage: bench_transport [rounds]; DYNSPLITD names another server\n";
    return 2;
  }
  std::string directory = (std::filesystem::temp_directory_path() / "dynsplit-XXXXXX").string();
  if (mkdtemp(directory.data()) == nullptr) return 1;
  Bench(self, server, directory).Run(rounds);
  std::filesystem::remove_all(directory);
  return 0;
}

}  // namespace
}  // namespace dynsplit::bench

int main(int argc, char** argv) { return dynsplit::bench::Main(argc, argv); }
