// The CPU definitions behind indexer_loss.h, for float and double. indexer_loss.cc has checked the
// arguments.
#pragma once

#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/key_sets_cpu.h"

namespace baleen {

// p of rows [first, last) on the keys of `tile`: the mean over heads of exp(scale * q.k - lse), 0
// outside a row's window. p and the scratch `logits` hold [last - first, tile.size()].
template <typename T>
void DenseTargetTile(const Context& context, const DenseTarget& target, const WindowKeys& keys,
                     int64_t first, int64_t last, KeyRange tile, const Tensor& logits,
                     const Tensor& p);

template <typename T>
IndexerLossResult SparseIndexerLossCpu(const Context& context, const Tensor& q_TIJ,
                                       const Tensor& k_SJ, const Tensor& w_TI, const Tensor& ids_TK,
                                       const Tensor& target_TK, double target_scale,
                                       double grad_scale, const Tensor& dk_SJ,
                                       const Tensor& scores_TK);

template <typename T>
IndexerLossResult DenseIndexerLossCpu(const Context& context, const Tensor& q_TIJ,
                                      const Tensor& k_SJ, const Tensor& w_TI,
                                      const DenseTarget& target, const KeyWindows& windows,
                                      double grad_scale, int64_t key_tile, const Tensor& dk_SJ);

template <typename T>
Tensor DenseTargetProbabilitiesCpu(const Context& context, const DenseTarget& target,
                                   const KeyWindows& windows);

template <typename T>
SelectionQualityResult SelectionQualityCpu(const Context& context, const Tensor& p_TS,
                                           const Tensor& ids_TK, const KeyWindows& windows);

}  // namespace baleen
