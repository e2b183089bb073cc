// Embedding rows on the CPU.
#include "kernels/ops/embedding_cpu.h"

#include <algorithm>

namespace baleen {

template <typename T>
void EmbeddingLookupCpu(int64_t tokens, int64_t W, int64_t D, int64_t vocab_begin,
                        const int32_t* ids, const T* table, T* y) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = ids[t] - vocab_begin;
    if (row >= 0 && row < W) {
      std::copy_n(table + row * D, D, y + t * D);
    } else {
      std::fill_n(y + t * D, D, T{0});
    }
  }
}

template <typename T>
void EmbeddingBackwardCpu(int64_t tokens, int64_t W, int64_t D, int64_t vocab_begin,
                          const int32_t* ids, const T* dy, T* dtable) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = ids[t] - vocab_begin;
    if (row < 0 || row >= W) continue;
    const T* __restrict const from = dy + t * D;
    T* __restrict const to = dtable + row * D;
    for (int64_t d = 0; d < D; ++d) to[d] += from[d];
  }
}

template void EmbeddingLookupCpu(int64_t, int64_t, int64_t, int64_t, const int32_t*, const float*,
                                 float*);
template void EmbeddingLookupCpu(int64_t, int64_t, int64_t, int64_t, const int32_t*, const double*,
                                 double*);
template void EmbeddingBackwardCpu(int64_t, int64_t, int64_t, int64_t, const int32_t*, const float*,
                                   float*);
template void EmbeddingBackwardCpu(int64_t, int64_t, int64_t, int64_t, const int32_t*,
                                   const double*, double*);

}  // namespace baleen
