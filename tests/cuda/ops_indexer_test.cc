// The indexer's ops on the GPU against their definitions in fp64, on the kernels of the published
// shapes and on those for every shape.
//
// Tolerances. General kernels: fp32 throughout, so rounding errors of 2^-24 that do not line up
// (RelativeTolerance of ops_support.h; terms: products and keys of a sum). Tuned kernels: sums are
// fp32 too, but delta and w delta are rounded to bf16 (2^-9 each) as operands of the gradients'
// products: 2^-7 for dq, dw and dk.
#include <gmock/gmock.h>

#include <limits>

#include "kernels/ops/indexer/indexer_kernels.h"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "tests/cuda/indexer_support.h"
#include "tests/cuda/racecheck.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/cuda and tests/support

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;

// Tuned: 64 x 128 and 32 x 128 in bf16 (dense: 64 x 128 beside a main width of 192).
const std::vector<IndexerShape>& Shapes() {
  const int64_t heads = UnderRacecheck() ? 4 : 64;  // of fp32, whose kernel takes any number
  static const std::vector<IndexerShape> shapes = {
      {kBF16, 70, 170, 64, 128, 48, 3, 192}, {kBF16, 45, 100, 32, 128, 40, 2, 192},
      {kBF16, 50, 130, 4, 128, 32, 4, 160},  {kBF16, 50, 130, 4, 32, 16, 3, 24},
      {kBF16, 37, 37, 3, 20, 9, 2, 17},      {kF32, 40, 90, heads, 128, 33, 2, 192},
      {kF32, 50, 130, 4, 32, 70, 3, 24},     {kF32, 37, 37, 3, 20, 9, 1, 17},
      {kF32, 70, 150, 20, 70, 24, 2, 33},    {kF32, 1, 3, 1, 1, 2, 1, 1},
  };
  return shapes;
}

// The larger of two tolerances: rounding of operands, and of sums of `terms` terms.
double Tolerance(IndexerKernel kernel, DType result, int64_t terms) {
  return std::max(kernel == IndexerKernel::kTuned ? 0x1p-7 : 0.0, RelativeTolerance(result, terms));
}

// Scores inside the windows, 0 outside, where they are not defined.
std::vector<double> InsideWindows(const Tensor& scores_TS, const KeyWindows& windows) {
  std::vector<double> values = ToDoubles(scores_TS);
  const int64_t S = scores_TS.dim(1);
  for (int64_t i = 0; i < scores_TS.num_elements(); ++i) {
    const int64_t t = i / S, s = i % S;
    const bool inside =
        s >= windows.begin_T.data<int32_t>()[t] && s < windows.end_T.data<int32_t>()[t];
    if (!inside) values[i] = 0;
  }
  return values;
}

TEST(CudaIndexerScores, AreTheDefinitionsInsideTheWindows) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const auto on_gpu = [&] {
      const Tensor scores = IndexerScores(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.windows_gpu);
      CHECK(scores.dtype() == kF32) << scores.DebugString();
      return InsideWindows(OnHost(scores), c.windows_cpu);
    };
    const std::vector<double> cpu = InsideWindows(
        IndexerScores(Cpu(), c.q.cpu, c.k.cpu, c.w.cpu, c.windows_cpu), c.windows_cpu);
    // The tensor cores cut running sums off instead of rounding them: 2^-23 at each 16 products.
    const double tolerance = std::max(RelativeTolerance(kF32, shape.I * shape.J),
                                      0x1p-23 * (4 + static_cast<double>(shape.J) / 16));
    const std::vector<double> gpu = on_gpu();
    EXPECT_LE(RelativeError(gpu, cpu), tolerance);
    if (!UnderRacecheck()) EXPECT_EQ(on_gpu(), gpu);
  }
}

