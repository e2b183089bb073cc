// The definition of sparse attention and its backward in double on the CPU, for the
// checks of the benches. Queries are spread over threads; nothing else is done for speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace baleen::bench {

constexpr int kLatentAndRope = 576, kLatent = 512;

// T rows, S keys, H heads, K selected; matrices row-major, values as the GPU sees them
// (bf16-exact).
struct SparseAttentionProblem {
  int tokens, heads, keys, selected;
  double scale;
  std::vector<double> q_THC, kv_SC, do_THV;
  std::vector<int32_t> ids_TK;
};
struct SparseAttentionForwardResult {
  std::vector<double> o_THV, lse_TH;
};
struct SparseAttentionGradients {
  std::vector<double> dq_THC, dkv_SC, target_TK;
};

// Runs body(t, worker) for all t over `workers` threads.
inline void ForEachToken(int tokens, int workers, const std::function<void(int, int)>& body) {
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    threads.emplace_back([=, &body] {
      for (int t = worker; t < tokens; t += workers) body(t, worker);
    });
  }
  for (std::thread& thread : threads) thread.join();
}
inline int NumWorkers() {
  return static_cast<int>(std::max(1u, std::min(16u, std::thread::hardware_concurrency())));
}

inline double Dot(const double* a, const double* b, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

inline SparseAttentionForwardResult ReferenceForward(const SparseAttentionProblem& p) {
  SparseAttentionForwardResult out;
  const size_t rows = size_t(p.tokens) * p.heads;
  out.o_THV.assign(rows * kLatent, 0);
  out.lse_TH.assign(rows, -INFINITY);
  ForEachToken(p.tokens, NumWorkers(), [&](int t, int) {
    std::vector<double> scores(p.selected);
    for (int h = 0; h < p.heads; ++h) {
      const size_t row = size_t(t) * p.heads + h;
      double largest = -INFINITY, sum = 0;
      for (int k = 0; k < p.selected; ++k) {
        const int s = p.ids_TK[size_t(t) * p.selected + k];
        scores[k] = s < 0 ? -INFINITY
                          : p.scale * Dot(&p.q_THC[row * kLatentAndRope],
                                          &p.kv_SC[size_t(s) * kLatentAndRope], kLatentAndRope);
        largest = std::max(largest, scores[k]);
      }
      if (largest == -INFINITY) continue;
      for (double score : scores) sum += std::exp(score - largest);
      out.lse_TH[row] = largest + std::log(sum);
      for (int k = 0; k < p.selected; ++k) {
        const int s = p.ids_TK[size_t(t) * p.selected + k];
        if (s < 0) continue;
        const double weight = std::exp(scores[k] - out.lse_TH[row]);
        for (int v = 0; v < kLatent; ++v) {
          out.o_THV[row * kLatent + v] += weight * p.kv_SC[size_t(s) * kLatentAndRope + v];
        }
      }
    }
  });
  return out;
}

inline SparseAttentionGradients ReferenceBackward(const SparseAttentionProblem& p,
                                                  const SparseAttentionForwardResult& forward) {
  const int workers = NumWorkers();
  SparseAttentionGradients out;
  out.dq_THC.assign(p.q_THC.size(), 0);
  out.dkv_SC.assign(p.kv_SC.size(), 0);
  out.target_TK.assign(p.ids_TK.size(), 0);
  std::vector<std::vector<double>> dkv(workers, std::vector<double>(p.kv_SC.size(), 0));
  ForEachToken(p.tokens, workers, [&](int t, int worker) {
    for (int h = 0; h < p.heads; ++h) {
      const size_t row = size_t(t) * p.heads + h;
      if (std::isinf(forward.lse_TH[row])) continue;
      const double* q = &p.q_THC[row * kLatentAndRope];
      const double* d_o = &p.do_THV[row * kLatent];
      const double delta = Dot(d_o, &forward.o_THV[row * kLatent], kLatent);
      for (int k = 0; k < p.selected; ++k) {
        const int s = p.ids_TK[size_t(t) * p.selected + k];
        if (s < 0) continue;
        const double* c = &p.kv_SC[size_t(s) * kLatentAndRope];
        double* dc = &dkv[worker][size_t(s) * kLatentAndRope];
        const double weight = std::exp(p.scale * Dot(q, c, kLatentAndRope) - forward.lse_TH[row]);
        const double ds = p.scale * weight * (Dot(d_o, c, kLatent) - delta);
        out.target_TK[size_t(t) * p.selected + k] += weight;
        for (int x = 0; x < kLatentAndRope; ++x) {
          out.dq_THC[row * kLatentAndRope + x] += ds * c[x];
          dc[x] += ds * q[x];
        }
        for (int v = 0; v < kLatent; ++v) dc[v] += weight * d_o[v];
      }
    }
  });
  for (const std::vector<double>& part : dkv) {
    for (size_t i = 0; i < part.size(); ++i) out.dkv_SC[i] += part[i];
  }
  return out;
}

}  // namespace baleen::bench
