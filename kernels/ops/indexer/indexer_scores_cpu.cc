// Indexer scores on the CPU: kRowsPerBlock query rows with all their heads against the union of
// their key windows, as one [rows * I, J] x [J, keys] Matmul, then the weighted sum over heads.
#include "kernels/ops/indexer/indexer_scores_cpu.h"

#include <limits>

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/key_sets_cpu.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/linear/matmul_cpu.h"

namespace baleen {
namespace {

constexpr int64_t kRowsPerBlock = 32;

}  // namespace

template <typename T>
Tensor IndexerScoresCpu(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                        const Tensor& w_TI, const KeyWindows& windows) {
  const int64_t num_rows = q_TIJ.dim(0), num_heads = q_TIJ.dim(1), num_keys = k_SJ.dim(0);
  const DType dtype = q_TIJ.dtype();
  Tensor scores_TS = context.Empty(StatisticsOf(dtype), {num_rows, num_keys});
  const int64_t block_rows = std::min(kRowsPerBlock, num_rows);
  const Tensor products = CpuScratch(context, dtype, {block_rows * num_heads * num_keys});
  const Tensor block_scores = CpuScratch(context, dtype, {num_keys});
  if (context.dry()) {
    ReserveMatmulPanels(context, dtype, num_keys, q_TIJ.dim(2));
    return scores_TS;
  }
  const WindowKeys keys("IndexerScores", windows, num_keys);
  std::fill_n(scores_TS.data<T>(), num_rows * num_keys, -std::numeric_limits<T>::infinity());
  const MatrixView k = AsMatrix(k_SJ);
  for (int64_t first = 0; first < num_rows; first += kRowsPerBlock) {
    const int64_t last = std::min(num_rows, first + kRowsPerBlock);
    const KeyRange range = keys.Union(first, last);
    if (range.size() == 0) continue;
    Matmul(context, AsMatrix(q_TIJ.Rows(first, last)), Transpose::kNo,
           k.RowRange(range.begin, range.end), Transpose::kYes,
           ScratchMatrix(products, (last - first) * num_heads, range.size()));
    for (int64_t t = first; t < last; ++t) {
      const KeyRange own = keys.Row(t);
      WeightedReluSum(products.data<T>() + (t - first) * num_heads * range.size(),
                      w_TI.data<T>() + t * num_heads, num_heads, range.size(),
                      block_scores.data<T>());
      std::copy_n(block_scores.data<T>() + (own.begin - range.begin), own.size(),
                  scores_TS.data<T>() + t * num_keys + own.begin);
    }
  }
  return scores_TS;
}

template Tensor IndexerScoresCpu<float>(const Context&, const Tensor&, const Tensor&, const Tensor&,
                                        const KeyWindows&);
template Tensor IndexerScoresCpu<double>(const Context&, const Tensor&, const Tensor&,
                                         const Tensor&, const KeyWindows&);

}  // namespace baleen
