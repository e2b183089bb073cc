#include "kernels/core/context.h"

#include <sys/mman.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/memory_ledger.h"

namespace baleen {

std::string Table(const Ledger& ledger) {
  std::vector<std::pair<std::string, MemoryUse>> rows(ledger.uses.begin(), ledger.uses.end());
  std::stable_sort(rows.begin(), rows.end(),
                   [](const auto& a, const auto& b) { return a.second.bytes > b.second.bytes; });
  std::ostringstream out;
  for (const auto& [use, entry] : rows) {
    out << "\n  " << use << ": " << entry.bytes << " now, " << entry.peak_bytes << " at most";
  }
  return out.str();
}

namespace {

class HeapStorage : public CountedStorage {
 public:
  using CountedStorage::CountedStorage;
  ~HeapStorage() override { std::free(data()); }
};

// A range of address space without memory behind it, until a page is written to.
class Region {
 public:
  Region(int64_t bytes, const std::string& use) : bytes_(bytes) {
    data_ = static_cast<char*>(::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    CHECK(data_ != MAP_FAILED) << "out of address space: " << bytes << " bytes for " << use << " ("
                               << std::strerror(errno) << "; see ulimit -v)";
  }
  ~Region() { ::munmap(data_, static_cast<size_t>(bytes_)); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  bool HasRoom(int64_t bytes) const { return bytes_ - used_ >= bytes; }
  void* Take(int64_t bytes) {
    used_ += bytes;
    return data_ + used_ - bytes;
  }

 private:
  char* data_;
  int64_t bytes_;
  int64_t used_ = 0;
};

class RegionStorage : public CountedStorage {
 public:
  RegionStorage(void* data, int64_t bytes, std::shared_ptr<Ledger> ledger, std::string use,
                std::shared_ptr<Region> region)
      : CountedStorage(data, bytes, std::move(ledger), std::move(use)),
        region_(std::move(region)) {}

 private:
  std::shared_ptr<Region> region_;  // unmapped when its last storage is gone
};

class HostPool : public CountingPool {
 public:
  std::shared_ptr<Storage> Allocate(int64_t bytes, const std::string& use) override {
    CHECK_GE(bytes, 0) << use;
    const int64_t rounded = Rounded(bytes);
    void* data = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    CHECK(data != nullptr) << "out of host memory: " << rounded << " bytes for " << use
                           << "; held now (bytes):" << Table(*ledger_);
    return std::make_shared<HeapStorage>(data, rounded, ledger_, use);
  }
};

// Takes one place after the other and none twice: what is handed out reads as zeros, and costs no
// call of the kernel (a step of a large model makes a hundred thousand tensors).
class DryPool : public CountingPool {
 public:
  std::shared_ptr<Storage> Allocate(int64_t bytes, const std::string& use) override {
    CHECK_GE(bytes, 0) << use;
    const int64_t rounded = Rounded(bytes);
    if (region_ == nullptr || !region_->HasRoom(rounded)) {
      region_ = std::make_shared<Region>(std::max(rounded, kRegionBytes), use);
    }
    return std::make_shared<RegionStorage>(region_->Take(rounded), rounded, ledger_, use, region_);
  }

 private:
  static constexpr int64_t kRegionBytes = int64_t{256} << 30;
  std::shared_ptr<Region> region_;
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

std::shared_ptr<MemoryPool> MakeDryPool() { return std::make_shared<DryPool>(); }

Context Context::Dry(OpCounter* counter) {
  Context context(Device{}, MakeDryPool());
  context.dry_ = true;
  context.counter_ = counter;
  return context;
}

Tensor Context::Empty(DType dtype, Shape shape) const {
  const int64_t bytes = NumElements(shape) * DTypeBytes(dtype);
  return Tensor(pool_->Allocate(bytes, use_), 0, dtype, std::move(shape), device_);
}

Tensor Context::Zeros(DType dtype, Shape shape) const {
  Tensor tensor = Empty(dtype, std::move(shape));
  if (dry_) return tensor;  // zero as it is, and writing would make its pages
  if constexpr (kHaveCuda) {
    if (device_.kind == DeviceKind::kCuda) {
      cuda_internal::Zero(tensor.raw(), tensor.bytes(), stream_);
      return tensor;
    }
  }
  CHECK(device_.kind == DeviceKind::kCpu) << "this build has no CUDA backend";
  std::memset(tensor.raw(), 0, static_cast<size_t>(tensor.bytes()));
  return tensor;
}

}  // namespace baleen
