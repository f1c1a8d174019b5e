// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/device_bench.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cuda/cuda_status.h"
#include "tests/oracle/random_tensors.h"

namespace dynsplit::bench {
namespace {

constexpr int kWarmUps = 3;
constexpr int kRepeats = 20;
constexpr int64_t kFlushBytes = int64_t{256} << 20;  // several L2 caches
constexpr int64_t kRandomElements = int64_t{4} << 20;

__global__ void ReadKernel(const uint4* data, int64_t count, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 8
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const uint4 v = data[i];
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x9E3779B9U) *out = sum;  // keeps the loads; rarely written
}

void ReadAll(const Device& device, const Buffer& data, uint32_t* out) {
  ReadKernel<<<static_cast<unsigned>(device.launch.num_sms * 8), 512, 0, device.launch.stream>>>(
      data.as<uint4>(), data.size_bytes() / 16, out);
  Check(LaunchStatus("ReadKernel"));
}

void Copy(const Device& device, void* to, const void* from, int64_t bytes) {
  Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault,
                        device.launch.stream));
}

double MedianTime(const Device& device, const std::function<void()>& prepare,
                  const std::function<void(int)>& run) {
  cudaEvent_t start;
  cudaEvent_t stop;
  Check(cudaEventCreate(&start));
  Check(cudaEventCreate(&stop));
  for (int i = 0; i < kWarmUps; ++i) run(i);
  std::vector<float> times;
  for (int i = 0; i < kRepeats; ++i) {
    Check(cudaStreamSynchronize(device.stream->get()));
    prepare();
    Check(cudaEventRecord(start, device.stream->get()));
    run(kWarmUps + i);  // counting on: a run may build on the one before
    Check(cudaEventRecord(stop, device.stream->get()));
    Check(cudaEventSynchronize(stop));
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms);
  }
  Check(cudaEventDestroy(start));
  Check(cudaEventDestroy(stop));
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

}  // namespace

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}
void Check(cudaError_t error) { Check(CudaStatus(error, "benchmark")); }

Device OpenDevice() {
  Device device;
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0));
  device.stream = Check(StreamHandle::Create(0));
  device.pool = Check(DevicePool::Create(0, int64_t{1} << 40));
  device.pool->Attach(device.stream);
  device.launch = {.stream = device.stream->get(),
                   .num_sms = properties.multiProcessorCount,
                   .max_shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin),
                   .pool = device.pool.get(),
                   .handle = device.stream};
  std::printf("device: %s, %d SMs, L2 %d MiB\n", properties.name, properties.multiProcessorCount,
              properties.l2CacheSize >> 20);
  return device;
}

double Time(const Device& device, const std::function<void(int)>& run) {
  return MedianTime(
      device, [] {}, run);
}

Ceilings MeasureCeilings(const Device& device) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  const Buffer from = device.Allocate(kBytes);
  const Buffer to = device.Allocate(kBytes);
  const Buffer host = Check(PinnedCache::Create(0, 0)->AllocateExclusive(kBytes / 4));
  Check(cudaMemsetAsync(from.data(), 0x5A, kBytes, device.launch.stream));
  Ceilings ceilings;
  const double copy_ms = Time(device, [&](int) { Copy(device, to.data(), from.data(), kBytes); });
  ceilings.copy_gbps = 2.0 * kBytes / copy_ms / 1e6;
  const double read_ms = Time(device, [&](int) { ReadAll(device, from, to.as<uint32_t>()); });
  ceilings.read_gbps = 1.0 * kBytes / read_ms / 1e6;
  const double host_ms =
      Time(device, [&](int) { Copy(device, to.data(), host.data(), host.size_bytes()); });
  ceilings.host_gbps = static_cast<double>(host.size_bytes()) / host_ms / 1e6;
  std::printf(
      "ceilings: copy %.0f GB/s (read + written), read %.0f GB/s, host to device %.1f GB/s\n",
      ceilings.copy_gbps, ceilings.read_gbps, ceilings.host_gbps);
  return ceilings;
}

ColdTimer::ColdTimer(const Device& device) : device_(device), flush_(device.Allocate(kFlushBytes)) {
  Check(cudaMemsetAsync(flush_.data(), 0x5A, kFlushBytes, device.launch.stream));
}

double ColdTimer::Time(const std::function<void(int)>& run) const {
  return MedianTime(
      device_, [this] { ReadAll(device_, flush_, flush_.as<uint32_t>()); }, run);
}

RandomSource::RandomSource(const Device& device) : device_(device) {
  oracle::Random random(7);
  std::vector<__nv_bfloat16> values(kRandomElements);
  for (auto& value : values) value = __float2bfloat16_rn(random.Normal());
  block_ = UploadBytes(device, values.data(), kRandomElements * 2);
}

Buffer RandomSource::Make(int64_t bytes) {
  Buffer out = device_.Allocate(bytes);
  for (int64_t at = 0; at < bytes;) {
    const int64_t from = next_ % (kRandomElements * 2 / 4096) * 4096;
    const int64_t size = std::min(kRandomElements * 2 - from, bytes - at);
    Copy(device_, out.data() + at, block_.data() + from, size);
    at += size;
    next_ += 389;
  }
  return out;
}

Buffer UploadBytes(const Device& device, const void* data, int64_t bytes) {
  Buffer out = device.Allocate(bytes);
  Copy(device, out.data(), data, bytes);
  Check(cudaStreamSynchronize(device.launch.stream));
  return out;
}

}  // namespace dynsplit::bench
