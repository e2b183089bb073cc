#include "kernels/core/cuda_pool.h"

#include <bit>
#include <cstdio>
#include <map>
#include <utility>

#include "kernels/core/cuda_check.h"
#include "kernels/core/memory_ledger.h"

namespace baleen {
namespace {

void LogFailure(const char* what, cudaError_t error) {
  // At the process's end the driver may already be gone: nothing is lost then.
  if (error == cudaSuccess || error == cudaErrorCudartUnloading) return;
  std::fprintf(stderr, "warning: %s: %s\n", what, cudaGetErrorString(error));
}

void DestroyPool(cudaMemPool_t pool) { LogFailure("cudaMemPoolDestroy", cudaMemPoolDestroy(pool)); }

// The driver's pool and the stream of its order; storages share them, and outlive the MemoryPool.
struct DeviceMemory {
  std::shared_ptr<CudaStream> stream;
  Owned<cudaMemPool_t, &DestroyPool> pool;

  cudaStream_t order() const { return static_cast<cudaStream_t>(stream->get()); }
};

class DeviceStorage : public CountedStorage {
 public:
  DeviceStorage(void* data, int64_t bytes, std::shared_ptr<Ledger> ledger, std::string use,
                std::shared_ptr<DeviceMemory> memory)
      : CountedStorage(data, bytes, std::move(ledger), std::move(use)),
        memory_(std::move(memory)) {}
  ~DeviceStorage() override {
    LogFailure("cudaFreeAsync", cudaFreeAsync(data(), memory_->order()));
  }

 private:
  std::shared_ptr<DeviceMemory> memory_;
};

class CudaPool : public CountingPool {
 public:
  explicit CudaPool(std::shared_ptr<DeviceMemory> memory) : memory_(std::move(memory)) {}

  std::shared_ptr<Storage> Allocate(int64_t bytes, const std::string& use) override {
    CHECK_GE(bytes, 0) << use;
    const int64_t rounded = Rounded(bytes);
    void* data = nullptr;
    if (Take(rounded, &data) == cudaErrorMemoryAllocation) {
      // What is freed but not yet passed by the stream, and what lies between blocks in use, can
      // still serve: once more, with the stream drained and the pool's free memory given back.
      cudaGetLastError();
      CUDA_CHECK(cudaStreamSynchronize(memory_->order())) << "while out of memory for " << use;
      CUDA_CHECK(cudaMemPoolTrimTo(memory_->pool.get(), 0));
      if (Take(rounded, &data) == cudaErrorMemoryAllocation) OutOfMemory(rounded, use);
    }
    return std::make_shared<DeviceStorage>(data, rounded, ledger_, use, memory_);
  }

 private:
  cudaError_t Take(int64_t bytes, void** data) {
    const cudaError_t error = cudaMallocFromPoolAsync(data, static_cast<size_t>(bytes),
                                                      memory_->pool.get(), memory_->order());
    if (error != cudaErrorMemoryAllocation) CUDA_CHECK(error) << bytes << " bytes";
    return error;
  }

  [[noreturn]] void OutOfMemory(int64_t bytes, const std::string& use) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    uint64_t reserved = 0;
    cudaMemPoolGetAttribute(memory_->pool.get(), cudaMemPoolAttrReservedMemCurrent, &reserved);
    CHECK(false)
        << "out of GPU memory: " << bytes << " bytes for " << use << "; of " << total << " bytes "
        << free << " are free, " << reserved
        << " belong to this pool, the rest to NCCL, the driver and other processes."
        << "\nHeld (bytes):" << Table(*ledger_) << "\n  total: " << ledger_->total.bytes << " now, "
        << ledger_->total.peak_bytes << " at most"
        << "\nTo fit: recompute: full; a smaller micro_batch_size or data.seq_length; more "
           "ranks in parallelism (tensor, context or pipeline for activations, expert for "
           "experts, data for optimizer state). `baleen plan` prints the bytes per rank.";
    __builtin_unreachable();
  }

