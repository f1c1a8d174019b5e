// SPDX-License-Identifier: Apache-2.0
//
// One stream of a backend with the inputs and poisoned outputs of a check.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "server/pipeline/backend.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::oracle {

inline constexpr std::byte kPoison{0xA5};
inline constexpr int64_t kGuardBytes = 256;

// Device memory that an operation writes.
template <typename T>
struct Output {
  Buffer host_source;  // outlives `device`, which may be an alias of it
  Buffer device;
  int64_t count = 0;
  T* data() const { return device.as<T>(); }
};

class DeviceSession {
 public:
  explicit DeviceSession(Backend& backend)
      : backend_(backend), stream_(backend.CreateStream().value()) {}

  Backend& backend() { return backend_; }
  Stream& stream() { return *stream_; }

  TensorView Upload(const HostTensor& tensor) {
    if (tensor.blob().empty()) return tensor.ViewAt(nullptr);
    return tensor.ViewAt(UploadBytes(tensor.blob().data(), tensor.blob().size()));
  }
  // Null for an empty vector.
  template <typename T>
  T* Upload(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    return reinterpret_cast<T*>(UploadBytes(values.data(), values.size() * sizeof(T)));
  }
  RotationTable Upload(const HostRotation& rotation) {
    RotationTable table = rotation.table();
    table.coarse = Upload(rotation.coarse);
    table.fine = Upload(rotation.fine);
    return table;
  }

  template <typename T>
  Output<T> Poisoned(int64_t count) {
    Output<T> output = HostPoisoned<T>(count);
    output.device = backend_.ToDevice(output.host_source, *stream_).value();
    return output;
  }
  // What an operation changes in place.
  template <typename T>
  Output<T> Holding(const std::vector<T>& values) {
    Output<T> output = HostPoisoned<T>(static_cast<int64_t>(values.size()));
    if (!values.empty()) {
      std::memcpy(output.host_source.data(), values.data(), values.size() * sizeof(T));
    }
    output.device = backend_.ToDevice(output.host_source, *stream_).value();
    return output;
  }

  // Waits, checks the guard, and returns what was written.
  template <typename T>
  std::vector<T> Read(Output<T> output) {
    Buffer host = backend_.ToHost(std::move(output.device), *stream_).value();
    const absl::Status status = stream_->Synchronize();
    EXPECT_TRUE(status.ok()) << status;
    std::vector<T> values(static_cast<size_t>(output.count));
    const size_t size = values.size() * sizeof(T);
    if (size > 0) std::memcpy(values.data(), host.data(), size);
    for (size_t i = 0; i < static_cast<size_t>(kGuardBytes); ++i) {
      if (host.data()[size + i] != kPoison) {
        ADD_FAILURE() << "byte " << i << " behind the output was overwritten";
        break;
      }
    }
    return values;
  }

 private:
  template <typename T>
  Output<T> HostPoisoned(int64_t count) {
    Output<T> output;
    output.count = count;
    const int64_t size = count * static_cast<int64_t>(sizeof(T)) + kGuardBytes;
    output.host_source = backend_.AllocateHost(size).value();
    std::memset(output.host_source.data(), static_cast<int>(kPoison), static_cast<size_t>(size));
    return output;
  }
  std::byte* UploadBytes(const void* bytes, size_t size) {
    Buffer host = backend_.AllocateHost(static_cast<int64_t>(size)).value();
    std::memcpy(host.data(), bytes, size);
    Buffer device = backend_.ToDevice(host, *stream_).value();
    std::byte* data = device.data();
    inputs_.push_back({std::move(host), std::move(device)});
    return data;
  }

  // Declared so that the device copy goes before its source.
  struct Input {
    Buffer host;
    Buffer device;
  };
  Backend& backend_;
  std::unique_ptr<Stream> stream_;
  std::vector<Input> inputs_;
};

}  // namespace dynsplit::oracle
