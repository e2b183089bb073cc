// The indexer's loss on the CPU. Sparse: row by row on the gathered keys. Dense: kRowsPerBlock rows
// at a time, twice over the key tiles: first lse_I, then p, loss and gradients.
//
// Both turn a = q.k, in place, into b = w_j delta 1[a > 0]; then dq = b k and dk += b^T q are
// Matmuls. Sums over the keys of a row (lse, loss, dw) run in fp64 in the order of the keys. Key
// tiles begin at multiples of key_tile, so that a row's result does not depend on the rows in its
// block; loss and dw do not depend on key_tile either.
#include "kernels/ops/indexer/indexer_loss_cpu.h"

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/ops/attention/gathered_keys_cpu.h"
#include "kernels/ops/indexer/indexer_scores_cpu.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/linear/matmul_cpu.h"

namespace baleen {
namespace {

constexpr int64_t kRowsPerBlock = 32;

// log sum exp of values that come one after the other. One exp a value, and no dependence on how
// they are grouped.
template <typename T>
struct RunningLogSumExp {
  T largest = -std::numeric_limits<T>::infinity();
  double sum = 0;  // of exp(value - largest)

  void Add(T value) {
    if (value > largest) {
      sum = sum * std::exp(largest - value) + 1;
      largest = value;
    } else {
      sum += std::exp(value - largest);
    }
  }
  double Result() const { return largest + std::log(sum); }
};

// The term p ln(p / pi) of the KL divergence, ln pi = score - lse; 0 ln 0 = 0.
template <typename T>
double KlTerm(T p, T score, double lse) {
  return p == 0 ? 0 : p * (std::log(static_cast<double>(p)) - (score - lse));
}

// For one query row and `size` keys: dw_j += sum_s delta relu(a_j), and a becomes b = w_j delta 1[a
// > 0].
template <typename T>
void BackwardOfScores(T* a_IN, const T* delta_N, const T* w_I, int64_t num_heads, int64_t size,
                      double* dw_I) {
  for (int64_t j = 0; j < num_heads; ++j) {
    T* a = a_IN + j * size;
    double dw = dw_I[j];
    for (int64_t s = 0; s < size; ++s) dw += static_cast<double>(delta_N[s]) * Relu(a[s]);
    dw_I[j] = dw;
    for (int64_t s = 0; s < size; ++s) a[s] = a[s] <= 0 ? T{0} : w_I[j] * delta_N[s];
  }
}

IndexerLossResult ZeroResult(const Context& context, const Tensor& q_TIJ) {
  const DType dtype = q_TIJ.dtype(), statistics = StatisticsOf(dtype);
  return {context.Zeros(statistics, {q_TIJ.dim(0)}), context.Zeros(dtype, q_TIJ.shape()),
          context.Zeros(statistics, {q_TIJ.dim(0), q_TIJ.dim(1)})};
}

// The state of one call of DenseIndexerLoss.
template <typename T>
class DenseLoss {
 public:
  DenseLoss(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ, const Tensor& w_TI,
            const DenseTarget& target, const KeyWindows& windows, double grad_scale,
            int64_t key_tile, const Tensor& dk_SJ)
      : context_(context),
        q_TIJ_(q_TIJ),
        w_TI_(w_TI),
        k_(AsMatrix(k_SJ)),
        dk_(AsMatrix(dk_SJ)),
        target_(target),
        keys_("DenseIndexerLoss", windows, k_SJ.dim(0)),
        num_heads_(q_TIJ.dim(1)),
        grad_scale_(grad_scale),
        key_tile_(std::min(key_tile, std::max<int64_t>(1, k_SJ.dim(0)))),
        lse_(kRowsPerBlock),
        dw_(kRowsPerBlock * num_heads_) {
    const DType dtype = q_TIJ.dtype();
    products_ = CpuScratch(context, dtype, {kRowsPerBlock * num_heads_ * key_tile_});
    scores_ = CpuScratch(context, dtype, {kRowsPerBlock * key_tile_});
    logits_ = CpuScratch(context, dtype, {kRowsPerBlock * key_tile_});
    p_ = CpuScratch(context, dtype, {kRowsPerBlock * key_tile_});
  }

