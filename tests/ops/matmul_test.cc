// Matmul against the plain loop for every transpose, stride, batch and instruction set; its order
// of summation.
#include "kernels/ops/linear/matmul.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/linear/matmul_cpu.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::GradientError;
using testing::RandomTensor;
using testing::RelativeError;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;

double At(const Tensor& tensor, int64_t index) {
  return tensor.dtype() == DType::kF64 ? tensor.data<double>()[index] : tensor.data<float>()[index];
}

double At(const MatrixView& view, int64_t batch, int64_t r, int64_t c, Transpose transpose) {
  if (transpose == Transpose::kYes) std::swap(r, c);
  const int64_t matrix = view.batch == 1 ? 0 : batch;
  return At(view.tensor, view.offset + matrix * view.batch_stride + r * view.row_stride + c);
}

// The definition: every element of C as one sum over k, in double; flat [batch, M, N].
std::vector<double> MatmulPlain(const MatrixView& a, Transpose ta, const MatrixView& b,
                                Transpose tb, const MatrixView& c_before, Accumulate accumulate,
                                double alpha) {
  const int64_t depth = ta == Transpose::kYes ? a.rows : a.cols;
  std::vector<double> result;
  for (int64_t batch = 0; batch < c_before.batch; ++batch) {
    for (int64_t i = 0; i < c_before.rows; ++i) {
      for (int64_t j = 0; j < c_before.cols; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += At(a, batch, i, k, ta) * At(b, batch, k, j, tb);
        result.push_back(alpha * sum + (accumulate == Accumulate::kAdd
                                            ? At(c_before, batch, i, j, Transpose::kNo)
                                            : 0));
      }
    }
  }
  return result;
}

std::vector<double> Values(const MatrixView& view) {
  std::vector<double> values;
  for (int64_t batch = 0; batch < view.batch; ++batch) {
    for (int64_t r = 0; r < view.rows; ++r) {
      for (int64_t c = 0; c < view.cols; ++c) {
        values.push_back(At(view, batch, r, c, Transpose::kNo));
      }
    }
  }
  return values;
}

// A sum of k products of unit normals has size sqrt(k) and an error below eps * sqrt(k) * sqrt(k) /
// 2, relative to its size eps * sqrt(k) / 2 in the norm; runs of 256 make it smaller still.
double Tolerance(DType dtype, int64_t k) {
  const double eps = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
  return eps * (4 + std::sqrt(static_cast<double>(k)));
}

// A view of `batch` matrices with gaps between columns, rows and matrices, and the elements of the
// gaps.
MatrixView Padded(const Context& context, DType dtype, int64_t batch, int64_t rows, int64_t cols,
                  uint64_t seed) {
  MatrixView view;
  view.batch = batch;
  view.rows = rows;
  view.cols = cols;
  view.offset = 3;
  view.row_stride = cols + 5;
  view.batch_stride = (rows + 1) * view.row_stride + 7;
  view.tensor = RandomTensor(context, dtype, {view.offset + batch * view.batch_stride}, seed);
  return view;
}

Tensor CloneOf(const Context& context, const Tensor& a) {
  return TensorOf(context, a.dtype(), a.shape(), ToDoubles(a));
}

TEST(Matmul, MultipliesThreeNumbersByHand) {
  const Context context = Context::Cpu();
  const Tensor a = TensorOf(context, DType::kF32, {1, 3}, {1, 2, 3});
  const Tensor b = TensorOf(context, DType::kF32, {3, 2}, {4, 5, 6, 7, 8, 9});
  const Tensor c = TensorOf(context, DType::kF32, {1, 2}, {100, 200});
  Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kNo, AsMatrix(c));
  EXPECT_EQ(ToDoubles(c), (std::vector<double>{40, 46}));
  Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kNo, AsMatrix(c),
         Accumulate::kAdd, 0.5);
  EXPECT_EQ(ToDoubles(c), (std::vector<double>{60, 69}));
}

struct Size {
  int64_t m, n, k;
};

