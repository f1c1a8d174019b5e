// SPDX-License-Identifier: Apache-2.0
//
// Flags that several commands share, and what they stand for.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/client.h"
#include "dynsplit/v1/types.pb.h"

namespace dynsplit::cli {

// How to reach the server.
struct ConnectionFlags {
  std::string target = "127.0.0.1:8001";
  double timeout_seconds = 300;
  int chunk_kib = 2048;
  int num_channels = 1;

  void AddTo(CLI::App& app);
  absl::StatusOr<std::unique_ptr<Client>> Connect() const;
};

// Every choice of a policy; what is not given is the preset's or the server's default.
class PolicyFlags {
 public:
  PolicyFlags() = default;
  PolicyFlags(const PolicyFlags&) = delete;  // options write through references to policy_
  PolicyFlags& operator=(const PolicyFlags&) = delete;

  void AddTo(CLI::App& app);
  // Only what was given is present.
  v1::Policy Get() const;

 private:
  v1::Policy policy_;
};

// A request made from a capture file.
struct CaptureFlags {
  std::string input;
  std::vector<int32_t> layers;  // of the capture; empty = all
  int32_t num_window_queries = 0;

  void AddTo(CLI::App& app);
};

}  // namespace dynsplit::cli
