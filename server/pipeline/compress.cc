// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/compress.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

using Clock = std::chrono::steady_clock;

// Evaluations of the quality floor's bisection, beside those of its two ends.
constexpr int kMaxBisections = 10;

// One layer on its way through the stages, timing each.
class LayerCompressor {
 public:
  LayerCompressor(const SequenceContext& context, const LayerTensors& tensors, bool with_pages,
                  Backend& backend, Stream& stream)
      : context_(context),
        tensors_(tensors),
        with_pages_(with_pages),
        backend_(backend),
        stream_(stream) {}

  absl::StatusOr<LayerResult> Run() {
    Clock::time_point start = Clock::now();
    absl::StatusOr<LayerScores> scores = ScoreLayer(context_, tensors_, backend_, stream_);
    if (!scores.ok()) return scores.status();
    scores_ = *std::move(scores);
    if (auto status = EndStage(start, seconds_.score); !status.ok()) return status;

    absl::StatusOr<Candidate> best =
        floor().empty() ? Evaluate(0, with_pages_, false) : ReachFloor();
    if (!best.ok()) return best.status();
    if (!best->measured && context_.spec.with_receipt) {
      if (auto status = Measure(*best); !status.ok()) return status;
    }
    LayerResult result;
    result.decision = std::move(best->decision);
    if (with_pages_) result.pages = std::move(best->pages);
    result.receipt = best->receipt;
    result.seconds = seconds_;
    return result;
  }

 private:
  struct Candidate {
    LayerDecision decision;
    LayerPages pages;  // empty where neither asked for nor needed
    LayerReceipt receipt;
    bool measured = false;
  };

  const QualityFloor& floor() const { return context_.spec.policy.quality_floor; }

  absl::Status EndStage(Clock::time_point start, double& seconds) {
    if (auto status = stream_.Synchronize(); !status.ok()) return status;
    seconds += std::chrono::duration<double>(Clock::now() - start).count();
    return absl::OkStatus();
  }

  absl::StatusOr<Candidate> Evaluate(int64_t min_num_kept, bool apply, bool measure) {
    Candidate candidate;
    Clock::time_point start = Clock::now();
    absl::StatusOr<LayerDecision> decision =
        PlanLayer(context_, scores_, tensors_.layer, min_num_kept, backend_, stream_);
    if (!decision.ok()) return decision.status();
    candidate.decision = *std::move(decision);
    candidate.receipt = NotMeasured(tensors_.layer);
    if (auto status = EndStage(start, seconds_.select); !status.ok()) return status;
    if (apply) {
      if (auto status = Apply(candidate); !status.ok()) return status;
    }
    if (measure) {
      if (auto status = Measure(candidate); !status.ok()) return status;
    }
    return candidate;
  }

  absl::Status Apply(Candidate& candidate) {
    const Clock::time_point start = Clock::now();
    absl::StatusOr<LayerPages> pages =
        ApplyLayer(context_, candidate.decision, tensors_, backend_, stream_);
    if (!pages.ok()) return pages.status();
    candidate.pages = *std::move(pages);
    return EndStage(start, seconds_.gather);
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
    const Clock::time_point start = Clock::now();
    absl::StatusOr<LayerReceipt> receipt =
        MeasureLayer(context_, candidate.decision, candidate.pages, tensors_, backend_, stream_);
    if (!receipt.ok()) return receipt.status();
    candidate.receipt = *receipt;
    candidate.measured = true;
    return EndStage(start, seconds_.receipt);
  }

  // Enough to judge the floor: pages only where it asks for the output's error.
  absl::StatusOr<Candidate> Judge(int64_t min_num_kept) {
    const bool needs_error = floor().max_output_relative_error > 0;
    absl::StatusOr<Candidate> candidate = Evaluate(min_num_kept, needs_error, false);
    if (!candidate.ok()) return candidate;
    if (auto status = MeasureOnly(*candidate); !status.ok()) return status;
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
      if (auto status = Apply(candidate); !status.ok()) return status;
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
  LayerScores scores_;
  LayerSeconds seconds_;
};

}  // namespace

absl::StatusOr<LayerResult> CompressLayer(const SequenceContext& context,
                                          const LayerTensors& tensors, bool with_pages,
                                          Backend& backend, Stream& stream) {
  return LayerCompressor(context, tensors, with_pages, backend, stream).Run();
}

}  // namespace dynsplit
