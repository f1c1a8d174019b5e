// SPDX-License-Identifier: Apache-2.0
#include "cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "cuda/cuda_status.h"
#include "cuda/device_memory.h"
#include "cuda/imported_memory.h"
#include "cuda/operations.h"
#include "cuda/stream_marks.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr int kOldestComputeMajor = 8;

// The first fault of a device; shared by the backend and its streams. Thread-safe.
class FaultRecord {
 public:
  absl::Status Get() const {
    absl::MutexLock lock(&mu_);
    return fault_;
  }
  // Remembers `status` if it is a fault; returns it.
  absl::Status Note(absl::Status status) {
    if (!status.ok() && IsDeviceFault(status)) {
      absl::MutexLock lock(&mu_);
      fault_.Update(status);
    }
    return status;
  }

 private:
  mutable absl::Mutex mu_;
  absl::Status fault_ ABSL_GUARDED_BY(mu_);
};

class CudaStream : public Stream {
 public:
  CudaStream(std::shared_ptr<StreamHandle> handle, std::unique_ptr<StreamMarks> marks,
             std::shared_ptr<DevicePool> pool, std::shared_ptr<FaultRecord> fault)
      : handle_(std::move(handle)),
        pool_(std::move(pool)),
        fault_(std::move(fault)),
        marks_(std::move(marks)) {
    pool_->Attach(handle_);
  }
  ~CudaStream() override { pool_->Detach(handle_); }

  absl::Status Synchronize() override {
    absl::Status status = Enter();
    if (!status.ok()) return status;
    return fault_->Note(CudaStatus(cudaStreamSynchronize(handle_->get()), "cudaStreamSynchronize"));
  }
  int64_t Mark() override {
    if (Enter().ok()) (void)fault_->Note(marks_->Record(next_mark_));
    return next_mark_++;
  }
  Clock::time_point TimeOf(int64_t mark) override {
    (void)Enter();
    return marks_->TimeOf(mark);
  }
  const std::shared_ptr<StreamHandle>& handle() const { return handle_; }

 private:
  absl::Status Enter() {
    return fault_->Note(CudaStatus(cudaSetDevice(handle_->device()), "cudaSetDevice"));
  }

  const std::shared_ptr<StreamHandle> handle_;
  const std::shared_ptr<DevicePool> pool_;
  const std::shared_ptr<FaultRecord> fault_;
  const std::unique_ptr<StreamMarks> marks_;
  int64_t next_mark_ = 0;
};

// Streams given to a backend are its own (Backend's contract).
const std::shared_ptr<StreamHandle>& HandleOf(Stream& stream) {
  return static_cast<CudaStream&>(stream).handle();
}

struct DeviceLimits {
  int num_sms = 0;
  int64_t max_shared_bytes = 0;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(int device, BackendInfo info, DeviceLimits limits, std::shared_ptr<DevicePool> pool,
              std::shared_ptr<PinnedCache> pinned)
      : device_(device),
        info_(std::move(info)),
        limits_(limits),
        pool_(std::move(pool)),
        pinned_(std::move(pinned)),
        imported_(std::make_shared<ImportedMemory>(device)),
        fault_(std::make_shared<FaultRecord>()) {}