  std::shared_ptr<DeviceMemory> memory_;
};

void FreePinned(void* data) { LogFailure("cudaFreeHost", cudaFreeHost(data)); }

// Blocks of page-locked memory by size (powers of two: taking one costs the driver milliseconds, so
// blocks must fit again). A free one waits for the stream to pass the point where it was given up.
struct PinnedBlocks {
  struct Free {
    Owned<void*, &FreePinned> data;
    CudaEvent passed;
  };
  std::shared_ptr<CudaStream> stream;
  std::multimap<int64_t, Free> free;

  void* Take(int64_t bytes) {
    const auto [begin, end] = free.equal_range(bytes);
    for (auto it = begin; it != end; ++it) {
      if (cudaEventQuery(static_cast<cudaEvent_t>(it->second.passed.get())) != cudaSuccess) {
        continue;
      }
      void* data = it->second.data.Release();
      free.erase(it);
      return data;
    }
    cudaGetLastError();  // cudaErrorNotReady of the queries is no error
    void* data = nullptr;
    CUDA_CHECK(cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocDefault))
        << bytes << " bytes of page-locked host memory; see ulimit -l and the free memory";
    return data;
  }

  void Give(void* data, int64_t bytes) {
    Free block{Owned<void*, &FreePinned>(data), CudaEvent()};
    cudaEvent_t event = nullptr;
    cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (error == cudaSuccess) {
      block.passed = CudaEvent(event);
      error = cudaEventRecord(event, static_cast<cudaStream_t>(stream->get()));
    }
    if (error != cudaSuccess) return LogFailure("pinned memory", error);  // the block is freed
    free.emplace(bytes, std::move(block));
  }
};

class PinnedStorage : public CountedStorage {
 public:
  PinnedStorage(void* data, int64_t bytes, std::shared_ptr<Ledger> ledger, std::string use,
                std::shared_ptr<PinnedBlocks> blocks)
      : CountedStorage(data, bytes, std::move(ledger), std::move(use)),
        blocks_(std::move(blocks)) {}
  ~PinnedStorage() override { blocks_->Give(data(), bytes()); }

 private:
  std::shared_ptr<PinnedBlocks> blocks_;
};

class PinnedPool : public CountingPool {
 public:
  explicit PinnedPool(std::shared_ptr<CudaStream> stream) { blocks_->stream = std::move(stream); }

  std::shared_ptr<Storage> Allocate(int64_t bytes, const std::string& use) override {
    CHECK_GE(bytes, 0) << use;
    const auto block =
        static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(bytes, kSmallest))));
    return std::make_shared<PinnedStorage>(blocks_->Take(block), block, ledger_, use, blocks_);
  }

 private:
  static constexpr int64_t kSmallest = 4096;
  std::shared_ptr<PinnedBlocks> blocks_ = std::make_shared<PinnedBlocks>();
};

}  // namespace

absl::StatusOr<std::shared_ptr<MemoryPool>> MakeCudaPool(int device_index,
                                                         std::shared_ptr<CudaStream> stream) {
  cudaMemPoolProps props = {};
  props.allocType = cudaMemAllocationTypePinned;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = device_index;
  cudaMemPool_t pool = nullptr;
  if (const cudaError_t error = cudaMemPoolCreate(&pool, &props); error != cudaSuccess) {
    return EnvironmentError("GPU ", device_index,
                            ": the driver has no stream-ordered memory pools (",
                            cudaGetErrorString(error), "): install a driver for CUDA 13 or newer");
  }
  auto memory = std::make_shared<DeviceMemory>();
  memory->stream = std::move(stream);
  memory->pool = Owned<cudaMemPool_t, &DestroyPool>(pool);
  uint64_t keep_all = UINT64_MAX;  // a step takes and frees the same sizes again and again
  CUDA_CHECK(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all));
  return std::make_shared<CudaPool>(std::move(memory));
}

std::shared_ptr<MemoryPool> MakePinnedPool(std::shared_ptr<CudaStream> stream) {
  return std::make_shared<PinnedPool>(std::move(stream));
}

}  // namespace baleen