TEST(Matmul, AgreesWithThePlainLoopForEveryTransposeStrideAndBatch) {
  const Context context = Context::Cpu();
  const Size sizes[] = {{1, 1, 1},    {1, 33, 7},   {3, 5, 2},     {8, 32, 64},    {13, 70, 257},
                        {64, 64, 64}, {17, 1, 300}, {5, 600, 513}, {130, 259, 40}, {31, 31, 256}};
  uint64_t seed = 1;
  for (const Size& size : sizes) {
    for (int variant = 0; variant < 32; ++variant) {
      const DType dtype = variant & 1 ? DType::kF64 : DType::kF32;
      const Transpose ta = variant & 2 ? Transpose::kYes : Transpose::kNo;
      const Transpose tb = variant & 4 ? Transpose::kYes : Transpose::kNo;
      const Accumulate accumulate = variant & 8 ? Accumulate::kAdd : Accumulate::kOverwrite;
      const int64_t batch = variant & 16 ? 2 : 1;
      const bool tall_a = ta == Transpose::kYes, tall_b = tb == Transpose::kYes;
      const MatrixView a =
          Padded(context, dtype, batch, tall_a ? size.k : size.m, tall_a ? size.m : size.k, ++seed);
      // A batch of one B serves all.
      const MatrixView b =
          Padded(context, dtype, 1, tall_b ? size.n : size.k, tall_b ? size.k : size.n, ++seed);
      const MatrixView c = Padded(context, dtype, batch, size.m, size.n, ++seed);
      const Tensor before = CloneOf(context, c.tensor);
      const std::vector<double> expected = MatmulPlain(a, ta, b, tb, c, accumulate, 0.75);
      Matmul(context, a, ta, b, tb, c, accumulate, 0.75);
      EXPECT_LT(RelativeError(Values(c), expected), Tolerance(dtype, size.k))
          << size.m << "x" << size.n << "x" << size.k << " variant " << variant;

      // Nothing outside the view changes.
      MatrixView old = c;
      old.tensor = before;
      for (int64_t i = 0; i < c.batch; ++i) {
        for (int64_t r = 0; r < c.rows; ++r) {
          for (int64_t col = 0; col < c.cols; ++col) {
            const int64_t at = c.offset + i * c.batch_stride + r * c.row_stride + col;
            if (dtype == DType::kF64) {
              c.tensor.data<double>()[at] = before.data<double>()[at];
            } else {
              c.tensor.data<float>()[at] = before.data<float>()[at];
            }
          }
        }
      }
      EXPECT_TRUE(SameBits(c.tensor, before)) << "wrote outside the view, variant " << variant;
    }
  }
}

template <typename T>
void CheckEveryInstructionSet() {
  const Context context = Context::Cpu();
  const DType dtype = DTypeOf<T>::value;
  for (const Size& size : {Size{1, 1, 1}, Size{7, 45, 300}, Size{23, 130, 19}}) {
    const Tensor a = RandomTensor(context, dtype, {size.m, size.k}, 1);
    const Tensor b = RandomTensor(context, dtype, {size.n, size.k}, 2);
    const Tensor c = context.Empty(dtype, {size.m, size.n});
    const std::vector<double> expected =
        MatmulPlain(AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kYes, AsMatrix(c),
                    Accumulate::kOverwrite, 1);
    for (const VectorIsa isa : SupportedVectorIsas()) {
      MatmulProblem<T> problem{1,
                               size.m,
                               size.n,
                               size.k,
                               {a.data<T>(), 0, size.k, 1},
                               {b.data<T>(), 0, 1, size.k},
                               {c.data<T>(), 0, size.n, 1},
                               1,
                               false};
      MatmulCpu(context, problem, isa);
      EXPECT_LT(RelativeError(ToDoubles(c), expected), Tolerance(dtype, size.k))
          << "instruction set " << static_cast<int>(isa);
    }
  }
}

TEST(Matmul, AgreesWithThePlainLoopOnEveryInstructionSet) {
  CheckEveryInstructionSet<float>();
  CheckEveryInstructionSet<double>();
}

