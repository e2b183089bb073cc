// Attention on the CPU: one head and kRowsPerBlock query rows at a time against the union of their
// key windows.
//
// The products are Matmuls over that rectangle, what lies outside a row's own keys is masked: P = 0
// there. The scratch is two [kRowsPerBlock, S] arrays. A row's result does not depend on which rows
// share its block: sums over keys run in an order fixed by the keys' places in the sequence, and a
// masked key adds an exact zero.
#include "kernels/ops/attention/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/key_sets_cpu.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/linear/matmul_cpu.h"

namespace baleen {
namespace {

constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kKeysPerRun = 256;  // a product over so few keys is one ascending sum in Matmul

// One head and rows [first, last) of the queries, and the keys they meet.
struct Block {
  int64_t head;
  int64_t first;
  int64_t last;
  KeyRange keys;
  int64_t num_rows() const { return last - first; }
};

// Calls body(block) for every block that has a key: heads outermost, rows ascending.
template <typename Keys, typename Body>
void ForEachBlock(const Keys& keys, int64_t num_rows, int64_t num_heads, Body body) {
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t first = 0; first < num_rows; first += kRowsPerBlock) {
      const int64_t last = std::min(num_rows, first + kRowsPerBlock);
      const Block block = {head, first, last, keys.Union(first, last)};
      if (block.keys.size() > 0) body(block);
    }
  }
}

MatrixView QueryRows(const Tensor& x_THW, const Block& block) {
  return OneOfBatch(PerHead(x_THW), block.head).RowRange(block.first, block.last);
}

MatrixView KeyRows(const Tensor& x_SHW, const Block& block) {
  return OneOfBatch(PerHead(x_SHW), block.head).RowRange(block.keys.begin, block.keys.end);
}

// out += weights values, the keys in runs that begin at multiples of kKeysPerRun: so the
// order of summation depends on a key's place in the sequence, not on where the block's range
// begins.
void AddSumOverKeys(const Context& context, const Block& block, const MatrixView& weights,
                    const MatrixView& values, const MatrixView& out) {
  for (int64_t s = block.keys.begin; s < block.keys.end;) {
    const int64_t end = std::min(block.keys.end, (s / kKeysPerRun + 1) * kKeysPerRun);
    const int64_t from = s - block.keys.begin, to = end - block.keys.begin;
    Matmul(context, weights.Columns(from, to - from), Transpose::kNo, values.RowRange(from, to),
           Transpose::kNo, out, Accumulate::kAdd);
    s = end;
  }
}

// P = exp(S - max) / sum over the row's own keys, 0 elsewhere; lse = max + log sum. The sums are
// fp64: one number a row, so that their error does not grow with S. A row without keys leaves P = 0
// and lse as it is.
template <typename T, typename Keys>
void SoftmaxRows(const Keys& keys, const Block& block, const T* logits, T* probs, T* lse_TH,
                 int64_t num_heads) {
  const int64_t width = block.keys.size(), begin = block.keys.begin;
  std::fill_n(probs, block.num_rows() * width, T{0});
  for (int64_t t = block.first; t < block.last; ++t) {
    const T* row_logits = logits + (t - block.first) * width;
    T* row_probs = probs + (t - block.first) * width;
    T largest = -std::numeric_limits<T>::infinity();
    keys.ForEach(t,
                 [&](int64_t, int64_t s) { largest = std::max(largest, row_logits[s - begin]); });
    double sum = 0;
    keys.ForEach(t, [&](int64_t, int64_t s) {
      row_probs[s - begin] = std::exp(row_logits[s - begin] - largest);
      sum += row_probs[s - begin];
    });
    const T factor = static_cast<T>(1 / sum);
    keys.ForEach(t, [&](int64_t, int64_t s) { row_probs[s - begin] *= factor; });
    lse_TH[t * num_heads + block.head] = static_cast<T>(largest + std::log(sum));
  }
}

// P = exp(S - lse) over the row's own keys, 0 elsewhere.
template <typename T, typename Keys>
void RecomputeProbs(const Keys& keys, const Block& block, const T* logits, const T* lse_TH,
                    int64_t num_heads, T* probs) {
  const int64_t width = block.keys.size(), begin = block.keys.begin;
  std::fill_n(probs, block.num_rows() * width, T{0});
  for (int64_t t = block.first; t < block.last; ++t) {
    const T* row_logits = logits + (t - block.first) * width;
    T* row_probs = probs + (t - block.first) * width;
    const T lse = lse_TH[t * num_heads + block.head];
    keys.ForEach(t, [&](int64_t, int64_t s) {
      row_probs[s - begin] = std::exp(row_logits[s - begin] - lse);
    });
  }
}