  IndexerLossResult Run() {
    IndexerLossResult result = ZeroResult(context_, q_TIJ_);
    if (context_.dry()) {
      ReservePanels();
      return result;
    }
    for (first_ = 0; first_ < q_TIJ_.dim(0); first_ += kRowsPerBlock) {
      last_ = std::min(q_TIJ_.dim(0), first_ + kRowsPerBlock);
      lse_.assign(kRowsPerBlock, RunningLogSumExp<T>());
      dw_.assign(kRowsPerBlock * num_heads_, 0);
      loss_.assign(kRowsPerBlock, 0);
      ForEachTile([&](KeyRange tile) { AddToLse(tile); });
      ForEachTile([&](KeyRange tile) { AddToLossAndGradients(tile, result.dq_TIJ); });
      for (int64_t t = first_; t < last_; ++t) {
        result.loss_T.data<T>()[t] = static_cast<T>(loss_[t - first_]);
        for (int64_t j = 0; j < num_heads_; ++j) {
          result.dw_TI.data<T>()[t * num_heads_ + j] =
              static_cast<T>(dw_[(t - first_) * num_heads_ + j]);
        }
      }
    }
    return result;
  }

 private:
  // Those of the largest products: scores, the target's logits, dq and dk of a whole tile.
  void ReservePanels() const {
    const DType dtype = q_TIJ_.dtype();
    const int64_t width = q_TIJ_.dim(2), rows = std::min(q_TIJ_.dim(0), kRowsPerBlock);
    ReserveMatmulPanels(context_, dtype, key_tile_, std::max(width, target_.q_THQ.dim(2)));
    ReserveMatmulPanels(context_, dtype, width, std::max(key_tile_, rows * num_heads_));
  }

  template <typename Body>
  void ForEachTile(Body body) const {
    const KeyRange range = keys_.Union(first_, last_);
    for (int64_t s = range.begin / key_tile_ * key_tile_; s < range.end; s += key_tile_) {
      body({s, std::min(range.end, s + key_tile_)});
    }
  }

  // The part of the row's window inside the tile, counted from the tile's begin.
  KeyRange Inside(int64_t row, KeyRange tile) const {
    const KeyRange own = keys_.Row(row);
    const int64_t begin = std::clamp(own.begin, tile.begin, tile.end) - tile.begin;
    return {begin, std::max(begin, std::min(own.end, tile.end) - tile.begin)};
  }

  void ComputeScores(KeyRange tile) {
    const int64_t size = tile.size(), rows = last_ - first_;
    Matmul(context_, AsMatrix(q_TIJ_.Rows(first_, last_)), Transpose::kNo,
           k_.RowRange(tile.begin, tile.end), Transpose::kYes,
           ScratchMatrix(products_, rows * num_heads_, size));
    for (int64_t r = 0; r < rows; ++r) {
      WeightedReluSum(products_.data<T>() + r * num_heads_ * size,
                      w_TI_.data<T>() + (first_ + r) * num_heads_, num_heads_, size,
                      scores_.data<T>() + r * size);
    }
  }

  void AddToLse(KeyRange tile) {
    ComputeScores(tile);
    for (int64_t t = first_; t < last_; ++t) {
      const KeyRange inside = Inside(t, tile);
      const T* scores = scores_.data<T>() + (t - first_) * tile.size();
      for (int64_t s = inside.begin; s < inside.end; ++s) lse_[t - first_].Add(scores[s]);
    }
  }

