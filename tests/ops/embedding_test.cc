// Embedding rows: whole tables, tables split over ranks, gradients.
#include "kernels/ops/embedding.h"

#include <gtest/gtest.h>

#include "kernels/ops/elementwise.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::GradientError;
using testing::IntTensorOf;
using testing::RandomTensor;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;
using Doubles = std::vector<double>;

TEST(Embedding, TakesRowsByIdAndZeroesForeignIds) {
  const Context context = Context::Cpu();
  const Tensor table = TensorOf(context, DType::kF32, {2, 2}, {1, 2, 3, 4});  // ids 10 and 11
  const Tensor ids = IntTensorOf(context, {5}, {11, 9, 10, 12, 11});
  EXPECT_EQ(ToDoubles(EmbeddingLookup(context, ids, table, 10)),
            (Doubles{3, 4, 0, 0, 1, 2, 0, 0, 3, 4}));
}

TEST(Embedding, AddsGradientsOfRepeatedIdsAndSkipsForeignOnes) {
  const Context context = Context::Cpu();
  const Tensor dtable = TensorOf(context, DType::kF32, {2, 2}, {100, 200, 300, 400});
  const Tensor ids = IntTensorOf(context, {4}, {11, 9, 12, 11});
  const Tensor dy = TensorOf(context, DType::kF32, {4, 2}, {1, 2, 5, 5, 6, 6, 10, 20});
  EmbeddingBackward(context, ids, dy, dtable, 10);
  EXPECT_EQ(ToDoubles(dtable), (Doubles{100, 200, 311, 422}));
}

TEST(Embedding, PartsOfASplitVocabularyAddUpToTheWhole) {
  const Context context = Context::Cpu();
  const int64_t W = 11, D = 5, T = 40;
  const Tensor table = RandomTensor(context, DType::kF32, {W, D}, 1);
  const Tensor dy = RandomTensor(context, DType::kF32, {T, D}, 2);
  std::vector<int32_t> values(T);
  for (int64_t t = 0; t < T; ++t) values[t] = static_cast<int32_t>(t * 7 % W);
  const Tensor ids = IntTensorOf(context, {T}, values);
  const Tensor dwhole = context.Zeros(DType::kF32, {W, D}),
               dsplit = context.Zeros(DType::kF32, {W, D});
  EmbeddingBackward(context, ids, dy, dwhole, 0);
  const Tensor sum = context.Zeros(DType::kF32, {T, D});
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 4}, {4, 5}, {5, 5}, {5, 11}}) {
    AddInPlace(context, sum, EmbeddingLookup(context, ids, table.Rows(begin, end), begin));
    EmbeddingBackward(context, ids, dy, dsplit.Rows(begin, end), begin);
  }
  EXPECT_TRUE(SameBits(sum, EmbeddingLookup(context, ids, table, 0)));
  EXPECT_TRUE(SameBits(dsplit, dwhole));
}

TEST(Embedding, HasTheGradientOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor table = RandomTensor(context, DType::kF64, {3, 4}, 1);
  const Tensor dy = RandomTensor(context, DType::kF64, {5, 4}, 2);
  const Tensor ids = IntTensorOf(context, {5}, {2, 0, 2, 7, 2});
  const auto loss = [&] {
    const Doubles y = ToDoubles(EmbeddingLookup(context, ids, table, 0));
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * ToDoubles(dy)[i];
    return sum;
  };
  const Tensor dtable = context.Zeros(DType::kF64, {3, 4});
  EmbeddingBackward(context, ids, dy, dtable, 0);
  EXPECT_LT(GradientError(loss, table, dtable), 1e-8);
}

TEST(Embedding, TakesNoTokens) {
  const Context context = Context::Cpu();
  const Tensor table = context.Zeros(DType::kF32, {3, 4}), ids = context.Empty(DType::kI32, {0});
  EXPECT_EQ(EmbeddingLookup(context, ids, table, 0).shape(), (Shape{0, 4}));
}

TEST(EmbeddingDeathTest, NamesTheTensorsThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor table = context.Zeros(DType::kF32, {3, 4}), floats = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(EmbeddingLookup(context, floats, table, 0),
               "ids is F32\\[2\\], expected I32\\[2\\]");
  EXPECT_DEATH(EmbeddingBackward(context, IntTensorOf(context, {2}, {0, 1}), table, table, 0),
               "dy is F32\\[3, 4\\], expected F32\\[2, 4\\]");
}

}  // namespace
}  // namespace baleen
