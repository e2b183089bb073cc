// The definition of the dense indexer loss in plain double loops, for the bench's checks at small
// shapes. Legend: T query rows, S keys, H main heads, Q = 192, I = 64 index heads, J = 128.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace baleen::bench {

constexpr int kIndexHeads = 64, kIndexDim = 128, kMainDim = 192;

struct DenseIndexerProblem {
  int rows, keys, main_heads;
  double softmax_scale, grad_scale;
  std::vector<int32_t> begin, end;  // [T], begin >= end: a row without keys
  std::vector<double> q, k, w, main_q, main_k;
};

struct DenseIndexerResult {
  std::vector<double> loss_T, dw_TI, dq_TIJ, dk_SJ;
};

inline double Dot(const double* a, const double* b, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Calls work(row, thread) for every row, on up to 16 threads.
inline void ForEachRow(int rows, const std::function<void(int, int)>& work) {
  const int count = std::max(1u, std::min(16u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int thread = 0; thread < count; ++thread) {
    threads.emplace_back([=, &work] {
      for (int row = thread; row < rows; row += count) work(row, thread);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Natural log of the sum of exp over the row's window, for each head; 0 for a row without keys.
inline std::vector<double> ReferenceMainLse(const DenseIndexerProblem& p) {
  std::vector<double> lse(size_t(p.rows) * p.main_heads, 0);
  ForEachRow(p.rows, [&](int t, int) {
    std::vector<double> s(p.keys);
    for (int h = 0; h < p.main_heads && p.begin[t] < p.end[t]; ++h) {
      double highest = -INFINITY, sum = 0;
      for (int i = p.begin[t]; i < p.end[t]; ++i) {
        s[i] =
            p.softmax_scale * Dot(&p.main_q[(size_t(t) * p.main_heads + h) * kMainDim],
                                  &p.main_k[(size_t(i) * p.main_heads + h) * kMainDim], kMainDim);
        highest = std::max(highest, s[i]);
      }
      for (int i = p.begin[t]; i < p.end[t]; ++i) sum += std::exp(s[i] - highest);
      lse[size_t(t) * p.main_heads + h] = highest + std::log(sum);
    }
  });
  return lse;
}

// One row: its loss, dw and dq into `out`, its share of dk into dk_SJ.
inline void ReferenceRow(const DenseIndexerProblem& p, const std::vector<double>& lse, int t,
                         DenseIndexerResult& out, std::vector<double>& dk_SJ) {
  const double* q = &p.q[size_t(t) * kIndexHeads * kIndexDim];
  const double* w = &p.w[size_t(t) * kIndexHeads];
  const int begin = p.begin[t], count = p.end[t] - begin;
  if (count <= 0) return;
  std::vector<double> a(size_t(count) * kIndexHeads), score(count, 0);
  double highest = -INFINITY, sum = 0;
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < kIndexHeads; ++j) {
      a[size_t(i) * kIndexHeads + j] =
          Dot(q + j * kIndexDim, &p.k[size_t(begin + i) * kIndexDim], kIndexDim);
      score[i] += w[j] * std::max(0.0, a[size_t(i) * kIndexHeads + j]);
    }
    highest = std::max(highest, score[i]);
  }
  for (double x : score) sum += std::exp(x - highest);
  const double index_lse = highest + std::log(sum);
  for (int i = 0; i < count; ++i) {
    const double* k = &p.k[size_t(begin + i) * kIndexDim];
    double target = 0;
    for (int h = 0; h < p.main_heads; ++h) {
      const size_t row = size_t(t) * p.main_heads + h, key = size_t(begin + i) * p.main_heads + h;
      target += std::exp(p.softmax_scale *
                             Dot(&p.main_q[row * kMainDim], &p.main_k[key * kMainDim], kMainDim) -
                         lse[row]) /
                p.main_heads;
    }
    if (target > 0) out.loss_T[t] += target * (std::log(target) - score[i] + index_lse);
    const double delta = p.grad_scale * (std::exp(score[i] - index_lse) - target);
    for (int j = 0; j < kIndexHeads; ++j) {
      const double relu = a[size_t(i) * kIndexHeads + j];
      if (!(relu > 0)) continue;
      out.dw_TI[size_t(t) * kIndexHeads + j] += delta * relu;
      for (int d = 0; d < kIndexDim; ++d) {
        out.dq_TIJ[(size_t(t) * kIndexHeads + j) * kIndexDim + d] += delta * w[j] * k[d];
        dk_SJ[size_t(begin + i) * kIndexDim + d] += delta * w[j] * q[j * kIndexDim + d];
      }
    }
  }
}

// Of the rows that `wanted` marks (all if empty); the others' results are 0.
inline DenseIndexerResult ReferenceDenseIndexerLoss(const DenseIndexerProblem& p,
                                                    const std::vector<double>& lse,
                                                    const std::vector<bool>& wanted = {}) {
  DenseIndexerResult out;
  out.loss_T.assign(p.rows, 0);
  out.dw_TI.assign(p.w.size(), 0);
  out.dq_TIJ.assign(p.q.size(), 0);
  out.dk_SJ.assign(p.k.size(), 0);
  std::vector<std::vector<double>> dk(16, out.dk_SJ);
  ForEachRow(p.rows, [&](int t, int thread) {
    if (wanted.empty() || wanted[t]) ReferenceRow(p, lse, t, out, dk[thread]);
  });
  for (const std::vector<double>& part : dk) {
    for (size_t i = 0; i < part.size(); ++i) out.dk_SJ[i] += part[i];
  }
  return out;
}

}  // namespace baleen::bench
