// The faults themselves: kernels of namespace baleen, like those that are watched. Results and
// errors do not matter; what counts is what the tool says.
#include <cuda_runtime_api.h>

#include <cstring>

#include "tests/cuda/planted_fault.h"

namespace baleen::testing {
namespace {

constexpr int kThreads = 64;

__global__ void PlantedMemcheckFault(int* data, unsigned) { data[kThreads + threadIdx.x] = 1; }

__global__ void PlantedRacecheckFault(int* data, unsigned) {
  __shared__ int s[kThreads];
  s[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

__global__ void PlantedSynccheckFault(int* data, unsigned first_lanes) {
  if (threadIdx.x <= 16) __syncwarp(first_lanes);  // lane 16 is not one of them
  data[threadIdx.x] = 1;
}

__global__ void PlantedInitcheckFault(int* data, unsigned) { data[threadIdx.x] += 1; }

}  // namespace

bool PlantFault(const char* tool) {
  const auto is = [tool](const char* name) { return std::strcmp(tool, name) == 0; };
  auto* kernel = is("memcheck")    ? PlantedMemcheckFault
                 : is("racecheck") ? PlantedRacecheckFault
                 : is("synccheck") ? PlantedSynccheckFault
                 : is("initcheck") ? PlantedInitcheckFault
                                   : nullptr;
  if (kernel == nullptr) return false;
  int* data = nullptr;
  if (cudaMalloc(&data, kThreads * sizeof(int)) != cudaSuccess) return true;
  if (!is("initcheck")) cudaMemset(data, 0, kThreads * sizeof(int));
  // Launched and awaited as the tests' kernels are.
  cudaStream_t stream = nullptr;
  cudaEvent_t done = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  kernel<<<1, kThreads, 0, stream>>>(data, 0xffff);
  cudaEventRecord(done, stream);
  while (cudaEventQuery(done) == cudaErrorNotReady) {
  }
  return true;
}

}  // namespace baleen::testing
