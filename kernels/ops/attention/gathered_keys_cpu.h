// The selected key rows of one query row, copied next to each other so that its products are plain
// Matmuls.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/key_sets_cpu.h"

namespace baleen {

template <typename T>
class GatheredKeys {
 public:
  // Room for up to `max_keys` rows of x_SW.
  GatheredKeys(const Context& context, const Tensor& x_SW, int64_t max_keys)
      : x_SW_(x_SW), rows_NW_(CpuScratch(context, x_SW.dtype(), {max_keys, x_SW.dim(1)})) {}

  // Copies the keys of `row`; slots that hold -1 are left out.
  void Gather(const ListedKeys& keys, int64_t row) {
    slots_.clear();
    ids_.clear();
    const int64_t width = x_SW_.dim(1);
    keys.ForEach(row, [&](int64_t slot, int64_t s) {
      std::copy_n(x_SW_.data<T>() + s * width, width, rows_NW_.template data<T>() + size() * width);
      slots_.push_back(slot);
      ids_.push_back(s);
    });
  }

  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  int64_t slot(int64_t n) const { return slots_[n]; }
  MatrixView rows_NW() const { return ScratchMatrix(rows_NW_, size(), x_SW_.dim(1)); }

  // dx_SW[id of n] += drows_NW[n], in the order of the slots.
  void ScatterAdd(const T* drows_NW, const Tensor& dx_SW) const {
    const int64_t width = x_SW_.dim(1);
    for (int64_t n = 0; n < size(); ++n) {
      T* target = dx_SW.data<T>() + ids_[n] * width;
      const T* source = drows_NW + n * width;
      for (int64_t c = 0; c < width; ++c) target[c] += source[c];
    }
  }

 private:
  Tensor x_SW_;
  Tensor rows_NW_;
  std::vector<int64_t> slots_;
  std::vector<int64_t> ids_;
};

}  // namespace baleen
