// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/compress.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

// Evaluations of the quality floor's bisection, beside those of its two ends.
constexpr int kMaxBisections = 10;

// One layer on its way through the stages. Host memory that the device writes lives in Candidates:
// where a function gives one up, the device is done with it.
class LayerCompressor {
 public:
  LayerCompressor(const SequenceContext& context, const LayerTensors& tensors, bool with_pages,
                  Backend& backend, StageTimer& timer)
      : context_(context),
        tensors_(tensors),
        with_pages_(with_pages),
        backend_(backend),
        stream_(timer.stream()),
        timer_(timer) {}

  absl::StatusOr<LayerResult> Run() {
    absl::StatusOr<LayerScores> scores = ScoreLayer(context_, tensors_, backend_, stream_);
    if (!scores.ok()) return scores.status();
    scores_ = *std::move(scores);
    timer_.End(LayerStage::kScore);

    absl::StatusOr<Candidate> best = floor().empty() ? Evaluate(0, with_pages_) : ReachFloor();
    if (!best.ok()) return best.status();
    if (!best->measured && context_.spec.with_receipt) {
      if (auto status = Measure(*best); !status.ok()) return Abandon(std::move(status), stream_);
    }
    LayerResult result;
    result.decision = std::move(best->decision);
    if (with_pages_) result.pages = std::move(best->pages);
    result.receipt = best->receipt;
    result.figures = std::move(best->figures);
    return result;
  }

 private:
  struct Candidate {
    LayerDecision decision;
    LayerPages pages;  // empty where neither asked for nor needed
    LayerReceipt receipt;
    std::optional<ReceiptFigures> figures;  // of the receipt, until it is read
    bool measured = false;
  };

  const QualityFloor& floor() const { return context_.spec.policy.quality_floor; }

  absl::StatusOr<Candidate> Evaluate(int64_t min_num_kept, bool apply) {
    Candidate candidate;
    absl::StatusOr<LayerDecision> decision =
        EnqueuePlan(context_, scores_, tensors_.layer, min_num_kept, backend_, stream_);
    if (!decision.ok()) return decision.status();
    candidate.decision = *std::move(decision);
    candidate.receipt = NotMeasured(tensors_.layer);
    timer_.End(LayerStage::kSelect);
    if (apply) {
      if (auto status = Apply(candidate); !status.ok()) return Abandon(std::move(status), stream_);
    }
    return candidate;
  }

  absl::Status Apply(Candidate& candidate) {
    absl::StatusOr<LayerPages> pages =
        ApplyLayer(context_, candidate.decision, tensors_, backend_, stream_);
    if (!pages.ok()) return pages.status();
    candidate.pages = *std::move(pages);
    timer_.End(LayerStage::kGather);
    return absl::OkStatus();
  }

  // A plan alone has no pages; where values are there, they are made for the receipt.
  absl::Status Measure(Candidate& candidate) {
    const bool can_measure_error = tensors_.queries.data != nullptr &&
                                   tensors_.keys.data != nullptr && tensors_.values.data != nullptr;
    const bool wants_error = context_.spec.with_receipt || floor().max_output_relative_error > 0;
    if (can_measure_error && wants_error && candidate.pages.key_pages.empty()) {
      if (auto status = Apply(candidate); !status.ok()) return status;
    }
    return MeasureOnly(candidate);
  }

  absl::Status MeasureOnly(Candidate& candidate) {
    absl::StatusOr<ReceiptFigures> figures =
        EnqueueReceipt(context_, candidate.decision, candidate.pages, tensors_, backend_, stream_);
    if (!figures.ok()) return figures.status();
    candidate.figures = *std::move(figures);
    candidate.measured = true;
    timer_.End(LayerStage::kReceipt);
    return absl::OkStatus();
  }

  // Enough to judge the floor: pages only where it asks for the output's error.
  absl::StatusOr<Candidate> Judge(int64_t min_num_kept) {
    const bool needs_error = floor().max_output_relative_error > 0;
    absl::StatusOr<Candidate> candidate = Evaluate(min_num_kept, needs_error);
    if (!candidate.ok()) return candidate;
    absl::Status status = MeasureOnly(*candidate);
    status.Update(stream_.Synchronize());
    if (!status.ok()) return status;
    timer_.Resolve();
    ReadDecision(candidate->decision);
    candidate->receipt = ReadReceipt(*std::exchange(candidate->figures, std::nullopt));
    return candidate;
  }

