// SPDX-License-Identifier: Apache-2.0
//
// From a capture to a job, from a result to files.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cli/flags.h"
#include "client/cpp/capture.h"
#include "client/cpp/job.h"

namespace dynsplit::cli {

// A capture reduced to the layers asked for; layers are numbered anew from 0.
absl::StatusOr<Capture> LoadInput(const CaptureFlags& flags);

// Token ids, keys, values and, where captured, window queries. Views `capture`, which must outlive
// it.
CompressJob MakeJob(const Capture& capture, const CaptureFlags& flags, const v1::Policy& policy);

// Writes by extension: .safetensors, else a container.
absl::Status WriteResult(const std::string& path, const Capture& capture,
                         const CompressResult& result);

// Row-major shape of a response tensor; {byte_size} where the kind has none that fits.
std::vector<int64_t> OutputShape(const v1::TensorDescriptor& tensor, const v1::Plan& plan);

// The int32 values of a tensor.
std::vector<int32_t> Int32Values(const OutputTensor& tensor);

// "bf16", "fp8_e4m3", ... and the name safetensors has for it.
std::string DTypeLabel(v1::DType dtype);
std::string SafetensorsDType(v1::DType dtype);
// "key_pages"
std::string KindLabel(v1::TensorKind kind);

}  // namespace dynsplit::cli
