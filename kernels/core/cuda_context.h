// A CUDA device as Context has it: three streams, events, library handles, pinned host memory.
//
// Ops launch on the compute stream; messages that may run beside them on the communication stream,
// or, where what is computed soon waits for them, on the exchange stream, so that they need not
// queue behind those for which nothing waits. The order between them is written by events at the
// call. CUDA's handles appear as void* so that this header compiles everywhere; a build without
// CUDA has MakeCudaContext (an error) and CudaDeviceCount (0) only. One thread at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/context.h"
#include "kernels/core/owned.h"
#include "kernels/core/status.h"

namespace baleen {

namespace cuda_internal {
void DestroyStream(void* stream);
void DestroyEvent(void* event);
void DestroyCublasLt(void* handle);
void DestroyCudnn(void* handle);
// Enqueues zeros.
void Zero(void* data, int64_t bytes, void* stream);
}  // namespace cuda_internal

using CudaStream = Owned<void*, &cuda_internal::DestroyStream>;  // cudaStream_t
using CudaEvent = Owned<void*, &cuda_internal::DestroyEvent>;    // cudaEvent_t without timing

// For matmuls on the compute stream; the workspace is shared by them, one after the other.
struct CublasLt {
  void* handle = nullptr;  // cublasLtHandle_t
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct CudaProperties {
  std::string name;  // "NVIDIA H100 80GB HBM3"
  int num_sms = 0;
  int64_t total_bytes = 0;
};

// GPUs that this process sees; 0 without a driver.
int CudaDeviceCount();

// The context of GPU `device_index`. EnvironmentError when there is no such GPU, it is not of
// compute capability 9.0, the driver is too old or cuBLASLt cannot be loaded.
absl::StatusOr<Context> MakeCudaContext(int device_index);

// Aborts with the op's name when a launch since the last call failed.
void CheckCudaLaunch(const char* op);

class CudaDevice {
 public:
  explicit CudaDevice(int index) : index_(index) {}
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  int index() const { return index_; }
  const CudaProperties& properties() const { return properties_; }
  void* compute_stream() const { return compute_stream_->get(); }
  void* communication_stream() const { return communication_stream_.get(); }
  void* exchange_stream() const { return exchange_stream_.get(); }

  CublasLt cublaslt() const { return cublaslt_; }
  // The cudnnHandle_t on the compute stream, made at the first call. EnvironmentError when cuDNN
  // cannot be loaded.
  absl::StatusOr<void*> cudnn();

  // Page-locked host memory: tensors of it are the host's (Device{}), and copies to and from them
  // run beside both host and GPU. Given-up blocks are kept, and handed out again once the compute
  // stream has passed the point where they were given up.
  MemoryPool& pinned_pool() const { return *pinned_pool_; }
  // Pageable host memory, for what is large.
  MemoryPool& host_pool() const { return *host_pool_; }

  // The point that `stream` has reached.
  CudaEvent Record(void* stream) const;
  // What is enqueued on `stream` from now on runs after `event`; the host goes on.
  void Order(void* stream, const CudaEvent& event) const;
  bool IsDone(const CudaEvent& event) const;
  // The host waits, and calls every watcher now and then meanwhile: an error of another rank must
  // end the wait. Nothing else in Baleen waits for the GPU.
  void HostWait(const CudaEvent& event) const;

  // `watcher(seconds)` is called while the host waits, `seconds` after the wait began; the number
  // names it for RemoveWatcher.
  using Watcher = std::function<void(double seconds)>;
  int AddWatcher(Watcher watcher);
  void RemoveWatcher(int number);

 private:
  friend absl::StatusOr<Context> MakeCudaContext(int device_index);
  absl::Status Start();

  int index_;
  CudaProperties properties_;
  std::shared_ptr<CudaStream> compute_stream_;  // shared with memory that is freed on it
  CudaStream communication_stream_, exchange_stream_;
  std::shared_ptr<MemoryPool> host_pool_;
  std::shared_ptr<MemoryPool> pinned_pool_;
  std::shared_ptr<Storage> workspace_;
  Owned<void*, &cuda_internal::DestroyCublasLt> cublaslt_handle_;
  CublasLt cublaslt_;
  Owned<void*, &cuda_internal::DestroyCudnn> cudnn_;
  std::vector<std::pair<int, Watcher>> watchers_;
  int next_watcher_ = 0;
};

}  // namespace baleen