TEST(CudaIndexerScores, SelectTheDefinitionsKeys) {
  // The same fp32 scores on both sides: the reader stays inside the windows.
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const Tensor scores = IndexerScores(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.windows_gpu);
    const TopkResult gpu = TopkSelect(Gpu(), scores, c.windows_gpu, shape.K);
    const TopkResult cpu = TopkSelect(Cpu(), OnHost(scores), c.windows_cpu, shape.K);
    ExpectSameBits(gpu.ids_TK, cpu.ids_TK);
    ExpectSameBits(gpu.ties_T, cpu.ties_T);
    ExpectSameBits(gpu.nan_row_1, cpu.nan_row_1);
  }
}

TEST(CudaIndexerScores, NotANumberReachesTheSelection) {
  for (const IndexerShape& shape : Shapes()) {
    if (shape.T < 30) continue;
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const Tensor q = OnHost(c.q.gpu);
    const int64_t place = 27 * shape.I * shape.J + 1;  // of row 27
    if (shape.dtype == kF32) {
      q.data<float>()[place] = std::nanf("");
    } else {
      q.data<BFloat16>()[place] = BFloat16::FromFloat(std::nanf(""));
    }
    const Tensor scores = IndexerScores(Gpu(), OnGpu(q), c.k.gpu, c.w.gpu, c.windows_gpu);
    const TopkResult result = TopkSelect(Gpu(), scores, c.windows_gpu, shape.K);
    EXPECT_THAT(ToDoubles(OnHost(result.nan_row_1)), ::testing::ElementsAre(27));
  }
}

// --- Losses.

// dk starts at these values: the ops add.
OnBoth FirstDk(const IndexerShape& shape) {
  return RandomOnBoth(kF32, {shape.S, shape.J}, 99, 0.1);
}

// What was added to dk, which is smaller than what was there: errors count against the addition.
void ExpectAdded(const Tensor& dk_gpu, const Tensor& dk_cpu, const OnBoth& first,
                 double tolerance) {
  const std::vector<double> a = ToDoubles(OnHost(dk_gpu)), b = ToDoubles(dk_cpu),
                            base = ToDoubles(first.cpu);
  double error = 0, added = 0, held = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    added += (b[i] - base[i]) * (b[i] - base[i]);
    held += b[i] * b[i];
  }
  EXPECT_LE(std::sqrt(error), tolerance * std::sqrt(added) + 0x1p-23 * std::sqrt(held));
  EXPECT_TRUE(added > 0 || b.size() < 20);  // a single head may be closed
}

struct Outcome {
  IndexerLossResult result;
  Tensor dk;
};
template <typename Loss>
Outcome RunLoss(const Context& context, const Tensor& first_dk, Loss loss) {
  const Tensor dk = Clone(context, first_dk);
  return {loss(dk), dk};
}

void ExpectLoss(const IndexerShape& shape, IndexerKernel kernel, int64_t keys, const Outcome& gpu,
                const Outcome& cpu, const OnBoth& first_dk) {
  const int64_t terms = shape.J * keys * 4;
  ASSERT_EQ(gpu.result.loss_T.dtype(), kF32);
  ASSERT_EQ(gpu.result.dw_TI.dtype(), kF32);
  ASSERT_EQ(gpu.result.dq_TIJ.dtype(), shape.dtype);
  ExpectClose(gpu.result.loss_T, cpu.result.loss_T, terms);
  ExpectWithin(gpu.result.dw_TI, cpu.result.dw_TI, Tolerance(kernel, kF32, terms));
  ExpectWithin(gpu.result.dq_TIJ, cpu.result.dq_TIJ, Tolerance(kernel, shape.dtype, terms));
  ExpectAdded(gpu.dk, cpu.dk, first_dk, Tolerance(kernel, kF32, terms * shape.I));
}

void ExpectSameOutcome(const Outcome& a, const Outcome& b) {
  ExpectSameBits(a.result.loss_T, OnHost(b.result.loss_T));
  ExpectSameBits(a.result.dq_TIJ, OnHost(b.result.dq_TIJ));
  ExpectSameBits(a.result.dw_TI, OnHost(b.result.dw_TI));
  ExpectSameBits(a.dk, OnHost(b.dk));
}

