// SPDX-License-Identifier: Apache-2.0
//
// Products of a warpgroup (wgmma, compute capability 9.0): 64 rows times the transpose of N rows,
// both in shared memory, bf16 or fp16 factors, fp32 sums. Asynchronous: the sums' registers belong
// to the tensor cores from the call to the WaitForGroupMma that covers it.
//
// Shared memory holds rows as 128-byte pieces of 64 channels: all rows' first piece, then all
// rows' second. 16-byte chunk c of a row's piece lies at c ^ (row % 8) (the 128-byte swizzle).
// Thread l of warp w holds rows 16 w + l / 4 and 8 below; of each 8 columns, 2 (l % 4) and the
// next: sum[4 j + {0, 1}] upper row, sum[4 j + {2, 3}] lower row, columns 8 j + 2 (l % 4) + {0, 1}.
//
// The left factor may also come from registers, and the right one be read by columns: then 64 rows
// times N columns of an array, added up over its rows. A step takes 16 of those, and of the left
// factor's columns a thread holds 2 (l % 4) + {0, 1} and 8 on: a[0] upper row, a[1] lower row, a[2]
// and a[3] the same 8 columns on. So sums of the first kind, rounded and packed in pairs, are left
// factors of the second: sum[8 s .. 8 s + 7] in the order they have are a[0] .. a[3] of step s.
#pragma once

#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/tensor.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DYNSPLIT_HAS_GROUP_MMA 1  // of this compilation: host code, or device code for sm_90a
#endif

