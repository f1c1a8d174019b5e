// SPDX-License-Identifier: Apache-2.0
//
// A session used as a decode engine would use it: one Select a step, and rows kept between steps.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/capture.h"
#include "client/cpp/client.h"

namespace dynsplit::cli {

struct StepsRequest {
  v1::SessionInfo session;
  int32_t num_steps = 1;        // of the capture's last queries, oldest first; at least 1
  int64_t tokens_per_head = 0;  // 0 = the policy's budget
};

struct StepsReport {
  struct Layer {
    bool dense = false;
    // Share of the query heads' attention that the chosen tokens hold in the last step; NaN where
    // the capture is too large to compute it here.
    double mass_mean = 0, mass_min = 0;
  };
  int64_t num_tokens = 0;
  int64_t tokens_per_head = 0;
  int32_t num_groups = 0;
  bool budget_raised_by_protection = false;
  std::vector<Layer> layers;
  std::vector<int32_t> tokens;         // of the last step, [layers, groups, tokens_per_head]
  std::vector<double> seconds;         // of each step's Select, seen from here
  std::vector<double> server_seconds;  // of them, in the server
  // Of each step's gather; empty where the rows are too many for one message.
  std::vector<int64_t> moved_rows, chosen_rows;
};

// FAILED_PRECONDITION where the session does not fit the capture.
absl::StatusOr<StepsReport> RunSteps(Client& client, const Capture& capture,
                                     const StepsRequest& request);

}  // namespace dynsplit::cli