TEST(CudaSparseIndexerLoss, GivesLossAndGradientsOfTheDefinition) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const OnBoth first_dk = FirstDk(shape);
    const auto on_gpu = [&](const Tensor& dk) {
      return SparseIndexerLoss(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.ids.gpu, c.target.gpu, 0.25, 3.0,
                               dk);
    };
    const Outcome gpu = RunLoss(Gpu(), first_dk.gpu, on_gpu);
    const Outcome cpu = RunLoss(Cpu(), first_dk.cpu, [&](const Tensor& dk) {
      return SparseIndexerLoss(Cpu(), c.q.cpu, c.k.cpu, c.w.cpu, c.ids.cpu, c.target.cpu, 0.25, 3.0,
                               dk);
    });
    ExpectLoss(shape, ChooseSparseIndexerLoss(shape.dtype, shape.I, shape.J, shape.K), shape.K, gpu,
               cpu, first_dk);
    ExpectSameOutcome(gpu, RunLoss(Gpu(), first_dk.gpu, on_gpu));
    if (shape.T <= 10) continue;
    // A row without keys.
    EXPECT_EQ(ToDoubles(OnHost(gpu.result.loss_T))[5], 0);
    EXPECT_THAT(ToDoubles(OnHost(gpu.result.dw_TI.Rows(5, 6))), ::testing::Each(0));
    EXPECT_THAT(ToDoubles(OnHost(gpu.result.dq_TIJ.Rows(5, 6))), ::testing::Each(0));
  }
}

TEST(CudaSparseIndexerLoss, TakesTheScoresItIsGiven) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const OnBoth first_dk = FirstDk(shape), scores = RandomOnBoth(kF32, {shape.T, shape.K}, 50);
    const Outcome gpu = RunLoss(Gpu(), first_dk.gpu, [&](const Tensor& dk) {
      return SparseIndexerLoss(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.ids.gpu, c.target.gpu, 0.25, 3.0,
                               dk, scores.gpu);
    });
    const Outcome cpu = RunLoss(Cpu(), first_dk.cpu, [&](const Tensor& dk) {
      return SparseIndexerLoss(Cpu(), c.q.cpu, c.k.cpu, c.w.cpu, c.ids.cpu, c.target.cpu, 0.25, 3.0,
                               dk, scores.cpu);
    });
    ExpectLoss(shape, ChooseSparseIndexerLoss(shape.dtype, shape.I, shape.J, shape.K), shape.K, gpu,
               cpu, first_dk);
  }
}

TEST(CudaDenseIndexerLoss, GivesLossAndGradientsOfTheDefinition) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const OnBoth first_dk = FirstDk(shape);
    const auto on_gpu = [&](const Tensor& dk) {
      return DenseIndexerLoss(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.target_gpu(), c.windows_gpu, 2.0,
                              64, dk);
    };
    const Outcome gpu = RunLoss(Gpu(), first_dk.gpu, on_gpu);
    const Outcome cpu = RunLoss(Cpu(), first_dk.cpu, [&](const Tensor& dk) {
      return DenseIndexerLoss(Cpu(), c.q.cpu, c.k.cpu, c.w.cpu, c.target_cpu(), c.windows_cpu, 2.0,
                              64, dk);
    });
    ExpectLoss(shape, ChooseDenseIndexerLoss(shape.dtype, shape.I, shape.J, shape.Q), shape.S, gpu,
               cpu, first_dk);
    ExpectSameOutcome(gpu, RunLoss(Gpu(), first_dk.gpu, on_gpu));
    if (shape.T <= 10) continue;
    EXPECT_EQ(ToDoubles(OnHost(gpu.result.loss_T))[10], 0);  // sees nothing
    EXPECT_THAT(ToDoubles(OnHost(gpu.result.dq_TIJ.Rows(10, 11))), ::testing::Each(0));
  }
}

