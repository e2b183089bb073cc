#include "kernels/core/cuda_context.h"

#include <cublasLt.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_pool.h"
#include "kernels/core/shared_library.h"

namespace baleen {
namespace {

// What cuBLASLt's manual asks for on Hopper, for split-K and stream-K.
constexpr int64_t kCublasLtWorkspaceBytes = 32 << 20;
// A wait below this is spent looking again and again: receive counts arrive within it.
constexpr double kSpinSeconds = 200e-6;
constexpr double kWatchSeconds = 10e-3;
constexpr int kSleepMicroseconds = 50;

void LogFailure(const char* what, cudaError_t error) {
  if (error == cudaSuccess || error == cudaErrorCudartUnloading) return;
  std::fprintf(stderr, "warning: %s: %s\n", what, cudaGetErrorString(error));
}

cudaStream_t AsStream(void* stream) { return static_cast<cudaStream_t>(stream); }

absl::StatusOr<CudaStream> MakeStream(int priority) {
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority);
  if (error != cudaSuccess) {
    return EnvironmentError("CUDA stream: ", cudaGetErrorString(error));
  }
  return CudaStream(stream);
}

// cuDNN is not linked: two functions of it, with its handle and status as the ABI has them.
absl::StatusOr<SharedLibrary> OpenCudnn() {
  return SharedLibrary::Open({"libcudnn.so.9"}, "cuDNN (attention)");
}

// Of the compute capability that the kernels are compiled for.
absl::Status CheckDevice(int index, CudaProperties* properties) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return EnvironmentError("no usable GPU: ", cudaGetErrorString(error), " (",
                            cudaGetErrorName(error),
                            "): look at nvidia-smi, or use run.device: cpu");
  }
  if (index < 0 || index >= count) {
    return EnvironmentError("GPU ", index, " of ", count,
                            " visible: start at most one rank a GPU (see CUDA_VISIBLE_DEVICES)");
  }
  cudaDeviceProp prop = {};
  if (const cudaError_t error = cudaGetDeviceProperties(&prop, index); error != cudaSuccess) {
    return EnvironmentError("GPU ", index, ": ", cudaGetErrorString(error));
  }
  if (prop.major != 9 || prop.minor != 0) {
    return EnvironmentError("GPU ", index, " (", prop.name, ") has compute capability ", prop.major,
                            ".", prop.minor, "; Baleen's kernels are for 9.0 (H100, H200)");
  }
  *properties = CudaProperties{prop.name, prop.multiProcessorCount,
                               static_cast<int64_t>(prop.totalGlobalMem)};
  return absl::OkStatus();
}

}  // namespace

namespace cuda_internal {

void DestroyStream(void* stream) {
  LogFailure("cudaStreamDestroy", cudaStreamDestroy(AsStream(stream)));
}
void DestroyEvent(void* event) {
  LogFailure("cudaEventDestroy", cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}
void DestroyCublasLt(void* handle) { cublasLtDestroy(static_cast<cublasLtHandle_t>(handle)); }
void DestroyCudnn(void* handle) {
  // The handle exists, so the library is open.
  if (auto library = OpenCudnn(); library.ok()) {
    library->Find<int(void*)>("cudnnDestroy")(handle);
  }
}

void Zero(void* data, int64_t bytes, void* stream) {
  if (bytes == 0) return;
  CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), AsStream(stream)));
}

}  // namespace cuda_internal

int CudaDeviceCount() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void CheckCudaLaunch(const char* op) { CUDA_CHECK(cudaPeekAtLastError()) << op; }

CudaDevice::~CudaDevice() = default;

absl::StatusOr<void*> CudaDevice::cudnn() {
  if (!cudnn_) {
    ASSIGN_OR_RETURN(const SharedLibrary library, OpenCudnn());
    void* handle = nullptr;
    if (const int status = library.Find<int(void**)>("cudnnCreate")(&handle); status != 0) {
      return EnvironmentError("cudnnCreate failed with status ", status, " (", library.name(), ")");
    }
    cudnn_ = Owned<void*, &cuda_internal::DestroyCudnn>(handle);
    const int status = library.Find<int(void*, void*)>("cudnnSetStream")(handle, compute_stream());
    CHECK_EQ(status, 0) << "cudnnSetStream";
  }
  return cudnn_.get();
}

