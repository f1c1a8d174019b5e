// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace dynsplit {

// Parts of one allocation, laid out before it is made.
class Parts {
 public:
  int64_t Add(int64_t size_bytes) {
    const int64_t offset = end_;
    end_ = (end_ + size_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
    return offset;
  }
  int64_t size_bytes() const { return end_; }

 private:
  static constexpr int64_t kAlignmentBytes = 256;
  int64_t end_ = 0;
};

}  // namespace dynsplit
