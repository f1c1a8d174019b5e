// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/layer_work.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/runtime/host_finite.h"
#include "server/runtime/output_need.h"

namespace dynsplit {
namespace {

constexpr int64_t kStageAlignmentBytes = 64;

int64_t AlignUp(int64_t bytes) {
  return (bytes + kStageAlignmentBytes - 1) / kStageAlignmentBytes * kStageAlignmentBytes;
}

// Read by operations only, and large.
bool IsBulk(TensorKind kind) {
  return kind == TensorKind::kKey || kind == TensorKind::kValue || kind == TensorKind::kKeyValue ||
         kind == TensorKind::kQueries;
}

const char* KindName(TensorKind kind) {
  switch (kind) {
    case TensorKind::kKey:
      return "KEY";
    case TensorKind::kValue:
      return "VALUE";
    case TensorKind::kKeyValue:
      return "KEY_VALUE";
    case TensorKind::kKeyScales:
      return "KEY_SCALES";
    case TensorKind::kValueScales:
      return "VALUE_SCALES";
    case TensorKind::kLogSumExp:
      return "LOG_SUM_EXP";
    case TensorKind::kAccumulatedScores:
      return "ACCUMULATED_SCORES";
    default:
      return "tensor";
  }
}

absl::Status CheckFloats(const RequestTensor& tensor, std::span<const float> values) {
  const bool scales =
      tensor.kind == TensorKind::kKeyScales || tensor.kind == TensorKind::kValueScales;
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i]) && (!scales || values[i] > 0)) continue;
    return InvalidField(tensor.field,
                        absl::StrCat(KindName(tensor.kind), " value ", i, " is ", values[i],
                                     "; must be finite", scales ? " and > 0" : ""));
  }
  return absl::OkStatus();
}

absl::Status CheckInts(const RequestSpec& spec, const RequestTensor& tensor,
                       std::span<const int32_t> values) {
  const int64_t num_tokens = spec.sequence.shape.num_tokens;
  int64_t num_pool_pages = num_tokens;
  for (const RequestTensor& other : spec.tensors) {
    if (other.view.page_size > 0) num_pool_pages = std::min(num_pool_pages, other.num_pool_pages);
  }
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t value = values[i];
    switch (tensor.kind) {
      case TensorKind::kTokenIds:
        if (value < 0) {
          return InvalidField(tensor.field,
                              absl::StrCat("token id ", i, " is ", value, "; must be >= 0"));
        }
        break;
      case TensorKind::kBlockTable:
        if (value < 0 || value >= num_pool_pages) {
          return InvalidField(tensor.field,
                              absl::StrCat("entry ", i, " is ", value, "; the pool has ",
                                           num_pool_pages, " pages"));
        }
        break;
      case TensorKind::kQueryPositions:
        if (value < 0 || value >= num_tokens || (i > 0 && value <= values[i - 1])) {
          return InvalidField(
              tensor.field, absl::StrCat("position ", i, " is ", value, "; must ascend within [0, ",
                                         num_tokens, ")"));
        }
        break;
      default:
        return absl::OkStatus();  // checked with the plan
    }
  }
  return absl::OkStatus();
}

// Moves device results to the host, or to the caller's room, remembering what they are.
class Collector {
 public:
  Collector(Backend& backend, Stream& stream, OutputRoom* room, ComputedLayer& output)
      : backend_(backend), stream_(stream), room_(room), output_(output) {}

