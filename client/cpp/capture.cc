// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/capture.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"

namespace dynsplit {
namespace {

using Json = nlohmann::json;

constexpr char kFormat[] = "kv-capture/1";

template <typename... Parts>
absl::Status Bad(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("capture: ", parts...));
}

absl::StatusOr<Json> MetadataObject(const Safetensors& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) return Bad("metadata ", key, " is missing");
  Json json = Json::parse(found->second, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Bad("metadata ", key, " is not a JSON object");
  return json;
}

absl::StatusOr<int32_t> Integer(const Json& json, const char* key, int32_t min, int32_t max) {
  const auto found = json.find(key);
  if (found == json.end() || !found->is_number_integer()) return Bad(key, " is not an integer");
  const auto value = found->get<int64_t>();
  if (value < min || value > max) {
    return Bad(key, " is ", value, "; must be in [", min, ", ", max, "]");
  }
  return static_cast<int32_t>(value);
}

std::string Text(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_string() ? found->get<std::string>() : std::string();
}

absl::Status ReadModel(const Json& model, Capture& capture, std::vector<int32_t>& layer_ids) {
  const auto query_heads = Integer(model, "num_query_heads", 1, 1024);
  const auto kv_heads = Integer(model, "num_kv_heads", 1, 1024);
  const auto head_dim = Integer(model, "head_dim", 1, 512);
  const auto vocab_size = Integer(model, "vocab_size", 1, INT32_MAX);
  for (const auto* value : {&query_heads, &kv_heads, &head_dim, &vocab_size}) {
    if (!value->ok()) return value->status();
  }
  const auto layers = model.find("layer_ids");
  if (layers == model.end() || !layers->is_array() || layers->empty() || layers->size() > 1024) {
    return Bad("layer_ids is not a list of 1 to 1024 layers");
  }
  for (const Json& layer : *layers) {
    if (!layer.is_number_integer()) return Bad("layer_ids is not a list of integers");
    layer_ids.push_back(layer.get<int32_t>());
  }
  const auto rope = model.find("rope");
  if (rope == model.end() || !rope->is_object()) return Bad("rope is missing");
  const auto theta = rope->find("theta");
  const auto interleaved = rope->find("interleaved");
  if (theta == rope->end() || !theta->is_number() || interleaved == rope->end() ||
      !interleaved->is_boolean()) {
    return Bad("rope needs theta and interleaved");
  }
  const auto rotary_dim = Integer(*rope, "rotary_dim", 0, *head_dim);
  if (!rotary_dim.ok()) return rotary_dim.status();
  capture.rope.set_theta(theta->get<double>());
  capture.rope.set_rotary_dim(*rotary_dim);
  capture.rope.set_interleaved(interleaved->get<bool>());
  capture.shape.set_num_layers(static_cast<int32_t>(layer_ids.size()));
  capture.shape.set_num_query_heads(*query_heads);
  capture.shape.set_num_kv_heads(*kv_heads);
  capture.shape.set_head_dim(*head_dim);
  capture.vocab_size = *vocab_size;
  capture.model = Text(model, "name");
  return absl::OkStatus();
}

absl::StatusOr<const SafetensorsTensor*> Tensor(const Safetensors& file, const std::string& name,
                                                const std::string& dtype,
                                                const std::vector<int64_t>& shape) {
  const SafetensorsTensor* tensor = file.Find(name);
  if (tensor == nullptr) return Bad("tensor ", name, " is missing");
  if (tensor->dtype != dtype || tensor->shape != shape) {
    return Bad("tensor ", name, " does not have dtype ", dtype, " and the expected shape");
  }
  return tensor;
}

// A one-dimensional I32 tensor of any length; copied, for files align nothing.
absl::StatusOr<std::vector<int32_t>> Integers(const Safetensors& file, const std::string& name) {
  const SafetensorsTensor* found = file.Find(name);
  if (found == nullptr || found->shape.size() != 1) return Bad("tensor ", name, " is missing");
  const auto tensor = Tensor(file, name, "I32", found->shape);
  if (!tensor.ok()) return tensor.status();
  std::vector<int32_t> values(static_cast<size_t>(found->shape[0]));
  if (!values.empty()) std::memcpy(values.data(), found->bytes.data(), found->bytes.size());
  return values;
}

absl::Status ReadText(const Safetensors& file, Capture& capture) {
  const SafetensorsTensor* bytes = file.Find("token_bytes");
  if (bytes == nullptr || bytes->dtype != "U8") return Bad("tensor token_bytes is missing");
  if (!bytes->bytes.empty()) {
    capture.text.assign(reinterpret_cast<const char*>(bytes->bytes.data()), bytes->bytes.size());
  }
  auto offsets = Integers(file, "token_offsets");
  if (!offsets.ok()) return offsets.status();
  capture.token_offsets = *std::move(offsets);
  const std::vector<int32_t>& at = capture.token_offsets;
  if (at.size() != capture.token_ids.size() + 1 || at.front() != 0 ||
      std::cmp_not_equal(at.back(), capture.text.size())) {
    return Bad("token_offsets do not cover token_bytes");
  }
  for (size_t i = 1; i < at.size(); ++i) {
    if (at[i] < at[i - 1]) return Bad("token_offsets descend at token ", i - 1);
  }
  return absl::OkStatus();
}

absl::Status ReadTokens(const Safetensors& file, Capture& capture) {
  auto ids = Integers(file, "token_ids");
  if (!ids.ok()) return ids.status();
  capture.token_ids = *std::move(ids);
  if (capture.token_ids.empty()) return Bad("token_ids is empty");
  for (const int32_t id : capture.token_ids) {
    if (id < 0 || id >= capture.vocab_size) {
      return Bad("token id ", id, " is not in [0, ", capture.vocab_size, ")");
    }
  }
  capture.shape.set_num_tokens(static_cast<int64_t>(capture.token_ids.size()));
  if (file.Find("query_positions") == nullptr) return absl::OkStatus();
  auto positions = Integers(file, "query_positions");
  if (!positions.ok()) return positions.status();
  int64_t previous = -1;
  for (const int32_t position : *positions) {
    if (position <= previous || position >= capture.shape.num_tokens()) {
      return Bad("query_positions are not ascending positions of the text");
    }
    previous = position;
  }
  capture.query_positions = *std::move(positions);
  return absl::OkStatus();
}

absl::StatusOr<v1::DType> DTypeOf(const Safetensors& file) {
  const SafetensorsTensor* key = file.Find("layers.0.key");
  if (key == nullptr) return Bad("tensor layers.0.key is missing");
  if (key->dtype == "BF16") return v1::DTYPE_BFLOAT16;
  if (key->dtype == "F16") return v1::DTYPE_FLOAT16;
  if (key->dtype == "F32") return v1::DTYPE_FLOAT32;
  return Bad("tensor layers.0.key has dtype ", key->dtype, "; must be BF16, F16 or F32");
}

absl::Status ReadLayers(const Safetensors& file, const std::vector<int32_t>& layer_ids,
                        Capture& capture) {
  const absl::StatusOr<v1::DType> dtype = DTypeOf(file);
  if (!dtype.ok()) return dtype.status();
  capture.dtype = *dtype;
  const std::string name = file.Find("layers.0.key")->dtype;
  const v1::SequenceShape& shape = capture.shape;
  const auto num_queries = static_cast<int64_t>(capture.query_positions.size());
  for (size_t layer = 0; layer < layer_ids.size(); ++layer) {
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    const std::vector<int64_t> kv = {shape.num_tokens(), shape.num_kv_heads(), shape.head_dim()};
    const auto key = Tensor(file, prefix + "key", name, kv);
    if (!key.ok()) return key.status();
    const auto value = Tensor(file, prefix + "value", name, kv);
    if (!value.ok()) return value.status();
    Capture::Layer& read = capture.layers.emplace_back();
    read.model_layer = layer_ids[layer];
    read.key = (*key)->bytes;
    read.value = (*value)->bytes;
    if (num_queries == 0) continue;
    const auto queries = Tensor(file, prefix + "query", name,
                                {num_queries, shape.num_query_heads(), shape.head_dim()});
    if (!queries.ok()) return queries.status();
    read.queries = (*queries)->bytes;
  }
  return absl::OkStatus();
}

}  // namespace

