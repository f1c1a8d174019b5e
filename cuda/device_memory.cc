// SPDX-License-Identifier: Apache-2.0
#include "cuda/device_memory.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cuda/cuda_status.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr int64_t kRetryAfterMs = 100;
constexpr int64_t kSmallestClassBytes = 4096;
constexpr int64_t kDeviceGranuleBytes = int64_t{2} << 20;
constexpr int64_t kSmallestBlockBytes = 512;

std::atomic<int64_t> device_allocations = 0;
std::atomic<int64_t> pinned_allocations = 0;

// `size_bytes` rounded up so that sizes between two powers of two make `steps` classes. Requires:
// size_bytes >= steps.
int64_t RoundToClass(int64_t size_bytes, int64_t steps) {
  const int64_t step =
      static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(size_bytes))) / steps;
  return (size_bytes + step - 1) / step * step;
}

// Blocks of the device are at most an eighth larger than what they hold.
int64_t BlockBytes(int64_t size_bytes) {
  return RoundToClass(std::max(size_bytes, kSmallestBlockBytes), 8);
}

constexpr std::string_view kDeviceFull = "device memory (the device has no more)";

absl::Status Exhausted(std::string_view what, int64_t wanted, int64_t in_use, int64_t limit) {
  return RetryLater(absl::StatusCode::kResourceExhausted,
                    absl::StrCat(absl::string_view(what.data(), what.size()), ": ", wanted,
                                 " bytes wanted, ", in_use, " in use; the limit is ", limit),
                    kRetryAfterMs);
}

}  // namespace

DriverAllocations CountDriverAllocations() {
  return {.device = device_allocations.load(std::memory_order_relaxed),
          .pinned = pinned_allocations.load(std::memory_order_relaxed)};
}

absl::StatusOr<std::shared_ptr<StreamHandle>> StreamHandle::Create(int device) {
  absl::Status status = CudaStatus(cudaSetDevice(device), "cudaSetDevice");
  if (!status.ok()) return status;
  cudaStream_t stream = nullptr;
  status = CudaStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                      "cudaStreamCreateWithFlags");
  if (!status.ok()) return status;
  return std::shared_ptr<StreamHandle>(new StreamHandle(device, stream));
}

StreamHandle::~StreamHandle() {
  if (cudaSetDevice(device_) == cudaSuccess) (void)cudaStreamDestroy(stream_);
}

absl::StatusOr<std::shared_ptr<DevicePool>> DevicePool::Create(int device, int64_t limit_bytes) {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.handleTypes = cudaMemHandleTypeNone;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  absl::Status status = CudaStatus(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  if (!status.ok()) return status;
  std::shared_ptr<DevicePool> owner(new DevicePool(device, limit_bytes, pool));
  uint64_t keep_all = std::numeric_limits<uint64_t>::max();
  status = CudaStatus(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all),
                      "cudaMemPoolSetAttribute");
  if (!status.ok()) return status;
  return owner;
}

DevicePool::~DevicePool() {
  if (cudaSetDevice(device_) == cudaSuccess) (void)cudaMemPoolDestroy(pool_);
}

cudaError_t DevicePool::AllocateFromPool(void** data, int64_t size_bytes, cudaStream_t stream) {
  const auto size = static_cast<size_t>(size_bytes);
  device_allocations.fetch_add(1, std::memory_order_relaxed);
  cudaError_t error = cudaMallocFromPoolAsync(data, size, pool_, stream);
  if (error != cudaErrorMemoryAllocation) return error;
  // We may keep what is wanted, and the pool may hold memory it cannot join; give both back, when
  // the device has reached the freeing, and try once more.
  (void)cudaGetLastError();
  Trim(0);
  error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaMemPoolTrimTo(pool_, 0);
  if (error == cudaSuccess) error = cudaMallocFromPoolAsync(data, size, pool_, stream);
  if (error == cudaErrorMemoryAllocation) (void)cudaGetLastError();
  return error;
}

