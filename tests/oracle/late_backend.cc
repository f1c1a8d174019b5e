// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/late_backend.h"

#include "tests/oracle/wrapped_backend.h"

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

class LateBackend final : public WrappedBackend {
 public:
  LateBackend(std::unique_ptr<Backend> operations, std::shared_ptr<LateRecord> record)
      : WrappedBackend(std::move(operations)), record_(std::move(record)), info_(inner().info()) {
    info_.name = "late";
  }

  const BackendInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override {
    absl::StatusOr<std::unique_ptr<Stream>> stream = inner().CreateStream();
    if (!stream.ok()) return stream;
    return std::make_unique<LateStream>(*std::move(stream), record_);
  }
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) override {
    return inner().Allocate(size_bytes, Inner(stream));
  }
  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    absl::StatusOr<Buffer> buffer = inner().AllocateHost(size_bytes);
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
  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& stream) override {
    return inner().Copy(to, from, size_bytes, Inner(stream));
  }

 private:
  absl::Status Run(std::string_view /*operation*/, Stream& stream,
                   absl::FunctionRef<absl::Status(Stream&)> run) override {
    return run(Inner(stream));
  }

  const std::shared_ptr<LateRecord> record_;
  BackendInfo info_;  // constant after construction
};

std::unique_ptr<Backend> MakeLateBackend(std::unique_ptr<Backend> operations,
                                         std::shared_ptr<LateRecord> record) {
  return std::make_unique<LateBackend>(std::move(operations), std::move(record));
}

}  // namespace dynsplit
