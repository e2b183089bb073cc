// Internal: the CPU definition behind cross_entropy.h, for float and double. logits [tokens, W].
#pragma once

#include <cstdint>

namespace baleen {

// Arrays of one element a row.
template <typename T>
struct CrossEntropyRows {
  T* row_max;
  T* row_sum;
  T* target_logit;
};

template <typename T>
void CrossEntropyLocalStatsCpu(int64_t tokens, int64_t W, int64_t vocab_begin, const T* logits,
                               const int32_t* targets, const CrossEntropyRows<T>& stats);
// parts: arrays [num_parts, tokens].
template <typename T>
void CombineCrossEntropyStatsCpu(int64_t num_parts, int64_t tokens,
                                 const CrossEntropyRows<const T>& parts,
                                 const CrossEntropyRows<T>& whole);
template <typename T>
void CrossEntropyLossCpu(int64_t tokens, const CrossEntropyRows<const T>& stats,
                         const int32_t* targets, T* loss);
template <typename T>
void CrossEntropyBackwardCpu(int64_t tokens, int64_t W, int64_t vocab_begin,
                             const CrossEntropyRows<const T>& stats, const int32_t* targets,
                             T scale, T* logits);

}  // namespace baleen
