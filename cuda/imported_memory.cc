// SPDX-License-Identifier: Apache-2.0
#include "cuda/imported_memory.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cuda/cuda_status.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

// Bytes from `base`, the begin of an allocation, to its end. The runtime cannot say; the driver is
// asked through the runtime, so that programs link without it.
absl::StatusOr<int64_t> AllocationBytes(const std::byte* base) {
  constexpr unsigned int kOldestVersion = 3020;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  absl::Status status =
      RefusalStatus(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &entry, kOldestVersion,
                                                     cudaEnableDefault, &found),
                    "cudaGetDriverEntryPointByVersion", absl::StatusCode::kInternal);
  if (!status.ok()) return status;
  if (found != cudaDriverEntryPointSuccess) {
    return absl::InternalError("the CUDA driver has no cuMemGetAddressRange");
  }
  CUdeviceptr begin = 0;
  size_t size = 0;
  const auto address = reinterpret_cast<CUdeviceptr>(base);
  const CUresult result =
      reinterpret_cast<PFN_cuMemGetAddressRange_v3020>(entry)(&begin, &size, address);
  if (result != CUDA_SUCCESS) {
    return absl::InternalError(absl::StrCat("cuMemGetAddressRange: error ", result));
  }
  return static_cast<int64_t>(size - (address - begin));
}

}  // namespace

absl::StatusOr<ImportedMemory::Mapping> ImportedMemory::Acquire(const std::string& handle) {
  absl::MutexLock lock(&mu_);
  if (const auto known = mappings_.find(handle); known != mappings_.end()) {
    ++known->second.num_users;
    return known->second;
  }
  cudaIpcMemHandle_t ipc_handle;
  std::memcpy(ipc_handle.reserved, handle.data(), sizeof(ipc_handle.reserved));
  void* memory = nullptr;
  const cudaError_t error =
      cudaIpcOpenMemHandle(&memory, ipc_handle, cudaIpcMemLazyEnablePeerAccess);
  absl::Status status =
      RefusalStatus(error, "cudaIpcOpenMemHandle", absl::StatusCode::kInvalidArgument);
  if (absl::IsInvalidArgument(status)) {
    return InvalidField("cuda_ipc.handle",
                        absl::StrCat("names no memory of another process on this device: ",
                                     cudaGetErrorName(error)));
  }
  if (!status.ok()) return status;
  auto* const base = static_cast<std::byte*>(memory);
  const absl::StatusOr<int64_t> size_bytes = AllocationBytes(base);
  if (!size_bytes.ok()) {
    (void)cudaIpcCloseMemHandle(base);
    return size_bytes.status();
  }
  return mappings_[handle] = {.base = base, .size_bytes = *size_bytes, .num_users = 1};
}

void ImportedMemory::Release(const std::string& handle) {
  absl::MutexLock lock(&mu_);
  const auto mapping = mappings_.find(handle);
  if (mapping == mappings_.end() || --mapping->second.num_users > 0) return;
  if (cudaSetDevice(device_) == cudaSuccess) (void)cudaIpcCloseMemHandle(mapping->second.base);
  mappings_.erase(mapping);
}

absl::StatusOr<Buffer> ImportedMemory::Import(std::string_view handle, int64_t offset_bytes,
                                              int64_t size_bytes) {
  if (handle.size() != sizeof(cudaIpcMemHandle_t)) {
    return InvalidField("cuda_ipc.handle", absl::StrCat("has ", handle.size(), " bytes; must have ",
                                                        sizeof(cudaIpcMemHandle_t)));
  }
  if (offset_bytes < 0) {
    return InvalidField("cuda_ipc.offset_bytes",
                        absl::StrCat("is ", offset_bytes, "; must be >= 0"));
  }
  if (size_bytes <= 0) {
    return InvalidField("byte_size", absl::StrCat("is ", size_bytes, "; must be >= 1"));
  }
  const std::string key(handle);
  const absl::StatusOr<Mapping> mapping = Acquire(key);
  if (!mapping.ok()) return mapping.status();
  if (offset_bytes > mapping->size_bytes || size_bytes > mapping->size_bytes - offset_bytes) {
    Release(key);
    return InvalidField("byte_size",
                        absl::StrCat("is ", size_bytes, " from offset ", offset_bytes,
                                     " on; the allocation has ", mapping->size_bytes, " bytes"));
  }
  return Buffer(mapping->base + offset_bytes, size_bytes,
                [self = shared_from_this(), key](std::byte*, int64_t) { self->Release(key); });
}

absl::StatusOr<Buffer> PinMapped(int device, std::byte* data, int64_t size_bytes) {
  if (size_bytes <= 0) return Buffer();
  absl::Status status =
      RefusalStatus(cudaHostRegister(data, static_cast<size_t>(size_bytes),
                                     cudaHostRegisterPortable | cudaHostRegisterMapped),
                    "cudaHostRegister", absl::StatusCode::kInvalidArgument);
  if (!status.ok()) return status;
  void* address = nullptr;
  status = RefusalStatus(cudaHostGetDevicePointer(&address, data, 0), "cudaHostGetDevicePointer",
                         absl::StatusCode::kInternal);
  if (!status.ok()) {
    (void)cudaHostUnregister(data);
    return status;
  }
  return Buffer(static_cast<std::byte*>(address), size_bytes, [device, data](std::byte*, int64_t) {
    if (cudaSetDevice(device) == cudaSuccess) (void)cudaHostUnregister(data);
  });
}

}  // namespace dynsplit
