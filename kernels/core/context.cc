#include "kernels/core/context.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels/core/check.h"

namespace baleen {
namespace {

constexpr int64_t kAlignment = 64;  // one cache line, and the widest vector load

// What all storages of one pool share: they may outlive the pool object, never this.
struct Ledger {
  std::map<std::string, MemoryUse> uses;
  MemoryUse total;

  void Add(const std::string& use, int64_t bytes) {
    for (MemoryUse* entry : {&uses[use], &total}) {
      entry->bytes += bytes;
      entry->peak_bytes = std::max(entry->peak_bytes, entry->bytes);
    }
  }
};

std::string Table(const Ledger& ledger) {
  std::ostringstream out;
  for (const auto& [use, entry] : ledger.uses) out << "\n  " << use << ": " << entry.bytes;
  return out.str();
}

class HostStorage : public Storage {
 public:
  HostStorage(void* data, int64_t bytes, std::shared_ptr<Ledger> ledger, std::string use)
      : Storage(data, bytes), ledger_(std::move(ledger)), use_(std::move(use)) {
    ledger_->Add(use_, bytes);
  }
  ~HostStorage() override {
    ledger_->Add(use_, -bytes());
    std::free(data());
  }

 private:
  std::shared_ptr<Ledger> ledger_;
  std::string use_;
};

class HostPool : public MemoryPool {
 public:
  std::shared_ptr<Storage> Allocate(int64_t bytes, const std::string& use) override {
    CHECK_GE(bytes, 0) << use;
    const int64_t rounded =
        std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    void* data = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    CHECK(data != nullptr) << "out of host memory: " << rounded << " bytes for " << use
                           << "; held now (bytes):" << Table(*ledger_);
    return std::make_shared<HostStorage>(data, rounded, ledger_, use);
  }
  std::map<std::string, MemoryUse> Uses() const override { return ledger_->uses; }
  MemoryUse Total() const override { return ledger_->total; }
  void ResetPeak() override {
    for (auto& [use, entry] : ledger_->uses) entry.peak_bytes = entry.bytes;
    ledger_->total.peak_bytes = ledger_->total.bytes;
  }

 private:
  std::shared_ptr<Ledger> ledger_ = std::make_shared<Ledger>();
};

}  // namespace

std::shared_ptr<MemoryPool> MakeHostPool() {
#ifdef __GLIBC__
  // A step frees and takes the same sizes again and again. By default glibc gives blocks above 128
  // KiB back to the kernel each time, and page faults cost a fifth of a small model's step: keep
  // them in the process instead.
  ::mallopt(M_MMAP_THRESHOLD, 32 << 20);
  ::mallopt(M_TRIM_THRESHOLD, 512 << 20);
#endif
  return std::make_shared<HostPool>();
}

Tensor Context::Empty(DType dtype, Shape shape) const {
  const int64_t bytes = NumElements(shape) * DTypeBytes(dtype);
  return Tensor(pool_->Allocate(bytes, use_), 0, dtype, std::move(shape), device_);
}

Tensor Context::Zeros(DType dtype, Shape shape) const {
  Tensor tensor = Empty(dtype, std::move(shape));
  CHECK(device_.kind == DeviceKind::kCpu) << "zeroing on the GPU comes with the CUDA backend";
  std::memset(tensor.raw(), 0, static_cast<size_t>(tensor.bytes()));
  return tensor;
}

}  // namespace baleen
