// What cuda_context.h offers in a build without CUDA.
#include "kernels/core/cuda_context.h"
#include "kernels/core/cuda_trace.h"

namespace baleen {

namespace cuda_internal {
// No event is ever made here, but its owner names this function.
void DestroyEvent(void*) { CHECK(false) << "an event in a build without CUDA"; }
}  // namespace cuda_internal

int CudaDeviceCount() { return 0; }

absl::StatusOr<Context> MakeCudaContext(int device_index) {
  return EnvironmentError("GPU ", device_index,
                          ": this build has no CUDA backend; build the preset cuda, or use "
                          "run.device: cpu");
}

struct CudaTrace::State {};
CudaTrace::~CudaTrace() = default;
absl::StatusOr<std::unique_ptr<CudaTrace>> CudaTrace::Start(const Context&) {
  return EnvironmentError("this build has no CUDA backend, and nothing to trace");
}
void CudaTrace::Mark(int) {}
absl::StatusOr<std::vector<DeviceRecord>> CudaTrace::Stop() { return std::vector<DeviceRecord>(); }

}  // namespace baleen
