// SPDX-License-Identifier: Apache-2.0
//
// dynsplitd: the compression server. The only file that knows every part.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "proto/wire/channel.h"
#include "server/cpu/cpu_backend.h"
#include "server/rpc/server.h"
#include "server/runtime/config.h"
#include "server/runtime/log.h"
#include "server/runtime/self_test.h"
#ifdef DYNSPLIT_HAVE_CUDA
#include "cuda/cuda_backend.h"
#endif

namespace dynsplit {
namespace {

constexpr const char* kVersion = "0.1.0";

// Exit codes, beside 0.
constexpr int kExitFailed = 1;   // could not start, self-test failed, device failed
constexpr int kExitConfig = 78;  // EX_CONFIG: an option is wrong

struct Invocation {
  std::string config_file;
  bool check_config = false;
  bool self_test = false;
  std::map<std::string, std::string> flags;  // as given, by option name
};

std::string_view Text(const absl::Status& status) {
  return {status.message().data(), status.message().size()};
}

void AddFlags(CLI::App& app, Invocation& invocation) {
  app.set_version_flag("--version", absl::StrCat("dynsplitd ", kVersion));
  app.add_option("--config", invocation.config_file,
                 "file of lines name = value; also DYNSPLIT_CONFIG");
  app.add_flag("--check-config", invocation.check_config, "check the configuration and exit");
  app.add_flag("--self-test", invocation.self_test,
               "compress a small example on the chosen backend and exit");
  const ServerConfig defaults;
  for (const ConfigOption& option : ConfigOptions()) {
    const std::string name(option.name);
    app.add_option_function<std::string>(
           "--" + name,
           [&invocation, name](const std::string& value) { invocation.flags[name] = value; },
           std::string(option.help))
        ->default_str(option.get(defaults));
  }
}

// Flags over environment over file over defaults.
absl::StatusOr<ServerConfig> LoadConfig(const Invocation& invocation) {
  ServerConfig config;
  std::string file = invocation.config_file;
  if (const char* variable = std::getenv("DYNSPLIT_CONFIG"); file.empty() && variable != nullptr) {
    file = variable;
  }
  if (!file.empty()) {
    std::ifstream stream(file, std::ios::binary);
    std::ostringstream content;
    content << stream.rdbuf();
    if (!stream) return absl::InvalidArgumentError(absl::StrCat("cannot read '", file, "'"));
    if (absl::Status status = ApplyConfigText(content.str(), config); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(file, ": ", status.message()));
    }
  }
  absl::Status status =
      ApplyEnvironment([](const char* name) { return std::getenv(name); }, config);
  for (const auto& [name, value] : invocation.flags) {
    if (status.ok()) status = SetOption(name, value, config);
  }
  if (status.ok()) status = ValidateConfig(config);
  if (!status.ok()) return status;
  return config;
}

using Backends = std::vector<std::unique_ptr<Backend>>;

// One for each of so many equal shares; 0 stays "the backend's own".
int64_t ShareOf(int64_t whole, size_t num_devices) {
  return whole == 0 ? 0 : std::max<int64_t>(whole / static_cast<int64_t>(num_devices), 1);
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuShare(const ServerConfig& config,
                                                        size_t num_devices) {
  if (num_devices == 1) {
    return CreateCpuBackend(
        {.num_threads = config.threads, .memory_limit_bytes = config.device_memory_bytes});
  }
  const auto processors = static_cast<int32_t>(std::thread::hardware_concurrency());
  const int64_t threads =
      ShareOf(config.threads == 0 ? std::max(processors, 1) : config.threads, num_devices);
  return CreateCpuBackend({.num_threads = static_cast<int>(threads),
                           .memory_limit_bytes = ShareOf(config.device_memory_bytes, num_devices)});
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const ServerConfig& config,
                                                       [[maybe_unused]] int32_t number,
                                                       size_t num_devices) {
#ifdef DYNSPLIT_HAVE_CUDA
  const int num_cuda_devices = config.backend == "cpu" ? 0 : CudaDeviceCount();
  if (num_cuda_devices > 0) {
    return CreateCudaBackend({.device = number,
                              .memory_limit_bytes = config.device_memory_bytes,
                              .pinned_limit_bytes = config.pinned_memory_bytes});
  }
#endif
  if (config.backend == "cuda") {
    return absl::FailedPreconditionError(
        "option backend is 'cuda'; this build or this machine has no CUDA device");
  }
  return CreateCpuShare(config, num_devices);
}

absl::StatusOr<Backends> CreateBackends(const ServerConfig& config) {
  std::vector<int32_t> numbers = {config.device};
  if (!config.devices.empty()) numbers = *ParseDevices(config.devices);  // validated
  Backends backends;
  for (const int32_t number : numbers) {
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        CreateBackend(config, number, numbers.size());
    if (!backend.ok()) return backend.status();
    const BackendInfo& info = (*backend)->info();
    Log(LogLevel::kInfo, "backend",
        {{"backend", std::string_view(info.name)},
         {"device", std::string_view(info.device)},
         {"memory_bytes", info.memory_bytes}});
    backends.push_back(*std::move(backend));
  }
  return backends;
}

void LogConfig(const ServerConfig& config) {
  // One line an option keeps the log flat and greppable.
  for (const ConfigOption& option : ConfigOptions()) {
    const std::string value = option.get(config);
    Log(LogLevel::kInfo, "option", {{"name", option.name}, {"value", std::string_view(value)}});
  }
}

// Waits for SIGTERM or SIGINT (0), or for the last device to fail (1).
int WaitForEnd(const sigset_t& signals, const rpc::Server& server) {
  constexpr timespec kPeriod = {.tv_sec = 0, .tv_nsec = 250'000'000};
  while (true) {
    const int signal = sigtimedwait(&signals, nullptr, &kPeriod);
    if (signal > 0) {
      Log(LogLevel::kInfo, "signal", {{"signal", int64_t{signal}}});
      return 0;
    }
    if (!server.device_status().ok()) return kExitFailed;
  }
}

int RunSelfTest(const Backends& backends) {
  for (const std::unique_ptr<Backend>& backend : backends) {
    const absl::Status status = SelfTest(*backend);
    std::cout << (status.ok() ? absl::StrCat("self-test passed on ", backend->info().name, "\n")
                              : absl::StrCat(status.message(), "\n"));
    if (!status.ok()) return kExitFailed;
  }
  return 0;
}

int Serve(const ServerConfig& config, Backends backends, const sigset_t& signals) {
  absl::StatusOr<std::unique_ptr<rpc::Server>> server =
      rpc::Server::Start(config, std::move(backends), kVersion);
  if (!server.ok()) {
    Log(LogLevel::kError, "cannot start", {{"error", Text(server.status())}});
    return kExitFailed;
  }
  Log(LogLevel::kInfo, "serving",
      {{"version", std::string_view(kVersion)},
       {"listen", std::string_view(config.listen)},
       {"port", int64_t{(*server)->port()}},
       {"unix_socket", std::string_view(config.unix_socket)},
       {"metrics_port", int64_t{(*server)->http_port()}}});
  const int code = WaitForEnd(signals, **server);
  (*server)->Shutdown();
  server->reset();
  Log(LogLevel::kInfo, "stopped");
  return code;
}

int Main(int argc, char** argv) {
  wire::InitProcessMemoryPolicy();
  // Before any thread starts, so that all inherit it: signals are taken by sigtimedwait alone.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);

  Invocation invocation;
  CLI::App app("Compresses LLM key-value caches between prefill and decode.", "dynsplitd");
  app.footer(
      "Every option can also be set as DYNSPLIT_<NAME> or in the --config file; flags win "
      "over the environment, the environment over the file.");
  AddFlags(app, invocation);
  CLI11_PARSE(app, argc, argv);

  const absl::StatusOr<ServerConfig> config = LoadConfig(invocation);
  if (!config.ok()) {
    std::cerr << "dynsplitd: " << config.status().message() << "\n";
    return kExitConfig;
  }
  if (invocation.check_config) {
    std::cout << "configuration is valid\n";
    for (const ConfigOption& option : ConfigOptions()) {
      std::cout << option.name << " = " << option.get(*config) << "\n";
    }
    return 0;
  }
  if (!SetLogLevel(std::string_view(config->log_level)).ok()) return kExitConfig;
  absl::StatusOr<Backends> backends = CreateBackends(*config);
  if (!backends.ok()) {
    std::cerr << "dynsplitd: " << backends.status().message() << "\n";
    return kExitFailed;
  }
  if (invocation.self_test) return RunSelfTest(*backends);
  LogConfig(*config);
  return Serve(*config, *std::move(backends), signals);
}

}  // namespace
}  // namespace dynsplit

int main(int argc, char** argv) {
  try {
    return dynsplit::Main(argc, argv);
  } catch (const std::exception& error) {  // of the libraries; ours throw none
    std::fprintf(stderr, "dynsplitd: %s\n", error.what());
    return 1;
  }
}
