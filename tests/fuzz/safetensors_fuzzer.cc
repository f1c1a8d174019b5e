// SPDX-License-Identifier: Apache-2.0
//
// Runs the input as a whole file, and as a header with zeros behind it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "client/cpp/capture.h"
#include "client/cpp/safetensors.h"

namespace {

void Open(const std::vector<std::byte>& file) {
  const auto parsed = dynsplit::Safetensors::Parse(file, nullptr);
  if (!parsed.ok()) return;
  size_t bytes = 0;
  for (const dynsplit::SafetensorsTensor& tensor : parsed->tensors()) {
    bytes += tensor.bytes.size();
  }
  if (bytes > file.size()) std::abort();
  const auto capture = dynsplit::ReadCapture(*parsed);
  if (!capture.ok()) return;
  for (int64_t t = 0; t < capture->shape.num_tokens(); ++t) (void)capture->token_text(t);
  for (const auto& layer : capture->layers) {
    if (!layer.queries.empty()) (void)capture->WindowQueries(layer, capture->num_window_queries());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::byte> file(size);
  std::transform(data, data + size, file.begin(), [](uint8_t b) { return std::byte{b}; });
  Open(file);
  // The last two bytes as the size of the zeros.
  if (size < 2) return 0;
  const size_t header_bytes = size - 2;
  const size_t data_bytes = data[size - 2] | (size_t{data[size - 1]} << 8);
  std::vector<std::byte> framed(8 + header_bytes + data_bytes);
  for (size_t i = 0; i < 8; ++i)
    framed[i] = static_cast<std::byte>(uint64_t{header_bytes} >> (8 * i));
  std::copy(file.begin(), file.end() - 2, framed.begin() + 8);
  Open(framed);
  return 0;
}
