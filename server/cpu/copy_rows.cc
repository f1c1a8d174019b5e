// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/copy_rows.h"

#include <hwy/cache_control.h>

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/cpu/copy_rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace dynsplit::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Requires: `to` aligned to 64, num_bytes a multiple of 64.
void StreamRow(const std::byte* from, int64_t num_bytes, std::byte* to) {
  const hn::CappedTag<uint8_t, 64> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto* in = reinterpret_cast<const uint8_t*>(from);
  auto* out = reinterpret_cast<uint8_t*>(to);
  for (int64_t i = 0; i < num_bytes; i += lanes) hn::Stream(hn::LoadU(d, in + i), d, out + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace dynsplit::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dynsplit::cpu {
HWY_EXPORT(StreamRow);

RowCopier::~RowCopier() {
  if (stream_) hwy::FlushStream();
}

void RowCopier::Copy(const std::byte* from, int64_t num_bytes, std::byte* to) {
  if (stream_ && num_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    HWY_DYNAMIC_DISPATCH(StreamRow)(from, num_bytes, to);
  } else {
    std::memcpy(to, from, static_cast<size_t>(num_bytes));
  }
}
}  // namespace dynsplit::cpu
#endif  // HWY_ONCE
