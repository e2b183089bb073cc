// Shapes and checks of the quantisers, then the definition for the device.
#include "kernels/ops/linear/fp8_quantise.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/linear/fp8_quantise_cpu.h"
#include "kernels/ops/linear/fp8_quantise_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "fp8_quantise";

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t RowsOf(const Tensor& x) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < x.rank(); ++d) rows *= x.dim(d);
  return rows;
}

Fp8Operand MakeOperand(const Context& context, Fp8Scaling scaling, DType source, int64_t batch,
                       int64_t outer, int64_t depth) {
  Fp8Operand operand;
  operand.scaling = scaling;
  operand.source = source;
  operand.batch = batch;
  operand.outer = outer;
  operand.depth = depth;
  const bool runs = scaling == Fp8Scaling::kRuns;
  const int64_t outer_stored = runs ? RoundUp(outer, kFp8RowMultiple) : outer;
  const int64_t depth_stored = RoundUp(depth, kFp8Depth), blocks = depth_stored / kFp8Depth;
  operand.codes = context.Empty(DType::kF8E4M3, {batch * outer_stored, depth_stored});
  // cuBLASLt wants the scales of a column of blocks 16 bytes apart or a multiple of it.
  operand.scales = context.Empty(
      DType::kF32, runs ? Shape{blocks, outer_stored}
                        : Shape{batch * RoundUp(outer, kFp8Depth) / kFp8Depth, RoundUp(blocks, 4)});
  return operand;
}

Fp8Operand RowsOperand(const Context& context, const Tensor& x, int64_t rows) {
  return MakeOperand(context, Fp8Scaling::kRuns, x.dtype(), 1, rows, x.dim(-1));
}
Fp8Operand ColumnsOperand(const Context& context, const Tensor& x, int64_t rows) {
  return MakeOperand(context, Fp8Scaling::kRuns, x.dtype(), 1, x.dim(-1), rows);
}

// What the kernels read: rows of whole 16-byte words.
void CheckCudaSource(const Tensor& x) {
  CHECK(x.dtype() == DType::kBF16 && (x.empty() || x.dim(-1) % 8 == 0) &&
        reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0)
      << kOp << ": the CUDA kernels take BF16 rows of whole 16-byte words, not " << x.DebugString();
}

Fp8QuantiseCudaArgs CudaArgs(const Tensor& x, int64_t rows, const Fp8Operand& operand) {
  Fp8QuantiseCudaArgs args;
  args.batch = operand.batch;
  args.rows = rows;
  args.columns = x.dim(-1);
  args.values = x.raw();
  args.outer_stored = operand.outer_stored();
  args.depth_stored = operand.depth_stored();
  args.scale_stride = operand.scales.dim(1);
  args.codes = operand.codes.raw();
  args.scales = operand.scales.data<float>();
  return args;
}

// `kernel` is called with CudaArgs; `of` says which dimension is the outer one.
template <typename Kernel>
Fp8Operand Quantise(const Context& context, const Tensor& x, int64_t rows, Fp8Operand operand,
                    Fp8Source of, Kernel kernel) {
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  if (operand.codes.num_elements() == 0) return operand;
  if (OnCuda(context)) {
    CheckCudaSource(x);
    if constexpr (kHaveCuda) {
      kernel(CudaArgs(x, rows, operand), context.stream());
      CheckLaunch(kOp);
      return operand;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, x.bytes() + operand.codes.bytes() + operand.scales.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(),
                   [&](auto zero) { Fp8QuantiseCpu<decltype(zero)>(x, of, operand); });
  return operand;
}

}  // namespace

Fp8Operand QuantiseRows(const Context& context, const Tensor& x) {
  CHECK_GE(x.rank(), 1) << kOp << ": x is " << x.DebugString();
  const int64_t rows = RowsOf(x);
  return Quantise(context, x, rows, RowsOperand(context, x, rows), Fp8Source::kAsStored,
                  [](const auto& args, void* stream) { Fp8QuantiseRowsCuda(args, stream); });
}

Fp8Operand QuantiseColumns(const Context& context, const Tensor& x) {
  CHECK_GE(x.rank(), 1) << kOp << ": x is " << x.DebugString();
  const int64_t rows = RowsOf(x);
  return Quantise(context, x, rows, ColumnsOperand(context, x, rows), Fp8Source::kTransposed,
                  [](const auto& args, void* stream) { Fp8QuantiseColumnsCuda(args, stream); });
}

Fp8RowsAndColumns QuantiseRowsAndColumns(const Context& context, const Tensor& x) {
  if (!OnCuda(context)) return {QuantiseRows(context, x), QuantiseColumns(context, x)};
  CHECK_GE(x.rank(), 1) << kOp << ": x is " << x.DebugString();
  const int64_t rows = RowsOf(x);
  const Fp8RowsAndColumns both{RowsOperand(context, x, rows), ColumnsOperand(context, x, rows)};
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  if (x.num_elements() == 0) return both;
  CheckCudaSource(x);
  if constexpr (kHaveCuda) {
    Fp8QuantiseBothCuda(CudaArgs(x, rows, both.rows), CudaArgs(x, rows, both.columns),
                        context.stream());
    return both;
  }
  NoCudaKernel(kOp);
}

Fp8Operand QuantiseWeight(const Context& context, const Tensor& weight, Fp8Side summed) {
  CHECK(weight.rank() == 2 || weight.rank() == 3) << kOp << ": weight " << weight.DebugString();
  const int64_t batch = weight.rank() == 3 ? weight.dim(0) : 1;
  const int64_t rows = weight.dim(-2), columns = weight.dim(-1);
  const bool transposed = summed == Fp8Side::kRows;
  return Quantise(context, weight, rows,
                  MakeOperand(context, Fp8Scaling::kBlocks, weight.dtype(), batch,
                              transposed ? columns : rows, transposed ? rows : columns),
                  transposed ? Fp8Source::kTransposed : Fp8Source::kAsStored,
                  [transposed](const auto& args, void* stream) {
                    Fp8QuantiseBlocksCuda(args, transposed, stream);
                  });
}

Tensor Dequantise(const Context& context, const Fp8Operand& operand, DType dtype) {
  CHECK(!OnCuda(context)) << kOp << ": Dequantise is the CPU's";
  const Tensor values = context.Empty(dtype, {operand.batch, operand.outer, operand.depth});
  ForFloatOrDouble(context, kOp, dtype,
                   [&](auto zero) { Fp8DequantiseCpu<decltype(zero)>(operand, values); });
  return values;
}

}  // namespace baleen
