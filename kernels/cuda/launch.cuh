// Launching: the check behind every launch, and small arithmetic of grids.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace baleen::cuda {

// A call or launch that fails inside a step cannot be repaired in process: say which, and end.
inline void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: CUDA says %s: %s\n", what, cudaGetErrorName(error),
               cudaGetErrorString(error));
  std::abort();
}
inline void CheckLaunch(const char* kernel) { CheckCuda(cudaGetLastError(), kernel); }

inline cudaStream_t AsStream(void* stream) { return static_cast<cudaStream_t>(stream); }

__host__ __device__ inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiprocessors of the current device.
inline int NumMultiprocessors() {
  int device = 0, count = 0;
  CheckCuda(cudaGetDevice(&device), "current device");
  CheckCuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
            "multiprocessors");
  return count;
}

// The block of kernels that need no other.
inline constexpr int kFlatThreads = 256;

}  // namespace baleen::cuda