TEST(CudaIndexerLoss, ClosesTheReluAtProductsOfZero) {
  // Queries of zero: no gradient to q, k or w, though delta is not zero.
  for (const IndexerShape& shape : {Shapes()[0], Shapes()[3], Shapes()[6]}) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    FillZero(Gpu(), c.q.gpu);
    const Tensor dk = Gpu().Zeros(kF32, {shape.S, shape.J});
    for (const IndexerLossResult& loss :
         {SparseIndexerLoss(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.ids.gpu, c.target.gpu, 0.25, 3.0,
                            dk),
          DenseIndexerLoss(Gpu(), c.q.gpu, c.k.gpu, c.w.gpu, c.target_gpu(), c.windows_gpu, 3.0, 64,
                           dk)}) {
      EXPECT_NE(ToDoubles(OnHost(loss.loss_T))[20], 0);
      EXPECT_THAT(ToDoubles(OnHost(loss.dq_TIJ)), ::testing::Each(0));
      EXPECT_THAT(ToDoubles(OnHost(loss.dw_TI)), ::testing::Each(0));
    }
    EXPECT_THAT(ToDoubles(OnHost(dk)), ::testing::Each(0));
  }
}

// --- Chunks of rows, on the kernels themselves: the ops' budgets would need millions of pairs.

struct Chunked {
  Chunked(const IndexerShape& shape, const IndexerCase& c, IndexerChunks chunks)
      : loss(Gpu().Empty(kF32, {shape.T})),
        dq(Gpu().Empty(shape.dtype, c.q.gpu.shape())),
        dw(Gpu().Empty(kF32, c.w.gpu.shape())),
        dk(Gpu().Zeros(kF32, c.k.gpu.shape())),
        workspace(MakeIndexerWorkspace(Gpu(), chunks.bytes)),
        args{.element = shape.dtype == kBF16 ? CudaElement::kBF16 : CudaElement::kF32,
             .T = shape.T,
             .S = shape.S,
             .I = shape.I,
             .J = shape.J,
             .q_TIJ = c.q.gpu.raw(),
             .k_SJ = c.k.gpu.raw(),
             .w_TI = c.w.gpu.data<float>(),
             .grad_scale = 2,
             .loss_T = loss.data<float>(),
             .dq_TIJ = dq.raw(),
             .dw_TI = dw.data<float>(),
             .dk_SJ = dk.data<float>(),
             .rows_per_chunk = chunks.rows,
             .workspace = workspace.begin,
             .workspace_bytes = chunks.bytes} {}
  Tensor loss, dq, dw, dk;
  IndexerWorkspace workspace;
  IndexerLossCudaArgs args;
};

// Rows are what they are in any chunk; sums over rows are rounded in another order.
void ExpectTheSame(const Chunked& whole, const Chunked& parts, double tolerance) {
  ExpectSameBits(parts.loss, OnHost(whole.loss));
  ExpectSameBits(parts.dq, OnHost(whole.dq));
  ExpectSameBits(parts.dw, OnHost(whole.dw));
  ExpectWithin(parts.dk, OnHost(whole.dk), tolerance);
}

