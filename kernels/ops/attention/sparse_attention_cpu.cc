// Sparse attention on the CPU: for each query row gather the selected latents (N <= K of them),
// then four or five small Matmuls between [H, C], [H, N] and [N, C]. Rows are independent; their
// dkv are added in ascending row order.
#include "kernels/ops/attention/sparse_attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/ops/attention/gathered_keys_cpu.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/linear/matmul_cpu.h"

namespace baleen {
namespace {

// The [H, W] matrix of one query row.
MatrixView RowOf(const Tensor& x_THW, int64_t row) { return OneOfBatch(AsBatch(x_THW), row); }

// S becomes P = exp(S - max) / sum in every row (one a head); lse = max + log sum. The sums are
// fp64.
template <typename T>
void SoftmaxHeads(T* logits_HN, int64_t num_heads, int64_t num_keys, T* lse_H) {
  for (int64_t h = 0; h < num_heads; ++h) {
    T* row = logits_HN + h * num_keys;
    const T largest = *std::max_element(row, row + num_keys);
    double sum = 0;
    for (int64_t n = 0; n < num_keys; ++n) {
      row[n] = std::exp(row[n] - largest);
      sum += row[n];
    }
    const T factor = static_cast<T>(1 / sum);
    for (int64_t n = 0; n < num_keys; ++n) row[n] *= factor;
    lse_H[h] = static_cast<T>(largest + std::log(sum));
  }
}

// dS = P * (dP - D), D = do~ . o~, written over dP.
template <typename T>
void SoftmaxBackwardHeads(const T* do_HV, const T* o_HV, const T* probs_HN, int64_t num_heads,
                          int64_t value_dim, int64_t num_keys, T* dprobs_HN) {
  for (int64_t h = 0; h < num_heads; ++h) {
    double dot = 0;
    for (int64_t v = 0; v < value_dim; ++v) {
      dot += static_cast<double>(do_HV[h * value_dim + v]) * o_HV[h * value_dim + v];
    }
    const T d = static_cast<T>(dot);
    for (int64_t i = h * num_keys; i < (h + 1) * num_keys; ++i) {
      dprobs_HN[i] = probs_HN[i] * (dprobs_HN[i] - d);
    }
  }
}

}  // namespace

template <typename T>
SparseAttentionResult SparseAttentionCpu<T>::Forward(const Context& context, const Tensor& q_THC,
                                                     const Tensor& kv_SC, const Tensor& ids_TK,
                                                     int64_t value_dim, double scale) {
  const int64_t num_rows = q_THC.dim(0), num_heads = q_THC.dim(1), num_slots = ids_TK.dim(1);
  const DType dtype = q_THC.dtype();
  SparseAttentionResult result = {context.Zeros(dtype, {num_rows, num_heads, value_dim}),
                                  context.Empty(StatisticsOf(dtype), {num_rows, num_heads})};
  GatheredKeys<T> gathered(context, kv_SC, num_slots);
  const Tensor probs = CpuScratch(context, dtype, {num_heads, num_slots});
  if (context.dry()) {
    ReserveMatmulPanels(context, dtype, num_slots, q_THC.dim(2));
    ReserveMatmulPanels(context, dtype, value_dim, num_slots);
    return result;
  }
  const ListedKeys keys("SparseAttention", ids_TK, kv_SC.dim(0));
  std::fill_n(result.lse_TH.data<T>(), num_rows * num_heads, -std::numeric_limits<T>::infinity());
  for (int64_t t = 0; t < num_rows; ++t) {
    gathered.Gather(keys, t);
    if (gathered.size() == 0) continue;
    const MatrixView kv = gathered.rows_NW(), p = ScratchMatrix(probs, num_heads, gathered.size());
    Matmul(context, RowOf(q_THC, t), Transpose::kNo, kv, Transpose::kYes, p, Accumulate::kOverwrite,
           scale);
    SoftmaxHeads(probs.data<T>(), num_heads, gathered.size(),
                 result.lse_TH.data<T>() + t * num_heads);
    Matmul(context, p, Transpose::kNo, kv.Columns(0, value_dim), Transpose::kNo,
           RowOf(result.o_THV, t));
  }
  return result;
}

template <typename T>
Tensor SparseAttentionCpu<T>::Backward(const Context& context, const Tensor& do_THV,
                                       const Tensor& q_THC, const Tensor& kv_SC,
                                       const SparseAttentionResult& forward, const Tensor& ids_TK,
                                       double scale, const Tensor& dkv_SC,
                                       const Tensor& target_TK) {
  const int64_t num_rows = q_THC.dim(0), num_heads = q_THC.dim(1), num_slots = ids_TK.dim(1);
  const int64_t width = q_THC.dim(2), value_dim = do_THV.dim(2);
  const DType dtype = q_THC.dtype();
  Tensor dq_THC = context.Zeros(dtype, q_THC.shape());
  GatheredKeys<T> gathered(context, kv_SC, num_slots);
  const Tensor probs = CpuScratch(context, dtype, {num_heads, num_slots});
  const Tensor dprobs = CpuScratch(context, dtype, {num_heads, num_slots});  // dP, then dS
  const Tensor dgathered = CpuScratch(context, dtype, {num_slots, width});
  if (context.dry()) {
    ReserveMatmulPanels(context, dtype, num_slots, width);
    ReserveMatmulPanels(context, dtype, width, std::max(num_slots, num_heads));
    return dq_THC;
  }
  const ListedKeys keys("SparseAttentionBackward", ids_TK, kv_SC.dim(0));
  std::fill_n(target_TK.data<T>(), target_TK.num_elements(), T{0});
  for (int64_t t = 0; t < num_rows; ++t) {
    gathered.Gather(keys, t);
    const int64_t size = gathered.size();
    if (size == 0) continue;
    const MatrixView kv = gathered.rows_NW(), p = ScratchMatrix(probs, num_heads, size);
    const MatrixView ds = ScratchMatrix(dprobs, num_heads, size);
    const MatrixView dkv = ScratchMatrix(dgathered, size, width);

    // P from the saved lse, and its sum over the heads.
    Matmul(context, RowOf(q_THC, t), Transpose::kNo, kv, Transpose::kYes, p, Accumulate::kOverwrite,
           scale);
    for (int64_t h = 0; h < num_heads; ++h) {
      const T lse = forward.lse_TH.data<T>()[t * num_heads + h];
      T* row = probs.data<T>() + h * size;
      for (int64_t n = 0; n < size; ++n) {
        row[n] = std::exp(row[n] - lse);
        target_TK.data<T>()[t * num_slots + gathered.slot(n)] += row[n];
      }
    }

    Matmul(context, RowOf(do_THV, t), Transpose::kNo, kv.Columns(0, value_dim), Transpose::kYes,
           ds);
    const int64_t at = t * num_heads * value_dim;
    SoftmaxBackwardHeads(do_THV.data<T>() + at, forward.o_THV.data<T>() + at, probs.data<T>(),
                         num_heads, value_dim, size, dprobs.data<T>());
    Matmul(context, ds, Transpose::kNo, kv, Transpose::kNo, RowOf(dq_THC, t),
           Accumulate::kOverwrite, scale);

    // The latent is key and value: both gradients meet in its first columns.
    Matmul(context, ds, Transpose::kYes, RowOf(q_THC, t), Transpose::kNo, dkv,
           Accumulate::kOverwrite, scale);
    Matmul(context, p, Transpose::kYes, RowOf(do_THV, t), Transpose::kNo, dkv.Columns(0, value_dim),
           Accumulate::kAdd);
    gathered.ScatterAdd(dgathered.data<T>(), dkv_SC);
  }
  return dq_THC;
}

template struct SparseAttentionCpu<float>;
template struct SparseAttentionCpu<double>;

}  // namespace baleen
