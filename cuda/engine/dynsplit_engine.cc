// SPDX-License-Identifier: Apache-2.0
#include "cuda/engine/dynsplit_engine.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <span>

#include "cuda/attend_tokens.h"
#include "cuda/attend_tokens_plan.h"
#include "server/pipeline/types.h"

namespace {

using dynsplit::AttendTokensItem;
using dynsplit::AttendTokensParams;
using dynsplit::DType;
using dynsplit::TensorView;

constexpr int32_t kMaxHeads = 1024;
constexpr int32_t kMaxHeadDim = 512;
constexpr int32_t kHeadDimStep = 8;
constexpr int64_t kMaxRows = INT32_MAX / 2;  // of an item
constexpr int64_t kWorkspaceAlignment = 256;
constexpr size_t kErrorBytes = 256;

thread_local std::array<char, kErrorBytes> last_error = {};

int Fail(int code, const char* what, const char* why) {
  std::snprintf(last_error.data(), last_error.size(), "%s: %s", what, why);
  return code;
}

int FailValue(const char* field, int64_t value, const char* wanted) {
  std::snprintf(last_error.data(), last_error.size(), "%s is %lld; must be %s", field,
                static_cast<long long>(value), wanted);
  return DYNSPLIT_INVALID_ARGUMENT;
}

int FailItem(int64_t item, const char* field, const char* wanted) {
  std::snprintf(last_error.data(), last_error.size(), "items[%lld].%s must be %s",
                static_cast<long long>(item), field, wanted);
  return DYNSPLIT_INVALID_ARGUMENT;
}

int Check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return DYNSPLIT_OK;
  return Fail(DYNSPLIT_DEVICE_ERROR, call, cudaGetErrorString(error));
}

// The code's type; kInt32, which no tensor has, for unknown codes.
DType TypeOf(int32_t code) {
  switch (code) {
    case DYNSPLIT_FLOAT32:
      return DType::kFloat32;
    case DYNSPLIT_FLOAT16:
      return DType::kFloat16;
    case DYNSPLIT_BFLOAT16:
      return DType::kBFloat16;
    case DYNSPLIT_FLOAT8_E4M3:
      return DType::kFloat8E4M3;
    case DYNSPLIT_FLOAT8_E5M2:
      return DType::kFloat8E5M2;
    case DYNSPLIT_INT8:
      return DType::kInt8;
    default:
      return DType::kInt32;
  }
}

int CheckShape(const dynsplit_attend_shape* shape) {
  if (shape == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "shape", "must not be null");
  if (shape->num_kv_heads < 1) return FailValue("num_kv_heads", shape->num_kv_heads, "at least 1");
  if (shape->num_query_heads < 1 || shape->num_query_heads > kMaxHeads ||
      shape->num_query_heads % shape->num_kv_heads != 0) {
    return FailValue("num_query_heads", shape->num_query_heads,
                     "a multiple of num_kv_heads in [1, 1024]");
  }
  if (shape->head_dim < kHeadDimStep || shape->head_dim > kMaxHeadDim ||
      shape->head_dim % kHeadDimStep != 0) {
    return FailValue("head_dim", shape->head_dim, "a multiple of 8 in [8, 512]");
  }
  const DType query_dtype = TypeOf(shape->query_dtype);
  if (query_dtype == DType::kInt32 || IsQuantized(query_dtype)) {
    return FailValue("query_dtype", shape->query_dtype, "a code of float32, float16 or bfloat16");
  }
  if (TypeOf(shape->key_dtype) == DType::kInt32) {
    return FailValue("key_dtype", shape->key_dtype, "a code of an element type");
  }
  if (TypeOf(shape->value_dtype) == DType::kInt32) {
    return FailValue("value_dtype", shape->value_dtype, "a code of an element type");
  }
  if (shape->token_groups != 1 && shape->token_groups != shape->num_kv_heads) {
    return FailValue("token_groups", shape->token_groups, "1 or num_kv_heads");
  }
  return DYNSPLIT_OK;
}

// What is wrong with rows that are read; null if nothing is.
const char* FaultOf(const dynsplit_rows& rows, DType dtype) {
  const int64_t element_bytes = DTypeBytes(dtype);
  if (rows.data == nullptr) return "rows with data";
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<intptr_t>(rows.data)) |
                       rows.token_stride_bytes | rows.head_stride_bytes;
  if (bits % element_bytes != 0) return "rows at multiples of their element size";
  if (IsQuantized(dtype) && rows.scales == nullptr) return "rows with scales";
  return nullptr;
}