  // Comparisons are written so that a NaN fails.
  bool Reaches(const Candidate& candidate) const {
    // All tokens hold all mass; its fp32 sum may fall short of 1 by rounding.
    const bool keeps_all = candidate.decision.plan.num_kept == context_.spec.shape.num_tokens;
    const bool mass_ok =
        keeps_all || candidate.receipt.mass_mean >= floor().min_retained_attention_mass;
    const bool error_ok = floor().max_output_relative_error == 0 ||
                          candidate.receipt.error_mean <= floor().max_output_relative_error;
    return mass_ok && error_ok;
  }

  // Least budget found that reaches the floor: the policy's own, or bisected between it and what
  // max_kept_ratio allows. Units are tokens, or blocks in whole-block mode.
  absl::StatusOr<Candidate> ReachFloor() {
    const absl::StatusOr<LayerBudget> budget = BudgetOf(context_, tensors_.layer);
    if (!budget.ok()) return budget.status();
    const bool whole_blocks = budget->num_whole_blocks > 0;
    int64_t low = whole_blocks ? budget->num_whole_blocks : budget->num_kept;
    absl::StatusOr<Candidate> candidate = Judge(low);
    if (!candidate.ok()) return candidate;
    if (Reaches(*candidate)) return WithPages(*std::move(candidate));

    const int64_t total =
        whole_blocks ? context_.segmentation.num_blocks() : context_.spec.shape.num_tokens;
    int64_t high =
        static_cast<int64_t>(std::floor(static_cast<double>(total) * floor().max_kept_ratio));
    if (high <= low) return Unreachable(*candidate);
    absl::StatusOr<Candidate> best = Judge(high);
    if (!best.ok()) return best;
    if (!Reaches(*best)) return Unreachable(*best);
    for (int i = 0; i < kMaxBisections && high - low > 1; ++i) {
      const int64_t middle = low + (high - low) / 2;
      candidate = Judge(middle);
      if (!candidate.ok()) return candidate;
      if (Reaches(*candidate)) {
        high = middle;
        best = std::move(candidate);
      } else {
        low = middle;
      }
    }
    return WithPages(*std::move(best));
  }

  // The receipt of a mass-only search lacks the error, which pages tell.
  absl::StatusOr<Candidate> WithPages(Candidate candidate) {
    if (with_pages_ && candidate.pages.key_pages.empty()) {
      if (auto status = Apply(candidate); !status.ok()) return Abandon(std::move(status), stream_);
    }
    if (std::isnan(candidate.receipt.error_mean) && tensors_.values.data != nullptr) {
      candidate.measured = false;
    }
    return candidate;
  }

  absl::Status Unreachable(const Candidate& candidate) const {
    std::string reached =
        absl::StrCat("a retained attention mass of ", candidate.receipt.mass_mean);
    if (floor().max_output_relative_error > 0) {
      absl::StrAppend(&reached, " and an output relative error of ", candidate.receipt.error_mean);
    }
    return PreconditionFailed(
        "QUALITY_FLOOR", "policy.quality_floor",
        absl::StrCat("is not reached by layer ", tensors_.layer, ", which gets to ", reached,
                     " with ", candidate.decision.plan.num_kept, " of ",
                     context_.spec.shape.num_tokens, " tokens (max_kept_ratio ",
                     floor().max_kept_ratio, "); asked for are at least ",
                     floor().min_retained_attention_mass, " and at most ",
                     floor().max_output_relative_error == 0
                         ? std::string("any error")
                         : absl::StrCat(floor().max_output_relative_error)));
  }

  const SequenceContext& context_;
  const LayerTensors& tensors_;
  const bool with_pages_;
  Backend& backend_;
  Stream& stream_;
  StageTimer& timer_;
  LayerScores scores_;
};

}  // namespace

absl::StatusOr<LayerResult> CompressLayer(const SequenceContext& context,
                                          const LayerTensors& tensors, bool with_pages,
                                          Backend& backend, Stream& stream) {
  StageTimer timer(stream);
  absl::StatusOr<LayerResult> result = EnqueueLayer(context, tensors, with_pages, backend, timer);
  if (!result.ok()) return result;
  if (auto status = stream.Synchronize(); !status.ok()) return status;
  ReadLayer(*result);
  return result;
}

absl::StatusOr<LayerResult> EnqueueLayer(const SequenceContext& context,
                                         const LayerTensors& tensors, bool with_pages,
                                         Backend& backend, StageTimer& timer) {
  return LayerCompressor(context, tensors, with_pages, backend, timer).Run();
}

void ReadLayer(LayerResult& result) {
  ReadDecision(result.decision);
  if (result.figures.has_value()) {
    result.receipt = ReadReceipt(*std::exchange(result.figures, std::nullopt));
  }
}

}  // namespace dynsplit