  void AddToLossAndGradients(KeyRange tile, const Tensor& dq_TIJ) {
    ComputeScores(tile);
    DenseTargetTile<T>(context_, target_, keys_, first_, last_, tile, logits_, p_);
    const int64_t size = tile.size();
    for (int64_t t = first_; t < last_; ++t) {
      const int64_t r = t - first_;
      const KeyRange inside = Inside(t, tile);
      const double lse = inside.size() > 0 ? lse_[r].Result() : 0;
      const T* p = p_.data<T>() + r * size;
      T* delta = scores_.data<T>() + r * size;  // written over the scores; 0 outside the window
      std::fill(delta, delta + inside.begin, T{0});
      std::fill(delta + inside.end, delta + size, T{0});
      for (int64_t s = inside.begin; s < inside.end; ++s) {
        loss_[r] += KlTerm(p[s], delta[s], lse);
        // sum p = 1: the target is a mean of whole softmax rows.
        const T pi = std::exp(static_cast<T>(delta[s] - lse));
        delta[s] = static_cast<T>(grad_scale_ * (pi - p[s]));
      }
      BackwardOfScores(products_.data<T>() + r * num_heads_ * size, delta,
                       w_TI_.data<T>() + t * num_heads_, num_heads_, size, &dw_[r * num_heads_]);
    }
    const MatrixView b = ScratchMatrix(products_, (last_ - first_) * num_heads_, size);
    const MatrixView q = AsMatrix(q_TIJ_.Rows(first_, last_));
    Matmul(context_, b, Transpose::kNo, k_.RowRange(tile.begin, tile.end), Transpose::kNo,
           AsMatrix(dq_TIJ.Rows(first_, last_)), Accumulate::kAdd);
    Matmul(context_, b, Transpose::kYes, q, Transpose::kNo, dk_.RowRange(tile.begin, tile.end),
           Accumulate::kAdd);
  }

