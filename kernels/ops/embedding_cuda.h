// Internal: the kernels behind embedding.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// y[t] = table[ids[t] - vocab_begin], rows of row_bytes bytes; zeros where the id is not in
// [vocab_begin, vocab_begin + W).
struct EmbeddingLookupCudaArgs {
  int64_t tokens = 0, W = 0, row_bytes = 0, vocab_begin = 0;
  const int32_t* ids_T = nullptr;
  const void* table = nullptr;
  void* y = nullptr;
};
void EmbeddingLookupCuda(const EmbeddingLookupCudaArgs& args, void* stream);

// dtable[w] += sum of dy[t] over the tokens of word w, in their order: dy [tokens, D] of `element`,
// dtable [W, D] fp32. The tokens come sorted by word (stable_sort_cuda.h), keys of W last.
struct EmbeddingBackwardCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t tokens = 0, W = 0, D = 0;
  const int32_t* sorted_words_T = nullptr;
  const int32_t* sorted_tokens_T = nullptr;
  const void* dy = nullptr;
  float* dtable = nullptr;
};
void EmbeddingBackwardCuda(const EmbeddingBackwardCudaArgs& args, void* stream);

// The same sorted arrays for few tokens in one launch, where RanksWordsCuda says so: words are ids
// less vocab_begin, those outside [0, W) count as W.
struct RankWordsCudaArgs {
  int64_t tokens = 0, W = 0, vocab_begin = 0;
  const int32_t* ids_T = nullptr;
  int32_t* sorted_words_T = nullptr;
  int32_t* sorted_tokens_T = nullptr;
};
bool RanksWordsCuda(int64_t tokens, int64_t W);
void RankWordsCuda(const RankWordsCudaArgs& args, void* stream);

}  // namespace baleen
