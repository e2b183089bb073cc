// Block FP8 on the GPU: quantisers bit for bit as on the CPU; products of whole numbers exactly,
// with scales that differ from block to block; random ones against the definition in fp64.
//
// Tolerance. Results in bf16 round once, by 2^-8 at most. fp32 sums (dW): the tensor cores cut a
// sum of 32 products off about 13 bits below its largest and do so four times before it is added to
// the fp32 sum; the four may line up: 2^-11, and the same again for what cuBLASLt adds otherwise.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/ops/linear/fp8_check.h"
#include "kernels/ops/linear/fp8_grouped_cuda.h"
#include "kernels/ops/linear/fp8_linear.h"
#include "tests/cuda/operand_pair.h"

namespace baleen {
namespace {

using testing::Gpu;
using testing::IntTensorOf;
using testing::OnGpu;
using testing::OnHost;
using testing::OperandPair;
using testing::RandomPair;
using testing::RelativeError;
using testing::SameBits;
using testing::ToDoubles;

constexpr double kBf16Tolerance = 0x1p-8, kSumTolerance = 0x1p-10;

const Context& Cpu() {
  static const Context* const context = new Context(Context::Cpu());
  return *context;
}

OperandPair PairOf(const Shape& shape, const std::vector<float>& values,
                   DType dtype = DType::kBF16) {
  const Tensor rounded = Cpu().Empty(dtype, shape), exact = Cpu().Empty(DType::kF64, shape);
  for (size_t i = 0; i < values.size(); ++i) {
    float value = values[i];
    if (dtype == DType::kBF16) {
      rounded.data<BFloat16>()[i] = BFloat16::FromFloat(value);
      value = rounded.data<BFloat16>()[i].ToFloat();
    } else {
      rounded.data<float>()[i] = value;
    }
    exact.data<double>()[i] = value;
  }
  return {exact, OnGpu(rounded)};
}

uint32_t Mix(uint64_t i) {
  uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>((z ^ (z >> 27)) >> 33);
}

// --- Quantisers ---------------------------------------------------------------------------------

std::vector<uint8_t> Bytes(const Tensor& tensor) {
  const auto* const data = static_cast<const uint8_t*>(tensor.raw());
  return std::vector<uint8_t>(data, data + tensor.bytes());
}

void ExpectSameOperand(const Fp8Operand& gpu, const Fp8Operand& cpu) {
  ASSERT_EQ(gpu.codes.shape(), cpu.codes.shape());
  ASSERT_EQ(gpu.scales.shape(), cpu.scales.shape());
  const std::vector<uint8_t> a = Bytes(OnHost(gpu.codes)), b = Bytes(cpu.codes);
  const auto code = std::mismatch(a.begin(), a.end(), b.begin());
  EXPECT_TRUE(code.first == a.end())
      << "code " << code.first - a.begin() << " of " << cpu.codes.DebugString() << " is "
      << int(*code.first) << ", expected " << int(*code.second);
  const std::vector<double> s = ToDoubles(OnHost(gpu.scales)), t = ToDoubles(cpu.scales);
  const int64_t stride = cpu.scales.dim(1);
  const int64_t used = cpu.scaling == Fp8Scaling::kBlocks ? cpu.depth_stored() / kFp8Depth : stride;
  for (int64_t i = 0; i < cpu.scales.num_elements(); ++i) {
    if (i % stride < used)
      ASSERT_EQ(s[i], t[i]) << "scale " << i << " of " << cpu.scales.DebugString();
  }
}

void ExpectSameQuantisers(const OperandPair& x, const OperandPair& weights) {
  ExpectSameOperand(QuantiseRows(Gpu(), x.gpu), QuantiseRows(Cpu(), x.host));
  ExpectSameOperand(QuantiseColumns(Gpu(), x.gpu), QuantiseColumns(Cpu(), x.host));
  const Fp8RowsAndColumns both = QuantiseRowsAndColumns(Gpu(), x.gpu);
  ExpectSameOperand(both.rows, QuantiseRows(Cpu(), x.host));
  ExpectSameOperand(both.columns, QuantiseColumns(Cpu(), x.host));
  for (const Fp8Side side : {Fp8Side::kColumns, Fp8Side::kRows}) {
    ExpectSameOperand(QuantiseWeight(Gpu(), weights.gpu, side),
                      QuantiseWeight(Cpu(), weights.host, side));
  }
}

TEST(CudaFp8Quantise, HasTheBitsOfTheDefinitionForEveryShape) {
  const Shape shapes[] = {{1, 16},    {5, 48},    {128, 128}, {129, 144},
                          {300, 576}, {33, 1040}, {7, 2064}};
  for (const Shape& shape : shapes) {
    SCOPED_TRACE(ShapeString(shape));
    ExpectSameQuantisers(RandomPair(DType::kBF16, shape, 1),
                         RandomPair(DType::kBF16, {3, shape[0], shape[1]}, 2));
  }
  EXPECT_EQ(QuantiseRows(Gpu(), Gpu().Empty(DType::kBF16, {0, 16})).codes.num_elements(), 0);
  EXPECT_EQ(QuantiseColumns(Gpu(), Gpu().Empty(DType::kBF16, {0, 16})).codes.num_elements(), 0);
  EXPECT_EQ(
      QuantiseRowsAndColumns(Gpu(), Gpu().Empty(DType::kBF16, {0, 16})).rows.codes.num_elements(),
      0);
}

TEST(CudaFp8Quantise, HasTheBitsOfTheDefinitionFromTheSmallestToTheLargestValues) {
  // Every exponent of bf16, subnormal ones too; runs of zeros; NaN and infinity in some runs.
  const int64_t rows = 256, columns = 272;
  std::vector<float> values(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t random = Mix(r * columns + c);
      const int exponent = static_cast<int>(r) - 133 - static_cast<int>(random % 12);
      const float mantissa = 1.0f + static_cast<float>(random >> 8 & 127) / 128.0f;
      values[r * columns + c] =
          c < 128 && r % 16 == 3
              ? 0.0f
              : std::ldexp(random >> 20 & 1 ? -mantissa : mantissa, std::min(exponent, 127));
    }
  }
  const OperandPair finite = PairOf({rows, columns}, values);
  ExpectSameQuantisers(
      finite, {finite.host.Reshaped({1, rows, columns}), finite.gpu.Reshaped({1, rows, columns})});
  values[5 * columns + 7] = std::numeric_limits<float>::quiet_NaN();
  values[9 * columns + 200] = INFINITY;
  values[40 * columns + 1] = -INFINITY;
  const OperandPair special = PairOf({rows, columns}, values);
  ExpectSameQuantisers(special, {special.host.Reshaped({2, rows / 2, columns}),
                                 special.gpu.Reshaped({2, rows / 2, columns})});
}

// --- Products of whole numbers: exact, so a scale that is taken from another place shows ---------

// Small whole numbers times a power of two of their run along `depth` (and, for weights, of their
// block), which becomes the scale: every run holds a 4.
std::vector<float> WholeNumbers(int64_t rows, int64_t columns, bool depth_is_rows, bool blocks,
                                uint64_t seed) {
  std::vector<float> values(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t random = Mix(seed * 1000003 + r * columns + c);
      const int64_t run = blocks          ? r / 128 * 1000 + c / 128
                          : depth_is_rows ? r / 128 * 100003 + c
                                          : c / 128 * 100003 + r;
      const bool first = blocks ? r % 128 == 0 && c % 128 == 0 : (depth_is_rows ? r : c) % 128 == 0;
      const int exponent = static_cast<int>(Mix(seed * 77 + run) % 3);
      const float whole = first ? 4.0f : static_cast<float>(static_cast<int>(random % 9) - 4);
      values[r * columns + c] = std::ldexp(whole, exponent);
    }
  }
  return values;
}

