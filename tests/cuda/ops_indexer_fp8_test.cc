// The indexer's FP8 path on the GPU: codes and scales with the bits of the definition, and the
// scores of codes against the definition in fp64.
//
// Tolerance of the scores. Products of E4M3 numbers are exact; the tensor cores add 32 of them and
// the running sum at once, aligned to the largest and cut off 13 bits below its point. With M the
// largest of a sum's 128 products and of its partial sums, each of the products loses at most
// min(|product|, 2^-13 M), each of the four partial sums 2^-13 M. Cut-offs do not line up, so the
// L2 error is far below: 2^-11 is asked for.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>

#include "kernels/ops/indexer/fp8_simulate.h"
#include "tests/cuda/indexer_support.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/cuda and tests/support

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;
constexpr int64_t kWidth = 128;

Fp8Codes OnHost(const Fp8Codes& codes) {
  return {testing::OnHost(codes.codes), testing::OnHost(codes.scales)};
}
// For the definition in fp64.
Fp8Codes InDoubles(const Fp8Codes& codes) {
  const Fp8Codes host = OnHost(codes);
  return {host.codes, Cast(Cpu(), host.scales, kF64)};
}
std::vector<double> ValuesOf(const Fp8Codes& quantised) {
  const Fp8Codes host = InDoubles(quantised);
  const int64_t group = host.codes.num_elements() / host.scales.num_elements();
  std::vector<double> values;
  for (int64_t i = 0; i < host.codes.num_elements(); ++i) {
    values.push_back(double{host.codes.data<Float8E4M3>()[i].ToFloat()} *
                     host.scales.data<double>()[i / group]);
  }
  return values;
}
void ExpectSameCodes(const Fp8Codes& gpu, const Fp8Codes& host) {
  ExpectSameBits(gpu.codes, host.codes);
  ExpectSameBits(gpu.scales, host.scales);
}

TEST(CudaQuantiseFp8, HasTheBitsOfTheDefinition) {
  for (const int64_t group : {1, 4, 24, 32, 128, 256, 1024}) {
    for (const double scale : {1e-6, 1.0, 300.0, 1e6}) {
      SCOPED_TRACE(::testing::Message() << group << " of " << scale);
      const Tensor f32 = RandomTensor(Cpu(), kF32, {13, group * 2}, 1, scale);
      ExpectSameCodes(QuantiseFp8(Gpu(), OnGpu(f32), group), QuantiseFp8(Cpu(), f32, group));
      const Tensor bf16 = Cast(Cpu(), f32, kBF16);
      const Fp8Codes expected = QuantiseFp8(Cpu(), Cast(Cpu(), bf16, kF32), group);
      ExpectSameCodes(QuantiseFp8(Gpu(), OnGpu(bf16), group), expected);
      ExpectSameCodes(QuantiseFp8(Gpu(), Misaligned(OnGpu(bf16)), group), expected);
    }
  }
  EXPECT_EQ(QuantiseFp8(Gpu(), Gpu().Empty(kBF16, {0, 128}), 128).scales.shape(), (Shape{0, 1}));
}

TEST(CudaQuantiseFp8, GivesBackWhatSimulateFp8Rounded) {
  const OnBoth x = RandomOnBoth(kBF16, {700, 2, kWidth}, 3, 5.0);
  const Tensor rounded = SimulateFp8(Gpu(), x.gpu, kWidth);
  EXPECT_EQ(ValuesOf(QuantiseFp8(Gpu(), rounded, kWidth)), ToDoubles(testing::OnHost(rounded)));
}

// --- Scores.

const std::vector<IndexerShape>& Shapes() {
  static const std::vector<IndexerShape> shapes = {
      {kBF16, 70, 170, 64, kWidth, 48, 1, 8}, {kBF16, 45, 100, 32, kWidth, 40, 1, 8},
      {kBF16, 1, 3, 64, kWidth, 2, 1, 8},     {kBF16, 1, 1, 32, kWidth, 1, 1, 8},
      {kBF16, 66, 66, 32, kWidth, 9, 1, 8},   {kBF16, 3, 1003, 64, kWidth, 200, 1, 8},
      {kBF16, 9, 64, 64, kWidth, 8, 1, 8},    {kBF16, 8, 129, 32, kWidth, 8, 1, 8},
  };
  return shapes;
}

struct Fp8Case {
  explicit Fp8Case(const IndexerShape& shape)
      : base(shape),
        q(QuantiseFp8(Gpu(), base.q.gpu, kWidth)),
        k(QuantiseFp8(Gpu(), base.k.gpu, kWidth)) {}
  Tensor Scores() const {
    return testing::OnHost(IndexerScoresFp8(Gpu(), q, k, base.w.gpu, base.windows_gpu));
  }
  bool Inside(int64_t t, int64_t s) const {
    return s >= base.windows_cpu.begin_T.data<int32_t>()[t] &&
           s < base.windows_cpu.end_T.data<int32_t>()[t];
  }
  IndexerCase base;
  Fp8Codes q, k;
};