// The bits of C[i, j] may not depend on which other rows (chunks of tokens, experts) or columns are
// in the call.
template <typename T>
void CheckRowAndColumnIndependence() {
  const Context context = Context::Cpu();
  const DType dtype = DTypeOf<T>::value;
  const int64_t m = 43, n = 77, k = 600;
  const Tensor a = RandomTensor(context, dtype, {m, k}, 1);
  const Tensor b = RandomTensor(context, dtype, {n, k}, 2);
  const Tensor start = RandomTensor(context, dtype, {m, n}, 3);
  const Tensor whole = CloneOf(context, start);
  Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kYes, AsMatrix(whole),
         Accumulate::kAdd, 0.7);
  for (int64_t chunk : {1, 2, 3, 4, 5, 8, 11, 40}) {
    const Tensor by_rows = CloneOf(context, start);
    for (int64_t i = 0; i < m; i += chunk) {
      const int64_t end = std::min(m, i + chunk);
      Matmul(context, AsMatrix(a).RowRange(i, end), Transpose::kNo, AsMatrix(b), Transpose::kYes,
             AsMatrix(by_rows).RowRange(i, end), Accumulate::kAdd, 0.7);
    }
    EXPECT_TRUE(SameBits(whole, by_rows)) << "rows in chunks of " << chunk;

    const Tensor by_columns = CloneOf(context, start);
    for (int64_t j = 0; j < n; j += chunk) {
      const int64_t count = std::min(chunk, n - j);
      Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b).RowRange(j, j + count),
             Transpose::kYes, AsMatrix(by_columns).Columns(j, count), Accumulate::kAdd, 0.7);
    }
    EXPECT_TRUE(SameBits(whole, by_columns)) << "columns in chunks of " << chunk;
  }
}

TEST(Matmul, GivesARowTheSameBitsWhateverOtherRowsAndColumnsAreInTheCall) {
  CheckRowAndColumnIndependence<float>();
  CheckRowAndColumnIndependence<double>();
}

TEST(Matmul, GivesTheSameBitsForBothStorageOrders) {
  const Context context = Context::Cpu();
  const int64_t m = 19, n = 35, k = 301;
  const Tensor a = RandomTensor(context, DType::kF32, {m, k}, 1);
  const Tensor b = RandomTensor(context, DType::kF32, {k, n}, 2);
  const Tensor a_t = context.Empty(DType::kF32, {k, m}), b_t = context.Empty(DType::kF32, {n, k});
  for (int64_t i = 0; i < m * k; ++i) {
    a_t.data<float>()[i % k * m + i / k] = a.data<float>()[i];
  }
  for (int64_t i = 0; i < k * n; ++i) {
    b_t.data<float>()[i % n * k + i / n] = b.data<float>()[i];
  }
  const Tensor plain = context.Empty(DType::kF32, {m, n}),
               transposed = context.Empty(DType::kF32, {m, n});
  Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kNo, AsMatrix(plain));
  Matmul(context, AsMatrix(a_t), Transpose::kYes, AsMatrix(b_t), Transpose::kYes,
         AsMatrix(transposed));
  EXPECT_TRUE(SameBits(plain, transposed));
}

TEST(Matmul, WorksOnHeadsAndColumnRangesWithoutCopies) {
  // scores[h] = q[:, h, 1:4] k[:, h, 1:4]^T of [T, H, W] tensors, written into [H, T, S].
  const Context context = Context::Cpu();
  const Tensor q_THW = RandomTensor(context, DType::kF64, {5, 3, 6}, 1);
  const Tensor k_SHW = RandomTensor(context, DType::kF64, {4, 3, 6}, 2);
  const Tensor scores_HTS = context.Zeros(DType::kF64, {3, 5, 4});
  Matmul(context, PerHead(q_THW).Columns(1, 3), Transpose::kNo, PerHead(k_SHW).Columns(1, 3),
         Transpose::kYes, AsBatch(scores_HTS));
  for (int64_t h = 0; h < 3; ++h) {
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t s = 0; s < 4; ++s) {
        double expected = 0;
        for (int64_t w = 1; w < 4; ++w) {
          expected += At(q_THW, (t * 3 + h) * 6 + w) * At(k_SHW, (s * 3 + h) * 6 + w);
        }
        EXPECT_NEAR(At(scores_HTS, (h * 5 + t) * 4 + s), expected, 1e-14);
      }
    }
  }
}

TEST(Matmul, LeavesOrZeroesCWhenThereIsNothingToSum) {
  const Context context = Context::Cpu();
  const Tensor a = context.Empty(DType::kF32, {2, 0}), b = context.Empty(DType::kF32, {3, 0});
  const Tensor c = TensorOf(context, DType::kF32, {2, 3}, {1, 2, 3, 4, 5, 6});
  MatrixView view_a = AsMatrix(a), view_b = AsMatrix(b);
  view_a.rows = 2;
  view_b.rows = 3;
  Matmul(context, view_a, Transpose::kNo, view_b, Transpose::kYes, AsMatrix(c), Accumulate::kAdd);
  EXPECT_EQ(ToDoubles(c), (std::vector<double>{1, 2, 3, 4, 5, 6}));
  Matmul(context, view_a, Transpose::kNo, view_b, Transpose::kYes, AsMatrix(c));
  EXPECT_EQ(ToDoubles(c), (std::vector<double>(6, 0.0)));
}

