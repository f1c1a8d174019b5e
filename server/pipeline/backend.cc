// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/backend.h"

namespace dynsplit {

DType OutputDType(DType source, EncodingPolicy::Format format, bool rotated) {
  switch (format) {
    case EncodingPolicy::Format::kFloat8E4M3:
      return DType::kFloat8E4M3;
    case EncodingPolicy::Format::kInt8:
      return DType::kInt8;
    case EncodingPolicy::Format::kAsIs:
      break;
  }
  // A turned key is no longer one of the input's codes.
  return rotated && IsQuantized(source) ? DType::kBFloat16 : source;
}

}  // namespace dynsplit