  // `tensor` says all but where its bytes are.
  absl::Status Add(ResultTensor tensor, Buffer device) {
    if (device.empty()) return absl::OkStatus();
    tensor.byte_size = DTypeBytes(tensor.dtype);
    for (const int64_t size : tensor.shape) tensor.byte_size *= size;
    if (absl::Status status =
            room_ != nullptr ? Place(tensor, std::move(device)) : ToHost(tensor, std::move(device));
        !status.ok()) {
      return status;
    }
    output_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // The same of what is in host memory already; `source` is where the backend copies it from.
  absl::Status AddHost(ResultTensor tensor, Buffer source) {
    absl::Status status = room_ != nullptr ? Place(tensor, std::move(source)) : absl::OkStatus();
    output_.tensors.push_back(std::move(tensor));
    return status;
  }

  absl::Status AddPageTable(int64_t num_pages) {
    std::vector<int32_t> table(static_cast<size_t>(num_pages));
    std::iota(table.begin(), table.end(), 0);
    Buffer source;
    if (room_ != nullptr) {
      absl::StatusOr<Buffer> host =
          backend_.AllocateHost(num_pages * static_cast<int64_t>(sizeof(int32_t)));
      if (!host.ok()) return host.status();
      std::copy(table.begin(), table.end(), host->as<int32_t>());
      source = *std::move(host);
    }
    return AddHost(Int32Output(TensorKind::kPageTable, {num_pages}, std::move(table)),
                   std::move(source));
  }

 private:
  absl::Status ToHost(ResultTensor& tensor, Buffer device) {
    absl::StatusOr<Buffer> host = backend_.ToHost(std::move(device), stream_);
    if (!host.ok()) return host.status();
    auto owner = std::make_shared<Buffer>(*std::move(host));
    tensor.data = owner->data();
    tensor.owner = std::move(owner);
    return absl::OkStatus();
  }

  absl::Status Place(ResultTensor& tensor, Buffer made) {
    const std::byte* at = made.data();
    if (!room_->Holds(at)) {
      absl::StatusOr<Buffer> place = room_->Take(tensor.byte_size);
      if (!place.ok()) return place.status();
      at = place->data();
      absl::Status status = backend_.Copy(place->data(), made.data(), tensor.byte_size, stream_);
      copied_.push_back(std::move(made));
      if (!status.ok()) return status;
    }
    tensor.region = room_->NameOf(at);
    tensor.data = nullptr;
    tensor.owner = nullptr;
    return absl::OkStatus();
  }

  Backend& backend_;
  Stream& stream_;
  OutputRoom* const room_;
  ComputedLayer& output_;
  std::vector<Buffer> copied_;  // until the device is done with them
};

absl::Status CollectPages(const SequenceContext& context, LayerPages& pages, Collector& collect) {
  const SequenceShape& shape = context.spec.shape;
  const int64_t heads = shape.num_kv_heads;
  const int64_t page_size = context.spec.policy.page_size;
  const std::vector<int64_t> page_shape = {pages.num_pages, page_size, heads, shape.head_dim};
  const std::vector<int64_t> block_shape = {context.segmentation.num_blocks(), heads,
                                            shape.head_dim};
  const auto add = [&](TensorKind kind, Buffer& from, DType dtype, std::vector<int64_t> sizes) {
    return collect.Add({.kind = kind,
                        .dtype = dtype,
                        .shape = std::move(sizes),
                        .scale_granularity = std::nullopt},
                       std::move(from));
  };
  const auto add_scales = [&](TensorKind kind, Buffer& from, ScaleGranularity granularity) {
    const bool per_head = granularity == ScaleGranularity::kHead;
    return collect.Add({.kind = kind,
                        .dtype = DType::kFloat32,
                        .shape = per_head ? std::vector<int64_t>{heads}
                                          : std::vector<int64_t>{pages.num_pages, page_size, heads},
                        .scale_granularity = granularity},
                       std::move(from));
  };
  absl::Status status = add(TensorKind::kKeyPages, pages.key_pages, pages.key_dtype, page_shape);
  status.Update(add(TensorKind::kValuePages, pages.value_pages, pages.value_dtype, page_shape));
  status.Update(
      add_scales(TensorKind::kKeyPageScales, pages.key_scales, pages.key_scale_granularity));
  status.Update(
      add_scales(TensorKind::kValuePageScales, pages.value_scales, pages.value_scale_granularity));
  status.Update(add(TensorKind::kBlockKeyMin, pages.block_min, pages.summary_dtype, block_shape));
  status.Update(add(TensorKind::kBlockKeyMax, pages.block_max, pages.summary_dtype, block_shape));
  status.Update(add(TensorKind::kBlockKeyMean, pages.block_mean, pages.summary_dtype, block_shape));
  return status;
}

// Most tokens a head of a layer may keep.
int64_t MostKept(const SequenceSpec& spec) {
  const int64_t num_tokens = spec.shape.num_tokens;
  const Policy& policy = spec.policy;
  const bool bounded = policy.transform == Transform::kEvict && policy.quality_floor.empty() &&
                       policy.protection.dense_layers.empty() &&
                       policy.budget.target != BudgetPolicy::Target::kBytes;
  if (!bounded) return num_tokens;
  int64_t target = policy.budget.tokens_per_head;
  if (policy.budget.target == BudgetPolicy::Target::kRatio) {
    target =
        static_cast<int64_t>(std::ceil(policy.budget.kept_ratio * static_cast<double>(num_tokens)));
  }
  int64_t guarded = policy.protection.num_sink_tokens +
                    std::max(policy.protection.num_recent_tokens, spec.supply.num_window_queries);
  for (const TokenSpan& span : policy.protection.pinned) guarded += span.end - span.begin;
  // An open block and whole blocks can add a little; two block sizes cover either.
  const int64_t slack = 2 * std::max<int64_t>(policy.segmentation.block_size, 64);
  return std::min(num_tokens, std::max(target, guarded) + slack);
}

}  // namespace

