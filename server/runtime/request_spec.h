// SPDX-License-Identifier: Apache-2.0
//
// What a request is once the wire format is left behind, and what it yields. Plain data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/pipeline/calibration.h"
#include "server/pipeline/compress.h"
#include "server/pipeline/plan.h"
#include "server/pipeline/segmentation.h"
#include "server/pipeline/types.h"
#include "server/runtime/output_room.h"
#include "server/runtime/regions.h"
#include "server/runtime/sessions.h"

namespace dynsplit {

enum class Method : uint8_t { kCompress, kPlan, kApply, kCalibrate, kOpen, kAppend, kFetch };

// Tensors that requests bring and responses carry; meanings and shapes as in types.proto.
enum class TensorKind : uint8_t {
  kKey,
  kValue,
  kKeyValue,
  kKeyScales,
  kValueScales,
  kQueries,
  kLogSumExp,
  kAccumulatedScores,
  kTokenIds,
  kBlockTable,
  kQueryPositions,
  kBlockStarts,
  kKeptTokens,
  kKeyPages,
  kValuePages,
  kKeyPageScales,
  kValuePageScales,
  kPageTable,
  kBlockKeyMin,
  kBlockKeyMax,
  kBlockKeyMean,
};

// One tensor that will arrive in the stream, or lies in a region. Sizes and strides are validated.
struct RequestTensor {
  static constexpr int32_t kWholeSequence = -1;

  uint32_t id = 0;
  TensorKind kind = TensorKind::kKey;
  int32_t layer = kWholeSequence;
  int64_t byte_size = 0;
  std::string field;  // proto path of its descriptor, for errors: "tensors[3]"
  // kKey, kValue, kKeyValue, kQueries: the layout, with null pointers.
  TensorView view;
  // kKeyValue: where the values start behind the keys.
  int64_t value_offset_bytes = 0;
  // Paged layouts: physical pages in the pool.
  int64_t num_pool_pages = 0;
  // Where the bytes are; no region = they arrive as chunks.
  RegionPart place;

  bool located() const { return place.region != nullptr; }
};

// A sequence that is to stay: kOpen, and kCompress where it also keeps.
struct SessionOpening {
  SessionSettings settings;
  ResidentSpec resident;
  std::shared_ptr<const DelimiterProfile> profile;  // of resident.policy; null = none is read
};

// kFetch: where to go on; see SessionTarget.Resume.
struct FetchResume {
  int32_t layer = 0;
  int32_t tensor_index = 0;
  int64_t offset = 0;
  int32_t num_skipped_layers = 0;  // of those wanted, before `layer`
};

struct RequestSpec {
  Method method = Method::kCompress;
  std::string request_id;
  std::string tenant;
  SequenceSpec sequence;
  std::vector<RequestTensor> tensors;
  int32_t max_open_layers = 2;
  int32_t max_chunk_bytes = 2 << 20;  // in the response
  int32_t num_shards = 1;             // streams that it comes as
  bool shadow = false;
  std::shared_ptr<const DelimiterProfile> profile;
  // kApply: what to execute; layers without their kept tokens, which arrive as tensors.
  std::optional<Plan> plan;
  std::vector<std::string> layer_hashes;  // of plan, hex
  std::string plan_hash;                  // hex
  CalibrationOptions calibration;
  std::shared_ptr<OutputRoom> output;  // kCompress, kApply, kFetch: of layers; null = the stream

  Backend* backend = nullptr;  // where it runs: its session's, its memory's, or any
  std::optional<SessionOpening> opening;
  SessionStore* store = nullptr;            // of what follows
  std::shared_ptr<Session> opened;          // as `opening` says; reserved, not yet published
  SessionUse session;                       // kAppend, kFetch
  SessionUse appending;                     // kAppend: no other append meanwhile
  Segmentation segmentation;                // kFetch: the session's
  std::vector<int32_t> fetch_layers;        // kFetch: ascending
  std::optional<FetchResume> fetch_resume;  // kFetch
};

// A session as it was at one moment.
struct SessionSnapshot {
  std::string id;
  SessionSettings settings;
  ResidentSpec spec;  // shape: as it is now
  SessionState state;
  int64_t num_blocks = 0;
  int64_t open_block_begin = 0;
  Residence residence = Residence::kDevice;
  ResidentLayout layout;
  int64_t reuse_bytes = 0;
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  int64_t num_demotions = 0;
  int64_t num_restorations = 0;
};

// One tensor of a response: in host memory, which `owner` keeps alive, or in a region.
struct ResultTensor {
  TensorKind kind = TensorKind::kKeptTokens;
  DType dtype = DType::kInt32;
  std::vector<int64_t> shape;
  std::optional<ScaleGranularity> scale_granularity;
  const std::byte* data = nullptr;
  int64_t byte_size = 0;
  std::shared_ptr<const void> owner = nullptr;
  std::optional<RegionName> region = std::nullopt;  // then `data` and `owner` are null
};

struct SequenceOutput {
  int64_t num_blocks = 0;
  int64_t open_block_begin = 0;
  std::vector<ResultTensor> tensors;
};

struct ComputedLayer {
  std::shared_ptr<const LayerPlan> plan;
  Hash128 hash{};  // of plan
  std::optional<LayerReceipt> receipt;
  int64_t num_pages = 0;
  std::vector<ResultTensor> tensors;
  bool skipped = false;      // kFetch: before the point where a broken stream goes on
  int64_t shadow_bytes = 0;  // what it would have weighed
};

// Summed over layers: receiving and splitting by the host's clock, the stages of layers by the
// marks on their streams. Sending is not known here.
struct RequestSeconds {
  double receive = 0, split = 0;
  double host_to_device = 0, score = 0, select = 0, gather = 0, receipt = 0, device_to_host = 0;
};

struct EndOutput {
  Plan plan;  // layers without their kept tokens
  std::vector<Hash128> layer_hashes;
  Hash128 plan_hash{};
  std::vector<LayerReceipt> receipts;  // empty = none wanted
  int64_t bytes_in = 0;
  int64_t bytes_out = 0;
  int64_t shadow_bytes_out = 0;
  int64_t num_queries = 0;
  std::string representation_salt;
  RequestSeconds seconds;
  std::optional<DelimiterProfile> profile;  // kCalibrate
  SequenceShape stored_shape;               // kOpen, kAppend: what was stored
  std::shared_ptr<Session> opened;          // complete; to be published when the end is sent
  std::optional<SessionSnapshot> session;   // kAppend, kFetch
};

}  // namespace dynsplit
