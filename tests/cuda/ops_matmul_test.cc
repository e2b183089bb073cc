// Matmul and the products of a linear layer on the GPU against the CPU definition in fp64, for each
// dtype, transpose, stride and batch.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/core/transfer.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/linear/matmul_choices_cuda.h"
#include "tests/cuda/operand_pair.h"

namespace baleen {
namespace {

using testing::ErrorOf;
using testing::Gpu;
using testing::OnHost;
using testing::OperandPair;
using testing::ProductTolerance;
using testing::RandomPair;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;

struct Dtypes {
  DType operands, result;
};
constexpr Dtypes kDtypes[] = {
    {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}, {DType::kF32, DType::kF32}};

// How a matrix lies in its tensor.
enum class Placing { kDense, kGaps, kPerHead };

struct PlacedPair {
  OperandPair tensors;
  MatrixView host, gpu;
};

MatrixView Place(const Tensor& tensor, Placing placing, int64_t batch, int64_t rows, int64_t cols) {
  if (placing == Placing::kPerHead) return PerHead(tensor.Reshaped({rows, batch, cols}));
  const int64_t gap = placing == Placing::kGaps ? 3 : 0;
  MatrixView view;
  view.tensor = tensor;
  view.offset = gap;
  view.batch = batch;
  view.rows = rows;
  view.cols = cols;
  view.row_stride = cols + gap;
  view.batch_stride = rows * view.row_stride + gap;
  return view;
}

PlacedPair RandomMatrix(DType dtype, Placing placing, int64_t batch, int64_t rows, int64_t cols,
                        uint64_t seed) {
  const int64_t gap = placing == Placing::kGaps ? 3 : 0;
  const int64_t elements = gap + batch * (rows * (cols + gap) + gap);
  PlacedPair pair;
  pair.tensors = RandomPair(dtype, {elements}, seed);
  pair.host = Place(pair.tensors.host, placing, batch, rows, cols);
  pair.gpu = Place(pair.tensors.gpu, placing, batch, rows, cols);
  return pair;
}

struct Case {
  int64_t batch, m, n, k;
  Placing placing;
  Accumulate accumulate;
  double alpha;
  bool one_b;  // serves the whole batch
};

void ExpectDefinition(const Case& c, Dtypes dtypes, Transpose ta, Transpose tb) {
  const bool a_turned = ta == Transpose::kYes, b_turned = tb == Transpose::kYes;
  const PlacedPair a = RandomMatrix(dtypes.operands, c.placing, c.batch, a_turned ? c.k : c.m,
                                    a_turned ? c.m : c.k, 1);
  const PlacedPair b = RandomMatrix(dtypes.operands, c.placing, c.one_b ? 1 : c.batch,
                                    b_turned ? c.n : c.k, b_turned ? c.k : c.n, 2);
  const PlacedPair result = RandomMatrix(dtypes.result, c.placing, c.batch, c.m, c.n, 3);
  Matmul(Context::Cpu(), a.host, ta, b.host, tb, result.host, c.accumulate, c.alpha);
  Matmul(Gpu(), a.gpu, ta, b.gpu, tb, result.gpu, c.accumulate, c.alpha);
  // The whole tensor is compared: gaps between rows and matrices must keep what they held.
  const Tensor out = OnHost(result.tensors.gpu);
  const double error = testing::RelativeError(ToDoubles(out), ToDoubles(result.tensors.host));
  EXPECT_LT(error, ProductTolerance(dtypes.operands, dtypes.result, c.k))
      << DTypeName(dtypes.operands) << " -> " << DTypeName(dtypes.result) << ", batch " << c.batch
      << ", " << c.m << " x " << c.n << " x " << c.k << ", transposed " << a_turned << b_turned;
}

TEST(CudaMatmul, AgreesWithTheDefinitionForEveryTransposeStrideAndBatch) {
  constexpr Accumulate kAdd = Accumulate::kAdd, kOverwrite = Accumulate::kOverwrite;
  const std::vector<Case> cases = {
      {1, 64, 128, 96, Placing::kDense, kOverwrite, 1.0, false},
      {1, 33, 17, 75, Placing::kDense, kAdd, 1.0, false},
      {3, 20, 31, 13, Placing::kGaps, kAdd, 0.5, false},
      {4, 50, 64, 48, Placing::kPerHead, kOverwrite, 0.125, false},
      {5, 24, 40, 32, Placing::kDense, kOverwrite, 1.0, true},
      {1, 1, 1, 1, Placing::kDense, kAdd, 2.0, false},
  };
  for (const Dtypes dtypes : kDtypes) {
    for (const Case& c : cases) {
      for (const Transpose ta : {Transpose::kNo, Transpose::kYes}) {
        for (const Transpose tb : {Transpose::kNo, Transpose::kYes}) {
          ExpectDefinition(c, dtypes, ta, tb);
        }
      }
    }
  }
}

TEST(CudaMatmul, TakesAnEmptySumForZeroAndLeavesAnEmptyResultAlone) {
  for (const Dtypes dtypes : kDtypes) {
    for (const Accumulate accumulate : {Accumulate::kOverwrite, Accumulate::kAdd}) {
      const PlacedPair a = RandomMatrix(dtypes.operands, Placing::kGaps, 2, 3, 0, 1);
      const PlacedPair b = RandomMatrix(dtypes.operands, Placing::kGaps, 2, 0, 5, 2);
      const PlacedPair c = RandomMatrix(dtypes.result, Placing::kGaps, 2, 3, 5, 3);
      Matmul(Context::Cpu(), a.host, Transpose::kNo, b.host, Transpose::kNo, c.host, accumulate);
      Matmul(Gpu(), a.gpu, Transpose::kNo, b.gpu, Transpose::kNo, c.gpu, accumulate);
      EXPECT_EQ(ToDoubles(OnHost(c.tensors.gpu)), ToDoubles(c.tensors.host));
    }
    const Tensor none = Gpu().Empty(dtypes.operands, {0, 4});
    EXPECT_EQ(Linear(Gpu(), none, Gpu().Zeros(dtypes.operands, {6, 4})).shape(), (Shape{0, 6}));
  }
}

TEST(CudaMatmul, MultipliesFp32WithoutRoundingItToTf32) {
  // 1 + 2^-20 would be 1 with TF32's 10 bits after the point.
  const Context host = Context::Cpu();
  const Tensor x =
      testing::TensorOf(host, DType::kF32, {64, 64}, std::vector<double>(64 * 64, 1.0 + 0x1p-20));
  const Tensor y = OnHost(Linear(Gpu(), testing::OnGpu(x), testing::OnGpu(x)));
  for (const double value : ToDoubles(y)) EXPECT_NEAR(value, 64 * (1 + 0x1p-19), 64 * 0x1p-22);
}

TEST(CudaLinear, HasTheResultAndTheGradientsOfTheDefinition) {
  const Context host = Context::Cpu();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const OperandPair x = RandomPair(dtype, {2, 37, 72}, 1),
                      weight = RandomPair(dtype, {56, 72}, 2),
                      dy = RandomPair(dtype, {2, 37, 56}, 3);
    const OperandPair dweight = RandomPair(DType::kF32, {56, 72}, 4);
    const Tensor y = Linear(Gpu(), x.gpu, weight.gpu);
    EXPECT_EQ(y.shape(), (Shape{2, 37, 56}));
    EXPECT_LT(ErrorOf(y, Linear(host, x.host, weight.host)), ProductTolerance(dtype, dtype, 72));
    EXPECT_LT(ErrorOf(LinearBackwardInput(Gpu(), dy.gpu, weight.gpu),
                      LinearBackwardInput(host, dy.host, weight.host)),
              ProductTolerance(dtype, dtype, 56));
    LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, dweight.gpu);
    LinearBackwardWeight(host, dy.host, x.host, dweight.host);
    EXPECT_LT(ErrorOf(dweight.gpu, dweight.host), ProductTolerance(dtype, DType::kF32, 74));
  }
}

