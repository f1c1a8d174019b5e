// SPDX-License-Identifier: Apache-2.0
#include "client/cli/request.h"

#include <google/protobuf/util/json_util.h>
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/cpp/container.h"
#include "client/cpp/safetensors.h"

namespace dynsplit::cli {
namespace {

InputTensor LayerTensor(const Capture& capture, v1::TensorKind kind, size_t layer,
                        absl::Span<const std::byte> bytes) {
  InputTensor tensor;
  tensor.kind = kind;
  tensor.layer = static_cast<int32_t>(layer);
  tensor.dtype = capture.dtype;
  tensor.bytes = bytes;
  return tensor;
}

const v1::LayerPlan* FindLayer(const v1::Plan& plan, int32_t layer) {
  for (const v1::LayerPlan& candidate : plan.layers()) {
    if (candidate.layer() == layer) return &candidate;
  }
  return nullptr;
}

int64_t ElementBits(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_FLOAT32:
    case v1::DTYPE_INT32:
      return 32;
    case v1::DTYPE_FLOAT16:
    case v1::DTYPE_BFLOAT16:
      return 16;
    case v1::DTYPE_INT4:
      return 4;
    default:
      return 8;
  }
}

// Shape the kind has by default; empty where that depends on more than the plan.
std::vector<int64_t> DenseShape(const v1::TensorDescriptor& tensor, const v1::Plan& plan) {
  const v1::LayerPlan* layer = tensor.has_layer() ? FindLayer(plan, tensor.layer()) : nullptr;
  const int64_t heads = plan.shape().num_kv_heads();
  const int64_t dim = plan.shape().head_dim();
  const int64_t slots = std::max(plan.policy().page_size(), 1);
  const int64_t pages = layer == nullptr ? 0 : (layer->num_kept_tokens() + slots - 1) / slots;
  switch (tensor.kind()) {
    case v1::TENSOR_KIND_TOKEN_IDS:
      return {plan.shape().num_tokens()};
    case v1::TENSOR_KIND_BLOCK_STARTS:
      return {plan.num_blocks() + 1};
    case v1::TENSOR_KIND_KEPT_TOKENS:
      if (layer == nullptr) return {};
      return {layer->num_groups(), layer->num_kept_tokens()};
    case v1::TENSOR_KIND_KEY_PAGES:
    case v1::TENSOR_KIND_VALUE_PAGES:
      return {pages, slots, heads, dim};
    case v1::TENSOR_KIND_KEY_PAGE_SCALES:
    case v1::TENSOR_KIND_VALUE_PAGE_SCALES:
      if (tensor.byte_size() == heads * 4) return {heads};
      return {pages, slots, heads};
    case v1::TENSOR_KIND_PAGE_TABLE:
      return {pages};
    case v1::TENSOR_KIND_BLOCK_KEY_MIN:
    case v1::TENSOR_KIND_BLOCK_KEY_MAX:
    case v1::TENSOR_KIND_BLOCK_KEY_MEAN:
      return {plan.num_blocks(), heads, dim};
    default:
      return {};
  }
}

// Sections of the whole result; token ids go in too, so that the file can be read without the
// capture.
std::vector<ContainerSection> Sections(const Capture& capture, const CompressResult& result) {
  std::vector<ContainerSection> sections;
  v1::TensorDescriptor ids;
  ids.set_kind(v1::TENSOR_KIND_TOKEN_IDS);
  ids.set_dtype(v1::DTYPE_INT32);
  const auto bytes = absl::MakeConstSpan(
      reinterpret_cast<const std::byte*>(capture.token_ids.data()), capture.token_ids.size() * 4);
  ids.set_byte_size(static_cast<int64_t>(bytes.size()));
  sections.push_back({ids, bytes});
  for (const OutputTensor& tensor : result.sequence_tensors) {
    sections.push_back({tensor.descriptor, tensor.data.bytes()});
  }
  for (const LayerOutput& layer : result.layers) {
    for (const OutputTensor& tensor : layer.tensors) {
      sections.push_back({tensor.descriptor, tensor.data.bytes()});
      sections.back().descriptor.set_layer(layer.result.plan().layer());
    }
  }
  return sections;
}

std::string Json(const google::protobuf::Message& message) {
  std::string text;
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  (void)google::protobuf::util::MessageToJsonString(message, &text, options);
  return text;
}

absl::Status WriteAsSafetensors(const std::string& path, const Capture& capture,
                                const CompressResult& result) {
  std::vector<SafetensorsTensor> tensors;
  for (const ContainerSection& section : Sections(capture, result)) {
    SafetensorsTensor& tensor = tensors.emplace_back();
    tensor.name = KindLabel(section.descriptor.kind());
    if (section.descriptor.has_layer()) {
      tensor.name = absl::StrCat("layers.", section.descriptor.layer(), ".", tensor.name);
    }
    tensor.shape = OutputShape(section.descriptor, result.end.plan());
    tensor.dtype = SafetensorsDType(section.descriptor.dtype());
    if (tensor.shape.size() == 1 && tensor.shape[0] == section.descriptor.byte_size()) {
      tensor.dtype = "U8";
    }
    tensor.bytes = section.bytes;
  }
  const std::map<std::string, std::string> metadata = {
      {"dynsplit.format", "kv-compressed/1"},
      {"dynsplit.model", capture.model},
      {"dynsplit.plan", Json(result.end.plan())},
      {"dynsplit.receipt", Json(result.end.receipt())},
      {"dynsplit.representation_salt", result.end.representation_salt()},
      {"dynsplit.text.kind", capture.text_kind},
      {"dynsplit.text.title", capture.text_title},
  };
  return WriteSafetensors(path, metadata, tensors);
}

}  // namespace

