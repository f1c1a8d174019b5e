// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/pipeline/backend.h"
#include "server/pipeline/errors.h"

namespace dynsplit {

// What a faulty device says.
inline absl::Status DeviceFault() {
  return WithReason(absl::StatusCode::kInternal, "DEVICE_FAULT", "injected: an illegal address");
}

// A backend that asks before each operation whether it may go on. After DeviceFault() it is as
// broken as a device that faulted. Thread-safe.
class HookedBackend final : public Backend {
 public:
  using Hook = std::function<absl::Status(std::string_view operation)>;

  // With a uuid it has memory of its own, that handles name: ImportHandle gives zeros.
  explicit HookedBackend(std::unique_ptr<Backend> inner, std::string uuid = "")
      : inner_(std::move(inner)), info_(inner_->info()) {
    info_.uuid = std::move(uuid);
  }

  void SetHook(Hook hook) {
    absl::MutexLock lock(&mu_);
    hook_ = std::make_shared<const Hook>(std::move(hook));
  }

  const BackendInfo& info() const override { return info_; }
  absl::Status Healthy() const override {
    absl::MutexLock lock(&mu_);
    return fault_;
  }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override { return inner_->CreateStream(); }
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) override {
    if (absl::Status status = Healthy(); !status.ok()) return status;
    return inner_->Allocate(size_bytes, stream);
  }
  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    if (absl::Status status = Healthy(); !status.ok()) return status;
    return inner_->AllocateHost(size_bytes);
  }
  absl::StatusOr<Buffer> ToDevice(const Buffer& host, Stream& stream) override {
    return inner_->ToDevice(host, stream);
  }
  absl::StatusOr<Buffer> ToHost(Buffer device, Stream& stream) override {
    return inner_->ToHost(std::move(device), stream);
  }
  absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) override {
    if (absl::Status status = Healthy(); !status.ok()) return status;
    return inner_->AllocateResident(size_bytes, residence);
  }
  absl::StatusOr<std::string> ExportHandle(const Buffer& buffer) override {
    return inner_->ExportHandle(buffer);
  }
  absl::StatusOr<Buffer> ImportHandle(std::string_view handle, int64_t offset_bytes,
                                      int64_t size_bytes) override {
    if (info_.uuid.empty()) return inner_->ImportHandle(handle, offset_bytes, size_bytes);
    absl::StatusOr<Buffer> memory = inner_->AllocateResident(size_bytes, Residence::kDevice);
    if (memory.ok()) std::fill_n(memory->data(), size_bytes, std::byte{0});
    return memory;
  }
  absl::StatusOr<Buffer> RegisterHost(std::byte* data, int64_t size_bytes) override {
    return inner_->RegisterHost(data, size_bytes);
  }
  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& stream) override {
    if (absl::Status status = Before("Copy"); !status.ok()) return status;
    return inner_->Copy(to, from, size_bytes, stream);
  }
  int64_t device_bytes_in_use() const override { return inner_->device_bytes_in_use(); }
  int64_t host_bytes_in_use() const override { return inner_->host_bytes_in_use(); }

  absl::Status ScoreWindow(const ScoreWindowParams& params, Stream& stream) override {
    if (absl::Status status = Before("ScoreWindow"); !status.ok()) return status;
    return inner_->ScoreWindow(params, stream);
  }
  absl::Status ScoreKeys(const ScoreKeysParams& params, Stream& stream) override {
    if (absl::Status status = Before("ScoreKeys"); !status.ok()) return status;
    return inner_->ScoreKeys(params, stream);
  }
  absl::Status ReduceRows(const ReduceRowsParams& params, Stream& stream) override {
    if (absl::Status status = Before("ReduceRows"); !status.ok()) return status;
    return inner_->ReduceRows(params, stream);
  }
  absl::Status ReduceBlocks(const ReduceBlocksParams& params, Stream& stream) override {
    if (absl::Status status = Before("ReduceBlocks"); !status.ok()) return status;
    return inner_->ReduceBlocks(params, stream);
  }
  absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, Stream& stream) override {
    if (absl::Status status = Before("SummarizeBlocks"); !status.ok()) return status;
    return inner_->SummarizeBlocks(params, stream);
  }
  absl::Status ScoreBlocks(const ScoreBlocksParams& params, Stream& stream) override {
    if (absl::Status status = Before("ScoreBlocks"); !status.ok()) return status;
    return inner_->ScoreBlocks(params, stream);
  }
  absl::Status SelectTokens(const SelectTokensParams& params, Stream& stream) override {
    if (absl::Status status = Before("SelectTokens"); !status.ok()) return status;
    return inner_->SelectTokens(params, stream);
  }
  absl::Status GatherPages(const GatherPagesParams& params, Stream& stream) override {
    if (absl::Status status = Before("GatherPages"); !status.ok()) return status;
    return inner_->GatherPages(params, stream);
  }
  absl::Status MeasureAttention(const MeasureAttentionParams& params, Stream& stream) override {
    if (absl::Status status = Before("MeasureAttention"); !status.ok()) return status;
    return inner_->MeasureAttention(params, stream);
  }
  absl::Status MeasureSpans(const MeasureSpansParams& params, Stream& stream) override {
    if (absl::Status status = Before("MeasureSpans"); !status.ok()) return status;
    return inner_->MeasureSpans(params, stream);
  }
  absl::Status CheckFinite(const CheckFiniteParams& params, Stream& stream) override {
    if (absl::Status status = Before("CheckFinite"); !status.ok()) return status;
    return inner_->CheckFinite(params, stream);
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& stream) override {
    if (absl::Status status = Before("SelectBlocks"); !status.ok()) return status;
    return inner_->SelectBlocks(params, stream);
  }
  absl::Status AttendTokens(const AttendTokensParams& params, Stream& stream) override {
    if (absl::Status status = Before("AttendTokens"); !status.ok()) return status;
    return inner_->AttendTokens(params, stream);
  }
  absl::Status RefreshRows(const RefreshRowsParams& params, Stream& stream) override {
    if (absl::Status status = Before("RefreshRows"); !status.ok()) return status;
    return inner_->RefreshRows(params, stream);
  }
  absl::Status SegmentTokens(const SegmentTokensParams& params, Stream& stream) override {
    if (absl::Status status = Before("SegmentTokens"); !status.ok()) return status;
    return inner_->SegmentTokens(params, stream);
  }

 private:
  absl::Status Before(std::string_view operation) {
    std::shared_ptr<const Hook> hook;
    {
      absl::MutexLock lock(&mu_);
      if (!fault_.ok()) return fault_;
      hook = hook_;
    }
    absl::Status status =
        hook == nullptr || *hook == nullptr ? absl::OkStatus() : (*hook)(operation);
    if (GetErrorDetails(status).type != "DEVICE_FAULT") return status;
    absl::MutexLock lock(&mu_);
    fault_.Update(status);
    return status;
  }

  const std::unique_ptr<Backend> inner_;
  BackendInfo info_;  // constant after construction
  mutable absl::Mutex mu_;
  std::shared_ptr<const Hook> hook_ ABSL_GUARDED_BY(mu_);
  absl::Status fault_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
