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
#include "tests/oracle/wrapped_backend.h"

namespace dynsplit {

// What a faulty device says.
inline absl::Status DeviceFault() {
  return WithReason(absl::StatusCode::kInternal, "DEVICE_FAULT", "injected: an illegal address");
}

// A backend that asks before each operation whether it may go on. After DeviceFault() it is as
// broken as a device that faulted. Thread-safe.
class HookedBackend final : public WrappedBackend {
 public:
  using Hook = std::function<absl::Status(std::string_view operation)>;

  // With a uuid it has memory of its own, that handles name: ImportHandle gives zeros.
  explicit HookedBackend(std::unique_ptr<Backend> inner, std::string uuid = "")
      : WrappedBackend(std::move(inner)), info_(this->inner().info()) {
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
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) override {
    if (absl::Status status = Healthy(); !status.ok()) return status;
    return inner().Allocate(size_bytes, stream);
  }
  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    if (absl::Status status = Healthy(); !status.ok()) return status;
    return inner().AllocateHost(size_bytes);
  }
  absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) override {
    if (absl::Status status = Healthy(); !status.ok()) return status;
    return inner().AllocateResident(size_bytes, residence);
  }
  absl::StatusOr<Buffer> ImportHandle(std::string_view handle, int64_t offset_bytes,
                                      int64_t size_bytes) override {
    if (info_.uuid.empty()) return inner().ImportHandle(handle, offset_bytes, size_bytes);
    absl::StatusOr<Buffer> memory = inner().AllocateResident(size_bytes, Residence::kDevice);
    if (memory.ok()) std::fill_n(memory->data(), size_bytes, std::byte{0});
    return memory;
  }
  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& stream) override {
    if (absl::Status status = Before("Copy"); !status.ok()) return status;
    return inner().Copy(to, from, size_bytes, stream);
  }

 private:
  absl::Status Run(std::string_view operation, Stream& stream,
                   absl::FunctionRef<absl::Status(Stream&)> run) override {
    if (absl::Status status = Before(operation); !status.ok()) return status;
    return run(stream);
  }
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

  BackendInfo info_;  // constant after construction
  mutable absl::Mutex mu_;
  std::shared_ptr<const Hook> hook_ ABSL_GUARDED_BY(mu_);
  absl::Status fault_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
