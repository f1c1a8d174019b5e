// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/stage_timer.h"

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
    spans_.push_back(
        {pending.stage, stream_.TimeOf(pending.begin_mark), stream_.TimeOf(pending.end_mark)});
  }
  pending_.clear();
}

std::vector<StageSpan> StageTimer::Take() {
  Resolve();
  return std::exchange(spans_, {});
}

}  // namespace dynsplit