TEST(CudaLinear, WritesAGradientOverWhateverWasThere) {
  for (const int64_t rows : {0, 74}) {
    const OperandPair x = RandomPair(DType::kBF16, {rows, 72}, 1),
                      dy = RandomPair(DType::kBF16, {rows, 56}, 2);
    const Tensor added = Gpu().Zeros(DType::kF32, {56, 72});
    const Tensor written = CopyToDevice(
        Gpu(), TensorOf(Context::Cpu(), DType::kF32, {56, 72}, std::vector<double>(56 * 72, NAN)));
    LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, added);
    LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, written, Accumulate::kOverwrite);
    EXPECT_LT(ErrorOf(written, OnHost(added)), 1e-6) << rows;
  }
}

TEST(CudaLinear, GivesTheSameBitsTwiceEvenWhereSplittingTheSumPays) {
  // Few outputs, a long sum: where kernels that split K would be chosen.
  const OperandPair dy = RandomPair(DType::kBF16, {20000, 48}, 1),
                    x = RandomPair(DType::kBF16, {20000, 64}, 2);
  const Tensor first = Gpu().Zeros(DType::kF32, {48, 64}),
               second = Gpu().Zeros(DType::kF32, {48, 64});
  LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, first);
  LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, second);
  EXPECT_TRUE(SameBits(OnHost(first), OnHost(second)));
  const Context host = Context::Cpu();
  const Tensor expected = host.Zeros(DType::kF64, {48, 64});
  LinearBackwardWeight(host, dy.host, x.host, expected);
  EXPECT_LT(ErrorOf(first, expected), ProductTolerance(DType::kBF16, DType::kF32, 20000));
}

