#include "kernels/core/cuda_timer.h"

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"

namespace baleen {
namespace {

// A point of the compute stream with its time; CudaDevice::Record's have none.
CudaEvent RecordTime(const Context& context) {
  cudaEvent_t event = nullptr;
  CUDA_CHECK(cudaEventCreate(&event));
  CudaEvent owned(event);
  CUDA_CHECK(cudaEventRecord(event, static_cast<cudaStream_t>(context.stream())));
  return owned;
}

}  // namespace

double CudaSeconds(const Context& context, const std::function<void()>& work) {
  const CudaEvent begin = RecordTime(context);
  work();
  const CudaEvent end = RecordTime(context);
  context.cuda().HostWait(end);
  float milliseconds = 0;
  CUDA_CHECK(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(begin.get()),
                                  static_cast<cudaEvent_t>(end.get())));
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace baleen
