// Backward of sparse attention in the absorbed MQA form on sm_90a (spec 2.5): structs of device
// pointers and launch functions; contracts are checked by the caller.
//
// Legend: T query rows, S keys, H heads, K selected keys a row, C = 576 (512 latent + 64 rope),
// V = 512 (the first columns of C).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace baleen {

struct SparseAttentionBackwardArgs {
  // Inputs.
  const void* q_THC = nullptr;      // bf16
  const void* kv_SC = nullptr;      // bf16
  const void* o_THV = nullptr;      // bf16, the forward's output
  const void* do_THV = nullptr;     // bf16
  const float* lse_TH = nullptr;    // natural log; +inf or -inf marks a row without keys: P = 0
  const int32_t* ids_TK = nullptr;  // ascending or not, distinct in a row; -1 only at a row's end
  // Outputs.
  void* dq_THC = nullptr;      // bf16, overwritten
  float* dkv_SC = nullptr;     // fp32, added to
  float* target_TK = nullptr;  // fp32, overwritten: sum over H of P (as bf16), 0 at -1
  int num_tokens = 0;          // T
  int num_keys = 0;            // S
  int num_heads = 0;           // 1..64 (padded to 64 rows) or 128
  int num_selected = 0;        // K, a multiple of 64, at most 2048
  float scale = 0;             // of the scores, YaRN's factor included
};

// How many queries' rows of dkv lie in one sorted buffer, and how many queries go in one launch.
// The bits of dkv depend on it, and on nothing else that may change between runs.
struct SparseAttentionBackwardPlan {
  int chunk = 0;  // a multiple of 32
  int span = 0;   // a multiple of chunk
};

// Chunks as large as a workspace of about `budget_bytes` allows, up to the size from which on they
// gain nothing (at least 32 queries, 0.2 GB).
SparseAttentionBackwardPlan PlanSparseAttentionBackward(const SparseAttentionBackwardArgs& args,
                                                        size_t budget_bytes);

size_t SparseAttentionBackwardWorkspace(const SparseAttentionBackwardArgs& args,
                                        const SparseAttentionBackwardPlan& plan);

// Runs all launches on `stream`. `workspace` as sized above, 256-byte aligned, contents arbitrary.
// Bitwise reproducible for a given plan.
cudaError_t LaunchSparseAttentionBackward(const SparseAttentionBackwardArgs& args,
                                          const SparseAttentionBackwardPlan& plan, void* workspace,
                                          cudaStream_t stream);

}  // namespace baleen
