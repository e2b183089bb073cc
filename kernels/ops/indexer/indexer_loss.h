// The indexer's KL loss and its whole backward (DeepSeek-V3.2 report 2.1.1, eq. 3 and 4), on the
// selected keys or streamed over all causal keys.
//
//   p = target (L1-normalised main attention, summed over all heads),  pi = softmax over the
//   candidates of I loss[t] = sum_s p (ln p - I + lse_I)            (0 ln 0 = 0; KL of p against
//   pi) delta = g * (pi * sum p - p);   dw_j = sum_s delta relu(a_j);   dq_j = w_j sum_s delta
//   1[a_j > 0] k_s dk_s += sum_t delta sum_j w_j 1[a_j > 0] q_j,    a_j = q_j . k_s
// No gradient flows to the main attention: its q, k and lse are constants here.
// Legend: T query rows, S keys, K selected, I index heads, J index_head_dim, H main heads, Q main
// head width. Dtypes: q, k, dq and the target's q, k are of one (on the CPU kF32 or kF64, on CUDA
// kF32 or kBF16); all else is kF32 (kF64 for kF64). On CUDA ids and windows are not checked.
#pragma once

#include <string>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/attention/attention.h"

namespace baleen {

struct IndexerLossResult {
  Tensor loss_T;  // KL of each row, not scaled by g; 0 for rows without candidates
  Tensor dq_TIJ;
  Tensor dw_TI;
};

// Sparse stage. target_TK: head-summed probabilities of sparse_attention.h; target_scale = 1 / (all
// heads). grad_scale = g (loss weight and normalisation). Adds to dk_SJ. scores_TK: I of the ids,
// like w, where they are at hand (TopkSelect gives them); empty: computed from q, k and w.
IndexerLossResult SparseIndexerLoss(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                                    const Tensor& w_TI, const Tensor& ids_TK,
                                    const Tensor& target_TK, double target_scale, double grad_scale,
                                    const Tensor& dk_SJ, const Tensor& scores_TK = Tensor());

// Dense warm-up: candidates are the whole window of each row, p is recomputed tile by tile from the
// main attention's q, k and lse. `key_tile` keys at a time: memory is O(T * (heads + key_tile)),
// never T x S. On CUDA the kernels have tiles of their own, and chunks of rows bound the memory.
struct DenseTarget {
  Tensor q_THQ;
  Tensor k_SHQ;
  Tensor lse_TH;
  double softmax_scale = 1;
};
IndexerLossResult DenseIndexerLoss(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                                   const Tensor& w_TI, const DenseTarget& target,
                                   const KeyWindows& windows, double grad_scale, int64_t key_tile,
                                   const Tensor& dk_SJ);

// The dense target of a few query rows, written out: p_TS [T, S] = mean over the target's heads of
// exp(scale q.k - lse), 0 outside the row's window. Ranks that hold different heads add theirs and
// divide by the number of ranks.
Tensor DenseTargetProbabilities(const Context& context, const DenseTarget& target,
                                const KeyWindows& windows);

// How good a selection is, row by row, against the dense target p_TS:
//   mass = sum of p over ids;  best_mass = sum of the K largest p;  recall = |ids and K largest p|
//   / |ids|
// with K = |ids| of the row; equal p: the lower key is the larger. A row without ids has 0, 0
// and 1.
struct SelectionQualityResult {
  Tensor mass_T;
  Tensor best_mass_T;
  Tensor recall_T;
};
SelectionQualityResult SelectionQuality(const Context& context, const Tensor& p_TS,
                                        const Tensor& ids_TK, const KeyWindows& windows);

// The CUDA kernels that run, in words: for operands of this dtype, index heads of width J and K
// chosen keys, or main heads of width Q.
std::string SparseIndexerLossKernelName(DType dtype, int64_t num_heads, int64_t width, int64_t k);
std::string DenseIndexerLossKernelName(DType dtype, int64_t num_heads, int64_t width,
                                       int64_t main_width);

}  // namespace baleen
