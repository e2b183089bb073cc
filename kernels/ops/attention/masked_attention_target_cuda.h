// Head-summed probabilities of the selected keys, the indexer's target before division by the head
// count:
//
//   target[t, i] = sum_h exp(scale q_h.k_h - lse[t, h]) at key ids[t, i], 0 where ids is -1
//
// A kernel of its own, with the heads as the loop: in the backward each head's P passes in another
// thread block, and adding 128 of them in memory costs more than the products again (192 of 832 a
// pair). Legend: T query rows, S keys, H heads, Q = 192, K selected keys a row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/attention/masked_attention_plan_cuda.h"

namespace baleen {

struct MaskedTargetArgs {
  MaskedAttentionKeys keys;          // with ids
  const int32_t* begin_T = nullptr;  // [T] hulls of the rows' ids, in place of the windows
  const int32_t* end_T = nullptr;
  const void* q_THQ = nullptr;    // bf16, 16-byte aligned, as k_SHQ
  const void* k_SHQ = nullptr;    // bf16
  const float* lse_TH = nullptr;  // natural log
  int num_heads = 0;
  float scale = 0;
  int chunk = 0;               // rows at a time, as laid out
  float* target_TK = nullptr;  // out
  void* workspace = nullptr;   // 256-byte aligned, contents arbitrary
};

void LaunchMaskedTarget(const MaskedTargetArgs& args, cudaStream_t stream);

}  // namespace baleen