// What the cut-offs of one sum of 128 products may add up to.
double CutOff(const double* q, const double* k) {
  double sum = 0, largest = 0;
  for (int64_t i = 0; i < kWidth; ++i) {
    sum += q[i] * k[i];
    largest = std::max({largest, std::fabs(q[i] * k[i]), i % 32 == 31 ? std::fabs(sum) : 0});
  }
  const double unit = 0x1p-13 * largest;
  double error = 4 * unit;
  for (int64_t i = 0; i < kWidth; ++i) error += std::min(std::fabs(q[i] * k[i]), unit);
  return error;
}

TEST(CudaIndexerScoresFp8, AreTheDefinitionsWithinTheTensorCoresRounding) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const Fp8Case c(shape);
    const std::vector<double> gpu = ToDoubles(c.Scores());
    const std::vector<double> cpu = ToDoubles(
        IndexerScoresFp8(Cpu(), InDoubles(c.q), InDoubles(c.k), c.base.w.cpu, c.base.windows_cpu));
    const std::vector<double> q = ValuesOf(c.q), k = ValuesOf(c.k), w = ToDoubles(c.base.w.cpu);
    std::vector<double> found, expected;
    for (int64_t t = 0; t < shape.T; ++t) {
      for (int64_t s = 0; s < shape.S; ++s) {
        if (!c.Inside(t, s)) continue;
        double bound = 0, weights = 0;
        for (int64_t j = 0; j < shape.I; ++j) {
          const double weight = std::fabs(w[t * shape.I + j]);
          bound += weight * CutOff(&q[(t * shape.I + j) * kWidth], &k[s * kWidth]);
          weights += weight;
        }
        // The sum over heads is fp32.
        bound += 0x1p-24 * static_cast<double>(shape.I) * weights * 4 * std::sqrt(kWidth);
        const int64_t i = t * shape.S + s;
        ASSERT_LE(std::fabs(gpu[i] - cpu[i]), bound) << "row " << t << ", key " << s;
        found.push_back(gpu[i]);
        expected.push_back(cpu[i]);
      }
    }
    EXPECT_LE(RelativeError(found, expected), 0x1p-11);
  }
}

TEST(CudaIndexerScoresFp8, AreExactWhereNothingIsCutOff) {
  // Values -1, 0, 1: sums of up to 128, and weights of a few bits.
  const int64_t T = 19, S = 300, I = 64;
  const auto ternary = [](const Shape& shape, uint64_t seed) {
    const Tensor x = RandomTensor(Cpu(), kF32, shape, seed);
    for (int64_t i = 0; i < x.num_elements(); ++i) {
      float& value = x.data<float>()[i];
      value = value > 0.5f ? 1.0f : value < -0.5f ? -1.0f : 0.0f;
    }
    return x;
  };
  const Tensor q = ternary({T, I, kWidth}, 1), k = ternary({S, kWidth}, 2);
  const Tensor w = RandomTensor(Cpu(), kF32, {T, I}, 3);
  for (int64_t i = 0; i < w.num_elements(); ++i)
    w.data<float>()[i] = std::round(16 * w.data<float>()[i]) / 16;
  const Fp8Codes q_codes = QuantiseFp8(Cpu(), q, kWidth), k_codes = QuantiseFp8(Cpu(), k, kWidth);
  const KeyWindows cpu = {IntTensorOf(Cpu(), {T}, std::vector<int32_t>(T, 0)),
                          IntTensorOf(Cpu(), {T}, std::vector<int32_t>(T, S)),
                          {},
                          {}};
  const KeyWindows gpu = {OnGpu(cpu.begin_T), OnGpu(cpu.end_T), {}, {}};
  const auto on_gpu = [](const Fp8Codes& x) { return Fp8Codes{OnGpu(x.codes), OnGpu(x.scales)}; };
  ExpectSameBits(IndexerScoresFp8(Gpu(), on_gpu(q_codes), on_gpu(k_codes), OnGpu(w), gpu),
                 IndexerScoresFp8(Cpu(), q_codes, k_codes, w, cpu));
}

TEST(CudaIndexerScoresFp8, HaveTheSameBitsAgainAndFromRoundedValues) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const Fp8Case c(shape);
    Fp8Case again = c;
    again.q = QuantiseFp8(Gpu(), SimulateFp8(Gpu(), c.base.q.gpu, kWidth), kWidth);
    again.k = QuantiseFp8(Gpu(), SimulateFp8(Gpu(), c.base.k.gpu, kWidth), kWidth);
    const std::vector<double> first = ToDoubles(c.Scores()), second = ToDoubles(c.Scores()),
                              rounded = ToDoubles(again.Scores());
    for (int64_t i = 0; i < shape.T * shape.S; ++i) {
      if (!c.Inside(i / shape.S, i % shape.S)) continue;
      ASSERT_EQ(first[i], second[i]) << i;
      ASSERT_EQ(first[i], rounded[i]) << i;
    }
  }
}