std::string_view Capture::token_text(int64_t token) const {
  const auto at = static_cast<size_t>(token);
  const auto begin = static_cast<size_t>(token_offsets[at]);
  const auto end = static_cast<size_t>(token_offsets[at + 1]);
  return std::string_view(text).substr(begin, end - begin);
}

int64_t Capture::num_window_queries() const {
  int64_t num = 0;
  int64_t expected = shape.num_tokens() - 1;
  for (auto it = query_positions.rbegin(); it != query_positions.rend() && *it == expected; ++it) {
    ++num;
    --expected;
  }
  return num;
}

absl::Span<const std::byte> Capture::WindowQueries(const Layer& layer, int64_t num) const {
  const size_t row = layer.queries.size() / std::max<size_t>(query_positions.size(), 1);
  return layer.queries.last(row * static_cast<size_t>(num));
}

absl::StatusOr<Capture> LoadCapture(const std::string& path) {
  const absl::StatusOr<Safetensors> file = Safetensors::Load(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<Capture> capture = ReadCapture(*file);
  if (capture.ok()) return capture;
  return absl::Status(capture.status().code(),
                      absl::StrCat(path, ": ", capture.status().message()));
}

absl::StatusOr<Capture> ReadCapture(const Safetensors& file) {
  const auto format = file.metadata().find("dynsplit.format");
  if (format == file.metadata().end() || format->second != kFormat) {
    return Bad("metadata dynsplit.format is not ", kFormat);
  }
  const absl::StatusOr<Json> model = MetadataObject(file, "dynsplit.model");
  if (!model.ok()) return model.status();
  Capture capture;
  capture.owner = file.owner();
  std::vector<int32_t> layer_ids;
  if (absl::Status status = ReadModel(*model, capture, layer_ids); !status.ok()) return status;
  if (file.metadata().contains("dynsplit.text")) {
    const absl::StatusOr<Json> text = MetadataObject(file, "dynsplit.text");
    if (!text.ok()) return text.status();
    capture.text_kind = Text(*text, "kind");
    capture.text_title = Text(*text, "title");
  }
  if (absl::Status status = ReadTokens(file, capture); !status.ok()) return status;
  if (absl::Status status = ReadText(file, capture); !status.ok()) return status;
  if (absl::Status status = ReadLayers(file, layer_ids, capture); !status.ok()) return status;
  return capture;
}

}  // namespace dynsplit
