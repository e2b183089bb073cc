// Internal: the kernels behind attention.h that take any head widths, bf16 and fp32, windows and
// lists of keys. They compute in fp32 without the tensor cores: for small models, for fp32, and for
// what the library's attention (attention_cudnn.h) does not take.
//
// q, o, do, dq [T, H, ..] and k, v [S, H, ..] are of `element`; lse, delta [T, H] and what is added
// to (dk, dv) are fp32. Every sum has a fixed order: same inputs, same bits, and a row's o, lse and
// dq do not depend on which rows are beside it.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// Keys of a word of the bits below.
inline constexpr int64_t kKeysPerWord = 64;

struct AttentionCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t T = 0, S = 0, H = 0, Q = 0, V = 0;
  float scale = 0;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  // Which keys a row sees: key windows [T] each, or, where `seen` is given, a bit for each key,
  // [T, ceil(S / 64)].
  const int32_t* begin = nullptr;
  const int32_t* end = nullptr;
  const uint64_t* seen = nullptr;
};

// Writes o and lse.
void AttentionForwardCuda(const AttentionCudaArgs& args, void* o, float* lse, void* stream);

struct AttentionBackwardCudaArgs {
  const void* d_out = nullptr;
  const void* o = nullptr;
  const float* lse = nullptr;
  float* delta = nullptr;  // [T, H], scratch: do . o
  void* dq = nullptr;
  float* dk = nullptr;  // added to
  float* dv = nullptr;  // added to
};
void AttentionBackwardCuda(const AttentionCudaArgs& args, const AttentionBackwardCudaArgs& backward,
                           void* stream);

// seen [T, ceil(S / 64)] from ids [T, K] (-1: none).
void MarkSeenKeysCuda(int64_t T, int64_t S, int64_t K, const int32_t* ids, uint64_t* seen,
                      void* stream);

// target[t, i] = sum over the heads of exp(scale q.k - lse) at key ids[t, i], 0 where that is -1.
// args.seen holds the marks of ids; sums [T, S] is scratch.
void AttentionTargetCuda(const AttentionCudaArgs& args, const float* lse, int64_t K,
                         const int32_t* ids, float* sums, float* target, void* stream);

}  // namespace baleen
