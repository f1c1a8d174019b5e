// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynsplit::cpu {

// Copies short rows. With `stream`, aligned rows are written around the caches; their contents are
// visible to other threads once the copier is gone.
class RowCopier {
 public:
  explicit RowCopier(bool stream) : stream_(stream) {}
  ~RowCopier();
  RowCopier(const RowCopier&) = delete;
  RowCopier& operator=(const RowCopier&) = delete;

  void Copy(const std::byte* from, int64_t num_bytes, std::byte* to);

 private:
  const bool stream_;
};

}  // namespace dynsplit::cpu