  const Context& context_;
  Tensor q_TIJ_, w_TI_;
  MatrixView k_, dk_;
  DenseTarget target_;
  WindowKeys keys_;
  int64_t num_heads_;
  double grad_scale_;
  int64_t key_tile_;
  // Of the rows [first_, last_) of the block at hand.
  int64_t first_ = 0, last_ = 0;
  std::vector<RunningLogSumExp<T>> lse_;
  std::vector<double> loss_, dw_;
  // Of the tile at hand: products [rows * I, keys], the others [rows, keys].
  Tensor products_, scores_, logits_, p_;
};

}  // namespace

template <typename T>
void DenseTargetTile(const Context& context, const DenseTarget& target, const WindowKeys& keys,
                     int64_t first, int64_t last, KeyRange tile, const Tensor& logits,
                     const Tensor& p) {
  const int64_t num_heads = target.q_THQ.dim(1), size = tile.size();
  std::fill_n(p.data<T>(), (last - first) * size, T{0});
  for (int64_t h = 0; h < num_heads; ++h) {
    Matmul(context, OneOfBatch(PerHead(target.q_THQ), h).RowRange(first, last), Transpose::kNo,
           OneOfBatch(PerHead(target.k_SHQ), h).RowRange(tile.begin, tile.end), Transpose::kYes,
           ScratchMatrix(logits, last - first, size), Accumulate::kOverwrite, target.softmax_scale);
    for (int64_t t = first; t < last; ++t) {
      const KeyRange own = keys.Row(t);
      const T lse = target.lse_TH.data<T>()[t * num_heads + h];
      const T* row_logits = logits.data<T>() + (t - first) * size;
      T* row_p = p.data<T>() + (t - first) * size;
      const int64_t end = std::min(own.end, tile.end) - tile.begin;
      for (int64_t s = std::max(own.begin, tile.begin) - tile.begin; s < end; ++s) {
        row_p[s] += std::exp(row_logits[s] - lse);
      }
    }
  }
  const T factor = static_cast<T>(1.0 / num_heads);
  for (int64_t i = 0; i < (last - first) * size; ++i) p.data<T>()[i] *= factor;
}

template <typename T>
IndexerLossResult SparseIndexerLossCpu(const Context& context, const Tensor& q_TIJ,
                                       const Tensor& k_SJ, const Tensor& w_TI, const Tensor& ids_TK,
                                       const Tensor& target_TK, double target_scale,
                                       double grad_scale, const Tensor& dk_SJ,
                                       const Tensor& scores_TK) {
  const int64_t num_heads = q_TIJ.dim(1), width = q_TIJ.dim(2), num_slots = ids_TK.dim(1);
  const DType dtype = q_TIJ.dtype();
  IndexerLossResult result = ZeroResult(context, q_TIJ);
  GatheredKeys<T> gathered(context, k_SJ, num_slots);
  const Tensor products = CpuScratch(context, dtype, {num_heads, num_slots});
  const Tensor dgathered = CpuScratch(context, dtype, {num_slots, width});
  if (context.dry()) {
    ReserveMatmulPanels(context, dtype, num_slots, width);
    ReserveMatmulPanels(context, dtype, width, std::max(num_slots, num_heads));
    return result;
  }
  const ListedKeys keys("SparseIndexerLoss", ids_TK, k_SJ.dim(0));
  std::vector<T> scores(num_slots), p(num_slots), delta(num_slots);
  std::vector<double> dw(num_heads);
  for (int64_t t = 0; t < q_TIJ.dim(0); ++t) {
    gathered.Gather(keys, t);
    const int64_t size = gathered.size();
    if (size == 0) continue;
    const MatrixView q = OneOfBatch(AsBatch(q_TIJ), t);
    const MatrixView b = ScratchMatrix(products, num_heads, size);
    const T* w = w_TI.data<T>() + t * num_heads;
    Matmul(context, q, Transpose::kNo, gathered.rows_NW(), Transpose::kYes, b);
    if (scores_TK.empty()) {
      WeightedReluSum(products.data<T>(), w, num_heads, size, scores.data());
    } else {
      for (int64_t n = 0; n < size; ++n)
        scores[n] = scores_TK.data<T>()[t * num_slots + gathered.slot(n)];
    }

    RunningLogSumExp<T> log_sum_exp;
    double p_sum = 0, loss = 0;
    for (int64_t n = 0; n < size; ++n) {
      log_sum_exp.Add(scores[n]);
      p[n] = static_cast<T>(target_TK.data<T>()[t * num_slots + gathered.slot(n)] * target_scale);
      p_sum += p[n];
    }
    const double lse = log_sum_exp.Result();
    for (int64_t n = 0; n < size; ++n) {
      loss += KlTerm(p[n], scores[n], lse);
      const T pi = std::exp(static_cast<T>(scores[n] - lse));
      delta[n] = static_cast<T>(grad_scale * (pi * p_sum - p[n]));
    }
    result.loss_T.data<T>()[t] = static_cast<T>(loss);

    dw.assign(num_heads, 0);
    BackwardOfScores(products.data<T>(), delta.data(), w, num_heads, size, dw.data());
    std::copy(dw.begin(), dw.end(), result.dw_TI.data<T>() + t * num_heads);
    Matmul(context, b, Transpose::kNo, gathered.rows_NW(), Transpose::kNo,
           OneOfBatch(AsBatch(result.dq_TIJ), t));
    Matmul(context, b, Transpose::kYes, q, Transpose::kNo, ScratchMatrix(dgathered, size, width));
    gathered.ScatterAdd(dgathered.data<T>(), dk_SJ);
  }
  return result;
}

template <typename T>
IndexerLossResult DenseIndexerLossCpu(const Context& context, const Tensor& q_TIJ,
                                      const Tensor& k_SJ, const Tensor& w_TI,
                                      const DenseTarget& target, const KeyWindows& windows,
                                      double grad_scale, int64_t key_tile, const Tensor& dk_SJ) {
  return DenseLoss<T>(context, q_TIJ, k_SJ, w_TI, target, windows, grad_scale, key_tile, dk_SJ)
      .Run();
}

template void DenseTargetTile<float>(const Context&, const DenseTarget&, const WindowKeys&, int64_t,
                                     int64_t, KeyRange, const Tensor&, const Tensor&);
template void DenseTargetTile<double>(const Context&, const DenseTarget&, const WindowKeys&,
                                      int64_t, int64_t, KeyRange, const Tensor&, const Tensor&);
template IndexerLossResult SparseIndexerLossCpu<float>(const Context&, const Tensor&, const Tensor&,
                                                       const Tensor&, const Tensor&, const Tensor&,
                                                       double, double, const Tensor&,
                                                       const Tensor&);
template IndexerLossResult SparseIndexerLossCpu<double>(const Context&, const Tensor&,
                                                        const Tensor&, const Tensor&, const Tensor&,
                                                        const Tensor&, double, double,
                                                        const Tensor&, const Tensor&);
template IndexerLossResult DenseIndexerLossCpu<float>(const Context&, const Tensor&, const Tensor&,
                                                      const Tensor&, const DenseTarget&,
                                                      const KeyWindows&, double, int64_t,
                                                      const Tensor&);
template IndexerLossResult DenseIndexerLossCpu<double>(const Context&, const Tensor&, const Tensor&,
                                                       const Tensor&, const DenseTarget&,
                                                       const KeyWindows&, double, int64_t,
                                                       const Tensor&);

}  // namespace baleen