  const BackendInfo& info() const override { return info_; }
  absl::Status Healthy() const override { return fault_->Get(); }

  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override {
    absl::StatusOr<std::shared_ptr<StreamHandle>> handle = StreamHandle::Create(device_);
    if (!handle.ok()) return fault_->Note(handle.status());
    absl::StatusOr<std::unique_ptr<StreamMarks>> marks = StreamMarks::Create(*handle);
    if (!marks.ok()) return fault_->Note(marks.status());
    return std::make_unique<CudaStream>(*std::move(handle), *std::move(marks), pool_, fault_);
  }

  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) override {
    if (absl::Status status = Enter(); !status.ok()) return status;
    absl::StatusOr<Buffer> buffer = pool_->Allocate(size_bytes, HandleOf(stream));
    if (!buffer.ok()) return fault_->Note(buffer.status());
    return buffer;
  }

  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    if (absl::Status status = Enter(); !status.ok()) return status;
    absl::StatusOr<Buffer> buffer = pinned_->Allocate(size_bytes);
    if (!buffer.ok()) return fault_->Note(buffer.status());
    return buffer;
  }

  absl::StatusOr<Buffer> ToDevice(const Buffer& host, Stream& stream) override {
    absl::StatusOr<Buffer> buffer = Allocate(host.size_bytes(), stream);
    if (!buffer.ok() || host.empty()) return buffer;
    absl::Status status = Copy(buffer->data(), host.data(), host.size_bytes(), stream);
    if (!status.ok()) return status;
    return buffer;
  }

  absl::StatusOr<Buffer> ToHost(Buffer device, Stream& stream) override {
    absl::StatusOr<Buffer> host = AllocateHost(device.size_bytes());
    if (!host.ok() || device.empty()) return host;
    pool_->FreeOn(device, HandleOf(stream));
    absl::Status status = Copy(host->data(), device.data(), device.size_bytes(), stream);
    if (!status.ok()) return status;
    return host;
  }

  absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) override {
    if (size_bytes < 0) {
      return absl::InvalidArgumentError(absl::StrCat(size_bytes, " bytes of memory wanted"));
    }
    if (absl::Status status = Enter(); !status.ok()) return status;
    absl::StatusOr<Buffer> buffer = residence == Residence::kDevice
                                        ? pool_->AllocateExclusive(size_bytes)
                                        : pinned_->AllocateExclusive(size_bytes);
    if (!buffer.ok()) return fault_->Note(buffer.status());
    return buffer;
  }

  absl::StatusOr<std::string> ExportHandle(const Buffer& buffer) override {
    if (absl::Status status = Enter(); !status.ok()) return status;
    absl::StatusOr<std::string> handle = pool_->ExportHandle(buffer);
    if (!handle.ok()) return fault_->Note(handle.status());
    return handle;
  }

  absl::StatusOr<Buffer> ImportHandle(std::string_view handle, int64_t offset_bytes,
                                      int64_t size_bytes) override {
    if (absl::Status status = Enter(); !status.ok()) return status;
    absl::StatusOr<Buffer> buffer = imported_->Import(handle, offset_bytes, size_bytes);
    if (!buffer.ok()) return fault_->Note(buffer.status());
    return buffer;
  }

  absl::StatusOr<Buffer> RegisterHost(std::byte* data, int64_t size_bytes) override {
    if (absl::Status status = Enter(); !status.ok()) return status;
    absl::StatusOr<Buffer> buffer = PinMapped(device_, data, size_bytes);
    if (!buffer.ok()) return fault_->Note(buffer.status());
    return buffer;
  }

  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& stream) override {
    if (absl::Status status = Enter(); !status.ok() || size_bytes == 0) return status;
    return fault_->Note(CudaStatus(cudaMemcpyAsync(to, from, static_cast<size_t>(size_bytes),
                                                   cudaMemcpyDefault, HandleOf(stream)->get()),
                                   "cudaMemcpyAsync"));
  }

  int64_t device_bytes_in_use() const override { return pool_->bytes_in_use(); }
  int64_t host_bytes_in_use() const override { return pinned_->bytes_in_use(); }

  absl::Status ScoreWindow(const ScoreWindowParams& params, Stream& stream) override {
    return Run(kernels::ScoreWindow, params, stream);
  }
  absl::Status ScoreKeys(const ScoreKeysParams& params, Stream& stream) override {
    return Run(kernels::ScoreKeys, params, stream);
  }
  absl::Status ReduceRows(const ReduceRowsParams& params, Stream& stream) override {
    return Run(kernels::ReduceRows, params, stream);
  }
  absl::Status ReduceBlocks(const ReduceBlocksParams& params, Stream& stream) override {
    return Run(kernels::ReduceBlocks, params, stream);
  }
  absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, Stream& stream) override {
    return Run(kernels::SummarizeBlocks, params, stream);
  }
  absl::Status ScoreBlocks(const ScoreBlocksParams& params, Stream& stream) override {
    return Run(kernels::ScoreBlocks, params, stream);
  }
  absl::Status ScoreTokens(const ScoreTokensParams& params, Stream& stream) override {
    return Run(kernels::ScoreTokens, params, stream);
  }
  absl::Status SelectTokens(const SelectTokensParams& params, Stream& stream) override {
    return Run(kernels::SelectTokens, params, stream);
  }
  absl::Status GatherPages(const GatherPagesParams& params, Stream& stream) override {
    return Run(kernels::GatherPages, params, stream);
  }
  absl::Status MeasureAttention(const MeasureAttentionParams& params, Stream& stream) override {
    return Run(kernels::MeasureAttention, params, stream);
  }
  absl::Status MeasureSpans(const MeasureSpansParams& params, Stream& stream) override {
    return Run(kernels::MeasureSpans, params, stream);
  }
  absl::Status CheckFinite(const CheckFiniteParams& params, Stream& stream) override {
    return Run(kernels::CheckFinite, params, stream);
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& stream) override {
    return Run(kernels::SelectBlocks, params, stream);
  }
  absl::Status AttendTokens(const AttendTokensParams& params, Stream& stream) override {
    return Run(kernels::AttendTokens, params, stream);
  }
  absl::Status RefreshRows(const RefreshRowsParams& params, Stream& stream) override {
    return Run(kernels::RefreshRows, params, stream);
  }
  absl::Status SegmentTokens(const SegmentTokensParams& params, Stream& stream) override {
    return Run(kernels::SegmentTokens, params, stream);
  }

 private:
  // Makes the device current for this thread; refuses once it is faulty.
  absl::Status Enter() {
    if (absl::Status status = fault_->Get(); !status.ok()) return status;
    return fault_->Note(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  }

  template <typename Params>
  absl::Status Run(absl::Status (*operation)(const Params&, const kernels::Launch&),
                   const Params& params, Stream& stream) {
    if (absl::Status status = Enter(); !status.ok()) return status;
    const std::shared_ptr<StreamHandle>& handle = HandleOf(stream);
    return fault_->Note(operation(params, {.stream = handle->get(),
                                           .num_sms = limits_.num_sms,
                                           .max_shared_bytes = limits_.max_shared_bytes,
                                           .pool = pool_.get(),
                                           .handle = handle}));
  }

  const int device_;
  const BackendInfo info_;
  const DeviceLimits limits_;
  const std::shared_ptr<DevicePool> pool_;
  const std::shared_ptr<PinnedCache> pinned_;
  const std::shared_ptr<ImportedMemory> imported_;
  const std::shared_ptr<FaultRecord> fault_;
};

