// The definitions of the indexer's kernels in plain double loops, for the bench's checks at small
// shapes. Legend: T query rows, S keys, I index heads, J = 128, K selected keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace baleen::bench {

constexpr int kIndexDim = 128;

struct Windows {
  std::vector<int32_t> begin, end;
};

// a[j] = q[t, j] . k[s] for every head.
inline void HeadScores(const double* q_IJ, const double* k_J, int heads, double* a_I) {
  for (int j = 0; j < heads; ++j) {
    double sum = 0;
    for (int d = 0; d < kIndexDim; ++d) sum += q_IJ[j * kIndexDim + d] * k_J[d];
    a_I[j] = sum;
  }
}

// I[t, s] inside the windows, NaN outside.
inline std::vector<double> ReferenceScores(const std::vector<double>& q,
                                           const std::vector<double>& k,
                                           const std::vector<double>& w,
                                           const std::vector<double>& k_scale,
                                           const Windows& windows, int rows, int keys, int heads) {
  std::vector<double> scores(static_cast<size_t>(rows) * keys,
                             std::numeric_limits<double>::quiet_NaN());
  std::vector<double> a(heads);
  for (int t = 0; t < rows; ++t) {
    for (int s = std::max(0, windows.begin[t]); s < std::min(keys, windows.end[t]); ++s) {
      HeadScores(&q[static_cast<size_t>(t) * heads * kIndexDim],
                 &k[static_cast<size_t>(s) * kIndexDim], heads, a.data());
      double sum = 0;
      for (int j = 0; j < heads; ++j)
        sum += w[static_cast<size_t>(t) * heads + j] * std::max(a[j], 0.0);
      scores[static_cast<size_t>(t) * keys + s] = sum * k_scale[s];
    }
  }
  return scores;
}

struct TopkRow {
  std::vector<int32_t> ids;  // ascending, padded with -1
  int ties_cut = 0;
  bool has_nan = false;
};

inline TopkRow ReferenceTopk(const float* scores, int begin, int end, int topk) {
  TopkRow row;
  std::vector<int32_t> order(std::max(0, end - begin));
  std::iota(order.begin(), order.end(), begin);
  for (int32_t i : order) row.has_nan |= std::isnan(scores[i]);
  if (row.has_nan) order.clear();
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  if (static_cast<int>(order.size()) > topk) {
    const float least = scores[order[topk - 1]];
    for (size_t i = topk; i < order.size() && scores[order[i]] == least; ++i) ++row.ties_cut;
    order.resize(topk);
  }
  std::sort(order.begin(), order.end());
  row.ids = order;
  row.ids.resize(topk, -1);
  return row;
}

struct IndexerGradients {
  std::vector<double> loss_T, dw_TI, dq_TIJ, dk_SJ, score_TK;
};

// KL(p || softmax over the chosen keys of I) and its gradients; p = scale * target, g = grad_scale.
inline IndexerGradients ReferenceBackward(
    const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& w,
    const std::vector<int32_t>& ids, const std::vector<double>& target, double target_scale,
    double grad_scale, int rows, int keys, int heads, int topk) {
  IndexerGradients out;
  out.loss_T.assign(rows, 0);
  out.score_TK.assign(static_cast<size_t>(rows) * topk, std::numeric_limits<double>::quiet_NaN());
  out.dw_TI.assign(static_cast<size_t>(rows) * heads, 0);
  out.dq_TIJ.assign(static_cast<size_t>(rows) * heads * kIndexDim, 0);
  out.dk_SJ.assign(static_cast<size_t>(keys) * kIndexDim, 0);
  std::vector<double> a(static_cast<size_t>(topk) * heads), score(topk);
  for (int t = 0; t < rows; ++t) {
    const double* q_IJ = &q[static_cast<size_t>(t) * heads * kIndexDim];
    const double* w_I = &w[static_cast<size_t>(t) * heads];
    double highest = -std::numeric_limits<double>::infinity(), mass = 0;
    for (int i = 0; i < topk; ++i) {
      const int s = ids[static_cast<size_t>(t) * topk + i];
      if (s < 0) continue;
      HeadScores(q_IJ, &k[static_cast<size_t>(s) * kIndexDim], heads,
                 &a[static_cast<size_t>(i) * heads]);
      score[i] = 0;
      for (int j = 0; j < heads; ++j)
        score[i] += w_I[j] * std::max(a[static_cast<size_t>(i) * heads + j], 0.0);
      out.score_TK[static_cast<size_t>(t) * topk + i] = score[i];
      highest = std::max(highest, score[i]);
      mass += target_scale * target[static_cast<size_t>(t) * topk + i];
    }
    double sum = 0;
    for (int i = 0; i < topk; ++i) {
      if (ids[static_cast<size_t>(t) * topk + i] >= 0) sum += std::exp(score[i] - highest);
    }
    const double lse = highest + std::log(sum);
    for (int i = 0; i < topk; ++i) {
      const int s = ids[static_cast<size_t>(t) * topk + i];
      if (s < 0) continue;
      const double p = target_scale * target[static_cast<size_t>(t) * topk + i];
      const double delta = grad_scale * (std::exp(score[i] - lse) * mass - p);
      out.loss_T[t] += (p > 0 ? p * std::log(p) : 0) - p * (score[i] - lse);
      for (int j = 0; j < heads; ++j) {
        const double r = a[static_cast<size_t>(i) * heads + j];
        if (!(r > 0)) continue;
        out.dw_TI[static_cast<size_t>(t) * heads + j] += delta * r;
        double* dq = &out.dq_TIJ[(static_cast<size_t>(t) * heads + j) * kIndexDim];
        for (int d = 0; d < kIndexDim; ++d) {
          dq[d] += w_I[j] * delta * k[static_cast<size_t>(s) * kIndexDim + d];
          out.dk_SJ[static_cast<size_t>(s) * kIndexDim + d] +=
              delta * w_I[j] * q_IJ[j * kIndexDim + d];
        }
      }
    }
  }
  return out;
}

}  // namespace baleen::bench
