// SPDX-License-Identifier: Apache-2.0
#include "tests/e2e/sample.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/types/span.h"

namespace dynsplit::e2e {
namespace {

template <typename T>
T OrAbort(absl::StatusOr<T> loaded) {
  if (!loaded.ok()) {
    ADD_FAILURE() << loaded.status();
    std::abort();
  }
  return *std::move(loaded);
}

template <typename T>
std::vector<T> Values(absl::Span<const std::byte> bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

template <typename T>
std::vector<T> Values(const Safetensors& file, const std::string& name, const std::string& dtype) {
  const SafetensorsTensor* tensor = file.Find(name);
  if (tensor == nullptr || tensor->dtype != dtype) {
    ADD_FAILURE() << "no " << dtype << " tensor " << name;
    return {};
  }
  return Values<T>(tensor->bytes);
}

}  // namespace

std::string DataPath(const std::string& file) { return DYNSPLIT_TEST_DATA "/" + file; }

Capture LoadData(const std::string& file) { return OrAbort(LoadCapture(DataPath(file))); }

Safetensors LoadGolden(const std::string& file) {
  return OrAbort(Safetensors::Load(DataPath("golden/" + file)));
}

std::vector<float> Floats(const Safetensors& file, const std::string& name) {
  return Values<float>(file, name, "F32");
}

std::vector<int32_t> Integers(const Safetensors& file, const std::string& name) {
  return Values<int32_t>(file, name, "I32");
}

CompressJob MakeJob(const Capture& capture, bool values) {
  CompressJob job;
  job.owner = capture.owner;
  *job.begin.mutable_shape() = capture.shape;
  *job.begin.mutable_rope() = capture.rope;
  const auto add = [&job](v1::TensorKind kind, std::optional<int32_t> layer, v1::DType dtype,
                          absl::Span<const std::byte> bytes) {
    InputTensor& tensor = job.tensors.emplace_back();
    tensor.kind = kind;
    tensor.layer = layer;
    tensor.dtype = dtype;
    tensor.bytes = bytes;
  };
  add(v1::TENSOR_KIND_TOKEN_IDS, std::nullopt, v1::DTYPE_INT32,
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(capture.token_ids.data()),
                          capture.token_ids.size() * sizeof(int32_t)));
  for (size_t i = 0; i < capture.layers.size(); ++i) {
    const auto layer = static_cast<int32_t>(i);
    add(v1::TENSOR_KIND_QUERIES, layer, capture.dtype, capture.layers[i].queries);
    add(v1::TENSOR_KIND_KEY, layer, capture.dtype, capture.layers[i].key);
    if (values) add(v1::TENSOR_KIND_VALUE, layer, capture.dtype, capture.layers[i].value);
  }
  return job;
}

std::vector<int32_t> Integers(const LayerOutput& layer, v1::TensorKind kind) {
  const OutputTensor* tensor = FindTensor(layer.tensors, kind);
  return tensor == nullptr ? std::vector<int32_t>() : Values<int32_t>(tensor->data.bytes());
}

}  // namespace dynsplit::e2e
