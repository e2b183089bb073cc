// The GPU of a test: one context for all of them, and tensors to and fro.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "kernels/core/context.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/transfer.h"

namespace baleen::testing {

// The context of GPU 0. Made once and never destroyed: the driver is gone when statics are.
inline Context& Gpu() {
  static Context* const context = [] {
    absl::StatusOr<Context> made = MakeCudaContext(0);
    CHECK_OK(made.status());
    return new Context(*std::move(made));
  }();
  return *context;
}

inline Tensor OnGpu(const Tensor& host) { return CopyToDevice(Gpu(), host); }
inline Tensor OnHost(const Tensor& device) { return CopyToHost(Gpu(), device); }

// Holds a stream until opened.
class Gate {
 public:
  ~Gate() { Open(); }
  void Close(void* stream) {
    CHECK(cudaLaunchHostFunc(static_cast<cudaStream_t>(stream), &Gate::Wait, open_) == cudaSuccess);
  }
  void Open() { open_->store(true); }

 private:
  static void Wait(void* open) {
    while (!static_cast<std::atomic<bool>*>(open)->load()) {
    }
  }
  // Left behind: the driver's thread may read it after the test.
  std::atomic<bool>* const open_ = new std::atomic<bool>(false);
};

}  // namespace baleen::testing
