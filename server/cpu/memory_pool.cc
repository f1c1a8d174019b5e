// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/memory_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <new>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dynsplit::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
// What stays for reuse at most; beyond it freed blocks go back to the system.
constexpr int64_t kKeepBytes = int64_t{4} << 30;

int64_t AlignmentOf(int64_t block_bytes) {
  return block_bytes >= kHugePage ? kHugePage : MemoryPool::kAlignment;
}

std::byte* NewBlock(int64_t block_bytes) {
  const int64_t alignment = AlignmentOf(block_bytes);
  void* data = ::operator new (static_cast<size_t>(block_bytes),
                               std::align_val_t{static_cast<size_t>(alignment)}, std::nothrow);
  if (data != nullptr && alignment == kHugePage) {
    // Advice only: without huge pages the block works all the same.
    static_cast<void>(madvise(data, static_cast<size_t>(block_bytes), MADV_HUGEPAGE));
  }
  return static_cast<std::byte*>(data);
}

void DeleteBlock(std::byte* data, int64_t block_bytes) {
  ::operator delete (data, std::align_val_t{static_cast<size_t>(AlignmentOf(block_bytes))});
}

}  // namespace

std::shared_ptr<MemoryPool> MemoryPool::Create(int64_t limit_bytes) {
  return std::shared_ptr<MemoryPool>(new MemoryPool(limit_bytes));
}

MemoryPool::~MemoryPool() {
  absl::MutexLock lock(&mu_);
  Trim(0);
}

// Class 4 * e + f holds 256 * 2^e * (4 + f) / 4 bytes.
int64_t MemoryPool::ClassBytes(int size_class) {
  return (kAlignment / 4 * (4 + size_class % 4)) << (size_class / 4);
}

int MemoryPool::ClassOf(int64_t size_bytes) {
  const int64_t units = (std::max(size_bytes, kAlignment) - 1) / kAlignment;
  const int doubling =
      std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(units))) - 1);
  int size_class = 4 * doubling;
  while (ClassBytes(size_class) < size_bytes) ++size_class;
  return size_class;
}

absl::Status MemoryPool::Reserve(int64_t size_bytes, Kind kind) {
  if (size_bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat("size_bytes is ", size_bytes, "; must be >= 0"));
  }
  if (size_bytes > std::numeric_limits<int64_t>::max() / 4096) {
    return absl::ResourceExhaustedError(absl::StrCat("no room for ", size_bytes, " bytes"));
  }
  const int64_t in_use = bytes_in_use(Kind::kDevice) + bytes_in_use(Kind::kHost);
  if (limit_bytes_ > 0 && size_bytes > limit_bytes_ - in_use) {
    return absl::ResourceExhaustedError(absl::StrCat("allocation of ", size_bytes, " bytes with ",
                                                     in_use, " in use exceeds the limit of ",
                                                     limit_bytes_, " bytes"));
  }
  in_use_[static_cast<size_t>(kind)] += size_bytes;
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> MemoryPool::NewReserved(int64_t block_bytes, int64_t size_bytes,
                                                   Kind kind) {
  std::byte* data = NewBlock(block_bytes);
  if (data != nullptr) return data;
  absl::MutexLock lock(&mu_);  // perhaps what is kept stands in the way
  Trim(0);
  data = NewBlock(block_bytes);
  if (data != nullptr) return data;
  in_use_[static_cast<size_t>(kind)] -= size_bytes;
  return absl::ResourceExhaustedError(
      absl::StrCat("the system has no ", size_bytes, " bytes of memory"));
}

absl::StatusOr<Buffer> MemoryPool::Allocate(int64_t size_bytes, Kind kind) {
  int size_class = 0;
  std::byte* data = nullptr;
  {
    absl::MutexLock lock(&mu_);
    if (auto status = Reserve(size_bytes, kind); !status.ok()) return status;
    size_class = ClassOf(size_bytes);
    auto& blocks = kept_[static_cast<size_t>(size_class)];
    if (!blocks.empty()) {
      data = blocks.back();
      blocks.pop_back();
      kept_bytes_ -= ClassBytes(size_class);
    } else {
      TrimToLimit();
    }
  }
  if (data == nullptr) {
    absl::StatusOr<std::byte*> block = NewReserved(ClassBytes(size_class), size_bytes, kind);
    if (!block.ok()) return block.status();
    data = *block;
  }
  return Buffer(data, size_bytes,
                [pool = shared_from_this(), size_class, kind](std::byte* block, int64_t bytes) {
                  pool->Free(block, bytes, size_class, kind);
                });
}

absl::StatusOr<Buffer> MemoryPool::AllocateExact(int64_t size_bytes, Kind kind) {
  {
    absl::MutexLock lock(&mu_);
    if (auto status = Reserve(size_bytes, kind); !status.ok()) return status;
    TrimToLimit();
  }
  absl::StatusOr<std::byte*> block = NewReserved(size_bytes, size_bytes, kind);
  if (!block.ok()) return block.status();
  return Buffer(*block, size_bytes,
                [pool = shared_from_this(), kind](std::byte* data, int64_t bytes) {
                  DeleteBlock(data, bytes);
                  pool->in_use_[static_cast<size_t>(kind)] -= bytes;
                });
}

void MemoryPool::Free(std::byte* data, int64_t size_bytes, int size_class, Kind kind) {
  const int64_t block_bytes = ClassBytes(size_class);
  absl::MutexLock lock(&mu_);
  in_use_[static_cast<size_t>(kind)] -= size_bytes;
  if (block_bytes > kKeepBytes / 2) return DeleteBlock(data, block_bytes);
  Trim(kKeepBytes - block_bytes);
  kept_[static_cast<size_t>(size_class)].push_back(data);
  kept_bytes_ += block_bytes;
}

void MemoryPool::TrimToLimit() {
  if (limit_bytes_ == 0) return;
  Trim(limit_bytes_ - bytes_in_use(Kind::kDevice) - bytes_in_use(Kind::kHost));
}

void MemoryPool::Trim(int64_t target_bytes) {
  for (int size_class = kNumClasses - 1; size_class >= 0 && kept_bytes_ > target_bytes;
       --size_class) {
    auto& blocks = kept_[static_cast<size_t>(size_class)];
    while (!blocks.empty() && kept_bytes_ > target_bytes) {
      DeleteBlock(blocks.back(), ClassBytes(size_class));
      blocks.pop_back();
      kept_bytes_ -= ClassBytes(size_class);
    }
  }
}

}  // namespace dynsplit::cpu
