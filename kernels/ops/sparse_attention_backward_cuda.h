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

// How the rows of dkv find each other.
enum class ScatterOrder {
  // Each (query, key) row is stored once, sorted by key, and a second pass adds the rows of a key
  // in
  // the order of the queries: bitwise reproducible, the default. Needs the large workspace.
  kFixed,
  // fp32 reductions in memory in the order of their arrival: the last bits vary from run to run.
  kArrival,
};

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

// Bytes of workspace for the fixed order with `chunk` query rows at a time, or for arrival order
// (chunk is ignored).
size_t SparseAttentionBackwardWorkspace(const SparseAttentionBackwardArgs& args, ScatterOrder order,
                                        int chunk);

// The number of query rows a chunk should hold: whole waves of the device's multiprocessors, about
// `budget_bytes` of workspace at most (at least one wave).
int SparseAttentionBackwardChunk(const SparseAttentionBackwardArgs& args, int num_multiprocessors,
                                 size_t budget_bytes);

// Runs all launches on `stream`. `workspace` as sized above, 256-byte aligned, contents arbitrary.
cudaError_t LaunchSparseAttentionBackward(const SparseAttentionBackwardArgs& args,
                                          ScatterOrder order, int chunk, void* workspace,
                                          cudaStream_t stream);

}  // namespace baleen
