// What every memory pool keeps beside its memory: who holds how much, and the most held at once.
// For the pools of this folder only.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>

#include "kernels/core/context.h"

namespace baleen {

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

// "\n  use: bytes now, peak bytes", the largest first.
std::string Table(const Ledger& ledger);

// Counts its bytes for as long as it lives; how the memory came and goes is the subclass's.
class CountedStorage : public Storage {
 public:
  CountedStorage(void* data, int64_t bytes, std::shared_ptr<Ledger> ledger, std::string use)
      : Storage(data, bytes), ledger_(std::move(ledger)), use_(std::move(use)) {
    ledger_->Add(use_, bytes);
  }
  ~CountedStorage() override { ledger_->Add(use_, -bytes()); }

 private:
  std::shared_ptr<Ledger> ledger_;
  std::string use_;
};

class CountingPool : public MemoryPool {
 public:
  std::map<std::string, MemoryUse> Uses() const override { return ledger_->uses; }
  MemoryUse Total() const override { return ledger_->total; }
  void ResetPeak() override {
    for (auto& [use, entry] : ledger_->uses) entry.peak_bytes = entry.bytes;
    ledger_->total.peak_bytes = ledger_->total.bytes;
  }

 protected:
  static constexpr int64_t kAlignment = 64;  // one cache line, and the widest vector load
  // What an allocation of `bytes` occupies, in every pool alike.
  static int64_t Rounded(int64_t bytes) {
    return std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  }

  std::shared_ptr<Ledger> ledger_ = std::make_shared<Ledger>();
};

}  // namespace baleen