StagePlan PlanStage(std::span<const RequestTensor> tensors, int32_t layer) {
  StagePlan plan;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].layer != layer && layer != StagePlan::kEverything) continue;
    plan.tensors.push_back(i);
    if (tensors[i].located() && IsBulk(tensors[i].kind)) {
      plan.offset_bytes.push_back(StagePlan::kNotStaged);
      continue;
    }
    plan.offset_bytes.push_back(plan.byte_size);
    plan.byte_size = AlignUp(plan.byte_size + tensors[i].byte_size);
  }
  return plan;
}

std::span<const std::byte> HostBytes(std::span<const RequestTensor> tensors, const StagePlan& plan,
                                     const Stage& stage, TensorKind kind) {
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const RequestTensor& tensor = tensors[plan.tensors[i]];
    if (tensor.kind != kind) continue;
    return {stage.host->data() + plan.offset_bytes[i], static_cast<size_t>(tensor.byte_size)};
  }
  return {};
}

absl::Status CheckStageValues(const RequestSpec& spec, const StagePlan& plan, const Stage& stage) {
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const RequestTensor& tensor = spec.tensors[plan.tensors[i]];
    if (plan.offset_bytes[i] == StagePlan::kNotStaged) continue;
    const std::byte* data = stage.host->data() + plan.offset_bytes[i];
    const auto count = static_cast<size_t>(tensor.byte_size / 4);
    absl::Status status;
    switch (tensor.kind) {
      case TensorKind::kKeyScales:
      case TensorKind::kValueScales:
      case TensorKind::kLogSumExp:
      case TensorKind::kAccumulatedScores:
        status = CheckFloats(tensor, {reinterpret_cast<const float*>(data), count});
        break;
      case TensorKind::kTokenIds:
      case TensorKind::kBlockTable:
      case TensorKind::kQueryPositions:
        status = CheckInts(spec, tensor, {reinterpret_cast<const int32_t*>(data), count});
        break;
      default:
        break;
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status FillStage(const RequestSpec& spec, const StagePlan& plan, const Stage& stage,
                       Backend& backend, Stream& stream) {
  bool copied = false;
  absl::Status status;
  for (size_t i = 0; i < plan.tensors.size() && status.ok(); ++i) {
    const RequestTensor& tensor = spec.tensors[plan.tensors[i]];
    if (!tensor.located() || plan.offset_bytes[i] == StagePlan::kNotStaged) continue;
    status = backend.Copy(stage.host->data() + plan.offset_bytes[i], tensor.place.data,
                          tensor.byte_size, stream);
    copied = true;
  }
  if (copied) status.Update(stream.Synchronize());
  return status;
}

absl::Status StageToDevice(const RequestSpec& spec, const StagePlan& plan, Stage& stage,
                           Backend& backend, Stream& stream) {
  if (stage.host != nullptr) {
    absl::StatusOr<Buffer> device = backend.ToDevice(*stage.host, stream);
    if (!device.ok()) return device.status();
    stage.device = *std::move(device);
  }
  stage.located.resize(plan.tensors.size());
  if (backend.info().name == "cpu") return absl::OkStatus();  // all memory is the device's
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const RequestTensor& tensor = spec.tensors[plan.tensors[i]];
    if (plan.offset_bytes[i] != StagePlan::kNotStaged ||
        tensor.place.region->kind() == Region::Kind::kDevice) {
      continue;
    }
    absl::StatusOr<Buffer> copy = backend.Allocate(tensor.byte_size, stream);
    if (!copy.ok()) return copy.status();
    stage.located[i] = *std::move(copy);
    absl::Status status =
        backend.Copy(stage.located[i].data(), tensor.place.data, tensor.byte_size, stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

LayerTensors LayerViews(const RequestSpec& spec, int32_t layer, const StagePlan& plan,
                        const Stage& stage, const int32_t* block_table) {
  LayerTensors tensors;
  tensors.layer = layer;
  const float* key_scales = nullptr;
  const float* value_scales = nullptr;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const RequestTensor& tensor = spec.tensors[plan.tensors[i]];
    if (tensor.layer != layer) continue;
    const std::byte* data = tensor.place.data;
    if (plan.offset_bytes[i] != StagePlan::kNotStaged) {
      data = stage.device.data() + plan.offset_bytes[i];
    } else if (!stage.located[i].empty()) {
      data = stage.located[i].data();
    }
    TensorView view = tensor.view;
    view.data = data;
    if (view.page_size > 0) view.block_table = block_table;
    switch (tensor.kind) {
      case TensorKind::kKey:
        tensors.keys = view;
        break;
      case TensorKind::kValue:
        tensors.values = view;
        break;
      case TensorKind::kKeyValue:
        tensors.keys = view;
        tensors.values = view;
        tensors.values.data += tensor.value_offset_bytes;
        break;
      case TensorKind::kKeyScales:
        key_scales = reinterpret_cast<const float*>(data);
        break;
      case TensorKind::kValueScales:
        value_scales = reinterpret_cast<const float*>(data);
        break;
      case TensorKind::kQueries:
        tensors.queries = view;
        break;
      case TensorKind::kLogSumExp:
        tensors.lse = reinterpret_cast<const float*>(data);
        break;
      case TensorKind::kAccumulatedScores:
        tensors.accumulated = reinterpret_cast<const float*>(data);
        break;
      default:
        break;  // read on the host
    }
  }
  tensors.keys.scales = key_scales;
  tensors.keys.scale_granularity = spec.sequence.input_scale_granularity;
  tensors.values.scales = value_scales;
  tensors.values.scale_granularity = spec.sequence.input_scale_granularity;
  return tensors;
}

absl::Status CheckStageFinite(const RequestSpec& spec, const StagePlan& plan, const Stage& stage) {
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const RequestTensor& tensor = spec.tensors[plan.tensors[i]];
    if (!IsBulk(tensor.kind)) continue;
    if (plan.offset_bytes[i] == StagePlan::kNotStaged || tensor.view.page_size > 0) {
      return absl::UnimplementedError("not in the stage");
    }
    const bool packed = tensor.kind == TensorKind::kKeyValue;
    for (int part = 0; part < (packed ? 2 : 1); ++part) {
      TensorView view = tensor.view;
      view.data = stage.host->data() + plan.offset_bytes[i] + part * tensor.value_offset_bytes;
      const int64_t token = FirstNotFinite(view);
      if (token == view.num_tokens) continue;
      return InvalidField(tensor.field,
                          absl::StrCat(KindName(tensor.kind), " of layer ", tensor.layer,
                                       " has a value that is not finite at token ", token));
    }
  }
  return absl::OkStatus();
}

ResultTensor Int32Output(TensorKind kind, std::vector<int64_t> shape, std::vector<int32_t> values) {
  auto owner = std::make_shared<std::vector<int32_t>>(std::move(values));
  return {.kind = kind,
          .dtype = DType::kInt32,
          .shape = std::move(shape),
          .scale_granularity = std::nullopt,
          .data = reinterpret_cast<const std::byte*>(owner->data()),
          .byte_size = static_cast<int64_t>(owner->size() * sizeof(int32_t)),
          .owner = owner};
}

absl::StatusOr<ComputedLayer> CollectLayer(const SequenceContext& context, LayerResult& result,
                                           OutputRoom* room, Backend& backend, StageTimer& timer) {
  LayerDecision& decision = result.decision;
  ComputedLayer output;
  output.num_pages = result.pages.num_pages;
  Collector collect(backend, timer.stream(), room, output);
  const int64_t num_kept = decision.plan.groups * decision.plan.num_kept;
  absl::Status status =
      collect.AddHost({.kind = TensorKind::kKeptTokens,
                       .dtype = DType::kInt32,
                       .shape = {decision.plan.groups, decision.plan.num_kept},
                       .scale_granularity = std::nullopt,
                       .byte_size = num_kept * static_cast<int64_t>(sizeof(int32_t))},
                      Buffer(decision.kept.data(), decision.kept.size_bytes(), nullptr));
  if (status.ok() && output.num_pages > 0) {
    status = collect.AddPageTable(output.num_pages);
    if (status.ok()) status = CollectPages(context, result.pages, collect);
  }
  timer.End(LayerStage::kDeviceToHost);
  // Also after a failure: nothing may be freed while the device still works on it.
  status.Update(timer.stream().Synchronize());
  if (!status.ok()) return status;

  ReadDecision(decision);
  auto plan = std::make_shared<const LayerPlan>(std::move(decision.plan));
  output.plan = plan;
  output.hash = plan->Hash();
  if (room == nullptr) {  // else the device has written them
    output.tensors.front().data = reinterpret_cast<const std::byte*>(plan->kept.data());
    output.tensors.front().owner = plan;
  }
  return output;
}

int64_t PayloadBytes(const ComputedLayer& output) {
  int64_t bytes = 0;
  for (const ResultTensor& tensor : output.tensors) {
    if (tensor.kind != TensorKind::kKeptTokens && tensor.kind != TensorKind::kPageTable) {
      bytes += tensor.byte_size;
    }
  }
  return bytes;
}

int32_t MaxLayersInFlight(const RequestSpec& spec) {
  const int32_t num_layers = spec.sequence.shape.num_layers;
  const bool global = spec.sequence.policy.scope == Scope::kGlobal &&
                      (spec.method == Method::kCompress || spec.method == Method::kPlan);
  // Beside the layers that arrive: one being computed, one being sent. Where nothing arrives,
  // because all lies in regions, all of them are at work: with the default two, one a worker of a
  // GPU.
  return global ? num_layers : std::min(num_layers, spec.max_open_layers + 2);
}

int64_t ReservationBytes(const RequestSpec& spec, bool device_has_own_memory) {
  const SequenceSpec& sequence = spec.sequence;
  const SequenceShape& shape = sequence.shape;
  std::vector<int64_t> layer_bytes(static_cast<size_t>(shape.num_layers));
  int64_t sequence_bytes = 0;
  const int64_t copies = device_has_own_memory ? 2 : 1;
  for (const RequestTensor& tensor : spec.tensors) {
    int64_t& bytes = tensor.layer == RequestTensor::kWholeSequence
                         ? sequence_bytes
                         : layer_bytes[static_cast<size_t>(tensor.layer)];
    // Bulk in regions has no stage, and at most the device's copy.
    const bool staged = !(tensor.located() && IsBulk(tensor.kind));
    bytes += (staged ? copies : copies - 1) * AlignUp(tensor.byte_size);
  }
  const int64_t input = *std::max_element(layer_bytes.begin(), layer_bytes.end());
  int64_t output = 0;
  int64_t output_copies = copies;
  if (spec.output != nullptr) {  // no host copy; none at all where operations write there
    output_copies = WritesInPlace(spec, device_has_own_memory) ? 0 : 1;
  }
  if (spec.method == Method::kCompress || spec.method == Method::kApply ||
      spec.method == Method::kFetch) {
    const bool bounded = spec.method == Method::kCompress && !spec.shadow;
    const int64_t kept = bounded ? MostKept(sequence) : shape.num_tokens;
    output = LayerOutputBytes(sequence, kept, shape.num_tokens);
    if (sequence.policy.transform == Transform::kEvict) {
      output = LayerOutputBytes(sequence, kept, 0);
    }
    if (spec.shadow) output *= 2;
  }
  const bool scored = spec.method != Method::kOpen && spec.method != Method::kAppend &&
                      spec.method != Method::kFetch;
  const int64_t scores = scored ? 2 * int64_t{4} * shape.num_kv_heads * shape.num_tokens : 0;
  return std::max<int64_t>(
      1, sequence_bytes +
             MaxLayersInFlight(spec) * (input + output_copies * output + copies * scores));
}

}  // namespace dynsplit
