#include "kernels/ops/rope.h"

#include <algorithm>
#include <cmath>

#include "kernels/ops/bounds.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/rope_cpu.h"
#include "kernels/ops/rope_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "rope";
constexpr double kPi = 3.14159265358979323846;

// The dimension (a real number) whose wave turns `rotations` times within the original context.
double CorrectionDim(const RopeFrequencyParams& params, double rotations) {
  return static_cast<double>(params.dim) *
         std::log(static_cast<double>(params.original_max_position) / (2 * kPi * rotations)) /
         (2 * std::log(params.theta));
}

void ApplyOnCuda(const Context& context, const MatrixView& x, const Tensor& positions_T,
                 const RopeTable& table, RopeLayout layout, RopeDirection direction) {
  ApplyRopeCuda({.element = ElementOf(kOp, "x", x.tensor),
                 .interleaved = layout == RopeLayout::kInterleaved,
                 .sign = direction == RopeDirection::kForward ? 1.0f : -1.0f,
                 .heads = x.batch,
                 .tokens = x.rows,
                 .half = static_cast<int>(x.cols / 2),
                 .head_stride = x.batch_stride,
                 .row_stride = x.row_stride,
                 .x = static_cast<char*>(x.tensor.raw()) + x.offset * DTypeBytes(x.dtype()),
                 .positions_T = positions_T.data<int32_t>(),
                 .cos = table.cos.data<float>(),
                 .sin = table.sin.data<float>()},
                context.stream());
}

}  // namespace

std::vector<double> RopeFrequencies(const RopeFrequencyParams& params) {
  CHECK(params.dim > 0 && params.dim % 2 == 0 && params.theta > 1 && params.factor > 0)
      << kOp << ": dim " << params.dim << ", theta " << params.theta << ", factor "
      << params.factor;
  const double dim = static_cast<double>(params.dim);
  double low = 0, high = 0;
  if (params.factor != 1) {
    low = std::max(0.0, std::floor(CorrectionDim(params, params.beta_fast)));
    high = std::min(dim - 1, std::ceil(CorrectionDim(params, params.beta_slow)));
    if (low == high) high += 0.001;  // as the reference: a step instead of 0 / 0
  }
  std::vector<double> frequencies;
  for (int64_t i = 0; i < params.dim / 2; ++i) {
    const double plain = std::pow(params.theta, -2.0 * static_cast<double>(i) / dim);
    if (params.factor == 1) {
      frequencies.push_back(plain);
      continue;
    }
    // YaRN: waves that turn often keep their frequency, slow ones are stretched by `factor`, a ramp
    // in between.
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies.push_back(plain / params.factor * ramp + plain * (1 - ramp));
  }
  return frequencies;
}

RopeTable MakeRopeTable(const Context& context, DType dtype, const std::vector<double>& frequencies,
                        int64_t num_positions) {
  CHECK_GE(num_positions, 0) << kOp;
  const DType table_dtype = StatisticsOf(dtype);
  const Shape shape = {num_positions, static_cast<int64_t>(frequencies.size())};
  const RopeTable table{context.Empty(table_dtype, shape), context.Empty(table_dtype, shape)};
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CHECK_LE(frequencies.size(), kRopeCudaMaxPairs) << kOp << ": pairs of a head";
      RopeTableCudaArgs args{.positions = num_positions,
                             .half = static_cast<int>(frequencies.size()),
                             .cos = table.cos.data<float>(),
                             .sin = table.sin.data<float>()};
      std::copy(frequencies.begin(), frequencies.end(), args.frequencies);
      RopeTableCuda(args, context.stream());
      return table;
    }
    NoCudaKernel(kOp);
  }
  ForFloatOrDouble(context, kOp, table_dtype, [&](auto element) {
    using T = decltype(element);
    RopeTableCpu(frequencies, num_positions, table.cos.data<T>(), table.sin.data<T>());
  });
  return table;
}

void ApplyRope(const Context& context, const MatrixView& x, const Tensor& positions_T,
               const RopeTable& table, RopeLayout layout, RopeDirection direction) {
  CheckTensor(context, kOp, "positions", positions_T, DType::kI32, {x.rows});
  CheckRank(kOp, "table", table.cos, 2);
  CHECK_EQ(x.cols, 2 * table.cos.dim(1))
      << kOp << ": columns of x and pairs of the table " << table.cos.DebugString();
  const DType table_dtype = StatisticsOf(x.dtype());
  CheckTensor(context, kOp, "cos", table.cos, table_dtype, table.cos.shape());
  CheckTensor(context, kOp, "sin", table.sin, table_dtype, table.cos.shape());
  CheckViewInside(kOp, "x", x);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return ApplyOnCuda(context, x, positions_T, table, layout, direction);
    NoCudaKernel(kOp);
  }
  CheckIndices(context, kOp, "positions", positions_T, 0, table.cos.dim(0));
  CountBytes(context, kOp, 2 * x.batch * x.rows * x.cols * DTypeBytes(x.dtype()));
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    const RopeArguments<T> arguments{x.batch,
                                     x.rows,
                                     x.cols / 2,
                                     x.batch_stride,
                                     x.row_stride,
                                     x.tensor.data<T>() + x.offset,
                                     positions_T.data<int32_t>(),
                                     table.cos.data<T>(),
                                     table.sin.data<T>()};
    ApplyRopeCpu(arguments, layout, direction);
  });
}

}  // namespace baleen
