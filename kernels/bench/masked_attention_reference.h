// Masked dense attention once more, in the plainest form: double, one row and head at a time. For
// small shapes. Legend: T query rows, S keys, H heads, Q = 192, V = 128, K selected keys a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace baleen::bench {

constexpr int kQueryDim = 192, kValueDim = 128;

struct MaskedProblem {
  int rows, keys, heads, num_selected;
  double scale;
  std::vector<int32_t> begin, end;  // [T]; empty: every row has [0, S)
  std::vector<int32_t> ids;         // [T, K]; empty: no selection
  std::vector<double> q, k, v, d_o;

  // The keys that row t sees.
  std::vector<int> KeysOf(int t) const {
    const int first = begin.empty() ? 0 : std::max(0, begin[t]);
    const int last = end.empty() ? keys : std::min(keys, end[t]);
    std::vector<int> seen;
    if (ids.empty()) {
      for (int s = first; s < last; ++s) seen.push_back(s);
    } else {
      for (int i = 0; i < num_selected; ++i) {
        const int s = ids[size_t(t) * num_selected + i];
        if (s >= first && s < last) seen.push_back(s);
      }
    }
    return seen;
  }
};

struct MaskedResult {
  std::vector<double> o, lse, dq, dk, dv;
  std::vector<double> target;  // [T, K] sum over heads of P; of a problem with ids
};

// Calls work(head) for every head and share of the rows, on up to 16 threads.
inline void InParallel(int count, const std::function<void(int)>& work) {
  const int workers = std::max(1u, std::min(16u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    threads.emplace_back([=, &work] {
      for (int i = worker; i < count; i += workers) work(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

inline double DotOf(const double* a, const double* b, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// One row and head: o, lse, dq; its shares of dk and dv of the head; P of the keys that it sees.
inline std::vector<double> ReferenceRow(const MaskedProblem& p, int t, int h,
                                        const std::vector<int>& seen, MaskedResult& out) {
  const size_t row = size_t(t) * p.heads + h;
  const auto key_at = [&](int s) { return size_t(s) * p.heads + h; };
  std::vector<double> prob(seen.size());
  double highest = -INFINITY, sum = 0, delta = 0;
  for (size_t i = 0; i < seen.size(); ++i) {
    prob[i] = p.scale * DotOf(&p.q[row * kQueryDim], &p.k[key_at(seen[i]) * kQueryDim], kQueryDim);
    highest = std::max(highest, prob[i]);
  }
  for (double& x : prob) sum += x = std::exp(x - highest);
  out.lse[row] = highest + std::log(sum);
  for (size_t i = 0; i < seen.size(); ++i) {
    prob[i] /= sum;
    for (int d = 0; d < kValueDim; ++d) {
      out.o[row * kValueDim + d] += prob[i] * p.v[key_at(seen[i]) * kValueDim + d];
    }
  }
  const double* d_o = &p.d_o[row * kValueDim];
  delta = DotOf(d_o, &out.o[row * kValueDim], kValueDim);
  for (size_t i = 0; i < seen.size(); ++i) {
    const size_t key = key_at(seen[i]);
    const double ds = p.scale * prob[i] * (DotOf(d_o, &p.v[key * kValueDim], kValueDim) - delta);
    for (int d = 0; d < kValueDim; ++d) out.dv[key * kValueDim + d] += prob[i] * d_o[d];
    for (int d = 0; d < kQueryDim; ++d) {
      out.dq[row * kQueryDim + d] += ds * p.k[key * kQueryDim + d];
      out.dk[key * kQueryDim + d] += ds * p.q[row * kQueryDim + d];
    }
  }
  return prob;
}

inline MaskedResult ReferenceMaskedAttention(const MaskedProblem& p) {
  MaskedResult out;
  out.o.assign(p.d_o.size(), 0);
  out.lse.assign(size_t(p.rows) * p.heads, -INFINITY);
  out.dq.assign(p.q.size(), 0);
  out.dk.assign(p.k.size(), 0);
  out.dv.assign(p.v.size(), 0);
  out.target.assign(p.ids.size(), 0);
  std::vector<std::vector<double>> target(p.heads, out.target);
  InParallel(p.heads, [&](int h) {
    for (int t = 0; t < p.rows; ++t) {
      const std::vector<int> seen = p.KeysOf(t);
      if (seen.empty()) continue;
      const std::vector<double> prob = ReferenceRow(p, t, h, seen, out);
      // `seen` keeps the order of the ids.
      size_t next = 0;
      for (int i = 0; i < p.num_selected && next < seen.size(); ++i) {
        if (p.ids[size_t(t) * p.num_selected + i] != seen[next]) continue;
        target[h][size_t(t) * p.num_selected + i] = prob[next++];
      }
    }
  });
  for (const std::vector<double>& of_head : target) {
    for (size_t i = 0; i < out.target.size(); ++i) out.target[i] += of_head[i];
  }
  return out;
}

}  // namespace baleen::bench