// The values of a result in fp64, rounded as the GPU's are.
std::vector<double> AsStored(const Tensor& exact, DType dtype) {
  std::vector<double> values = ToDoubles(exact);
  if (dtype == DType::kBF16) {
    for (double& value : values) value = BFloat16::FromFloat(static_cast<float>(value)).ToFloat();
  }
  return values;
}

void ExpectExactly(const Tensor& gpu, const Tensor& cpu) {
  ASSERT_EQ(gpu.shape(), cpu.shape());
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = AsStored(cpu, gpu.dtype());
  int64_t wrong = 0;
  for (size_t i = 0; i < a.size(); ++i) wrong += !(a[i] == b[i]);
  const auto first = std::mismatch(a.begin(), a.end(), b.begin());
  EXPECT_EQ(wrong, 0) << "of " << a.size() << ", first at " << first.first - a.begin() << ": "
                      << (wrong ? *first.first : 0) << ", expected " << (wrong ? *first.second : 0);
}

struct LayerShape {
  int64_t rows, in, out;
};
// Whole blocks; partial ones on every side; one block; long rows; more scales than fit one vector.
constexpr LayerShape kLayers[] = {{128, 128, 128},  {256, 384, 512}, {37, 144, 48},
                                  {300, 272, 576},  {1, 16, 16},     {144, 1168, 208},
                                  {529, 2048, 1040}};

