// SPDX-License-Identifier: Apache-2.0
#include "client/cli/decode_steps.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/attention.h"

namespace dynsplit::cli {
namespace {

// Rows of one step that may travel in a message (which holds at most 8 MiB).
constexpr int64_t kMaxRowBytes = int64_t{4} << 20;
// Multiply-adds spent on attention mass.
constexpr int64_t kMaxMassWork = int64_t{1} << 31;

// Row of the query that is `behind` queries before the last one.
absl::Span<const std::byte> QueryRow(const Capture& capture, const Capture::Layer& layer,
                                     int64_t behind) {
  const absl::Span<const std::byte> rows = capture.WindowQueries(layer, behind + 1);
  return rows.first(rows.size() / static_cast<size_t>(behind + 1));
}

v1::SelectRequest MakeStep(const Capture& capture, const StepsRequest& request, int64_t behind) {
  v1::SelectRequest select;
  select.set_tenant(request.session.tenant());
  v1::SequenceStep& step = *select.add_sequences();
  step.set_session_id(request.session.session_id());
  step.set_dtype(capture.dtype);
  step.set_num_queries(1);
  step.set_tokens_per_head(request.tokens_per_head);
  for (const Capture::Layer& layer : capture.layers) {
    const absl::Span<const std::byte> row = QueryRow(capture, layer, behind);
    step.mutable_query_data()->append(reinterpret_cast<const char*>(row.data()), row.size());
  }
  return select;
}

absl::Status CheckFits(const Capture& capture, const v1::SessionInfo& session) {
  const v1::SequenceShape& shape = session.shape();
  if (shape.num_layers() == capture.shape.num_layers() &&
      shape.num_query_heads() == capture.shape.num_query_heads() &&
      shape.num_kv_heads() == capture.shape.num_kv_heads() &&
      shape.head_dim() == capture.shape.head_dim() &&
      shape.num_tokens() == capture.shape.num_tokens()) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("session ", session.session_id(), " has ", shape.num_layers(), " layers, ",
                   shape.num_query_heads(), "/", shape.num_kv_heads(), " heads of ",
                   shape.head_dim(), ", ", shape.num_tokens(), " tokens; the capture does not"));
}

std::vector<int32_t> Int32s(const std::string& bytes) {
  std::vector<int32_t> values(bytes.size() / sizeof(int32_t));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(int32_t));
  return values;
}

// The layers of the last step.
absl::Status MeasureLayers(const Capture& capture, const v1::SessionInfo& session,
                           const v1::SequenceSelection& selection, StepsReport& report) {
  const std::vector<int32_t> tokens = Int32s(selection.tokens());
  const size_t layer_size = static_cast<size_t>(selection.num_groups()) *
                            static_cast<size_t>(selection.tokens_per_head());
  if (tokens.size() != layer_size * capture.layers.size()) {
    return absl::InternalError(absl::StrCat("server chose ", tokens.size(), " tokens where ",
                                            layer_size * capture.layers.size(), " were said"));
  }
  const int64_t work =
      selection.num_tokens() * capture.shape.num_query_heads() * capture.shape.head_dim();
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  for (size_t l = 0; l < capture.layers.size(); ++l) {
    StepsReport::Layer& layer = report.layers.emplace_back();
    const auto& dense = selection.dense_layers();
    layer.dense = std::find(dense.begin(), dense.end(), static_cast<int32_t>(l)) != dense.end();
    layer.mass_mean = layer.mass_min = layer.dense ? 1 : kUnknown;
    if (layer.dense || work > kMaxMassWork / static_cast<int64_t>(l + 1)) continue;
    const absl::Span<const int32_t> chosen(&tokens[l * layer_size], layer_size);
    if (std::any_of(chosen.begin(), chosen.end(),
                    [&](int32_t token) { return token < 0 || token >= selection.num_tokens(); })) {
      return absl::InternalError("server chose a token that the session does not have");
    }
    const std::vector<double> masses = AttentionMass(
        capture, capture.layers[l], QueryRow(capture, capture.layers[l], 0), selection.num_tokens(),
        chosen, selection.num_groups(), session.policy().scoring().softmax_scale());
    layer.mass_mean =
        std::accumulate(masses.begin(), masses.end(), 0.0) / static_cast<double>(masses.size());
    layer.mass_min = *std::min_element(masses.begin(), masses.end());
  }
  report.tokens = tokens;
  return absl::OkStatus();
}

absl::StatusOr<v1::SequenceSelection> SelectOne(Client& client, const v1::SelectRequest& request,
                                                double* server_seconds) {
  absl::StatusOr<v1::SelectResponse> response = client.Select(request);
  if (!response.ok()) return response.status();
  if (response->sequences_size() != 1) return absl::InternalError("server answered another step");
  if (server_seconds != nullptr) *server_seconds = response->total_seconds();
  return std::move(*response->mutable_sequences(0));
}

}  // namespace

absl::StatusOr<StepsReport> RunSteps(Client& client, const Capture& capture,
                                     const StepsRequest& request) {
  if (absl::Status status = CheckFits(capture, request.session); !status.ok()) return status;
  StepsReport report;
  v1::SequenceSelection last;
  uint64_t generation = 0;
  for (int64_t behind = request.num_steps - 1; behind >= 0; --behind) {
    v1::SelectRequest select = MakeStep(capture, request, behind);
    double server_seconds = 0;
    const absl::Time start = absl::Now();
    absl::StatusOr<v1::SequenceSelection> selection = SelectOne(client, select, &server_seconds);
    if (!selection.ok()) return selection.status();
    report.seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
    report.server_seconds.push_back(server_seconds);
    last = *std::move(selection);
    const int64_t row_bytes = int64_t{8} * capture.shape.head_dim();  // K and V, at most float32
    const int64_t rows = last.tokens_per_head() * last.num_layers() * capture.shape.num_kv_heads();
    if (rows * row_bytes > kMaxRowBytes) continue;
    select.mutable_sequences(0)->mutable_gather()->set_generation(generation);
    selection = SelectOne(client, select, nullptr);
    if (!selection.ok()) return selection.status();
    generation = selection->generation();
    report.moved_rows.push_back(selection->moved_rows());
    report.chosen_rows.push_back(selection->chosen_rows());
  }
  report.num_tokens = last.num_tokens();
  report.tokens_per_head = last.tokens_per_head();
  report.num_groups = last.num_groups();
  report.budget_raised_by_protection = last.budget_raised_by_protection();
  if (absl::Status status = MeasureLayers(capture, request.session, last, report); !status.ok()) {
    return status;
  }
  return report;
}

}  // namespace dynsplit::cli
