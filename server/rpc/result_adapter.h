// SPDX-License-Identifier: Apache-2.0
//
// Results and errors from the domain to the wire.
#pragma once

#include "absl/status/status.h"
#include "dynsplit/v1/compression.pb.h"
#include "grpcpp/support/status.h"
#include "server/runtime/request_spec.h"

namespace dynsplit::rpc {

// Ids of the tensors of one message count up from `first_tensor_id`.
v1::SequenceResult SequenceToProto(const SequenceOutput& output, uint32_t first_tensor_id);
v1::LayerResult LayerToProto(const ComputedLayer& output, uint32_t first_tensor_id);
// Everything but the sending seconds, the total and the backend.
v1::CompressEnd EndToProto(const EndOutput& output);
v1::DelimiterProfile ProfileToProto(const DelimiterProfile& profile);

// google.rpc details as errors.h attached them.
grpc::Status ErrorToGrpc(const absl::Status& status);
// "OK", "INVALID_ARGUMENT", ...
const char* CodeName(absl::StatusCode code);

}  // namespace dynsplit::rpc