TEST(CudaFp8Linear, IsExactOnWholeNumbersWithAScaleForEveryBlock) {
  for (const auto& [rows, in, out] : kLayers) {
    SCOPED_TRACE(::testing::Message() << rows << " rows, in " << in << " out " << out);
    const OperandPair w = PairOf({out, in}, WholeNumbers(out, in, false, true, 3));
    const OperandPair x = PairOf({rows, in}, WholeNumbers(rows, in, false, false, 1)),
                      dy = PairOf({rows, out}, WholeNumbers(rows, out, false, false, 2));
    ExpectExactly(Fp8Linear(Gpu(), x.gpu, w.gpu), Fp8Linear(Cpu(), x.host, w.host));
    ExpectExactly(Fp8LinearBackwardInput(Gpu(), dy.gpu, w.gpu),
                  Fp8LinearBackwardInput(Cpu(), dy.host, w.host));
    const OperandPair turned_x = PairOf({rows, in}, WholeNumbers(rows, in, true, false, 4)),
                      turned_dy = PairOf({rows, out}, WholeNumbers(rows, out, true, false, 5));
    const OperandPair dw = PairOf({out, in}, WholeNumbers(out, in, false, false, 6), DType::kF32);
    Fp8LinearBackwardWeight(Gpu(), turned_dy.gpu, turned_x.gpu, dw.gpu);
    Fp8LinearBackwardWeight(Cpu(), turned_dy.host, turned_x.host, dw.host);
    ExpectExactly(dw.gpu, dw.host);
  }
}

// --- Random products
// ------------------------------------------------------------------------------

double ErrorOf(const Tensor& gpu, const Tensor& expected) {
  return RelativeError(ToDoubles(OnHost(gpu)), ToDoubles(expected));
}

OperandPair Scaled(const Shape& shape, uint64_t seed, double scale) {
  const Tensor values = testing::RandomTensor(Cpu(), DType::kF32, shape, seed, scale);
  return PairOf(shape, std::vector<float>(values.data<float>(),
                                          values.data<float>() + values.num_elements()));
}

TEST(CudaFp8Linear, AgreesWithTheDefinitionAtEveryMagnitude) {
  for (const auto& [rows, in, out] : kLayers) {
    for (const double scale : {1.0, 1e-12, 1e12}) {
      SCOPED_TRACE(::testing::Message()
                   << rows << " rows, in " << in << " out " << out << " of " << scale);
      const OperandPair x = Scaled({rows, in}, 1, scale), dy = Scaled({rows, out}, 2, scale),
                        w = Scaled({out, in}, 3, 0.02);
      EXPECT_LE(ErrorOf(Fp8Linear(Gpu(), x.gpu, w.gpu), Fp8Linear(Cpu(), x.host, w.host)),
                kBf16Tolerance);
      EXPECT_LE(ErrorOf(Fp8LinearBackwardInput(Gpu(), dy.gpu, w.gpu),
                        Fp8LinearBackwardInput(Cpu(), dy.host, w.host)),
                kBf16Tolerance);
      const OperandPair dw = PairOf({out, in}, std::vector<float>(out * in, 0.0f), DType::kF32);
      Fp8LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, dw.gpu);
      Fp8LinearBackwardWeight(Cpu(), dy.host, x.host, dw.host);
      EXPECT_LE(ErrorOf(dw.gpu, dw.host), kSumTolerance);
    }
  }
}

TEST(CudaFp8Linear, PassesTheCheckThatRunsAskFor) {
  const absl::Status status = CheckFp8(Gpu());
  EXPECT_TRUE(status.ok()) << status.ToString();
}