namespace dynsplit::kernels {

inline constexpr int kGroupThreads = 128;
inline constexpr int kGroupRows = 64;
inline constexpr int kPieceBytes = 128;
inline constexpr int kSwizzleRows = 8;
inline constexpr int kSharedAlignment = 1024;  // of arrays

// True if the current device has the instructions.
inline bool DeviceHasGroupMma() {
  int device = 0;
  int major = 0;
  int minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

// Dynamic shared memory begins at 16 bytes at least.
__device__ inline std::byte* AlignShared(std::byte* base) {
  const uint32_t address = SharedAddress(base);
  return base + ((address + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment - address);
}

#ifdef DYNSPLIT_HAS_GROUP_MMA

// Byte of a 16-byte chunk, counted over the row's pieces, in an array of kRows rows.
template <int kRows>
__device__ inline int SwizzledByte(int row, int chunk) {
  const int piece = chunk / kSwizzleRows;
  const int place = chunk % kSwizzleRows ^ row % kSwizzleRows;
  return (piece * kRows + row) * kPieceBytes + place * 16;
}

// Of this thread; known to be the same in all of a warp, so that what follows from it is computed
// once a warp.
__device__ inline int GroupIndex() {
  return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
}

// The warpgroups of a thread block multiply by turns, in order. Left alone they would all wait for
// the tensor cores together, and then leave them idle together. Each of the first `num_groups`
// takes as many turns, and the others none.
class Turns {
 public:
  static constexpr int kFirstBarrier = 1;  // 0 is __syncthreads

  __device__ Turns(int group, int num_groups) : group_(group), num_groups_(num_groups) {
    if (group_ == num_groups_ - 1) Pass();
  }
  __device__ void Wait() const {
    asm volatile("bar.sync %0, %1;" ::"r"(kFirstBarrier + group_), "n"(2 * kGroupThreads)
                 : "memory");
  }
  __device__ void Pass() const {
    const int next = group_ + 1 == num_groups_ ? 0 : group_ + 1;
    asm volatile("bar.arrive %0, %1;" ::"r"(kFirstBarrier + next), "n"(2 * kGroupThreads)
                 : "memory");
  }

 private:
  const int group_;
  const int num_groups_;
};

// Copies an array of kRows rows of `items`, 16 kSteps channels each, from `first` on, zeros beyond
// num_items, by kTeam threads. A thread copies the same chunk of every kRowsATime-th row, so that
// its places in shared memory are a constant apart.
template <int kSteps, int kRows, int kTeam>
__device__ inline void CopySwizzledRows(const TensorView& items, int64_t num_items, int h,
                                        int64_t first, std::byte* array) {
  constexpr int kRowChunks = kSteps * 2;
  constexpr int kRowsATime = kTeam / kRowChunks;
  static_assert(kRowsATime % kSwizzleRows == 0 && kRows % kRowsATime == 0);
  const unsigned thread = threadIdx.x % kTeam;
  const auto row = static_cast<int>(thread / kRowChunks);
  const auto chunk = static_cast<int>(thread % kRowChunks);
  std::byte* const to = array + SwizzledByte<kRows>(row, chunk);
  if (items.block_table == nullptr && first + kRows <= num_items) {
    const std::byte* from = items.data + h * items.head_stride_bytes +
                            (first + row) * items.token_stride_bytes + chunk * kChunkBytes;
    const int64_t step_bytes = kRowsATime * items.token_stride_bytes;
#pragma unroll
    for (int i = 0; i < kRows / kRowsATime; ++i, from += step_bytes) {
      CopyAsync<kChunkBytes>(to + i * kRowsATime * kPieceBytes, from, true);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows / kRowsATime; ++i) {
      const int64_t n = first + row + i * kRowsATime;
      const bool valid = n < num_items;
      CopyAsync<kChunkBytes>(to + i * kRowsATime * kPieceBytes,
                             RowAddress(items, valid ? n : 0, h) + chunk * kChunkBytes, valid);
    }
  }
}

// Operand a or b: channels [16 step, 16 step + 16) of an array of kRows rows at shared address
// `base`, a multiple of 1024. `first`: a multiple of 8 rows to begin behind.
template <int kRows>
__device__ inline uint64_t SwizzledRows(uint32_t base, int first, int step) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = static_cast<uint64_t>(kSwizzleRows * kPieceBytes / 16) << 32;
  const uint32_t offset =
      static_cast<uint32_t>((step / 4 * kRows + first) * kPieceBytes + step % 4 * 32);
  return (kSwizzle128 | kStride | uint64_t{1} << 16) + (base / 16 + offset / 16);
}

// Operand b by columns: rows [16 step, 16 step + 16) of such an array are summed over. The unit of
// the swizzle is 8 rows by one piece (64 columns by 8 rows, columns adjacent): units of the next 8
// rows follow 1024 bytes on (the "stride" of the descriptor), those of the next 64 columns behind
// all rows' first piece (its "leading" offset). A step begins at a unit, so that the swizzle needs
// no base offset.
template <int kRows>
__device__ inline uint64_t SwizzledColumns(uint32_t base, int step) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = static_cast<uint64_t>(kSwizzleRows * kPieceBytes / 16) << 32;
  constexpr uint64_t kLeading = static_cast<uint64_t>(kRows * kPieceBytes / 16) << 16;
  const auto offset = static_cast<uint32_t>(step * 16 * kPieceBytes);
  return (kSwizzle128 | kStride | kLeading) + (base / 16 + offset / 16);
}

// Before the first product of a batch: registers written so far are seen by it.
__device__ inline void BeginGroupMma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitGroupMma() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kPending` committed batches of this warpgroup are under way.
template <int kPending>
__device__ inline void WaitForGroupMma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps reads of `sum` behind the wait before it.
template <int N>
__device__ inline void Own(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
// Keeps the registers of a left factor until the wait before it.
template <int N>
__device__ inline void Own(uint32_t (&factor)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(factor[i])::"memory");
}
// Shared memory written by ordinary or asynchronous copies is seen by the tensor cores; each writer
// calls it, then the barrier.
__device__ inline void ShowToGroupMma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The operands %0 .. and the constraints of 16, 32 or 64 sums.
#define DYNSPLIT_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DYNSPLIT_NAMES_32 \
  DYNSPLIT_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DYNSPLIT_NAMES_64                                                                   \
  DYNSPLIT_NAMES_32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DYNSPLIT_SUMS_16                                                                    \
  "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),       \
      "+f"(sum[6]), "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), \
      "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15])
#define DYNSPLIT_SUMS_32                                                                        \
  DYNSPLIT_SUMS_16, "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]),  \
      "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), \
      "+f"(sum[27]), "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31])
#define DYNSPLIT_SUMS_64                                                                        \
  DYNSPLIT_SUMS_32, "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]), "+f"(sum[35]), "+f"(sum[36]),  \
      "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]), "+f"(sum[42]), \
      "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]), "+f"(sum[48]), \
      "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]), "+f"(sum[54]), \
      "+f"(sum[55]), "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]), "+f"(sum[60]), \
      "+f"(sum[61]), "+f"(sum[62]), "+f"(sum[63])

// sum (+)= a b^T; add = 0 overwrites. `a`, `b` and `add` follow the sums.
#define DYNSPLIT_WGMMA(count, columns, type, a, b, add)                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add                              \
               ", 0;\n"                                                             \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
               " {" DYNSPLIT_NAMES_##count "}, " a ", " b ", p, 1, 1, 0, 0;\n}\n"   \
               : DYNSPLIT_SUMS_##count                                              \
               : "l"(left), "l"(right), "r"(adds))
#define DYNSPLIT_WGMMA_OF(count, columns, a, b, add)                                             \
  template <typename T>                                                                          \
  __device__ inline void GroupMma(float(&sum)[count], uint64_t left, uint64_t right, int adds) { \
    if constexpr (std::is_same_v<T, __half>) {                                                   \
      DYNSPLIT_WGMMA(count, columns, "f16", a, b, add);                                          \
    } else {                                                                                     \
      DYNSPLIT_WGMMA(count, columns, "bf16", a, b, add);                                         \
    }                                                                                            \
  }
DYNSPLIT_WGMMA_OF(16, "32", "%16", "%17", "%18")
DYNSPLIT_WGMMA_OF(32, "64", "%32", "%33", "%34")
DYNSPLIT_WGMMA_OF(64, "128", "%64", "%65", "%66")

// sum += a b, a from registers, b by columns (SwizzledColumns). `a` and `b` follow the sums.
#define DYNSPLIT_WGMMA_COLUMNS(count, columns, type, a, b)                 \
  asm volatile(                                                            \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                           \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
      " {" DYNSPLIT_NAMES_##count "}, {" a "}, " b ", p, 1, 1, 1;\n}\n"    \
      : DYNSPLIT_SUMS_##count                                              \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
#define DYNSPLIT_WGMMA_COLUMNS_OF(count, columns, a, b)                                \
  template <typename T>                                                                \
  __device__ inline void GroupMmaColumns(float(&sum)[count], const uint32_t(&left)[4], \
                                         uint64_t right) {                             \
    if constexpr (std::is_same_v<T, __half>) {                                         \
      DYNSPLIT_WGMMA_COLUMNS(count, columns, "f16", a, b);                             \
    } else {                                                                           \
      DYNSPLIT_WGMMA_COLUMNS(count, columns, "bf16", a, b);                            \
    }                                                                                  \
  }
DYNSPLIT_WGMMA_COLUMNS_OF(32, "64", "%32, %33, %34, %35", "%36")
DYNSPLIT_WGMMA_COLUMNS_OF(64, "128", "%64, %65, %66, %67", "%68")

#undef DYNSPLIT_NAMES_16
#undef DYNSPLIT_NAMES_32
#undef DYNSPLIT_NAMES_64
#undef DYNSPLIT_SUMS_16
#undef DYNSPLIT_SUMS_32
#undef DYNSPLIT_SUMS_64
#undef DYNSPLIT_WGMMA
#undef DYNSPLIT_WGMMA_OF
#undef DYNSPLIT_WGMMA_COLUMNS
#undef DYNSPLIT_WGMMA_COLUMNS_OF

#endif  // DYNSPLIT_HAS_GROUP_MMA

}  // namespace dynsplit::kernels