absl::StatusOr<int64_t> FreeDeviceBytes() {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  absl::Status status = CudaStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  if (!status.ok()) return status;
  return static_cast<int64_t>(free_bytes);
}

absl::Status CheckDevice(const cudaDeviceProp& properties) {
  if (properties.major >= kOldestComputeMajor && properties.memoryPoolsSupported != 0) {
    return absl::OkStatus();
  }
  return WithReason(
      absl::StatusCode::kUnimplemented, "DEVICE_UNSUPPORTED",
      absl::StrCat(properties.name, " has compute capability ", properties.major, ".",
                   properties.minor, " and ", properties.memoryPoolsSupported != 0 ? "" : "no ",
                   "memory pools; 8.0 with memory pools is needed"));
}

}  // namespace

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions& options) {
  if (options.device < 0 || options.device >= CudaDeviceCount()) {
    return NotFound("CUDA device", absl::StrCat(options.device));
  }
  absl::Status status = CudaStatus(cudaSetDevice(options.device), "cudaSetDevice");
  if (!status.ok()) return status;
  cudaDeviceProp properties;
  status =
      CudaStatus(cudaGetDeviceProperties(&properties, options.device), "cudaGetDeviceProperties");
  if (!status.ok()) return status;
  if (status = CheckDevice(properties); !status.ok()) return status;
  absl::StatusOr<int64_t> free_bytes = FreeDeviceBytes();
  if (!free_bytes.ok()) return free_bytes.status();
  const int64_t limit_bytes =
      options.memory_limit_bytes > 0 ? options.memory_limit_bytes : *free_bytes / 10 * 9;
  absl::StatusOr<std::shared_ptr<DevicePool>> pool =
      DevicePool::Create(options.device, limit_bytes);
  if (!pool.ok()) return pool.status();
  BackendInfo info = {.name = "cuda",
                      .device = properties.name,
                      .memory_bytes = limit_bytes,
                      .uuid = std::string(properties.uuid.bytes, sizeof(properties.uuid.bytes))};
  const DeviceLimits limits = {
      .num_sms = properties.multiProcessorCount,
      .max_shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin)};
  return std::make_unique<CudaBackend>(
      options.device, std::move(info), limits, *std::move(pool),
      PinnedCache::Create(options.device, options.pinned_limit_bytes));
}

}  // namespace dynsplit