// --- Shapes of the table of measured kernels ----------------------------------------------------

constexpr int64_t kTableRows = 4096;  // as few as the table takes

TEST(CudaLinear, FindsEveryMeasuredKernelInTheLibraryAtHand) {
  for (const MatmulTableRow& row : kMatmulTable) {
    ::testing::internal::CaptureStderr();
    if (row.pass == MatmulPass::kWeight) {
      const Tensor dy = Gpu().Zeros(DType::kBF16, {kTableRows, row.k});
      const Tensor x = Gpu().Zeros(DType::kBF16, {kTableRows, row.n});
      LinearBackwardWeight(Gpu(), dy, x, Gpu().Empty(DType::kF32, {row.k, row.n}),
                           Accumulate::kOverwrite);
    } else {
      const Tensor x = Gpu().Zeros(DType::kBF16, {kTableRows, row.k});
      const bool forward = row.pass == MatmulPass::kForward;
      const Tensor weight =
          Gpu().Zeros(DType::kBF16, forward ? Shape{row.n, row.k} : Shape{row.k, row.n});
      forward ? Linear(Gpu(), x, weight) : LinearBackwardInput(Gpu(), x, weight);
    }
    EXPECT_EQ(::testing::internal::GetCapturedStderr(), "") << row.n << " " << row.k;
  }
}

TEST(CudaLinear, HasTheResultsOfFewerRowsFromMeasuredKernels) {
  const Tensor values = RandomPair(DType::kBF16, {kTableRows * 7168}, 1).gpu;
  const auto matrix = [&](int64_t rows, int64_t cols) {
    return values.Rows(0, rows * cols).Reshaped({rows, cols});
  };
  const int64_t half = kTableRows / 2, first = half - 300, last = half - 100;
  // down_proj of a shared expert forward, kv_a_proj's two gradients.
  const Tensor x = matrix(kTableRows, 2048), down = matrix(7168, 2048);
  EXPECT_LT(ErrorOf(Linear(Gpu(), x, down).Rows(first, last),
                    OnHost(Linear(Gpu(), x.Rows(0, half), down).Rows(first, last))),
            ProductTolerance(DType::kBF16, DType::kBF16, 2048));
  const Tensor dy = matrix(kTableRows, 576), kv_a = matrix(576, 7168);
  EXPECT_LT(ErrorOf(LinearBackwardInput(Gpu(), dy, kv_a).Rows(first, last),
                    OnHost(LinearBackwardInput(Gpu(), dy.Rows(0, half), kv_a).Rows(first, last))),
            ProductTolerance(DType::kBF16, DType::kBF16, 576));
  const Tensor wide = matrix(kTableRows, 7168);
  const Tensor once = Gpu().Zeros(DType::kF32, {576, 7168}),
               halves = Gpu().Zeros(DType::kF32, {576, 7168});
  for (const int repeat : {0, 1}) {  // overwrites, then adds
    const Accumulate accumulate = repeat == 0 ? Accumulate::kOverwrite : Accumulate::kAdd;
    LinearBackwardWeight(Gpu(), dy, wide, once, accumulate);
    LinearBackwardWeight(Gpu(), dy.Rows(0, half), wide.Rows(0, half), halves, accumulate);
    LinearBackwardWeight(Gpu(), dy.Rows(half, kTableRows), wide.Rows(half, kTableRows), halves);
    EXPECT_LT(ErrorOf(once, OnHost(halves)),
              ProductTolerance(DType::kBF16, DType::kF32, kTableRows));
  }
}

TEST(CudaMatmulDeathTest, RefusesDtypesThatNoKernelTakes) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto multiply = [](DType operands, DType result) {
    const MatrixView a = AsMatrix(Gpu().Empty(operands, {4, 4}));
    Matmul(Gpu(), a, Transpose::kNo, a, Transpose::kNo, AsMatrix(Gpu().Empty(result, {4, 4})));
  };
  EXPECT_DEATH(multiply(DType::kF64, DType::kF64), "A is F64\\[4, 4\\], the CUDA kernels take");
  EXPECT_DEATH(multiply(DType::kF32, DType::kBF16), "dtypes A F32, B F32, C BF16");
}

}  // namespace
}  // namespace baleen