CudaEvent CudaDevice::Record(void* stream) const {
  cudaEvent_t event = nullptr;
  CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  CudaEvent owned(event);
  CUDA_CHECK(cudaEventRecord(event, AsStream(stream)));
  return owned;
}

void CudaDevice::Order(void* stream, const CudaEvent& event) const {
  CUDA_CHECK(cudaStreamWaitEvent(AsStream(stream), static_cast<cudaEvent_t>(event.get()), 0));
}

bool CudaDevice::IsDone(const CudaEvent& event) const {
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event.get()));
  if (error == cudaErrorNotReady) {
    cudaGetLastError();  // else the next launch check takes it for its own
    return false;
  }
  CUDA_CHECK(error) << "work on GPU " << index_ << " failed";
  return true;
}

void CudaDevice::HostWait(const CudaEvent& event) const {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  double next_watch = kWatchSeconds;
  while (!IsDone(event)) {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (seconds < kSpinSeconds) {
      ::sched_yield();
      continue;
    }
    ::usleep(kSleepMicroseconds);
    if (seconds < next_watch) continue;
    for (const auto& [number, watcher] : watchers_) watcher(seconds);
    next_watch = seconds + kWatchSeconds;
  }
}

int CudaDevice::AddWatcher(Watcher watcher) {
  watchers_.emplace_back(next_watcher_, std::move(watcher));
  return next_watcher_++;
}

void CudaDevice::RemoveWatcher(int number) {
  std::erase_if(watchers_, [&](const auto& entry) { return entry.first == number; });
}

absl::Status CudaDevice::Start() {
  RETURN_IF_ERROR(CheckDevice(index_, &properties_));
  if (const cudaError_t error = cudaSetDevice(index_); error != cudaSuccess) {
    return EnvironmentError("GPU ", index_, ": ", cudaGetErrorString(error));
  }
  // A larger number is a lower priority: messages go first, so that nobody waits for them.
  int lowest = 0, highest = 0;
  cudaDeviceGetStreamPriorityRange(&lowest, &highest);
  ASSIGN_OR_RETURN(CudaStream compute, MakeStream(lowest));
  compute_stream_ = std::make_shared<CudaStream>(std::move(compute));
  ASSIGN_OR_RETURN(communication_stream_, MakeStream(highest));
  ASSIGN_OR_RETURN(exchange_stream_, MakeStream(highest));
  host_pool_ = MakeHostPool();
  pinned_pool_ = MakePinnedPool(compute_stream_);

  RETURN_IF_ERROR(
      SharedLibrary::Open({"libcublasLt.so.13"}, "cuBLASLt (matrix products)").status());
  cublasLtHandle_t handle = nullptr;
  if (const cublasStatus_t status = cublasLtCreate(&handle); status != CUBLAS_STATUS_SUCCESS) {
    return EnvironmentError("cublasLtCreate failed with status ", static_cast<int>(status));
  }
  cublaslt_handle_ = Owned<void*, &cuda_internal::DestroyCublasLt>(handle);
  return absl::OkStatus();
}

absl::StatusOr<Context> MakeCudaContext(int device_index) {
  auto device = std::make_shared<CudaDevice>(device_index);
  RETURN_IF_ERROR(device->Start());
  ASSIGN_OR_RETURN(std::shared_ptr<MemoryPool> pool,
                   MakeCudaPool(device_index, device->compute_stream_));
  device->workspace_ = pool->Allocate(kCublasLtWorkspaceBytes, "workspaces");
  device->cublaslt_ =
      CublasLt{device->cublaslt_handle_.get(), device->workspace_->data(), kCublasLtWorkspaceBytes};
  void* stream = device->compute_stream();
  return Context(Device{DeviceKind::kCuda, device_index}, std::move(pool), std::move(device),
                 stream);
}

}  // namespace baleen
