// Internal: the kernels behind cross_entropy.h. logits [T, W] are of `element`, statistics and
// losses fp32; exponentials and sums in fp32.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// Arrays of one float a row.
struct CrossEntropyCudaRows {
  float* row_max = nullptr;
  float* row_sum = nullptr;
  float* target_logit = nullptr;
};

struct CrossEntropyCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t tokens = 0, W = 0, vocab_begin = 0;
  void* logits = nullptr;
  const int32_t* targets_T = nullptr;
  CrossEntropyCudaRows stats;
};
// Writes stats.
void CrossEntropyLocalStatsCuda(const CrossEntropyCudaArgs& args, void* stream);
// Reads stats, overwrites logits with their gradient.
void CrossEntropyBackwardCuda(const CrossEntropyCudaArgs& args, float scale, void* stream);

// parts: arrays [num_parts, tokens].
void CombineCrossEntropyStatsCuda(int64_t num_parts, int64_t tokens,
                                  const CrossEntropyCudaRows& parts,
                                  const CrossEntropyCudaRows& whole, void* stream);
void CrossEntropyLossCuda(int64_t tokens, const CrossEntropyCudaRows& stats,
                          const int32_t* targets_T, float* loss_T, void* stream);

}  // namespace baleen
