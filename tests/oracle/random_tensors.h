// SPDX-License-Identifier: Apache-2.0
//
// Seeded test data. One blob holds everything a view points to, so that a copy of the blob anywhere
// (a device) is a copy of the tensor: HostTensor::ViewAt(base of the copy).
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "server/pipeline/backend.h"
#include "server/pipeline/types.h"
#include "tests/oracle/shapes.h"

namespace dynsplit::oracle {

// mt19937_64 with distributions of our own: the standard's differ between libraries.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Between(int64_t low, int64_t high);  // inclusive
  double Uniform();                            // [0, 1)
  float Normal();                              // mean 0, variance 1 (sum of 12 uniforms)

 private:
  std::mt19937_64 engine_;
};

class HostTensor {
 public:
  // Normal values with some zeros, negative zeros, tiny values and outliers. Bytes that belong to
  // no element are 0xFF (NaN in every float type), so that reading them shows.
  static HostTensor Make(const ParityShape& shape, int64_t num_tokens, int32_t num_heads,
                         DType dtype, Layout layout, uint64_t seed);
  // Keys or values of the shape, and its queries (dense [W, Hq, D]).
  static HostTensor Cache(const ParityShape& shape, uint64_t seed);
  static HostTensor Queries(const ParityShape& shape, uint64_t seed);

  TensorView view() const { return ViewAt(blob_.data()); }
  TensorView ViewAt(const std::byte* base) const;
  const std::vector<std::byte>& blob() const { return blob_; }
  // Overwrites one element (rounded to the type); for quantised types the code.
  void Set(int64_t token, int32_t head, int32_t c, float value);
  // Quantised types: the scale that element (token, head) uses.
  void SetScale(int64_t token, int32_t head, float scale);

 private:
  std::vector<std::byte> blob_;
  TensorView geometry_;  // pointers null
  int64_t data_offset_ = 0;
  int64_t block_table_offset_ = -1;
  int64_t scales_offset_ = -1;
};

// Starts of blocks as the shape says: [B + 1].
std::vector<int32_t> RandomBlockStarts(const ParityShape& shape, uint64_t seed);

// Ascending kept tokens [num_kept_sets, num_kept]; num_kept = max(1, ratio * T).
struct KeptSets {
  int32_t groups = 1;
  int64_t num_kept = 0;
  std::vector<int32_t> tokens;
};
KeptSets RandomKept(const ParityShape& shape, uint64_t seed);

// Angles of base 10000 for positions up to num_tokens, laid out as RotationTable says.
struct HostRotation {
  std::vector<float> coarse;
  std::vector<float> fine;
  int32_t rotary_dim = 0;
  bool interleaved = false;
  RotationTable table() const {
    return {.coarse = coarse.data(),
            .fine = fine.data(),
            .rotary_dim = rotary_dim,
            .interleaved = interleaved};
  }
};
HostRotation MakeRotation(int64_t num_tokens, int32_t rotary_dim, bool interleaved);

}  // namespace dynsplit::oracle
