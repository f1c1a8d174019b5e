// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/late_backend.h"

#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace dynsplit {

void LateRecord::set_on_synchronize(std::function<void()> hook) {
  absl::MutexLock lock(&mu_);
  hook_ = std::move(hook);
}

void LateRecord::Use(const std::byte* host) {
  absl::MutexLock lock(&mu_);
  ++in_use_[host];
}

void LateRecord::Release(const std::byte* host) {
  absl::MutexLock lock(&mu_);
  const auto used = in_use_.find(host);
  if (used != in_use_.end() && --used->second == 0) in_use_.erase(used);
}

void LateRecord::Freed(const std::byte* host) {
  absl::MutexLock lock(&mu_);
  if (in_use_.erase(host) > 0) ++num_freed_early_;
}

void LateRecord::Synchronized() {
  ++num_synchronizations_;
  std::function<void()> hook;
  {
    absl::MutexLock lock(&mu_);
    hook = hook_;
  }
  if (hook) hook();
}

class LateStream final : public Stream {
 public:
  LateStream(std::unique_ptr<Stream> inner, std::shared_ptr<LateRecord> record)
      : inner_(std::move(inner)), record_(std::move(record)) {}

  absl::Status Synchronize() override {
    record_->Synchronized();
    for (const Copy& copy : copies_) {
      // Of a buffer that went early, only the record knows.
      if (!copy.bytes.empty() && record_->num_freed_early() == 0) {
        std::memcpy(copy.host, copy.bytes.data(), copy.bytes.size());
      }
      record_->Release(copy.host);
    }
    copies_.clear();
    return inner_->Synchronize();
  }
  int64_t Mark() override { return inner_->Mark(); }
  Clock::time_point TimeOf(int64_t mark) override { return inner_->TimeOf(mark); }

  // `bytes` come to `host` when the stream is synchronised; none: it is only read until then.
  void Add(std::byte* host, std::vector<std::byte> bytes) {
    record_->Use(host);
    copies_.push_back({host, std::move(bytes)});
  }
  Stream& inner() { return *inner_; }

 private:
  struct Copy {
    std::byte* host;
    std::vector<std::byte> bytes;
  };
  const std::unique_ptr<Stream> inner_;
  const std::shared_ptr<LateRecord> record_;
  std::vector<Copy> copies_;
};

namespace {

LateStream& Late(Stream& stream) { return static_cast<LateStream&>(stream); }
Stream& Inner(Stream& stream) { return Late(stream).inner(); }

}  // namespace

class LateBackend final : public Backend {
 public:
  LateBackend(std::unique_ptr<Backend> operations, std::shared_ptr<LateRecord> record)
      : operations_(std::move(operations)), record_(std::move(record)), info_(operations_->info()) {
    info_.name = "late";
  }