int CheckItem(const dynsplit_attend_shape& shape, const dynsplit_attend_item& item, int64_t i) {
  if (item.num_tokens < 0 || item.num_tokens > kMaxRows) {
    return FailItem(i, "num_tokens", "in [0, 2^30)");
  }
  if (item.num_tail_rows < 0 || item.num_tail_rows > kMaxRows) {
    return FailItem(i, "num_tail_rows", "in [0, 2^30)");
  }
  if (item.num_tokens + item.num_tail_rows == 0) {
    return FailItem(i, "num_tokens", "positive where num_tail_rows is 0");
  }
  const int64_t query_bytes = DTypeBytes(TypeOf(shape.query_dtype));
  const int64_t query_bits =
      static_cast<int64_t>(reinterpret_cast<intptr_t>(item.queries)) | item.query_stride_bytes;
  if (item.queries == nullptr || query_bits % query_bytes != 0) {
    return FailItem(i, "queries", "rows at multiples of their element size");
  }
  if (item.output == nullptr) return FailItem(i, "output", "device memory");
  const char* fault = nullptr;
  if (item.num_tokens > 0) {
    if (fault = FaultOf(item.keys, TypeOf(shape.key_dtype)); fault != nullptr) {
      return FailItem(i, "keys", fault);
    }
    if (fault = FaultOf(item.values, TypeOf(shape.value_dtype)); fault != nullptr) {
      return FailItem(i, "values", fault);
    }
  }
  if (item.num_tail_rows > 0) {
    if (fault = FaultOf(item.tail_keys, TypeOf(shape.key_dtype)); fault != nullptr) {
      return FailItem(i, "tail_keys", fault);
    }
    if (fault = FaultOf(item.tail_values, TypeOf(shape.value_dtype)); fault != nullptr) {
      return FailItem(i, "tail_values", fault);
    }
  }
  return DYNSPLIT_OK;
}

TensorView ViewOf(const dynsplit_attend_shape& shape, const dynsplit_rows& rows, int32_t dtype,
                  int64_t num_tokens) {
  TensorView view;
  view.data = static_cast<const std::byte*>(rows.data);
  view.dtype = TypeOf(dtype);
  view.num_tokens = num_tokens;
  view.num_heads = shape.num_kv_heads;
  view.head_dim = shape.head_dim;
  view.token_stride_bytes = rows.token_stride_bytes;
  view.head_stride_bytes = rows.head_stride_bytes;
  view.scales = IsQuantized(view.dtype) ? rows.scales : nullptr;
  view.scale_granularity = shape.scales_per_head != 0 ? dynsplit::ScaleGranularity::kHead
                                                      : dynsplit::ScaleGranularity::kTokenHead;
  return view;
}

AttendTokensItem ItemOf(const dynsplit_attend_shape& shape, const dynsplit_attend_item& item) {
  AttendTokensItem result;
  result.queries.data = static_cast<const std::byte*>(item.queries);
  result.queries.dtype = TypeOf(shape.query_dtype);
  result.queries.num_tokens = 1;
  result.queries.num_heads = shape.num_query_heads;
  result.queries.head_dim = shape.head_dim;
  result.queries.head_stride_bytes = item.query_stride_bytes;
  // How many tokens lie behind the data is the caller's business; what is read counts here.
  result.keys = ViewOf(shape, item.keys, shape.key_dtype, item.num_tokens);
  result.values = ViewOf(shape, item.values, shape.value_dtype, item.num_tokens);
  result.tokens = item.tokens;
  result.num_tokens = item.num_tokens;
  result.tail_keys = ViewOf(shape, item.tail_keys, shape.key_dtype, item.num_tail_rows);
  result.tail_values = ViewOf(shape, item.tail_values, shape.value_dtype, item.num_tail_rows);
  result.output = item.output;
  result.lse = item.lse;
  return result;
}

int NumSms(int& num_sms) {
  int device = 0;
  if (const int code = Check(cudaGetDevice(&device), "cudaGetDevice"); code != DYNSPLIT_OK) {
    return code;
  }
  return Check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
}

int64_t WorkspaceBytes(const dynsplit_attend_shape& shape, int64_t num_items, int num_sms) {
  return dynsplit::kernels::AttendWorkspaceBytes({.num_query_heads = shape.num_query_heads,
                                                  .num_kv_heads = shape.num_kv_heads,
                                                  .head_dim = shape.head_dim},
                                                 num_items, num_sms);
}

int CheckCall(const dynsplit_attend_shape& shape, const dynsplit_attend_item* items,
              int64_t num_items, const void* workspace, int64_t workspace_bytes, int num_sms) {
  if (num_items < 0) return FailValue("num_items", num_items, "at least 0");
  if (num_items > 0 && items == nullptr) {
    return Fail(DYNSPLIT_INVALID_ARGUMENT, "items", "must not be null");
  }
  for (int64_t i = 0; i < num_items; ++i) {
    if (const int code = CheckItem(shape, items[i], i); code != DYNSPLIT_OK) return code;
  }
  if (workspace == nullptr || reinterpret_cast<intptr_t>(workspace) % kWorkspaceAlignment != 0) {
    return Fail(DYNSPLIT_INVALID_ARGUMENT, "workspace", "must be 256-byte aligned device memory");
  }
  if (workspace_bytes < WorkspaceBytes(shape, num_items, num_sms)) {
    return FailValue("workspace_bytes", workspace_bytes,
                     "at least what dynsplit_attend_workspace_bytes says");
  }
  return DYNSPLIT_OK;
}

}  // namespace