TEST(CudaSparseIndexerLoss, DoesNotDependOnTheChunksOfRows) {
  for (const IndexerShape& shape : {Shapes()[0], Shapes()[1], Shapes()[3], Shapes()[8]}) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const IndexerChunks whole =
        PlanSparseIndexerChunks(shape.dtype, shape.T, shape.S, shape.I, shape.J, shape.K);
    const IndexerChunks parts =
        PlanSparseIndexerChunks(shape.dtype, 16, shape.S, shape.I, shape.J, shape.K);
    ASSERT_GE(whole.rows, shape.T);
    ASSERT_EQ(parts.rows, 16);
    const auto run = [&](const IndexerChunks& chunks) {
      Chunked chunked(shape, c, chunks);
      const SparseIndexerLossCudaArgs args = {.indexer = chunked.args,
                                              .K = shape.K,
                                              .ids_TK = c.ids.gpu.data<int32_t>(),
                                              .target_TK = c.target.gpu.data<float>(),
                                              .target_scale = 0.25f};
      ChooseSparseIndexerLoss(shape.dtype, shape.I, shape.J, shape.K) == IndexerKernel::kTuned
          ? SparseIndexerLossTunedCuda(args, Gpu().stream())
          : SparseIndexerLossCuda(args, Gpu().stream());
      return chunked;
    };
    ExpectTheSame(run(whole), run(parts), RelativeTolerance(kF32, shape.T * shape.I));
  }
}

TEST(CudaDenseIndexerLoss, DoesNotDependOnTheChunksOfRows) {
  const IndexerShape tuned = {kBF16, 600, 600, 64, 128, 8, 2, 192};
  for (const IndexerShape& shape : {tuned, Shapes()[3], Shapes()[8]}) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const bool is_tuned =
        ChooseDenseIndexerLoss(shape.dtype, shape.I, shape.J, shape.Q) == IndexerKernel::kTuned;
    const auto plan = [&](int64_t rows) {
      return PlanDenseIndexerChunks(shape.dtype, rows, shape.S, shape.I, shape.J, shape.Q);
    };
    const IndexerChunks whole = plan(shape.T), parts = plan(is_tuned ? 256 : 14);
    ASSERT_GE(whole.rows, shape.T);
    ASSERT_LT(parts.rows, shape.T);
    const auto run = [&](const IndexerChunks& chunks) {
      Chunked chunked(shape, c, chunks);
      const DenseTargetCudaArgs target = {.element = chunked.args.element,
                                          .T = shape.T,
                                          .S = shape.S,
                                          .H = shape.H,
                                          .Q = shape.Q,
                                          .q_THQ = c.main_q.gpu.raw(),
                                          .k_SHQ = c.main_k.gpu.raw(),
                                          .lse_TH = c.lse.gpu.data<float>(),
                                          .softmax_scale = static_cast<float>(c.scale),
                                          .begin_T = c.windows_gpu.begin_T.data<int32_t>(),
                                          .end_T = c.windows_gpu.end_T.data<int32_t>()};
      is_tuned ? DenseIndexerLossTunedCuda(chunked.args, target, Gpu().stream())
               : DenseIndexerLossCuda(chunked.args, target, Gpu().stream());
      return chunked;
    };
    ExpectTheSame(run(whole), run(parts), RelativeTolerance(kF32, shape.T * shape.I));
  }
}

// --- The target and the measurement.

TEST(CudaDenseTargetProbabilities, AreTheDefinitionsAndZeroOutsideTheWindows) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const Tensor gpu = DenseTargetProbabilities(Gpu(), c.target_gpu(), c.windows_gpu);
    const Tensor cpu = DenseTargetProbabilities(Cpu(), c.target_cpu(), c.windows_cpu);
    ASSERT_EQ(gpu.dtype(), kF32);
    // Exponentials carry the rounding of arguments up to 30.
    ExpectClose(gpu, cpu, 30 * shape.Q);
    const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
    for (size_t i = 0; i < b.size(); ++i) {
      if (b[i] == 0) ASSERT_EQ(a[i], 0) << i;
    }
  }
}

// Against the definition on the same fp32 probabilities.
void ExpectQuality(const Tensor& p_f32, const Tensor& ids, const KeyWindows& windows_gpu,
                   const KeyWindows& windows_cpu) {
  const SelectionQualityResult gpu = SelectionQuality(Gpu(), OnGpu(p_f32), OnGpu(ids), windows_gpu);
  const SelectionQualityResult cpu =
      SelectionQuality(Cpu(), Cast(Cpu(), p_f32, DType::kF64), ids, windows_cpu);
  ExpectClose(gpu.mass_T, cpu.mass_T);
  ExpectClose(gpu.best_mass_T, cpu.best_mass_T);
  ExpectClose(gpu.recall_T, cpu.recall_T);
}

