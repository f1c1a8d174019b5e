// SPDX-License-Identifier: Apache-2.0
//
// Recorded files of tests/data, and requests made of them for the client library.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/cpp/capture.h"
#include "client/cpp/job.h"
#include "client/cpp/safetensors.h"

namespace dynsplit::e2e {

std::string DataPath(const std::string& file);
// Both end the test program where the file cannot be read: it is part of the checkout.
Capture LoadData(const std::string& file);
Safetensors LoadGolden(const std::string& file);

// A safetensors tensor as numbers. Empty, and a failure, where `name` is not there as `dtype`.
std::vector<float> Floats(const Safetensors& file, const std::string& name);
std::vector<int32_t> Integers(const Safetensors& file, const std::string& name);

// Shape, RoPE and token ids; then queries, keys and (with `values`) values of every layer. Views
// the capture, which must outlive it.
CompressJob MakeJob(const Capture& capture, bool values);

// The int32 values of a layer's tensor of that kind; empty where there is none.
std::vector<int32_t> Integers(const LayerOutput& layer, v1::TensorKind kind);

}  // namespace dynsplit::e2e
