// Context: the device, its stream and its memory pool; the first argument of every op and of
// nothing global.
//
// MemoryPool hands out storage and knows who holds how much: every allocation carries the name of
// its use ("parameters", "activations", ...), so the banner, the planner's check and an
// out-of-memory message can say it.
//
// A dry context runs the model without computing: tensors are address space that nobody touches,
// ops check their arguments, allocate what they return (and what they use meanwhile), count their
// work and skip it. So what a plan says of bytes, messages and operations is what the code that
// trains does, for models that no machine at hand could hold.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "kernels/core/tensor.h"

namespace baleen {

// Whether this build has the CUDA backend. Code for it stands in `if constexpr (kHaveCuda)`: what
// such a statement names needs no definition in a build without.
#ifdef BALEEN_HAVE_CUDA
inline constexpr bool kHaveCuda = true;
#else
inline constexpr bool kHaveCuda = false;
#endif

class CudaDevice;  // cuda_context.h: streams, events, library handles, pinned memory

struct MemoryUse {
  int64_t bytes = 0;       // held now
  int64_t peak_bytes = 0;  // most held at once since the last ResetPeak
};

class MemoryPool {
 public:
  virtual ~MemoryPool() = default;
  // Storage of at least `bytes`, aligned to 64; the contents are undefined. Aborts with the use
  // table when memory ends: a step that does not fit cannot go on.
  virtual std::shared_ptr<Storage> Allocate(int64_t bytes, const std::string& use) = 0;
  virtual std::map<std::string, MemoryUse> Uses() const = 0;
  virtual MemoryUse Total() const = 0;
  virtual void ResetPeak() = 0;
};

// Host memory. One thread at a time.
std::shared_ptr<MemoryPool> MakeHostPool();
// Address space with the accounting of the host pool, byte for byte. It reads as zeros; what is
// written costs its pages. One thread at a time.
std::shared_ptr<MemoryPool> MakeDryPool();

// The work of one kind of op, as a dry context counts it.
struct OpCount {
  int64_t calls = 0;
  double flops = 0;  // multiplications and additions
  double bytes = 0;  // operands read and results written, each once
};
struct OpCounter {
  std::map<std::string, OpCount> ops;  // by the op's name
};

class Context {
 public:
  Context(Device device, std::shared_ptr<MemoryPool> pool)
      : device_(device), pool_(std::move(pool)) {}
  // A CUDA context (MakeCudaContext makes it); `stream` is the device's compute stream.
  Context(Device device, std::shared_ptr<MemoryPool> pool, std::shared_ptr<CudaDevice> cuda,
          void* stream)
      : device_(device), pool_(std::move(pool)), cuda_(std::move(cuda)), stream_(stream) {}
  // A CPU context with a pool of its own.
  static Context Cpu() { return Context(Device{}, MakeHostPool()); }
  // Itself on the CPU, else one of its own beside it.
  Context Host() const { return device_.kind == DeviceKind::kCpu ? *this : Cpu(); }
  // A CPU context that computes nothing. `counter`, where given, outlives it and its copies.
  static Context Dry(OpCounter* counter = nullptr);

  Device device() const { return device_; }
  MemoryPool& pool() const { return *pool_; }
  // The cudaStream_t that ops launch on; null on the CPU.
  void* stream() const { return stream_; }
  // Only of a CUDA context.
  CudaDevice& cuda() const {
    CHECK(cuda_ != nullptr) << "a CPU context has no CUDA device";
    return *cuda_;
  }
  bool dry() const { return dry_; }
  OpCounter* counter() const { return counter_; }  // null: nobody counts
  // Uninitialised, respectively zeroed, tensor under the use that ScopedUse named last.
  Tensor Empty(DType dtype, Shape shape) const;
  Tensor Zeros(DType dtype, Shape shape) const;
  const std::string& use() const { return use_; }

 private:
  friend class ScopedUse;
  Device device_;
  std::shared_ptr<MemoryPool> pool_;
  std::shared_ptr<CudaDevice> cuda_;
  void* stream_ = nullptr;
  std::string use_ = "activations";
  bool dry_ = false;
  OpCounter* counter_ = nullptr;
};

// Names what is allocated while it lives.
class ScopedUse {
 public:
  ScopedUse(Context& context, std::string use) : context_(context), previous_(context.use_) {
    context_.use_ = std::move(use);
  }
  ~ScopedUse() { context_.use_ = previous_; }
  ScopedUse(const ScopedUse&) = delete;
  ScopedUse& operator=(const ScopedUse&) = delete;

 private:
  Context& context_;
  std::string previous_;
};

}  // namespace baleen
