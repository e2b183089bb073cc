// The hash of selected keys on the CPU.
#include "kernels/ops/indexer/selection_hash_cpu.h"

#include "kernels/ops/indexer/selection_mix_cuda.h"

namespace baleen {

int64_t SelectionHashCpu(int64_t rows, int64_t K, const int32_t* row, const int32_t* ids) {
  int64_t hash = 0;
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      if (ids[r * K + k] >= 0) sum += MixSelected(row[r], ids[r * K + k]);
    }
    hash += static_cast<int64_t>(sum >> 33);
  }
  return hash;
}

}  // namespace baleen