const char* dynsplit_engine_error(void) { return last_error.data(); }

int dynsplit_attend_workspace_bytes(const dynsplit_attend_shape* shape, int64_t max_items,
                                    int64_t* bytes) {
  if (const int code = CheckShape(shape); code != DYNSPLIT_OK) return code;
  if (max_items < 1) return FailValue("max_items", max_items, "at least 1");
  if (bytes == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "bytes", "must not be null");
  int num_sms = 0;
  if (const int code = NumSms(num_sms); code != DYNSPLIT_OK) return code;
  *bytes = WorkspaceBytes(*shape, max_items, num_sms);
  return DYNSPLIT_OK;
}

int dynsplit_attend(const dynsplit_attend_shape* shape, const dynsplit_attend_item* items,
                    int64_t num_items, void* workspace, int64_t workspace_bytes, void* stream) {
  if (const int code = CheckShape(shape); code != DYNSPLIT_OK) return code;
  int num_sms = 0;
  if (const int code = NumSms(num_sms); code != DYNSPLIT_OK) return code;
  if (const int code = CheckCall(*shape, items, num_items, workspace, workspace_bytes, num_sms);
      code != DYNSPLIT_OK) {
    return code;
  }
  constexpr int64_t kMost = dynsplit::kernels::kAttendMaxLaunchItems;
  std::array<AttendTokensItem, kMost> batch;  // one launch at a time: nothing is allocated
  for (int64_t at = 0; at < num_items; at += kMost) {
    const auto count = static_cast<size_t>(std::min(kMost, num_items - at));
    for (size_t i = 0; i < count; ++i) {
      batch[i] = ItemOf(*shape, items[at + static_cast<int64_t>(i)]);
    }
    const AttendTokensParams params = {
        .items = std::span<const AttendTokensItem>(batch).first(count),
        .groups = shape->token_groups,
        .softmax_scale = shape->softmax_scale};
    const cudaError_t error = dynsplit::kernels::AttendTokensIn(params, num_sms, workspace,
                                                                static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return Check(error, "dynsplit_attend");
  }
  return DYNSPLIT_OK;
}

int dynsplit_open_ipc(const unsigned char handle[64], void** base) {
  if (handle == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "handle", "must not be null");
  if (base == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "base", "must not be null");
  cudaIpcMemHandle_t named;
  static_assert(sizeof(named) == 64);
  std::memcpy(&named, handle, sizeof(named));
  return Check(cudaIpcOpenMemHandle(base, named, cudaIpcMemLazyEnablePeerAccess),
               "cudaIpcOpenMemHandle");
}

int dynsplit_close_ipc(void* base) {
  return Check(cudaIpcCloseMemHandle(base), "cudaIpcCloseMemHandle");
}

int dynsplit_allocate(int64_t bytes, void** data, unsigned char handle[64]) {
  if (bytes < 1) return FailValue("bytes", bytes, "at least 1");
  if (data == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "data", "must not be null");
  if (handle == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "handle", "must not be null");
  void* memory = nullptr;
  if (const int code = Check(cudaMalloc(&memory, static_cast<size_t>(bytes)), "cudaMalloc");
      code != DYNSPLIT_OK) {
    return code;
  }
  cudaIpcMemHandle_t named;
  if (const int code = Check(cudaIpcGetMemHandle(&named, memory), "cudaIpcGetMemHandle");
      code != DYNSPLIT_OK) {
    (void)cudaFree(memory);
    return code;
  }
  std::memcpy(handle, &named, sizeof(named));
  *data = memory;
  return DYNSPLIT_OK;
}

int dynsplit_free(void* data) { return Check(cudaFree(data), "cudaFree"); }

int dynsplit_device_uuid(unsigned char uuid[16]) {
  if (uuid == nullptr) return Fail(DYNSPLIT_INVALID_ARGUMENT, "uuid", "must not be null");
  int device = 0;
  if (const int code = Check(cudaGetDevice(&device), "cudaGetDevice"); code != DYNSPLIT_OK) {
    return code;
  }
  cudaDeviceProp properties;
  if (const int code =
          Check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
      code != DYNSPLIT_OK) {
    return code;
  }
  static_assert(sizeof(properties.uuid.bytes) == 16);
  std::memcpy(uuid, properties.uuid.bytes, sizeof(properties.uuid.bytes));
  return DYNSPLIT_OK;
}