// scale * dS = scale * P * (dP - D), D = do . o, written over dP. The scale is in it and not an
// alpha of the products that follow: those add to what is there, and C + alpha * sum has other bits
// where the compiler fuses it.
template <typename T>
void SoftmaxBackwardRows(const Block& block, const Tensor& do_THV, const Tensor& o_THV,
                         double scale, const T* probs, T* dprobs) {
  const int64_t width = block.keys.size(), num_heads = do_THV.dim(1), value_dim = do_THV.dim(2);
  const T factor = static_cast<T>(scale);
  for (int64_t t = block.first; t < block.last; ++t) {
    const int64_t at = (t * num_heads + block.head) * value_dim;
    double dot = 0;
    for (int64_t v = 0; v < value_dim; ++v) {
      dot += static_cast<double>(do_THV.data<T>()[at + v]) * o_THV.data<T>()[at + v];
    }
    const T d = static_cast<T>(dot);
    const int64_t row = (t - block.first) * width;
    for (int64_t i = row; i < row + width; ++i) dprobs[i] = factor * probs[i] * (dprobs[i] - d);
  }
}

// A dry call reserves the panels of the largest products: a block that sees all keys.
template <typename T, typename MakeKeys>
AttentionResult ForwardOver(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                            const Tensor& v_SHV, MakeKeys make_keys, double scale) {
  const int64_t num_rows = q_THQ.dim(0), num_heads = q_THQ.dim(1), num_keys = k_SHQ.dim(0);
  const DType dtype = q_THQ.dtype();
  AttentionResult result = {context.Zeros(dtype, {num_rows, num_heads, v_SHV.dim(2)}),
                            context.Empty(StatisticsOf(dtype), {num_rows, num_heads})};
  const Shape scratch_shape = {std::min(num_rows, kRowsPerBlock), num_keys};
  const Tensor logits = CpuScratch(context, dtype, scratch_shape);
  const Tensor probs = CpuScratch(context, dtype, scratch_shape);
  if (context.dry()) {
    ReserveMatmulPanels(context, dtype, num_keys, q_THQ.dim(2));
    ReserveMatmulPanels(context, dtype, v_SHV.dim(2), std::min(num_keys, kKeysPerRun));
    return result;
  }
  const auto keys = make_keys();
  std::fill_n(result.lse_TH.data<T>(), num_rows * num_heads, -std::numeric_limits<T>::infinity());
  ForEachBlock(keys, num_rows, num_heads, [&](const Block& block) {
    Matmul(context, QueryRows(q_THQ, block), Transpose::kNo, KeyRows(k_SHQ, block), Transpose::kYes,
           ScratchMatrix(logits, block.num_rows(), block.keys.size()), Accumulate::kOverwrite,
           scale);
    SoftmaxRows(keys, block, logits.data<T>(), probs.data<T>(), result.lse_TH.data<T>(), num_heads);
    AddSumOverKeys(context, block, ScratchMatrix(probs, block.num_rows(), block.keys.size()),
                   KeyRows(v_SHV, block), QueryRows(result.o_THV, block));
  });
  return result;
}

