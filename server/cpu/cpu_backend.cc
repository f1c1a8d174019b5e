// SPDX-License-Identifier: Apache-2.0
#include "server/cpu/cpu_backend.h"

#include <hwy/targets.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/cpu/decode.h"
#include "server/cpu/operations.h"
#include "server/cpu/tensor.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

using cpu::MemoryPool;
using cpu::Workspace;

constexpr int64_t kCopyChunkBytes = int64_t{1} << 20;

class CpuStream final : public Stream {
 public:
  absl::Status Synchronize() override { return absl::OkStatus(); }
  int64_t Mark() override {
    marks_[static_cast<size_t>(next_mark_ % kMaxMarks)] = Clock::now();
    return next_mark_++;
  }
  Clock::time_point TimeOf(int64_t mark) override {
    return marks_[static_cast<size_t>(mark % kMaxMarks)];
  }

 private:
  std::array<Clock::time_point, kMaxMarks> marks_;
  int64_t next_mark_ = 0;
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(int num_threads, int64_t memory_limit_bytes)
      : threads_(num_threads), memory_(MemoryPool::Create(memory_limit_bytes)) {
    info_.name = "cpu";
    info_.device = absl::StrCat(cpu::VectorTargetName(), ", ", num_threads, " threads");
    info_.memory_bytes = memory_limit_bytes > 0
                             ? memory_limit_bytes
                             : int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  }

  const BackendInfo& info() const override { return info_; }
  absl::Status Healthy() const override { return absl::OkStatus(); }

  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override {
    return std::make_unique<CpuStream>();
  }
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& /*stream*/) override {
    return memory_->Allocate(size_bytes, MemoryPool::Kind::kDevice);
  }
  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    return memory_->Allocate(size_bytes, MemoryPool::Kind::kHost);
  }
  absl::StatusOr<Buffer> ToDevice(const Buffer& host, Stream& /*stream*/) override {
    return Buffer(host.data(), host.size_bytes(), nullptr);
  }
  absl::StatusOr<Buffer> ToHost(Buffer device, Stream& /*stream*/) override { return device; }
  absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) override {
    return memory_->AllocateExact(size_bytes, residence == Residence::kDevice
                                                  ? MemoryPool::Kind::kDevice
                                                  : MemoryPool::Kind::kHost);
  }
  absl::StatusOr<std::string> ExportHandle(const Buffer& /*buffer*/) override {
    return NoHandles();
  }
  absl::StatusOr<Buffer> ImportHandle(std::string_view /*handle*/, int64_t /*offset_bytes*/,
                                      int64_t /*size_bytes*/) override {
    return NoHandles();
  }
  absl::StatusOr<Buffer> RegisterHost(std::byte* data, int64_t size_bytes) override {
    return Buffer(data, size_bytes, nullptr);
  }
  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& /*stream*/) override {
    threads_.ParallelFor(cpu::CeilDiv(size_bytes, kCopyChunkBytes),
                         [&](int64_t chunk, int /*slot*/) {
                           const int64_t begin = chunk * kCopyChunkBytes;
                           const int64_t count = std::min(kCopyChunkBytes, size_bytes - begin);
                           std::memcpy(to + begin, from + begin, static_cast<size_t>(count));
                         });
    return absl::OkStatus();
  }
  int64_t device_bytes_in_use() const override {
    return memory_->bytes_in_use(MemoryPool::Kind::kDevice);
  }
  int64_t host_bytes_in_use() const override {
    return memory_->bytes_in_use(MemoryPool::Kind::kHost);
  }

  absl::Status ScoreWindow(const ScoreWindowParams& params, Stream& /*stream*/) override {
    return cpu::ScoreWindow(params, workspace());
  }
  absl::Status ScoreKeys(const ScoreKeysParams& params, Stream& /*stream*/) override {
    return cpu::ScoreKeys(params, workspace());
  }
  absl::Status ReduceRows(const ReduceRowsParams& params, Stream& /*stream*/) override {
    return cpu::ReduceRows(params, workspace());
  }
  absl::Status ReduceBlocks(const ReduceBlocksParams& params, Stream& /*stream*/) override {
    return cpu::ReduceBlocks(params, workspace());
  }
  absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, Stream& /*stream*/) override {
    return cpu::SummarizeBlocks(params, workspace());
  }
  absl::Status ScoreBlocks(const ScoreBlocksParams& params, Stream& /*stream*/) override {
    return cpu::ScoreBlocks(params, workspace());
  }
  absl::Status SelectTokens(const SelectTokensParams& params, Stream& /*stream*/) override {
    return cpu::SelectTokens(params, workspace());
  }
  absl::Status GatherPages(const GatherPagesParams& params, Stream& /*stream*/) override {
    return cpu::GatherPages(params, workspace());
  }
  absl::Status MeasureAttention(const MeasureAttentionParams& params, Stream& /*stream*/) override {
    return cpu::MeasureAttention(params, workspace());
  }
  absl::Status MeasureSpans(const MeasureSpansParams& params, Stream& /*stream*/) override {
    return cpu::MeasureSpans(params, workspace());
  }
  absl::Status CheckFinite(const CheckFiniteParams& params, Stream& /*stream*/) override {
    return cpu::CheckFinite(params, workspace());
  }
  absl::Status ScoreTokens(const ScoreTokensParams& params, Stream& /*stream*/) override {
    return cpu::ScoreTokens(params, workspace());
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& /*stream*/) override {
    return cpu::SelectBlocks(params, workspace());
  }
  absl::Status AttendTokens(const AttendTokensParams& params, Stream& /*stream*/) override {
    return cpu::AttendTokens(params, workspace());
  }
  absl::Status RefreshRows(const RefreshRowsParams& params, Stream& /*stream*/) override {
    return cpu::RefreshRows(params, workspace());
  }
  absl::Status SegmentTokens(const SegmentTokensParams& params, Stream& /*stream*/) override {
    return cpu::SegmentTokens(params, workspace());
  }

 private:
  static absl::Status NoHandles() {
    return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_ON_CPU",
                      "memory of the CPU backend has no handle; pass it as shared memory");
  }
  Workspace workspace() { return {threads_, *memory_}; }

  BackendInfo info_;  // constant after construction
  cpu::ThreadPool threads_;
  const std::shared_ptr<MemoryPool> memory_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuOptions& options) {
  if (options.num_threads < 0 || options.num_threads > 4096) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads is ", options.num_threads, "; must be in [0, 4096]"));
  }
  if (options.memory_limit_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory_limit_bytes is ", options.memory_limit_bytes, "; must be >= 0"));
  }
  const int num_threads = options.num_threads > 0
                              ? options.num_threads
                              : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::make_unique<CpuBackend>(num_threads, options.memory_limit_bytes);
}

}  // namespace dynsplit
