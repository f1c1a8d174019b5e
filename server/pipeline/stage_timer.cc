// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/stage_timer.h"

#include <algorithm>
#include <utility>

namespace dynsplit {

std::string_view StageName(LayerStage stage) {
  switch (stage) {
    case LayerStage::kHostToDevice:
      return "h2d";
    case LayerStage::kCheck:
      return "check";
    case LayerStage::kScore:
      return "score";
    case LayerStage::kSelect:
      return "select";
    case LayerStage::kGather:
      return "gather";
    case LayerStage::kReceipt:
      return "receipt";
    case LayerStage::kDeviceToHost:
      return "d2h";
  }
  return "";
}

void StageTimer::End(LayerStage stage) {
  const int64_t mark = stream_.Mark();
  pending_.push_back({stage, last_mark_, mark});
  last_mark_ = mark;
}

void StageTimer::Resolve() {
  for (const Pending& pending : pending_) {
    const Stream::Clock::time_point begin = stream_.TimeOf(pending.begin_mark);
    // The clocks may have been set between the two.
    const Stream::Clock::time_point end = std::max(begin, stream_.TimeOf(pending.end_mark));
    spans_.push_back({pending.stage, begin, end});
  }
  pending_.clear();
}

std::vector<StageSpan> StageTimer::Take() {
  Resolve();
  return std::exchange(spans_, {});
}

}  // namespace dynsplit
