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

// The codes as numbers, without their scales.
template <typename T>
Tensor NumbersOf(const Context& context, const Tensor& codes) {
  const Tensor numbers = context.Empty(DTypeOf<T>::value, codes.shape());
  if (context.dry()) return numbers;
  for (int64_t i = 0; i < codes.num_elements(); ++i)
    numbers.data<T>()[i] = static_cast<T>(codes.data<Float8E4M3>()[i].ToFloat());
  return numbers;
}

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

// Scales are powers of two, so nothing is rounded differently for their standing outside.
template <typename T>
Tensor IndexerScoresFp8Cpu(const Context& context, const Fp8Codes& q_TIJ, const Fp8Codes& k_SJ,
                           const Tensor& w_TI, const KeyWindows& windows) {
  const Tensor q = NumbersOf<T>(context, q_TIJ.codes), k = NumbersOf<T>(context, k_SJ.codes);
  const Tensor scaled_w = context.Empty(w_TI.dtype(), w_TI.shape());
  if (!context.dry()) {
    for (int64_t i = 0; i < w_TI.num_elements(); ++i)
      scaled_w.data<T>()[i] = w_TI.data<T>()[i] * q_TIJ.scales.data<T>()[i];
  }
  const Tensor scores_TS = IndexerScoresCpu<T>(context, q, k, scaled_w, windows);
  if (context.dry()) return scores_TS;
  const int64_t num_keys = scores_TS.dim(1);
  for (int64_t i = 0; i < scores_TS.num_elements(); ++i)
    scores_TS.data<T>()[i] *= k_SJ.scales.data<T>()[i % num_keys];
  return scores_TS;
}

template Tensor IndexerScoresCpu<float>(const Context&, const Tensor&, const Tensor&, const Tensor&,
                                        const KeyWindows&);
template Tensor IndexerScoresCpu<double>(const Context&, const Tensor&, const Tensor&,
                                         const Tensor&, const KeyWindows&);
template Tensor IndexerScoresFp8Cpu<float>(const Context&, const Fp8Codes&, const Fp8Codes&,
                                           const Tensor&, const KeyWindows&);
template Tensor IndexerScoresFp8Cpu<double>(const Context&, const Fp8Codes&, const Fp8Codes&,
                                            const Tensor&, const KeyWindows&);

}  // namespace baleen
