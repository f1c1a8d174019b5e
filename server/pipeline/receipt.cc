// SPDX-License-Identifier: Apache-2.0
//
// What compression cost, measured on the supplied queries against what the consumer will hold.
#include <algorithm>
#include <cmath>
#include <limits>

#include "server/pipeline/compress.h"
#include "server/pipeline/stage_inputs.h"

namespace dynsplit {
namespace {

// Pages lie one after the other, so that slot s of the sequence is row s of a dense tensor.
TensorView PagesView(const SequenceContext& context, const Buffer& pages, const Buffer& scales,
                     DType dtype, ScaleGranularity granularity, int64_t num_kept) {
  const SequenceShape& shape = context.spec.shape;
  TensorView view = DenseView(pages.data(), dtype, num_kept, shape.num_kv_heads, shape.head_dim);
  view.scales = scales.as<float>();
  view.scale_granularity = granularity;
  return view;
}

// ||o_kept - o_full|| / ||o_full||; an output of zero is lost only if something else came out.
double RelativeError(double err_sq, double ref_sq) {
  if (ref_sq > 0) return std::sqrt(err_sq / ref_sq);
  return err_sq > 0 ? std::numeric_limits<double>::infinity() : 0;
}

struct Summary {
  double sum = 0;
  double least = std::numeric_limits<double>::infinity();
  double most = -std::numeric_limits<double>::infinity();
  void Add(double value) {
    sum += value;
    least = std::min(least, value);
    most = std::max(most, value);
  }
};

}  // namespace

LayerReceipt NotMeasured(int32_t layer) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  return {
      .layer = layer, .mass_mean = kNan, .mass_min = kNan, .error_mean = kNan, .error_max = kNan};
}

absl::StatusOr<ReceiptFigures> EnqueueReceipt(const SequenceContext& context,
                                              const LayerDecision& decision,
                                              const LayerPages& pages, const LayerTensors& tensors,
                                              Backend& backend, Stream& stream) {
  const bool with_error = tensors.values.data != nullptr && !pages.key_pages.empty();
  const SequenceShape& shape = context.spec.shape;
  const int32_t num_heads = shape.num_query_heads;
  ReceiptFigures figures;
  figures.layer = decision.plan.layer;
  if (tensors.queries.data == nullptr || tensors.keys.data == nullptr) return figures;
  figures.num_heads = num_heads;
  figures.with_error = with_error;
  absl::StatusOr<Buffer> results =
      backend.Allocate(int64_t{3} * num_heads * static_cast<int64_t>(sizeof(float)), stream);
  if (!results.ok()) return results.status();

  MeasureAttentionParams params;
  params.queries = tensors.queries;
  params.keys = tensors.keys;
  params.kept = decision.kept.as<int32_t>();
  params.groups = decision.plan.groups;
  params.num_kept = decision.plan.num_kept;
  params.softmax_scale = SoftmaxScale(context.spec);
  params.mass = results->as<float>();
  if (with_error) {
    params.values = tensors.values;
    params.kept_keys = PagesView(context, pages.key_pages, pages.key_scales, pages.key_dtype,
                                 pages.key_scale_granularity, pages.num_kept);
    params.kept_values =
        PagesView(context, pages.value_pages, pages.value_scales, pages.value_dtype,
                  pages.value_scale_granularity, pages.num_kept);
    // Contiguous positions: the consumer goes on at num_kept where the original went on at T.
    params.rotation = context.rotation;
    params.query_shift =
        context.rotation.rotary_dim > 0 ? shape.num_tokens - decision.plan.num_kept : 0;
    params.err_sq = params.mass + num_heads;
    params.ref_sq = params.err_sq + num_heads;
  }
  if (auto status = backend.MeasureAttention(params, stream); !status.ok()) return status;
  absl::StatusOr<Buffer> host = backend.ToHost(*std::move(results), stream);
  if (!host.ok()) return host.status();
  figures.host = *std::move(host);
  return figures;
}

LayerReceipt ReadReceipt(const ReceiptFigures& figures) {
  LayerReceipt receipt = NotMeasured(figures.layer);
  if (figures.host.empty()) return receipt;
  const float* values = figures.host.as<float>();
  const int32_t num_heads = figures.num_heads;
  Summary mass;
  Summary error;
  for (int32_t head = 0; head < num_heads; ++head) {
    mass.Add(values[head]);
    if (figures.with_error) {
      error.Add(RelativeError(values[num_heads + head], values[2 * num_heads + head]));
    }
  }
  receipt.mass_mean = mass.sum / num_heads;
  receipt.mass_min = mass.least;
  if (figures.with_error) {
    receipt.error_mean = error.sum / num_heads;
    receipt.error_max = error.most;
  }
  return receipt;
}

absl::StatusOr<LayerReceipt> MeasureLayer(const SequenceContext& context,
                                          const LayerDecision& decision, const LayerPages& pages,
                                          const LayerTensors& tensors, Backend& backend,
                                          Stream& stream) {
  const absl::StatusOr<ReceiptFigures> figures =
      EnqueueReceipt(context, decision, pages, tensors, backend, stream);
  if (!figures.ok()) return figures.status();
  if (auto status = stream.Synchronize(); !status.ok()) return status;
  return ReadReceipt(*figures);
}

}  // namespace dynsplit