TEST(CudaFp8Linear, GivesTheSameBitsTwiceAndNothingForNoRows) {
  const OperandPair x = RandomPair(DType::kBF16, {300, 2048}, 1),
                    dy = RandomPair(DType::kBF16, {300, 144}, 2),
                    w = RandomPair(DType::kBF16, {144, 2048}, 3);
  EXPECT_TRUE(
      SameBits(OnHost(Fp8Linear(Gpu(), x.gpu, w.gpu)), OnHost(Fp8Linear(Gpu(), x.gpu, w.gpu))));
  const Tensor once = Gpu().Zeros(DType::kF32, {144, 2048}),
               twice = Gpu().Zeros(DType::kF32, {144, 2048});
  Fp8LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, once);
  Fp8LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, twice);
  EXPECT_TRUE(SameBits(OnHost(once), OnHost(twice)));
  const Tensor none = Gpu().Empty(DType::kBF16, {0, 2048}),
               no_dy = Gpu().Empty(DType::kBF16, {0, 144});
  EXPECT_EQ(Fp8Linear(Gpu(), none, w.gpu).shape(), (Shape{0, 144}));
  EXPECT_EQ(Fp8LinearBackwardInput(Gpu(), no_dy, w.gpu).shape(), (Shape{0, 2048}));
  Fp8LinearBackwardWeight(Gpu(), no_dy, none, twice);
  EXPECT_TRUE(SameBits(OnHost(once), OnHost(twice)));
}

TEST(CudaFp8Linear, WritesAGradientOverWhateverWasThere) {
  for (const int64_t rows : {0, 300}) {
    const OperandPair x = RandomPair(DType::kBF16, {rows, 256}, 1),
                      dy = RandomPair(DType::kBF16, {rows, 144}, 2);
    const Tensor added = Gpu().Zeros(DType::kF32, {144, 256});
    const OperandPair written = PairOf({144, 256}, std::vector<float>(144 * 256, NAN), DType::kF32);
    Fp8LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, added);
    Fp8LinearBackwardWeight(Gpu(), dy.gpu, x.gpu, written.gpu, Accumulate::kOverwrite);
    EXPECT_LE(ErrorOf(written.gpu, OnHost(added)), kSumTolerance) << rows;
  }
}

TEST(CudaFp8Linear, KeepsNotANumberInItsRow) {
  OperandPair x = RandomPair(DType::kBF16, {37, 272}, 1);
  const OperandPair w = RandomPair(DType::kBF16, {48, 272}, 2);
  const Tensor host = OnHost(x.gpu);
  host.data<BFloat16>()[11 * 272 + 200].bits = 0x7fc0;
  host.data<BFloat16>()[20 * 272].bits = 0x7f80;  // infinity
  const std::vector<double> y = ToDoubles(OnHost(Fp8Linear(Gpu(), OnGpu(host), w.gpu)));
  for (int64_t i = 0; i < 37 * 48; ++i) {
    EXPECT_EQ(std::isnan(y[i]), i / 48 == 11 || i / 48 == 20) << i;
  }
}

// --- Experts
// --------------------------------------------------------------------------------------

// Around the tile's 128 rows, empty experts first, in the middle and last, all rows at one expert,
// no row at all.
const std::vector<std::vector<int32_t>>& OffsetCases() {
  static const std::vector<std::vector<int32_t>> cases = {
      {0, 1},
      {0, 0, 4, 4, 5, 5},
      {0, 128, 256, 320},
      {0, 63, 128, 257, 257},
      {0, 0, 300, 300},
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
      {0, 600, 1201},  // enough rows an expert for two blocks to share B
      {0, 0, 0},
  };
  return cases;
}

TEST(CudaFp8Grouped, IsExactOnWholeNumbersForGroupsOfAnySize) {
  constexpr LayerShape kWidths[] = {{0, 128, 256}, {0, 272, 336}, {0, 16, 16}, {0, 640, 208}};
  for (const auto& [unused, in, out] : kWidths) {
    for (const std::vector<int32_t>& offsets : OffsetCases()) {
      SCOPED_TRACE(::testing::Message() << "in " << in << " out " << out << " offsets "
                                        << ::testing::PrintToString(offsets));
      const int64_t experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
      std::vector<float> weights;
      for (int64_t l = 0; l < experts; ++l) {
        const std::vector<float> one = WholeNumbers(out, in, false, true, 10 + l);
        weights.insert(weights.end(), one.begin(), one.end());
      }
      const OperandPair w = PairOf({experts, out, in}, weights);
      const OperandPair x = PairOf({rows, in}, WholeNumbers(rows, in, false, false, 1)),
                        dy = PairOf({rows, out}, WholeNumbers(rows, out, false, false, 2));
      const Tensor host = IntTensorOf(Cpu(), {experts + 1}, offsets), gpu = OnGpu(host);
      ExpectExactly(Fp8GroupedLinear(Gpu(), x.gpu, w.gpu, gpu),
                    Fp8GroupedLinear(Cpu(), x.host, w.host, host));
      ExpectExactly(Fp8GroupedLinearBackwardInput(Gpu(), dy.gpu, w.gpu, gpu),
                    Fp8GroupedLinearBackwardInput(Cpu(), dy.host, w.host, host));
    }
  }
}