cudaError_t DevicePool::AllocateFromDevice(void** data, int64_t size_bytes) {
  const auto size = static_cast<size_t>((size_bytes + kDeviceGranuleBytes - 1) /
                                        kDeviceGranuleBytes * kDeviceGranuleBytes);
  device_allocations.fetch_add(1, std::memory_order_relaxed);
  cudaError_t error = cudaMalloc(data, size);
  if (error != cudaErrorMemoryAllocation) return error;
  // The pool gives back only what the device has reached the freeing of.
  (void)cudaGetLastError();
  Trim(0);
  error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaMemPoolTrimTo(pool_, 0);
  if (error == cudaSuccess) error = cudaMalloc(data, size);
  if (error == cudaErrorMemoryAllocation) (void)cudaGetLastError();
  return error;
}

absl::Status DevicePool::Reserve(int64_t size_bytes) {
  if (size_bytes > limit_bytes_) {
    return Exhausted("device memory", size_bytes, bytes_in_use(), limit_bytes_);
  }
  const int64_t before = in_use_bytes_.fetch_add(size_bytes, std::memory_order_relaxed);
  if (size_bytes > limit_bytes_ - before) {
    GiveBack(size_bytes);
    return Exhausted("device memory", size_bytes, before, limit_bytes_);
  }
  int64_t peak = peak_bytes();
  while (peak < before + size_bytes &&
         !peak_bytes_.compare_exchange_weak(peak, before + size_bytes, std::memory_order_relaxed)) {
  }
  return absl::OkStatus();
}

void DevicePool::Attach(const std::shared_ptr<StreamHandle>& stream) {
  absl::MutexLock lock(&mu_);
  kept_.try_emplace(stream);
}

void DevicePool::Detach(const std::shared_ptr<StreamHandle>& stream) {
  Kept kept;
  {
    absl::MutexLock lock(&mu_);
    auto node = kept_.extract(stream);
    if (node.empty()) return;
    kept.swap(node.mapped());
    for (const auto& [block_bytes, data] : kept) kept_bytes_ -= block_bytes;
  }
  if (kept.empty() || cudaSetDevice(device_) != cudaSuccess) return;
  for (const auto& [block_bytes, data] : kept) (void)cudaFreeAsync(data, stream->get());
}

int64_t DevicePool::bytes_kept() const {
  absl::MutexLock lock(&mu_);
  return kept_bytes_;
}

DevicePool::Block DevicePool::TakeKept(int64_t block_bytes,
                                       const std::shared_ptr<StreamHandle>& stream) {
  const auto kept = kept_.find(stream);
  if (kept == kept_.end()) return {};
  // Of its own class only: so what was enough for some work is enough for the same work again.
  const auto found = kept->second.find(block_bytes);
  if (found == kept->second.end()) return {};
  const Block block = {.data = found->second, .block_bytes = found->first};
  kept->second.erase(found);
  kept_bytes_ -= block.block_bytes;
  return block;
}

void DevicePool::Trim(int64_t target_bytes) {
  struct Freed {
    std::shared_ptr<StreamHandle> stream;
    std::byte* data;
  };
  std::vector<Freed> freed;
  {
    absl::MutexLock lock(&mu_);
    for (auto& [stream, kept] : kept_) {
      while (!kept.empty() && kept_bytes_ > target_bytes) {
        const auto largest = std::prev(kept.end());
        kept_bytes_ -= largest->first;
        freed.push_back({stream, largest->second});
        kept.erase(largest);
      }
    }
  }
  for (const Freed& block : freed) (void)cudaFreeAsync(block.data, block.stream->get());
}

