// SPDX-License-Identifier: Apache-2.0
//
// How long one layer's work takes on its stream, stage by stage, without waiting between them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "server/pipeline/backend.h"

namespace dynsplit {

enum class LayerStage : uint8_t {
  kHostToDevice,
  kCheck,
  kScore,
  kSelect,
  kGather,
  kReceipt,
  kDeviceToHost
};
std::string_view StageName(LayerStage stage);  // "h2d", "check", ..., "d2h"

struct StageSpan {
  LayerStage stage = LayerStage::kCheck;
  Stream::Clock::time_point begin, end;
};

// Marks on a stream between which a stage's work lies. Not thread-safe; `stream` outlives it.
class StageTimer {
 public:
  explicit StageTimer(Stream& stream) : stream_(stream), last_mark_(stream.Mark()) {}

  // What was enqueued since construction, End or Skip belongs to `stage`.
  void End(LayerStage stage);
  // ... belongs to none.
  void Skip() { last_mark_ = stream_.Mark(); }
  // Looks up when the stages began and ended; at least once in Stream::kMaxMarks calls of the
  // above. Requires: the stream was synchronised after the last End.
  void Resolve();
  // Resolve, and the spans that no earlier Take returned.
  std::vector<StageSpan> Take();

  Stream& stream() const { return stream_; }

 private:
  struct Pending {
    LayerStage stage;
    int64_t begin_mark, end_mark;
  };

  Stream& stream_;
  int64_t last_mark_;
  std::vector<Pending> pending_;
  std::vector<StageSpan> spans_;
};

}  // namespace dynsplit