absl::StatusOr<Capture> LoadInput(const CaptureFlags& flags) {
  absl::StatusOr<Capture> capture = LoadCapture(flags.input);
  if (!capture.ok() || flags.layers.empty()) return capture;
  std::vector<Capture::Layer> chosen;
  for (const int32_t layer : flags.layers) {
    if (layer < 0 || std::cmp_greater_equal(layer, capture->layers.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat("--layers: ", layer, " is not in [0, ", capture->layers.size(), ")"));
    }
    chosen.push_back(capture->layers[static_cast<size_t>(layer)]);
  }
  capture->layers = std::move(chosen);
  capture->shape.set_num_layers(static_cast<int32_t>(capture->layers.size()));
  return capture;
}

CompressJob MakeJob(const Capture& capture, const CaptureFlags& flags, const v1::Policy& policy) {
  CompressJob job;
  job.owner = capture.owner;
  *job.begin.mutable_shape() = capture.shape;
  *job.begin.mutable_rope() = capture.rope;
  *job.begin.mutable_policy() = policy;
  InputTensor& ids = job.tensors.emplace_back();
  ids.kind = v1::TENSOR_KIND_TOKEN_IDS;
  ids.dtype = v1::DTYPE_INT32;
  ids.bytes = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(capture.token_ids.data()),
                                  capture.token_ids.size() * 4);
  int64_t num_queries = std::min<int64_t>(capture.num_window_queries(), 1024);
  if (flags.num_window_queries > 0) {
    num_queries = std::min<int64_t>(num_queries, flags.num_window_queries);
  }
  for (size_t i = 0; i < capture.layers.size(); ++i) {
    const Capture::Layer& layer = capture.layers[i];
    // Queries first: small, and what scoring waits for.
    if (num_queries > 0) {
      job.tensors.push_back(LayerTensor(capture, v1::TENSOR_KIND_QUERIES, i,
                                        capture.WindowQueries(layer, num_queries)));
    }
    job.tensors.push_back(LayerTensor(capture, v1::TENSOR_KIND_KEY, i, layer.key));
    job.tensors.push_back(LayerTensor(capture, v1::TENSOR_KIND_VALUE, i, layer.value));
  }
  return job;
}

absl::Status WriteResult(const std::string& path, const Capture& capture,
                         const CompressResult& result) {
  if (absl::EndsWith(path, ".safetensors")) return WriteAsSafetensors(path, capture, result);
  v1::ContainerHeader header;
  *header.mutable_shape() = capture.shape;
  *header.mutable_rope() = capture.rope;
  *header.mutable_plan() = result.end.plan();
  *header.mutable_receipt() = result.end.receipt();
  header.set_representation_salt(result.end.representation_salt());
  header.set_bytes_in(result.end.bytes_in());
  header.set_bytes_out(result.end.bytes_out());
  header.set_open_block_begin(result.sequence.open_block_begin());
  auto& metadata = *header.mutable_metadata();
  metadata["model"] = capture.model;
  metadata["text.kind"] = capture.text_kind;
  metadata["text.title"] = capture.text_title;
  return WriteContainer(path, std::move(header), Sections(capture, result));
}

std::vector<int64_t> OutputShape(const v1::TensorDescriptor& tensor, const v1::Plan& plan) {
  std::vector<int64_t> shape;
  for (const v1::Dim& dim : tensor.dims()) shape.push_back(dim.size());
  if (shape.empty()) shape = DenseShape(tensor, plan);
  int64_t bits = ElementBits(tensor.dtype());
  bool overflow = shape.empty();
  for (const int64_t size : shape) overflow |= __builtin_mul_overflow(bits, size, &bits);
  if (overflow || bits % 8 != 0 || bits / 8 != tensor.byte_size()) return {tensor.byte_size()};
  return shape;
}

std::vector<int32_t> Int32Values(const OutputTensor& tensor) {
  std::vector<int32_t> values(tensor.data.size() / sizeof(int32_t));
  if (!values.empty()) {
    std::memcpy(values.data(), tensor.data.bytes().data(), values.size() * sizeof(int32_t));
  }
  return values;
}

std::string DTypeLabel(v1::DType dtype) {
  constexpr size_t kPrefix = sizeof("DTYPE_") - 1;
  const std::string name = v1::DType_Name(dtype);
  return name.size() <= kPrefix ? "?" : absl::AsciiStrToLower(name.substr(kPrefix));
}

std::string SafetensorsDType(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_FLOAT32:
      return "F32";
    case v1::DTYPE_FLOAT16:
      return "F16";
    case v1::DTYPE_BFLOAT16:
      return "BF16";
    case v1::DTYPE_FLOAT8_E4M3:
      return "F8_E4M3";
    case v1::DTYPE_FLOAT8_E5M2:
      return "F8_E5M2";
    case v1::DTYPE_INT8:
      return "I8";
    case v1::DTYPE_INT32:
      return "I32";
    default:
      return "U8";
  }
}

std::string KindLabel(v1::TensorKind kind) {
  constexpr size_t kPrefix = sizeof("TENSOR_KIND_") - 1;
  const std::string name = v1::TensorKind_Name(kind);
  return name.size() <= kPrefix ? "?" : absl::AsciiStrToLower(name.substr(kPrefix));
}

}  // namespace dynsplit::cli
