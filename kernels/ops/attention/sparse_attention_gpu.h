// Internal: which kernel of a GPU computes sparse attention, the memory it takes meanwhile, and the
// calls. sparse_attention.cc has checked the arguments.
#pragma once

#include "kernels/ops/attention/sparse_attention.h"

namespace baleen {

// bf16, C = 576, V = 512, 1..128 heads (padded to 64 or 128; the forward packs queries of up to 32
// heads, the backward those of 16 and 32 where it pays), K of 1..2048 (padded to 64s).
bool SparseAttentionOnTensorCores(DType dtype, int64_t num_heads, int64_t width, int64_t value_dim,
                                  int64_t num_selected);

// What a call holds beside its operands and results, under a use of its own. A dry bf16 call takes
// it too (but for the general kernels' few counters), so that a plan knows it.
struct SparseAttentionScratch {
  Tensor ids_TP;                // lists padded to a multiple of 64; empty: K is one
  Tensor target_TP;             // likewise
  Tensor entries_IU, counts_I;  // of packs of queries; empty: none
  Tensor choice;                // the backward's: whether packs are used, where their rows lie
  Tensor parts;                 // of the forward's last works; empty: none is divided
  Tensor workspace;             // the backward's on tensor cores
  // The backward's of the general kernels (sparse_attention_general_cuda.h).
  Tensor contributions, sorted_keys, sorted_slots, offsets, sort_workspace;
};
SparseAttentionScratch MakeSparseAttentionScratch(const Context& context, const Tensor& q_THC,
                                                  const Tensor& ids_TK, int64_t value_dim);
SparseAttentionScratch MakeSparseAttentionBackwardScratch(const Context& context,
                                                          const Tensor& q_THC, const Tensor& kv_SC,
                                                          const Tensor& ids_TK, int64_t value_dim);

SparseAttentionResult SparseAttentionOnCuda(const Context& context, const Tensor& q_THC,
                                            const Tensor& kv_SC, const Tensor& ids_TK,
                                            int64_t value_dim, double scale);
Tensor SparseAttentionBackwardOnCuda(const Context& context, const Tensor& do_THV,
                                     const Tensor& q_THC, const Tensor& kv_SC,
                                     const SparseAttentionResult& forward, const Tensor& ids_TK,
                                     double scale, const Tensor& dkv_SC, const Tensor& target_TK);

}  // namespace baleen
