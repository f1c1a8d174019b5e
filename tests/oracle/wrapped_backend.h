// SPDX-License-Identifier: Apache-2.0
//
// A backend that is another one, but for what a derived class changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/pipeline/backend.h"

namespace dynsplit {

class WrappedBackend : public Backend {
 public:
  explicit WrappedBackend(std::unique_ptr<Backend> inner)
      : owned_(std::move(inner)), inner_(*owned_) {}
  // `inner` must outlive the wrapper.
  explicit WrappedBackend(Backend& inner) : inner_(inner) {}

  const BackendInfo& info() const override { return inner_.info(); }
  absl::Status Healthy() const override { return inner_.Healthy(); }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override { return inner_.CreateStream(); }
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, Stream& stream) override {
    return inner_.Allocate(size_bytes, stream);
  }
  absl::StatusOr<Buffer> AllocateHost(int64_t size_bytes) override {
    return inner_.AllocateHost(size_bytes);
  }
  absl::StatusOr<Buffer> ToDevice(const Buffer& host, Stream& stream) override {
    return inner_.ToDevice(host, stream);
  }
  absl::StatusOr<Buffer> ToHost(Buffer device, Stream& stream) override {
    return inner_.ToHost(std::move(device), stream);
  }
  absl::StatusOr<Buffer> AllocateResident(int64_t size_bytes, Residence residence) override {
    return inner_.AllocateResident(size_bytes, residence);
  }
  absl::StatusOr<std::string> ExportHandle(const Buffer& buffer) override {
    return inner_.ExportHandle(buffer);
  }
  absl::StatusOr<Buffer> ImportHandle(std::string_view handle, int64_t offset_bytes,
                                      int64_t size_bytes) override {
    return inner_.ImportHandle(handle, offset_bytes, size_bytes);
  }
  absl::StatusOr<Buffer> RegisterHost(std::byte* data, int64_t size_bytes) override {
    return inner_.RegisterHost(data, size_bytes);
  }
  absl::Status Copy(std::byte* to, const std::byte* from, int64_t size_bytes,
                    Stream& stream) override {
    return inner_.Copy(to, from, size_bytes, stream);
  }
  int64_t device_bytes_in_use() const override { return inner_.device_bytes_in_use(); }
  int64_t host_bytes_in_use() const override { return inner_.host_bytes_in_use(); }

  absl::Status ScoreWindow(const ScoreWindowParams& params, Stream& stream) override {
    return Forward("ScoreWindow", &Backend::ScoreWindow, params, stream);
  }
  absl::Status ScoreKeys(const ScoreKeysParams& params, Stream& stream) override {
    return Forward("ScoreKeys", &Backend::ScoreKeys, params, stream);
  }
  absl::Status ReduceRows(const ReduceRowsParams& params, Stream& stream) override {
    return Forward("ReduceRows", &Backend::ReduceRows, params, stream);
  }
  absl::Status ReduceBlocks(const ReduceBlocksParams& params, Stream& stream) override {
    return Forward("ReduceBlocks", &Backend::ReduceBlocks, params, stream);
  }
  absl::Status SummarizeBlocks(const SummarizeBlocksParams& params, Stream& stream) override {
    return Forward("SummarizeBlocks", &Backend::SummarizeBlocks, params, stream);
  }
  absl::Status ScoreBlocks(const ScoreBlocksParams& params, Stream& stream) override {
    return Forward("ScoreBlocks", &Backend::ScoreBlocks, params, stream);
  }
  absl::Status ScoreTokens(const ScoreTokensParams& params, Stream& stream) override {
    return Forward("ScoreTokens", &Backend::ScoreTokens, params, stream);
  }
  absl::Status SelectTokens(const SelectTokensParams& params, Stream& stream) override {
    return Forward("SelectTokens", &Backend::SelectTokens, params, stream);
  }
  absl::Status GatherPages(const GatherPagesParams& params, Stream& stream) override {
    return Forward("GatherPages", &Backend::GatherPages, params, stream);
  }
  absl::Status MeasureAttention(const MeasureAttentionParams& params, Stream& stream) override {
    return Forward("MeasureAttention", &Backend::MeasureAttention, params, stream);
  }
  absl::Status MeasureSpans(const MeasureSpansParams& params, Stream& stream) override {
    return Forward("MeasureSpans", &Backend::MeasureSpans, params, stream);
  }
  absl::Status CheckFinite(const CheckFiniteParams& params, Stream& stream) override {
    return Forward("CheckFinite", &Backend::CheckFinite, params, stream);
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& stream) override {
    return Forward("SelectBlocks", &Backend::SelectBlocks, params, stream);
  }
  absl::Status AttendTokens(const AttendTokensParams& params, Stream& stream) override {
    return Forward("AttendTokens", &Backend::AttendTokens, params, stream);
  }
  absl::Status RefreshRows(const RefreshRowsParams& params, Stream& stream) override {
    return Forward("RefreshRows", &Backend::RefreshRows, params, stream);
  }
  absl::Status SegmentTokens(const SegmentTokensParams& params, Stream& stream) override {
    return Forward("SegmentTokens", &Backend::SegmentTokens, params, stream);
  }

 protected:
  Backend& inner() { return inner_; }
  // Every operation passes here. `run` is the operation on the stream that it is given.
  virtual absl::Status Run(std::string_view operation, Stream& stream,
                           absl::FunctionRef<absl::Status(Stream&)> run) {
    (void)operation;
    return run(stream);
  }

 private:
  template <typename Params>
  absl::Status Forward(std::string_view name,
                       absl::Status (Backend::*operation)(const Params&, Stream&),
                       const Params& params, Stream& stream) {
    return Run(name, stream, [&](Stream& on) { return (inner_.*operation)(params, on); });
  }

  const std::unique_ptr<Backend> owned_;
  Backend& inner_;
};

}  // namespace dynsplit