absl::StatusOr<Buffer> DevicePool::Allocate(int64_t size_bytes,
                                            std::shared_ptr<StreamHandle> stream) {
  if (size_bytes <= 0) return Buffer();
  if (absl::Status status = Reserve(size_bytes); !status.ok()) return status;
  Block block;
  bool trims = false;
  {
    absl::MutexLock lock(&mu_);
    block = TakeKept(BlockBytes(size_bytes), stream);
    trims = block.data == nullptr && kept_bytes_ > limit_bytes_ - bytes_in_use();
  }
  if (trims) Trim(std::max<int64_t>(0, limit_bytes_ - bytes_in_use()));
  if (block.data == nullptr) {
    block.block_bytes = BlockBytes(size_bytes);
    void* memory = nullptr;
    const cudaError_t error = AllocateFromPool(&memory, block.block_bytes, stream->get());
    if (error != cudaSuccess) {
      GiveBack(size_bytes);
      if (error == cudaErrorMemoryAllocation) {
        return Exhausted(kDeviceFull, size_bytes, bytes_in_use(), limit_bytes_);
      }
      return CudaStatus(error, "cudaMallocFromPoolAsync");
    }
    block.data = static_cast<std::byte*>(memory);
  }
  {
    absl::MutexLock lock(&mu_);
    owners_[block.data] = {.stream = std::move(stream), .block_bytes = block.block_bytes};
  }
  return Buffer(block.data, size_bytes,
                [self = shared_from_this()](std::byte* p, int64_t size) { self->Free(p, size); });
}

absl::StatusOr<Buffer> DevicePool::AllocateExclusive(int64_t size_bytes) {
  if (size_bytes <= 0) return Buffer();
  if (absl::Status status = Reserve(size_bytes); !status.ok()) return status;
  void* memory = nullptr;
  const cudaError_t error = AllocateFromDevice(&memory, size_bytes);
  if (error != cudaSuccess) {
    GiveBack(size_bytes);
    if (error == cudaErrorMemoryAllocation) {
      return Exhausted(kDeviceFull, size_bytes, bytes_in_use(), limit_bytes_);
    }
    return CudaStatus(error, "cudaMalloc");
  }
  auto* data = static_cast<std::byte*>(memory);
  {
    absl::MutexLock lock(&mu_);
    exclusive_.insert(data);
  }
  return Buffer(data, size_bytes, [self = shared_from_this()](std::byte* p, int64_t size) {
    self->FreeExclusive(p, size);
  });
}

absl::StatusOr<std::string> DevicePool::ExportHandle(const Buffer& buffer) {
  {
    absl::MutexLock lock(&mu_);
    if (!exclusive_.contains(buffer.data())) {
      return absl::InvalidArgumentError("not device memory that other processes may map");
    }
  }
  cudaIpcMemHandle_t handle;
  absl::Status status = RefusalStatus(cudaIpcGetMemHandle(&handle, buffer.data()),
                                      "cudaIpcGetMemHandle", absl::StatusCode::kInternal);
  if (!status.ok()) return status;
  return std::string(handle.reserved, sizeof(handle.reserved));
}

void DevicePool::FreeOn(const Buffer& buffer, std::shared_ptr<StreamHandle> stream) {
  absl::MutexLock lock(&mu_);
  const auto owner = owners_.find(buffer.data());
  if (owner != owners_.end()) owner->second.stream = std::move(stream);
}

void DevicePool::Free(std::byte* data, int64_t size_bytes) {
  GiveBack(size_bytes);
  std::shared_ptr<StreamHandle> stream;  // not attached: the driver gets the block
  {
    absl::MutexLock lock(&mu_);
    auto node = owners_.extract(data);
    if (node.empty()) return;
    const Owner& owner = node.mapped();
    const auto kept = kept_.find(owner.stream);
    if (kept != kept_.end()) {
      kept->second.emplace(owner.block_bytes, data);
      kept_bytes_ += owner.block_bytes;
      return;
    }
    stream = owner.stream;
  }
  if (cudaSetDevice(device_) == cudaSuccess) (void)cudaFreeAsync(data, stream->get());
}

void DevicePool::FreeExclusive(std::byte* data, int64_t size_bytes) {
  {
    absl::MutexLock lock(&mu_);
    exclusive_.erase(data);
  }
  if (cudaSetDevice(device_) == cudaSuccess) (void)cudaFree(data);
  GiveBack(size_bytes);
}

std::shared_ptr<PinnedCache> PinnedCache::Create(int device, int64_t limit_bytes) {
  if (limit_bytes <= 0) {
    limit_bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  }
  return std::shared_ptr<PinnedCache>(new PinnedCache(device, limit_bytes));
}