  const BackendInfo& info() const override { return info_; }
  absl::Status Healthy() const override { return operations_->Healthy(); }

  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override {
    absl::StatusOr<std::unique_ptr<Stream>> inner = operations_->CreateStream();
    if (!inner.ok()) return inner;
    return std::make_unique<LateStream>(*std::move(inner), record_);
  }
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) override {
    return operations_->Allocate(size_bytes, Inner(stream));
  }
  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    absl::StatusOr<Buffer> buffer = operations_->AllocateHost(size_bytes);
    if (!buffer.ok() || buffer->empty()) return buffer;
    std::byte* const data = buffer->data();
    return Buffer(data, size_bytes,
                  [record = record_, owner = *std::move(buffer)](std::byte* p, int64_t) mutable {
                    record->Freed(p);
                    owner.Reset();
                  });
  }
  absl::StatusOr<Buffer> ToDevice(const Buffer& host, Stream& stream) override {
    absl::StatusOr<Buffer> device = Allocate(host.size_bytes(), stream);
    if (!device.ok() || host.empty()) return device;
    std::memcpy(device->data(), host.data(), static_cast<size_t>(host.size_bytes()));
    Late(stream).Add(host.data(), {});
    return device;
  }
  absl::StatusOr<Buffer> ToHost(Buffer device, Stream& stream) override {
    absl::StatusOr<Buffer> host = AllocateHost(device.size_bytes());
    if (!host.ok() || device.empty()) return host;
    constexpr int kGarbage = 0xa5;
    std::memset(host->data(), kGarbage, static_cast<size_t>(device.size_bytes()));
    Late(stream).Add(host->data(), {device.data(), device.data() + device.size_bytes()});
    return host;
  }
  absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) override {
    return operations_->AllocateResident(size_bytes, residence);
  }
  absl::StatusOr<std::string> ExportHandle(const Buffer& buffer) override {
    return operations_->ExportHandle(buffer);
  }
  absl::StatusOr<Buffer> ImportHandle(std::string_view handle, int64_t offset_bytes,
                                      int64_t size_bytes) override {
    return operations_->ImportHandle(handle, offset_bytes, size_bytes);
  }
  absl::StatusOr<Buffer> RegisterHost(std::byte* data, int64_t size_bytes) override {
    return operations_->RegisterHost(data, size_bytes);
  }
  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& stream) override {
    return operations_->Copy(to, from, size_bytes, Inner(stream));
  }
  int64_t device_bytes_in_use() const override { return operations_->device_bytes_in_use(); }
  int64_t host_bytes_in_use() const override { return operations_->host_bytes_in_use(); }

  absl::Status ScoreWindow(const ScoreWindowParams& params, Stream& stream) override {
    return operations_->ScoreWindow(params, Inner(stream));
  }
  absl::Status ScoreKeys(const ScoreKeysParams& params, Stream& stream) override {
    return operations_->ScoreKeys(params, Inner(stream));
  }
  absl::Status ReduceRows(const ReduceRowsParams& params, Stream& stream) override {
    return operations_->ReduceRows(params, Inner(stream));
  }
  absl::Status ReduceBlocks(const ReduceBlocksParams& params, Stream& stream) override {
    return operations_->ReduceBlocks(params, Inner(stream));
  }
  absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, Stream& stream) override {
    return operations_->SummarizeBlocks(params, Inner(stream));
  }
  absl::Status ScoreBlocks(const ScoreBlocksParams& params, Stream& stream) override {
    return operations_->ScoreBlocks(params, Inner(stream));
  }
  absl::Status SelectTokens(const SelectTokensParams& params, Stream& stream) override {
    return operations_->SelectTokens(params, Inner(stream));
  }
  absl::Status GatherPages(const GatherPagesParams& params, Stream& stream) override {
    return operations_->GatherPages(params, Inner(stream));
  }
  absl::Status MeasureAttention(const MeasureAttentionParams& params, Stream& stream) override {
    return operations_->MeasureAttention(params, Inner(stream));
  }
  absl::Status MeasureSpans(const MeasureSpansParams& params, Stream& stream) override {
    return operations_->MeasureSpans(params, Inner(stream));
  }
  absl::Status CheckFinite(const CheckFiniteParams& params, Stream& stream) override {
    return operations_->CheckFinite(params, Inner(stream));
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& stream) override {
    return operations_->SelectBlocks(params, Inner(stream));
  }
  absl::Status AttendTokens(const AttendTokensParams& params, Stream& stream) override {
    return operations_->AttendTokens(params, Inner(stream));
  }
  absl::Status RefreshRows(const RefreshRowsParams& params, Stream& stream) override {
    return operations_->RefreshRows(params, Inner(stream));
  }

 private:
  const std::unique_ptr<Backend> operations_;
  const std::shared_ptr<LateRecord> record_;
  BackendInfo info_;  // constant after construction
};

std::unique_ptr<Backend> MakeLateBackend(std::unique_ptr<Backend> operations,
                                         std::shared_ptr<LateRecord> record) {
  return std::make_unique<LateBackend>(std::move(operations), std::move(record));
}

}  // namespace dynsplit