// target_TK (empty for windows) receives the sum of P over the heads, in the order of the heads.
template <typename T, typename MakeKeys>
Tensor BackwardOver(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                    const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                    MakeKeys make_keys, double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV,
                    const Tensor& target_TK) {
  const int64_t num_rows = q_THQ.dim(0), num_heads = q_THQ.dim(1), num_keys = k_SHQ.dim(0);
  const DType dtype = q_THQ.dtype();
  Tensor dq_THQ = context.Zeros(dtype, q_THQ.shape());
  const Shape scratch_shape = {std::min(num_rows, kRowsPerBlock), num_keys};
  const Tensor logits = CpuScratch(context, dtype, scratch_shape);  // S, then dP, then scale * dS
  const Tensor probs = CpuScratch(context, dtype, scratch_shape);
  if (context.dry()) {
    const int64_t rows = scratch_shape[0], run = std::min(num_keys, kKeysPerRun);
    ReserveMatmulPanels(context, dtype, num_keys, std::max(q_THQ.dim(2), v_SHV.dim(2)));
    ReserveMatmulPanels(context, dtype, std::max(q_THQ.dim(2), v_SHV.dim(2)), rows);
    ReserveMatmulPanels(context, dtype, q_THQ.dim(2), run);
    return dq_THQ;
  }
  const auto keys = make_keys();
  ForEachBlock(keys, num_rows, num_heads, [&](const Block& block) {
    const MatrixView q = QueryRows(q_THQ, block), k = KeyRows(k_SHQ, block);
    const MatrixView d_out = QueryRows(do_THV, block);
    const MatrixView ds = ScratchMatrix(logits, block.num_rows(), block.keys.size());
    const MatrixView p = ScratchMatrix(probs, block.num_rows(), block.keys.size());
    Matmul(context, q, Transpose::kNo, k, Transpose::kYes, ds, Accumulate::kOverwrite, scale);
    RecomputeProbs(keys, block, logits.data<T>(), forward.lse_TH.data<T>(), num_heads,
                   probs.data<T>());
    if (!target_TK.empty()) {
      for (int64_t t = block.first; t < block.last; ++t) {
        const T* row = probs.data<T>() + (t - block.first) * block.keys.size();
        T* target = target_TK.data<T>() + t * target_TK.dim(1);
        keys.ForEach(t,
                     [&](int64_t slot, int64_t s) { target[slot] += row[s - block.keys.begin]; });
      }
    }
    Matmul(context, p, Transpose::kYes, d_out, Transpose::kNo, KeyRows(dv_SHV, block),
           Accumulate::kAdd);
    Matmul(context, d_out, Transpose::kNo, KeyRows(v_SHV, block), Transpose::kYes, ds);
    SoftmaxBackwardRows(block, do_THV, forward.o_THV, scale, probs.data<T>(), logits.data<T>());
    AddSumOverKeys(context, block, ds, k, QueryRows(dq_THQ, block));
    Matmul(context, ds, Transpose::kYes, q, Transpose::kNo, KeyRows(dk_SHQ, block),
           Accumulate::kAdd);
  });
  return dq_THQ;
}

}  // namespace

template <typename T>
AttentionResult AttentionCpu<T>::Forward(const Context& context, const Tensor& q_THQ,
                                         const Tensor& k_SHQ, const Tensor& v_SHV,
                                         const KeyWindows& windows, double scale) {
  const auto keys = [&] { return WindowKeys("Attention", windows, k_SHQ.dim(0)); };
  return ForwardOver<T>(context, q_THQ, k_SHQ, v_SHV, keys, scale);
}

template <typename T>
Tensor AttentionCpu<T>::Backward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                                 const Tensor& k_SHQ, const Tensor& v_SHV,
                                 const AttentionResult& forward, const KeyWindows& windows,
                                 double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV) {
  const auto keys = [&] { return WindowKeys("AttentionBackward", windows, k_SHQ.dim(0)); };
  return BackwardOver<T>(context, do_THV, q_THQ, k_SHQ, v_SHV, forward, keys, scale, dk_SHQ, dv_SHV,
                         Tensor());
}

template <typename T>
AttentionResult MaskedAttentionCpu<T>::Forward(const Context& context, const Tensor& q_THQ,
                                               const Tensor& k_SHQ, const Tensor& v_SHV,
                                               const Tensor& ids_TK, double scale) {
  const auto keys = [&] { return ListedKeys("MaskedAttention", ids_TK, k_SHQ.dim(0)); };
  return ForwardOver<T>(context, q_THQ, k_SHQ, v_SHV, keys, scale);
}

template <typename T>
Tensor MaskedAttentionCpu<T>::Backward(const Context& context, const Tensor& do_THV,
                                       const Tensor& q_THQ, const Tensor& k_SHQ,
                                       const Tensor& v_SHV, const AttentionResult& forward,
                                       const Tensor& ids_TK, double scale, const Tensor& dk_SHQ,
                                       const Tensor& dv_SHV, const Tensor& target_TK) {
  const auto keys = [&] { return ListedKeys("MaskedAttentionBackward", ids_TK, k_SHQ.dim(0)); };
  if (!context.dry()) std::fill_n(target_TK.data<T>(), target_TK.num_elements(), T{0});
  return BackwardOver<T>(context, do_THV, q_THQ, k_SHQ, v_SHV, forward, keys, scale, dk_SHQ, dv_SHV,
                         target_TK);
}

template struct AttentionCpu<float>;
template struct AttentionCpu<double>;
template struct MaskedAttentionCpu<float>;
template struct MaskedAttentionCpu<double>;

}  // namespace baleen