TEST(Matmul, CarriesNanAndInfinityToTheirOwnRowOnly) {
  const Context context = Context::Cpu();
  const Tensor a = TensorOf(context, DType::kF32, {3, 2}, {1, 1, NAN, 1, INFINITY, 1});
  const Tensor b = TensorOf(context, DType::kF32, {2, 1}, {2, 3});
  const Tensor c = context.Empty(DType::kF32, {3, 1});
  Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kNo, AsMatrix(c));
  EXPECT_EQ(c.data<float>()[0], 5.0f);
  EXPECT_TRUE(std::isnan(c.data<float>()[1]));
  EXPECT_TRUE(std::isinf(c.data<float>()[2]));
}

TEST(Linear, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor x = RandomTensor(context, DType::kF64, {2, 3, 5}, 1);
  const Tensor weight = RandomTensor(context, DType::kF64, {4, 5}, 2);
  const Tensor dy = RandomTensor(context, DType::kF64, {2, 3, 4}, 3);
  const auto loss = [&] {
    const Tensor y = Linear(context, x, weight);
    EXPECT_EQ(y.shape(), (Shape{2, 3, 4}));
    double sum = 0;
    for (int64_t i = 0; i < y.num_elements(); ++i) sum += At(y, i) * At(dy, i);
    return sum;
  };
  EXPECT_LT(GradientError(loss, x, LinearBackwardInput(context, dy, weight)), 1e-8);
  const Tensor dweight = context.Zeros(DType::kF64, {4, 5});
  LinearBackwardWeight(context, dy, x, dweight);
  EXPECT_LT(GradientError(loss, weight, dweight), 1e-8);

  // Parameter gradients are added to.
  const std::vector<double> once = ToDoubles(dweight);
  LinearBackwardWeight(context, dy, x, dweight);
  for (int64_t i = 0; i < dweight.num_elements(); ++i) EXPECT_EQ(At(dweight, i), 2 * once[i]);
  // Or written over.
  LinearBackwardWeight(context, dy, x, dweight, Accumulate::kOverwrite);
  EXPECT_EQ(ToDoubles(dweight), once);
}

TEST(Linear, TakesZeroRows) {
  const Context context = Context::Cpu();
  const Tensor x = context.Empty(DType::kF32, {0, 5}), weight = context.Zeros(DType::kF32, {4, 5});
  const Tensor y = Linear(context, x, weight);
  EXPECT_EQ(y.shape(), (Shape{0, 4}));
  const Tensor dweight = TensorOf(context, DType::kF32, {4, 5}, std::vector<double>(20, 1.5));
  LinearBackwardWeight(context, y, x, dweight);
  EXPECT_EQ(ToDoubles(dweight), std::vector<double>(20, 1.5));
  LinearBackwardWeight(context, y, x, dweight, Accumulate::kOverwrite);
  EXPECT_EQ(ToDoubles(dweight), std::vector<double>(20, 0.0));
}

TEST(MatmulDeathTest, NamesTheShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor a = context.Zeros(DType::kF32, {2, 3}), b = context.Zeros(DType::kF32, {4, 5});
  const Tensor c = context.Zeros(DType::kF32, {2, 5}), d = context.Zeros(DType::kF64, {3, 5});
  EXPECT_DEATH(
      Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kNo, AsMatrix(c)),
      "op\\(A\\) \\[2, 3\\] times op\\(B\\) \\[4, 5\\] is not C \\[2, 5\\]");
  EXPECT_DEATH(
      Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(d), Transpose::kNo, AsMatrix(c)),
      "dtypes A F32, B F64");
  EXPECT_DEATH(Linear(context, a, b), "x F32\\[2, 3\\], weight F32\\[4, 5\\]");
  MatrixView wild = AsMatrix(a);
  wild.offset = 1;
  EXPECT_DEATH(Matmul(context, wild, Transpose::kNo, AsMatrix(b).RowRange(0, 3), Transpose::kNo,
                      AsMatrix(c)),
               "matmul: view A of .* leaves F32\\[2, 3\\]");
}

}  // namespace
}  // namespace baleen
