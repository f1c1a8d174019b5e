// SPDX-License-Identifier: Apache-2.0
//
// What a compression did, for people and for scripts.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "client/cpp/capture.h"
#include "client/cpp/job.h"

namespace dynsplit::cli {

// "dynsplit: dynamic(14±6, smollm2), window-queries, uniform 25.0 %, evict, scope layer"
std::string DescribePolicy(const v1::Policy& policy);

// A table of the layers, then totals.
std::string HumanReport(const v1::Plan& plan, const v1::Receipt& receipt);

// The messages of a result, tensors left out. 64-bit integers are numbers, NaN and infinities null.
nlohmann::json JsonReport(const CompressResult& result);
nlohmann::json ToJson(const google::protobuf::Message& message);

// One entry of a summary. Means over layers are integers where the layers agree.
nlohmann::ordered_json SummaryEntry(const Capture& capture, const CompressResult& result);
// Puts the entry under `key` into the JSON object in the file, which is made if absent, and
// replaces the file atomically; prose, code and dialogue come first in it. INVALID_ARGUMENT where
// the file holds anything else.
absl::Status MergeSummary(const std::string& path, const std::string& key,
                          const nlohmann::ordered_json& entry);
// All entries of the file, one column each; then their policy, or policies where they differ.
absl::StatusOr<std::string> SummaryTable(const std::string& path);

}  // namespace dynsplit::cli