// Scores differ by 2^-12 of their size or so: two kernels' choices differ in keys whose scores lie
// that near the smallest chosen one.
TEST(CudaIndexerScoresFp8, ChooseTheKeysOfTheRoundedValues) {
  const IndexerShape& shape = Shapes()[5];
  const Fp8Case c(shape);
  const TopkResult codes =
      TopkSelect(Gpu(), IndexerScoresFp8(Gpu(), c.q, c.k, c.base.w.gpu, c.base.windows_gpu),
                 c.base.windows_gpu, 10);
  const TopkResult values = TopkSelect(
      Gpu(),
      IndexerScores(Gpu(), SimulateFp8(Gpu(), c.base.q.gpu, kWidth),
                    SimulateFp8(Gpu(), c.base.k.gpu, kWidth), c.base.w.gpu, c.base.windows_gpu),
      c.base.windows_gpu, 10, ChosenScores::kKeep);
  const Tensor ids = testing::OnHost(codes.ids_TK), expected = testing::OnHost(values.ids_TK);
  int64_t same = 0, chosen = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    const int32_t* const row = ids.data<int32_t>() + t * 10;
    for (int64_t i = 0; i < 10; ++i) {
      const int32_t id = expected.data<int32_t>()[t * 10 + i];
      if (id < 0) continue;
      ++chosen;
      same += std::find(row, row + 10, id) != row + 10;
    }
  }
  ASSERT_GE(chosen, 20);
  EXPECT_GE(same, chosen - 1);
}

TEST(CudaIndexerScoresFp8, DoNotDependOnTheChunkOfRows) {
  const IndexerShape& shape = Shapes()[0];
  const Fp8Case c(shape);
  const std::vector<double> whole = ToDoubles(c.Scores());
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 1}, {1, 7}, {7, 70}}) {
    const Fp8Codes q = {c.q.codes.Rows(begin, end), c.q.scales.Rows(begin, end)};
    const std::vector<double> rows =
        ToDoubles(testing::OnHost(IndexerScoresFp8(Gpu(), q, c.k, c.base.w.gpu.Rows(begin, end),
                                                   {c.base.windows_gpu.begin_T.Rows(begin, end),
                                                    c.base.windows_gpu.end_T.Rows(begin, end),
                                                    {},
                                                    {}})));
    for (int64_t i = 0; i < (end - begin) * shape.S; ++i) {
      const int64_t t = begin + i / shape.S, s = i % shape.S;
      if (c.Inside(t, s)) ASSERT_EQ(rows[i], whole[t * shape.S + s]) << t << ", " << s;
    }
  }
}

TEST(CudaIndexerScoresFp8, NotANumberReachesTheSelection) {
  for (const float bad : {std::nanf(""), INFINITY}) {
    for (const bool in_query : {true, false}) {
      SCOPED_TRACE(::testing::Message() << bad << (in_query ? " in a query" : " in a key"));
      Fp8Case c(Shapes()[0]);
      const Tensor x = testing::OnHost(in_query ? c.base.q.gpu : c.base.k.gpu);
      // Of row 27, or of key 0, which row 0 sees first where its document begins there.
      const int64_t first_key = c.base.windows_cpu.begin_T.data<int32_t>()[27];
      x.data<BFloat16>()[in_query ? 27 * 64 * kWidth + 1 : first_key * kWidth + 5] =
          BFloat16::FromFloat(bad);
      (in_query ? c.q : c.k) = QuantiseFp8(Gpu(), OnGpu(x), kWidth);
      const Tensor scores = IndexerScoresFp8(Gpu(), c.q, c.k, c.base.w.gpu, c.base.windows_gpu);
      const TopkResult result = TopkSelect(Gpu(), scores, c.base.windows_gpu, 48);
      const int row = static_cast<int>(ToDoubles(testing::OnHost(result.nan_row_1))[0]);
      if (in_query) {
        EXPECT_EQ(row, 27);
      } else {
        EXPECT_TRUE(row >= 0 && c.Inside(row, first_key)) << row;
        EXPECT_TRUE(row == 0 || !c.Inside(row - 1, first_key)) << row;
      }
    }
  }
}

TEST(CudaIndexerScoresFp8DeathTest, RefusesShapesWithoutAKernel) {
  const KeyWindows windows = {
      OnGpu(IntTensorOf(Cpu(), {2}, {0, 0})), OnGpu(IntTensorOf(Cpu(), {2}, {3, 3})), {}, {}};
  for (const auto& [heads, width] : {std::pair<int64_t, int64_t>{16, 128}, {64, 64}}) {
    const Fp8Codes q = QuantiseFp8(Gpu(), Gpu().Zeros(kBF16, {2, heads, width}), width),
                   k = QuantiseFp8(Gpu(), Gpu().Zeros(kBF16, {3, width}), width);
    const Tensor w = Gpu().Zeros(kF32, {2, heads});
    EXPECT_DEATH(IndexerScoresFp8(Gpu(), q, k, w, windows),
                 "the CUDA kernel takes 64 or 32 heads of width 128, not F8_E4M3\\[2, ");
  }
}

}  // namespace
}  // namespace baleen
