// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace dynsplit {

// Owned, uninitialised host memory, aligned for any vector load. Move-only. Large ones ask for huge
// pages: filling fresh small ones costs several times what copying into them does.
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kHugePage = size_t{2} << 20;

  // RESOURCE_EXHAUSTED when there is no memory.
  static absl::StatusOr<AlignedBuffer> Allocate(size_t size) {
    const size_t alignment = size >= kHugePage ? kHugePage : kAlignment;
    const size_t padded = (size + kAlignment - 1) / kAlignment * kAlignment;
    void* data = nullptr;
    if (posix_memalign(&data, alignment, padded) != 0) data = nullptr;
    // Whole huge pages only, so that no more memory is taken than was asked for.
    if (data != nullptr && size >= kHugePage) {
      madvise(data, size / kHugePage * kHugePage, MADV_HUGEPAGE);
    }
    if (data == nullptr && padded > 0) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", size, " bytes"));
    }
    AlignedBuffer buffer;
    buffer.data_.reset(static_cast<std::byte*>(data));
    buffer.size_ = size;
    return buffer;
  }

  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  std::byte* data() { return data_.get(); }
  size_t size() const { return size_; }
  absl::Span<const std::byte> bytes() const { return {data_.get(), size_}; }

 private:
  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

}  // namespace dynsplit
