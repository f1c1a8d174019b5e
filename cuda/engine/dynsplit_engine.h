// SPDX-License-Identifier: Apache-2.0
//
// C interface for inference engines that attend in place over keys and values that dynsplitd holds.
//   1. Open the session's memory: dynsplit_open_ipc with the handle of its lease.
//   2. For queries and tokens that the service reads and writes, and for rows of the reuse
//   pipeline:
//      dynsplit_allocate, and register the handle with the service as a region.
//   3. At start: ask dynsplit_attend_workspace_bytes for the largest batch, allocate once.
//   4. Each step and layer: let the service Select into the tokens' region, then dynsplit_attend on
//      the engine's stream, with the engine's newest rows as the tail.
//   5. A captured graph replays the pointers and row counts of its capture; contents may change.
//      Call once before the first capture, so that the kernels are loaded.
// Functions work on the calling thread's current device, return DYNSPLIT_OK or an error that
// dynsplit_engine_error() puts into words, and may be called from several threads. No function
// waits for the device except dynsplit_allocate, dynsplit_free and dynsplit_close_ipc.
#ifndef CUDA_ENGINE_DYNSPLIT_ENGINE_H_
#define CUDA_ENGINE_DYNSPLIT_ENGINE_H_

#include <stdint.h>

#if defined(__GNUC__)
#define DYNSPLIT_ENGINE_API __attribute__((visibility("default")))
#else
#define DYNSPLIT_ENGINE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// NOLINTBEGIN(readability-identifier-naming): names of a C interface.
enum {
  DYNSPLIT_OK = 0,
  DYNSPLIT_INVALID_ARGUMENT = 1,  // nothing was enqueued
  DYNSPLIT_DEVICE_ERROR = 2,      // CUDA refused, or an earlier error surfaced
};

// Element types. Quantised ones (8 bits): value = code * scale.
enum {
  DYNSPLIT_FLOAT32 = 0,
  DYNSPLIT_FLOAT16 = 1,
  DYNSPLIT_BFLOAT16 = 2,
  DYNSPLIT_FLOAT8_E4M3 = 3,
  DYNSPLIT_FLOAT8_E5M2 = 4,
  DYNSPLIT_INT8 = 5,
};

// Text of the calling thread's last error; empty if there was none. Valid until its next call.
DYNSPLIT_ENGINE_API const char* dynsplit_engine_error(void);

// What all items of a call have in common. Fastest: head_dim 64 or 128, at most 16 query heads a KV
// head, queries of a 16-bit type, keys and values of one type which is theirs or a quantised one,
// all addresses and strides multiples of 16 bytes. Everything else takes a slower path.
typedef struct dynsplit_attend_shape {
  int32_t num_query_heads;  // a multiple of num_kv_heads, at most 1024
  int32_t num_kv_heads;
  int32_t head_dim;         // a multiple of 8, at most 512
  int32_t query_dtype;      // and of outputs: FLOAT32, FLOAT16 or BFLOAT16
  int32_t key_dtype;        // also of tail keys
  int32_t value_dtype;      // also of tail values
  int32_t token_groups;     // 1: all heads read the same tokens; num_kv_heads: each its own
  int32_t scales_per_head;  // quantised types: 1 = scales [kv_heads], 0 = [tokens, kv_heads]
  float softmax_scale;      // of the logits, usually head_dim^-0.5
} dynsplit_attend_shape;

// Device memory [tokens, kv_heads, head_dim]; head_dim is contiguous. Row of token t and head h:
// data + t * token_stride_bytes + h * head_stride_bytes.
typedef struct dynsplit_rows {
  const void* data;
  int64_t token_stride_bytes;
  int64_t head_stride_bytes;
  const float* scales;  // quantised types only, else null
} dynsplit_rows;

// One sequence (or one layer of it). All pointers are device memory.
typedef struct dynsplit_attend_item {
  const void* queries;  // [num_query_heads, head_dim]
  int64_t query_stride_bytes;
  dynsplit_rows keys;
  dynsplit_rows values;
  const int32_t* tokens;    // [token_groups, num_tokens]; null: rows 0 .. num_tokens - 1
  int64_t num_tokens;       // rows read of keys and values, >= 0
  dynsplit_rows tail_keys;  // all num_tail_rows of them are read
  dynsplit_rows tail_values;
  int64_t num_tail_rows;  // >= 0; num_tokens + num_tail_rows >= 1
  void* output;           // out [num_query_heads, head_dim], query_dtype
  float* lse;  // out [num_query_heads], natural log of the sum of exponentials; null: not wanted
} dynsplit_attend_item;
// NOLINTEND(readability-identifier-naming)

// Bytes that suffice for calls of at most `max_items` items, whatever their rows.
DYNSPLIT_ENGINE_API int dynsplit_attend_workspace_bytes(const dynsplit_attend_shape* shape,
                                                        int64_t max_items, int64_t* bytes);

// Enqueues the attention of one query a head over the chosen and the tail rows of each item.
// `items` is host memory and may go when the call returns. `workspace` is 256-byte aligned device
// memory that calls in flight on other streams do not use; `stream` is a cudaStream_t.
DYNSPLIT_ENGINE_API int dynsplit_attend(const dynsplit_attend_shape* shape,
                                        const dynsplit_attend_item* items, int64_t num_items,
                                        void* workspace, int64_t workspace_bytes, void* stream);

// Maps an allocation of another process; `base` is its first byte. One mapping an allocation and
// process: opening it twice is an error.
DYNSPLIT_ENGINE_API int dynsplit_open_ipc(const unsigned char handle[64], void** base);
DYNSPLIT_ENGINE_API int dynsplit_close_ipc(void* base);

// Device memory that other processes may map by `handle`.
DYNSPLIT_ENGINE_API int dynsplit_allocate(int64_t bytes, void** data, unsigned char handle[64]);
DYNSPLIT_ENGINE_API int dynsplit_free(void* data);

// Of the current device: a session's memory can be mapped only on the device it lies on.
DYNSPLIT_ENGINE_API int dynsplit_device_uuid(unsigned char uuid[16]);

#ifdef __cplusplus
}
#endif

#endif  // CUDA_ENGINE_DYNSPLIT_ENGINE_H_