TEST(CudaFp8Grouped, AgreesWithTheDefinitionInEveryVariantOfTheKernel) {
  const int64_t experts = 3, rows = 700, in = 1168, out = 464;
  const std::vector<int32_t> offsets = {0, 450, 450, 700};
  const OperandPair x = RandomPair(DType::kBF16, {rows, in}, 1),
                    w = RandomPair(DType::kBF16, {experts, out, in}, 2);
  const Tensor host = IntTensorOf(Cpu(), {experts + 1}, offsets), gpu = OnGpu(host);
  const Tensor expected = Fp8GroupedLinear(Cpu(), x.host, w.host, host);
  const Fp8Operand a = QuantiseRows(Gpu(), x.gpu),
                   b = QuantiseWeight(Gpu(), w.gpu, Fp8Side::kColumns);
  for (const int cluster : {1, 2}) {
    for (const int tile_n : {128, 192}) {
      const Tensor y = Gpu().Empty(DType::kBF16, {rows, out});
      Fp8GroupedCudaArgs args;
      args.num_rows = rows;
      args.num_experts = experts;
      args.columns = out;
      args.depth = a.depth_stored();
      args.offsets_L1 = gpu.data<int32_t>();
      args.a_codes = a.codes.raw();
      args.a_scales = a.scales.data<float>();
      args.a_scale_stride = a.scales.dim(1);
      args.b_codes = b.codes.raw();
      args.b_scales = b.scales.data<float>();
      args.b_scale_stride = b.scales.dim(1);
      args.result = y.raw();
      LaunchFp8Grouped(args, PlanFp8Grouped(args, 132, cluster, tile_n), Gpu().stream());
      EXPECT_LE(ErrorOf(y, expected), kBf16Tolerance) << cluster << " blocks, tile " << tile_n;
    }
  }
}

TEST(CudaFp8Grouped, GivesARowTheSameBitsWhateverSharesTheCall) {
  const OperandPair x = RandomPair(DType::kBF16, {333, 208}, 1),
                    w = RandomPair(DType::kBF16, {3, 144, 208}, 2);
  const Tensor offsets = OnGpu(IntTensorOf(Cpu(), {4}, {0, 70, 70, 333}));
  const Tensor y = OnHost(Fp8GroupedLinear(Gpu(), x.gpu, w.gpu, offsets));
  EXPECT_TRUE(SameBits(y, OnHost(Fp8GroupedLinear(Gpu(), x.gpu, w.gpu, offsets))));
  const Tensor alone = OnGpu(IntTensorOf(Cpu(), {4}, {0, 0, 0, 263}));
  EXPECT_TRUE(SameBits(y.Rows(70, 333),
                       OnHost(Fp8GroupedLinear(Gpu(), x.gpu.Rows(70, 333), w.gpu, alone))));
}

TEST(CudaFp8Grouped, KeepsNotANumberWithItsRow) {
  const OperandPair x = RandomPair(DType::kBF16, {200, 272}, 1),
                    w = RandomPair(DType::kBF16, {2, 208, 272}, 2);
  const Tensor host = OnHost(x.gpu);
  host.data<BFloat16>()[100 * 272 + 3].bits = 0x7fc0;
  const Tensor offsets = OnGpu(IntTensorOf(Cpu(), {3}, {0, 101, 200}));
  const std::vector<double> y =
      ToDoubles(OnHost(Fp8GroupedLinear(Gpu(), OnGpu(host), w.gpu, offsets)));
  for (int64_t i = 0; i < 200 * 208; ++i) EXPECT_EQ(std::isnan(y[i]), i / 208 == 100) << i;
}

}  // namespace
}  // namespace baleen