TEST(CudaSelectionQuality, IsTheDefinitions) {
  for (const IndexerShape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const IndexerCase c(shape);
    const Tensor p = OnHost(DenseTargetProbabilities(Gpu(), c.target_gpu(), c.windows_gpu));
    ExpectQuality(p, c.ids.cpu, c.windows_gpu, c.windows_cpu);
    // A few different values only: most thresholds fall into a plateau.
    for (int64_t i = 0; i < p.num_elements(); ++i) {
      p.data<float>()[i] = static_cast<float>(i * 7919 % 104729 % 4) / 64;
    }
    ExpectQuality(p, c.ids.cpu, c.windows_gpu, c.windows_cpu);
  }
}

TEST(CudaSelectionQuality, HoldsOnLongRows) {
  const int64_t T = 4, S = 5000, K = 700;
  const Tensor p = RandomTensor(Cpu(), kF32, {T, S}, 3);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < T * K; ++i) ids.push_back(static_cast<int32_t>(i % K * 3 + 1000));
  const std::vector<int32_t> begin = {0, 990, 1, 5}, end = {5000, 4000, 4999, 3500};
  const KeyWindows cpu = {IntTensorOf(Cpu(), {T}, begin), IntTensorOf(Cpu(), {T}, end), {}, {}};
  const KeyWindows gpu = {OnGpu(cpu.begin_T), OnGpu(cpu.end_T), {}, {}};
  for (int64_t i = 0; i < p.num_elements(); ++i) p.data<float>()[i] *= p.data<float>()[i];
  ExpectQuality(p, IntTensorOf(Cpu(), {T, K}, ids), gpu, cpu);
  for (int64_t i = 0; i < p.num_elements(); ++i) p.data<float>()[i] = i % 2 == 0 ? 0.0f : -0.0f;
  ExpectQuality(p, IntTensorOf(Cpu(), {T, K}, ids), gpu, cpu);
}

TEST(CudaSelectionQuality, CountsEqualKeysByIndexAndMarksAKeyOutsideTheWindow) {
  const OnBoth p = ValuesOnBoth(kF32, {5, 8}, std::vector<double>(40, 0.125));
  const Tensor ids = OnGpu(IntTensorOf(Cpu(), {5, 4}, {0,  1,  2,  3,   //
                                                       2,  3,  4,  5,   //
                                                       -1, 6,  -1, 7,   //
                                                       -1, -1, -1, -1,  //
                                                       0,  1,  5,  -1}));
  const KeyWindows windows = {OnGpu(IntTensorOf(Cpu(), {5}, {0, 0, 0, 0, 0})),
                              OnGpu(IntTensorOf(Cpu(), {5}, {8, 8, 8, 8, 5})),
                              {},
                              {}};
  const SelectionQualityResult r = SelectionQuality(Gpu(), p.gpu, ids, windows);
  const std::vector<double> mass = ToDoubles(OnHost(r.mass_T)),
                            best = ToDoubles(OnHost(r.best_mass_T)),
                            recall = ToDoubles(OnHost(r.recall_T));
  EXPECT_EQ(std::vector<double>(mass.begin(), mass.begin() + 4),
            (std::vector<double>{0.5, 0.5, 0.25, 0}));
  EXPECT_EQ(std::vector<double>(best.begin(), best.begin() + 4),
            (std::vector<double>{0.5, 0.5, 0.25, 0}));
  EXPECT_EQ(std::vector<double>(recall.begin(), recall.begin() + 4),
            (std::vector<double>{1, 0.5, 0, 1}));
  EXPECT_TRUE(std::isnan(mass[4]) && std::isnan(best[4]) && std::isnan(recall[4]));
}

}  // namespace
}  // namespace baleen