PinnedCache::~PinnedCache() {
  absl::MutexLock lock(&mu_);
  ReleaseFreeBlocks();
}

int64_t PinnedCache::ClassBytes(int64_t size_bytes) {
  return RoundToClass(std::max(size_bytes, kSmallestClassBytes), 4);
}

void PinnedCache::ReleaseFreeBlocks() {
  if (free_.empty() || cudaSetDevice(device_) != cudaSuccess) return;
  for (const auto& [class_bytes, blocks] : free_) {
    for (std::byte* block : blocks) {
      (void)cudaFreeHost(block);
      pinned_bytes_ -= class_bytes;
    }
  }
  free_.clear();
}

absl::Status PinnedCache::ReservePinned(int64_t size_bytes) {
  absl::MutexLock lock(&mu_);
  if (size_bytes > limit_bytes_ - pinned_bytes_) ReleaseFreeBlocks();
  if (size_bytes > limit_bytes_ - pinned_bytes_) {
    return Exhausted("pinned host memory", size_bytes, pinned_bytes_, limit_bytes_);
  }
  pinned_bytes_ += size_bytes;
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> PinnedCache::Pin(int64_t size_bytes) {
  absl::Status status = CudaStatus(cudaSetDevice(device_), "cudaSetDevice");
  if (status.ok()) status = ReservePinned(size_bytes);
  if (!status.ok()) return status;
  pinned_allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = nullptr;
  const cudaError_t error = cudaHostAlloc(&memory, static_cast<size_t>(size_bytes),
                                          cudaHostAllocPortable | cudaHostAllocMapped);
  if (error == cudaSuccess) return static_cast<std::byte*>(memory);
  absl::MutexLock lock(&mu_);
  pinned_bytes_ -= size_bytes;
  if (error != cudaErrorMemoryAllocation) return CudaStatus(error, "cudaHostAlloc");
  (void)cudaGetLastError();
  return Exhausted("pinned host memory (the host has no more)", size_bytes, pinned_bytes_,
                   limit_bytes_);
}

void PinnedCache::Unpin(std::byte* data, int64_t size_bytes) {
  if (cudaSetDevice(device_) == cudaSuccess) (void)cudaFreeHost(data);
  absl::MutexLock lock(&mu_);
  pinned_bytes_ -= size_bytes;
}

absl::StatusOr<std::byte*> PinnedCache::Take(int64_t class_bytes) {
  {
    absl::MutexLock lock(&mu_);
    const auto cached = free_.find(class_bytes);
    if (cached != free_.end()) {
      std::byte* const block = cached->second.back();
      cached->second.pop_back();
      if (cached->second.empty()) free_.erase(cached);
      return block;
    }
  }
  return Pin(class_bytes);
}

void PinnedCache::Return(std::byte* data, int64_t class_bytes) {
  absl::MutexLock lock(&mu_);
  free_[class_bytes].push_back(data);
}

absl::StatusOr<Buffer> PinnedCache::Allocate(int64_t size_bytes) {
  if (size_bytes <= 0) return Buffer();
  absl::StatusOr<std::byte*> data = Take(ClassBytes(size_bytes));
  if (!data.ok()) return data.status();
  in_use_bytes_.fetch_add(size_bytes, std::memory_order_relaxed);
  return Buffer(*data, size_bytes, [self = shared_from_this()](std::byte* p, int64_t size) {
    self->Return(p, ClassBytes(size));
    self->in_use_bytes_.fetch_sub(size, std::memory_order_relaxed);
  });
}

absl::StatusOr<Buffer> PinnedCache::AllocateExclusive(int64_t size_bytes) {
  if (size_bytes <= 0) return Buffer();
  absl::StatusOr<std::byte*> data = Pin(size_bytes);
  if (!data.ok()) return data.status();
  in_use_bytes_.fetch_add(size_bytes, std::memory_order_relaxed);
  return Buffer(*data, size_bytes, [self = shared_from_this()](std::byte* p, int64_t size) {
    self->Unpin(p, size);
    self->in_use_bytes_.fetch_sub(size, std::memory_order_relaxed);
  });
}

}  // namespace dynsplit
