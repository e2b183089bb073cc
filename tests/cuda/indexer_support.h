// A problem of the indexer on the GPU and, in fp64, for the CPU definitions: random operands,
// windows of packed documents, chosen keys and the main attention's operands.
//
// Legend: T query rows, S keys, I index heads, J their width, K chosen keys, H main heads, Q their
// width.
#pragma once

#include <string>

#include "kernels/ops/attention/attention.h"
#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/indexer/topk_select.h"
#include "tests/cuda/ops_support.h"

namespace baleen::testing {

struct IndexerShape {
  DType dtype;
  int64_t T, S, I, J, K, H, Q;

  std::string Name() const {
    return ::testing::PrintToString(std::string(DTypeName(dtype))) + " " + std::to_string(T) +
           " x " + std::to_string(S) + ", " + std::to_string(I) + " x " + std::to_string(J) + ", " +
           std::to_string(K) + " keys, main " + std::to_string(H) + " x " + std::to_string(Q);
  }
};

struct IndexerCase {
  explicit IndexerCase(const IndexerShape& shape, uint64_t seed = 1)
      : q(RandomOnBoth(shape.dtype, {shape.T, shape.I, shape.J}, seed)),
        k(RandomOnBoth(shape.dtype, {shape.S, shape.J}, seed + 1)),
        w(RandomOnBoth(DType::kF32, {shape.T, shape.I}, seed + 2,
                       1 / std::sqrt(static_cast<double>(shape.I * shape.J)))),
        main_q(RandomOnBoth(shape.dtype, {shape.T, shape.H, shape.Q}, seed + 3)),
        main_k(RandomOnBoth(shape.dtype, {shape.S, shape.H, shape.Q}, seed + 4)),
        scale(1.5 / std::sqrt(static_cast<double>(shape.Q))) {
    // Documents of 23 keys more than the one before; the rows are the last T of S positions. Each
    // 11th row sees nothing, as rows of padding do.
    std::vector<int32_t> begin, end;
    for (int64_t t = 0; t < shape.T; ++t) {
      const int64_t position = shape.S - shape.T + t;
      int64_t first = 0;
      for (int64_t length = 23; first + length <= position; length += 23) first += length;
      begin.push_back(static_cast<int32_t>(first));
      end.push_back(static_cast<int32_t>(t % 11 == 10 ? first : position + 1));
    }
    windows_gpu = {OnGpu(IntTensorOf(Cpu(), {shape.T}, begin)),
                   OnGpu(IntTensorOf(Cpu(), {shape.T}, end)),
                   {},
                   {}};
    windows_cpu = {
        IntTensorOf(Cpu(), {shape.T}, begin), IntTensorOf(Cpu(), {shape.T}, end), {}, {}};
    ids = IntsOnBoth({shape.T, shape.K}, ChosenKeys(shape));
    target = Both(DType::kF32, RandomTarget(shape, seed + 5));
    const Tensor exact_lse =
        Attention(Cpu(), main_q.cpu, main_k.cpu, main_k.cpu, windows_cpu, scale).lse_TH;
    lse = Both(DType::kF32, Cast(Cpu(), exact_lse, DType::kF32));
  }

  DenseTarget target_gpu() const { return {main_q.gpu, main_k.gpu, lse.gpu, scale}; }
  DenseTarget target_cpu() const { return {main_q.cpu, main_k.cpu, lse.cpu, scale}; }

  OnBoth q, k, w, main_q, main_k, lse;
  double scale;
  KeyWindows windows_gpu, windows_cpu;
  OnBoth ids, target;

 private:
  // Every third key of the window from the last one back, ascending, with a hole in front; all of a
  // short window. Row 5 has chosen nothing.
  std::vector<int32_t> ChosenKeys(const IndexerShape& shape) const {
    std::vector<int32_t> ids(shape.T * shape.K, -1);
    for (int64_t t = 0; t < shape.T; ++t) {
      if (t == 5) continue;
      const int32_t begin = windows_cpu.begin_T.data<int32_t>()[t];
      const int32_t end = windows_cpu.end_T.data<int32_t>()[t];
      const int32_t step = end - begin > 3 * shape.K ? 3 : 1;
      int64_t slot = shape.K;
      for (int32_t s = end - 1; s >= begin && slot > 0; s -= step) ids[t * shape.K + --slot] = s;
      // Slots without a key stand in front where t is even, at the end otherwise.
      if (t % 2 == 1) {
        std::rotate(ids.begin() + t * shape.K, ids.begin() + t * shape.K + slot,
                    ids.begin() + (t + 1) * shape.K);
      }
    }
    return ids;
  }

  // Like probabilities summed over 4 heads; every seventh is 0. Slots without a key hold what must
  // not be read as a number of use.
  Tensor RandomTarget(const IndexerShape& shape, uint64_t seed) const {
    const Tensor target = RandomTensor(Cpu(), DType::kF32, {shape.T, shape.K}, seed);
    float* const p = target.data<float>();
    for (int64_t i = 0; i < target.num_elements(); ++i) {
      p[i] = i % 7 == 3 ? 0 : 2 * p[i] * p[i] / static_cast<float>(shape.K);
      if (ids.cpu.data<int32_t>()[i] < 0) p[i] = 77;
    }
    return target;
  }
};

// ||gpu - cpu|| / ||cpu|| and, eight times looser, each element beside |cpu| + rms(cpu).
inline void ExpectWithin(const Tensor& gpu, const Tensor& cpu, double tolerance) {
  ASSERT_EQ(gpu.shape(), cpu.shape());
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  EXPECT_LE(RelativeError(a, b), tolerance) << gpu.DebugString();
  double squares = 0;
  for (const double x : b) squares += x * x;
  const double rms = b.empty() ? 0 : std::sqrt(squares / static_cast<double>(b.size()));
  for (size_t i = 0; i < b.size(); ++i) {
    if (std::abs(a[i] - b[i]) <= 8 * tolerance * (std::abs(b[i]) + rms)) continue;
    ADD_FAILURE() << gpu.DebugString() << " element " << i << " is " << a[i] << ", expected "
                  << b[i] << " (rms " << rms << ")";
    return;
  }
}

}  // namespace baleen::testing
