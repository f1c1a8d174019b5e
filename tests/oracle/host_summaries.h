// SPDX-License-Identifier: Apache-2.0
//
// Summaries of blocks in memory of the host, in the layouts that operations meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "server/pipeline/backend.h"
#include "tests/oracle/device_session.h"
#include "tests/oracle/reference.h"

namespace dynsplit::oracle {

enum class SummaryLayout : uint8_t {
  kDense,     // each [B, Hkv, D]
  kResident,  // [Hkv, capacity, what there is, D], scales [Hkv, capacity], capacity > B
};

struct HostSummaries {
  DType dtype = DType::kFloat32;
  bool bounds = false;
  bool means = false;
  SummaryLayout layout = SummaryLayout::kDense;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int64_t capacity = 0;
  std::vector<std::byte> bytes;  // all of these start as kPoison
  std::vector<float> bound_scales;
  std::vector<float> mean_scales;

  // Sizes the members above by the others.
  void Allocate() {
    const int rows = (bounds ? 2 : 0) + (means ? 1 : 0);
    bytes.assign(static_cast<size_t>(rows * capacity * num_heads * RowBytes()), kPoison);
    float poison = 0;
    std::memset(&poison, static_cast<int>(kPoison), sizeof(poison));
    const auto num_scales =
        static_cast<size_t>(dtype == DType::kFloat8E4M3 ? capacity * num_heads : 0);
    bound_scales.assign(bounds ? num_scales : 0, poison);
    mean_scales.assign(means ? num_scales : 0, poison);
  }
  // The view of a copy of `bytes` and of the scales.
  BlockSummaries ViewAt(std::byte* base, float* bound_scale, float* mean_scale) const {
    const bool dense = layout == SummaryLayout::kDense;
    const int rows = (bounds ? 2 : 0) + (means ? 1 : 0);
    const int64_t next = dense ? capacity * num_heads * RowBytes() : RowBytes();
    BlockSummaries view;
    view.dtype = dtype;
    if (bounds) view.min = base;
    if (bounds) view.max = base + next;
    if (means) view.mean = base + (bounds ? 2 * next : 0);
    view.block_stride_bytes = dense ? num_heads * RowBytes() : rows * RowBytes();
    view.head_stride_bytes = dense ? RowBytes() : capacity * rows * RowBytes();
    if (dtype != DType::kFloat8E4M3) return view;
    view.bound_scales = bounds ? bound_scale : nullptr;
    view.mean_scales = means ? mean_scale : nullptr;
    view.scale_head_stride = capacity;
    return view;
  }
  BlockSummaries view() { return ViewAt(bytes.data(), bound_scales.data(), mean_scales.data()); }
  BlockSummaries Upload(DeviceSession& session) const {
    return ViewAt(session.Upload(bytes), session.Upload(bound_scales), session.Upload(mean_scales));
  }

 private:
  int64_t RowBytes() const { return head_dim * DTypeBytes(dtype); }
};

}  // namespace dynsplit::oracle
