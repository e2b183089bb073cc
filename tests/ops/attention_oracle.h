// The plainest attention: one query row, one head, one key at a time, in double. The oracle of
// every attention op.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/ops/attention/attention.h"
#include "tests/support/random_tensor.h"

namespace baleen::testing {

// keys[t]: the keys that row t sees, in any order.
using KeyLists = std::vector<std::vector<int64_t>>;

struct OracleAttention {
  std::vector<double> o_THV, lse_TH, dq_THQ, dk_SHQ, dv_SHV;
  std::vector<double> probs_THS;  // 0 where the row does not see the key
};

inline OracleAttention PlainAttention(const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                                      const Tensor& do_THV, const KeyLists& keys, double scale) {
  const std::vector<double> q = ToDoubles(q_THQ), k = ToDoubles(k_SHQ), v = ToDoubles(v_SHV),
                            d_out = ToDoubles(do_THV);
  const int64_t T = q_THQ.dim(0), S = k_SHQ.dim(0), H = q_THQ.dim(1), Q = q_THQ.dim(2),
                V = v_SHV.dim(2);
  OracleAttention r;
  r.o_THV.assign(T * H * V, 0);
  r.lse_TH.assign(T * H, -std::numeric_limits<double>::infinity());
  r.dq_THQ.assign(q.size(), 0);
  r.dk_SHQ.assign(k.size(), 0);
  r.dv_SHV.assign(v.size(), 0);
  r.probs_THS.assign(T * H * S, 0);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      if (keys[t].empty()) continue;
      double* probs = &r.probs_THS[(t * H + h) * S];
      double sum = 0;
      for (const int64_t s : keys[t]) {
        double dot = 0;
        for (int64_t i = 0; i < Q; ++i) dot += q[(t * H + h) * Q + i] * k[(s * H + h) * Q + i];
        probs[s] = std::exp(scale * dot);
        sum += probs[s];
      }
      r.lse_TH[t * H + h] = std::log(sum);
      for (const int64_t s : keys[t]) {
        probs[s] /= sum;
        for (int64_t i = 0; i < V; ++i) {
          r.o_THV[(t * H + h) * V + i] += probs[s] * v[(s * H + h) * V + i];
        }
      }
      // dS_s = P_s (dP_s - sum_s' P_s' dP_s'), the softmax Jacobian written out.
      std::vector<double> dprobs(S, 0);
      double mean = 0;
      for (const int64_t s : keys[t]) {
        for (int64_t i = 0; i < V; ++i) {
          dprobs[s] += d_out[(t * H + h) * V + i] * v[(s * H + h) * V + i];
          r.dv_SHV[(s * H + h) * V + i] += probs[s] * d_out[(t * H + h) * V + i];
        }
        mean += probs[s] * dprobs[s];
      }
      for (const int64_t s : keys[t]) {
        const double ds = probs[s] * (dprobs[s] - mean);
        for (int64_t i = 0; i < Q; ++i) {
          r.dq_THQ[(t * H + h) * Q + i] += scale * ds * k[(s * H + h) * Q + i];
          r.dk_SHQ[(s * H + h) * Q + i] += scale * ds * q[(t * H + h) * Q + i];
        }
      }
    }
  }
  return r;
}

inline KeyWindows WindowsOf(const Context& context, const std::vector<int32_t>& begin,
                            const std::vector<int32_t>& end) {
  const Shape shape = {static_cast<int64_t>(begin.size())};
  return {IntTensorOf(context, shape, begin), IntTensorOf(context, shape, end)};
}

// Row t sees keys 0 .. t + offset.
inline KeyWindows CausalWindows(const Context& context, int64_t num_rows, int64_t offset = 0) {
  std::vector<int32_t> begin(num_rows, 0), end(num_rows);
  for (int64_t t = 0; t < num_rows; ++t) end[t] = static_cast<int32_t>(t + offset + 1);
  return WindowsOf(context, begin, end);
}

inline KeyLists ListsOf(const KeyWindows& windows) {
  KeyLists lists;
  for (int64_t t = 0; t < windows.begin_T.num_elements(); ++t) {
    lists.emplace_back();
    for (int64_t s = windows.begin_T.data<int32_t>()[t]; s < windows.end_T.data<int32_t>()[t];
         ++s) {
      lists.back().push_back(s);
    }
  }
  return lists;
}

inline KeyLists ListsOf(const Tensor& ids_TK) {
  KeyLists lists(ids_TK.dim(0));
  for (int64_t i = 0; i < ids_TK.num_elements(); ++i) {
    const int32_t s = ids_TK.data<int32_t>()[i];
    if (s >= 0) lists[i / ids_TK.dim(1)].push_back(s);
  }
  return lists;
}

// Up to k distinct keys of [0, t + offset] for row t, scattered by a multiplicative walk; -1 where
// there are fewer, at the end. Every empty_every-th row stays empty (0: none).
inline Tensor ScatteredIds(const Context& context, int64_t num_rows, int64_t k, int64_t offset = 0,
                           int64_t empty_every = 0) {
  std::vector<int32_t> ids(num_rows * k, -1);
  for (int64_t t = 0; t < num_rows; ++t) {
    if (empty_every > 0 && t % empty_every == empty_every - 1) continue;
    const int64_t size = t + offset + 1;
    const int64_t step = size % 7 == 0 ? 5 : 7;  // visits every residue unless both divide size
    std::vector<bool> taken(size, false);
    int64_t count = 0;
    for (int64_t i = 0; i < size && count < k; ++i) {
      const int64_t s = (3 + i * step) % size;
      if (taken[s]) continue;
      taken[s] = true;
      ids[t * k + count++] = static_cast<int32_t>(s);
    }
  }
  return IntTensorOf(context, {num_rows, k}, ids);
}

// sum over all elements of a * b.
inline double DotOf(const Tensor& a, const Tensor& b) {
  const std::vector<double> x = ToDoubles(a), y = ToDoubles(b);
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// ||a - b|| / (||b|| + sqrt(n)): relative, and absolute at order one where the expected values
// vanish.
inline double ErrorOf(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK_EQ(a.size(), b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference) / (std::sqrt(norm) + std::sqrt(static_cast<double>(a.size())));
}

// Bound for fp32 (and fp64) against the oracle: u * (sqrt(terms) + 8) * magnitude. `terms` is the
// longest sum behind the value; rounding errors of a sum add up as a random walk, 8 stands for exp,
// log and the few products around it. `magnitude` is by how much an error is enlarged: a logit's
// absolute error is its probability's relative error.
inline double RoundingTolerance(DType dtype, int64_t terms, double magnitude) {
  const double unit = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
  return unit * (std::sqrt(static_cast<double>(terms)) + 8) * magnitude;
}

}  // namespace baleen::testing
