// On the CPU a product multiplies the values that the codes stand for: they are exact in fp32, so
// only the sums round. On the GPU, and in the plan of a run there, it takes the codes as they are.
#include "kernels/ops/linear/fp8_linear.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/fp8_grouped_cuda.h"
#include "kernels/ops/linear/fp8_linear_cuda.h"
#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/matmul.h"

namespace baleen {
namespace {

constexpr char kOp[] = "fp8_matmul", kGroupedOp[] = "fp8_grouped_matmul";

std::string Text(const Fp8Operand& operand) {
  return absl::StrCat("[", operand.batch, ", ", operand.outer, ", ", operand.depth, "] as ",
                      operand.codes.DebugString());
}

void CheckOperands(const char* op, const Fp8Operand& a, const Fp8Operand& b) {
  CHECK(a.scaling == Fp8Scaling::kRuns && a.batch == 1 && a.depth == b.depth &&
        a.source == b.source)
      << op << ": A " << Text(a) << ", B " << Text(b);
}

// Widths of the result that the GPU's products can have.
void CheckWidth(const char* op, const char* name, int64_t width) {
  CHECK_EQ(width % kFp8RowMultiple, 0) << op << ": " << name << " columns (Fp8Fits)";
}

void CheckWeight(const char* name, const Tensor& x, const Tensor& weight, int width_dim, int rank) {
  CHECK(x.rank() >= 1 && weight.rank() == rank && x.dim(-1) == weight.dim(width_dim) &&
        x.dtype() == weight.dtype() && Fp8Fits(weight.dim(-2), weight.dim(-1)))
      << kOp << ": " << name << " " << x.DebugString() << ", weight " << weight.DebugString();
}

// Whether the codes themselves are multiplied, or would be where the dry run's device is a GPU.
bool TakesCodes(const Context& context, const Fp8Operand& a) {
  return OnCuda(context) || (context.dry() && a.source == DType::kBF16);
}

void Count(const Context& context, const char* op, const Fp8Operand& a, const Fp8Operand& b,
           const Tensor& c) {
  const double products = static_cast<double>(a.outer) * static_cast<double>(b.outer * a.depth);
  CountWork(context, op, 2 * products,
            static_cast<double>(a.codes.bytes() + b.codes.bytes() + c.bytes()));
}

Fp8MatmulCudaOperand CudaOperand(const Fp8Operand& operand) {
  return {operand.codes.raw(), operand.scales.data<float>(),
          operand.scaling == Fp8Scaling::kBlocks};
}

// `rows`: of C as stored, which may be more than the operand's.
void RunCuda(const Context& context, const Fp8Operand& a, const Fp8Operand& b, int64_t rows,
             const Tensor& c, bool add) {
  Fp8MatmulCudaArgs args;
  args.m = rows;
  args.n = b.outer;
  args.k = a.depth_stored();
  args.a = CudaOperand(a);
  args.b = CudaOperand(b);
  args.result_element = c.dtype() == DType::kBF16 ? CudaElement::kBF16 : CudaElement::kF32;
  args.c = c.raw();
  args.add = add;
  if (rows == 0) return;
  if (args.k == 0) {  // an empty sum
    if (!add) FillZero(context, c);
    return;
  }
  CHECK_EQ(reinterpret_cast<uintptr_t>(c.raw()) % 16, 0u) << kOp << ": C " << c.DebugString();
  if constexpr (kHaveCuda) {
    const CublasLt library = context.cuda().cublaslt();
    Fp8MatmulCuda(args, {library.handle, library.workspace, library.workspace_bytes},
                  context.stream());
    CheckLaunch(kOp);
    return;
  }
  NoCudaKernel(kOp);
}

MatrixView Values(const Context& context, const Fp8Operand& operand) {
  return AsBatch(Dequantise(context, operand, operand.source));
}

Shape WithLast(const Shape& shape, int64_t last) {
  Shape result = shape;
  result.back() = last;
  return result;
}

void CheckOffsets(const Context& context, const Tensor& offsets_L1, const Fp8Operand& b) {
  CheckTensor(context, kGroupedOp, "offsets", offsets_L1, DType::kI32, {b.batch + 1});
}

void RunGroupedCuda(const Context& context, const Fp8Operand& a, const Fp8Operand& b,
                    const Tensor& offsets_L1, const Tensor& c) {
  Fp8GroupedCudaArgs args;
  args.num_rows = a.outer;
  args.num_experts = b.batch;
  args.columns = b.outer;
  args.depth = a.depth_stored();
  // Tiles, rows and columns are counted in 32 bits on the device.
  CHECK(args.num_rows <= INT32_MAX && args.num_experts * args.columns <= INT32_MAX &&
        args.depth <= INT32_MAX)
      << kGroupedOp << ": A " << Text(a) << ", B " << Text(b);
  if (c.num_elements() == 0) return;
  args.offsets_L1 = offsets_L1.data<int32_t>();
  args.a_codes = a.codes.raw();
  args.a_scales = a.scales.data<float>();
  args.a_scale_stride = a.scales.dim(1);
  args.b_codes = b.codes.raw();
  args.b_scales = b.scales.data<float>();
  args.b_scale_stride = b.scales.dim(1);
  args.result = c.raw();
  if constexpr (kHaveCuda) {
    Fp8GroupedCuda(args, context.stream());
    CheckLaunch(kGroupedOp);
    return;
  }
  NoCudaKernel(kGroupedOp);
}

}  // namespace

Tensor Fp8Product(const Context& context, const Fp8Operand& a, const Fp8Operand& b) {
  CheckOperands(kOp, a, b);
  CHECK_EQ(b.batch, 1) << kOp << ": B " << Text(b);
  CheckWidth(kOp, "C", b.outer);
  if (TakesCodes(context, a)) {
    // A's rows are a multiple of 16 in memory, and so are C's: those behind the last are left over.
    const Tensor stored = context.Empty(a.source, {a.outer_stored(), b.outer});
    const Tensor c = stored.Rows(0, a.outer);
    if (OnCuda(context)) {
      RunCuda(context, a, b, a.outer_stored(), stored, /*add=*/false);
    } else {
      Count(context, kOp, a, b, c);
    }
    return c;
  }
  const Tensor c = context.Empty(a.source, {a.outer, b.outer});
  Matmul(context, Values(context, a), Transpose::kNo, Values(context, b), Transpose::kYes,
         AsMatrix(c));
  return c;
}

void Fp8ProductInto(const Context& context, const Fp8Operand& a, const Fp8Operand& b,
                    const Tensor& c, Accumulate accumulate) {
  CheckOperands(kOp, a, b);
  CheckTensor(context, kOp, "C", c, StatisticsOf(a.source), {a.outer, b.outer});
  CheckWidth(kOp, "A", a.outer);
  CheckWidth(kOp, "C", b.outer);
  if (OnCuda(context)) {
    RunCuda(context, a, b, a.outer, c, accumulate == Accumulate::kAdd);
  } else if (TakesCodes(context, a)) {
    Count(context, kOp, a, b, c);
  } else {
    Matmul(context, Values(context, a), Transpose::kNo, Values(context, b), Transpose::kYes,
           AsMatrix(c), accumulate);
  }
}

Tensor Fp8GroupedProduct(const Context& context, const Fp8Operand& a, const Fp8Operand& b,
                         const Tensor& offsets_L1) {
  CheckOperands(kGroupedOp, a, b);
  CheckWidth(kGroupedOp, "C", b.outer);
  CheckOffsets(context, offsets_L1, b);
  if (!TakesCodes(context, a)) {
    return GroupedLinear(context, Dequantise(context, a, a.source).Reshaped({a.outer, a.depth}),
                         Dequantise(context, b, b.source), offsets_L1);
  }
  const Tensor c = context.Empty(a.source, {a.outer, b.outer});
  if (OnCuda(context)) {
    RunGroupedCuda(context, a, b, offsets_L1, c);
  } else {
    Count(context, kGroupedOp, a, b, c);
  }
  return c;
}

Tensor Fp8Linear(const Context& context, const Tensor& x, const Tensor& weight) {
  CheckWeight("x", x, weight, 1, 2);
  return Fp8Product(context, QuantiseRows(context, x),
                    QuantiseWeight(context, weight, Fp8Side::kColumns))
      .Reshaped(WithLast(x.shape(), weight.dim(0)));
}

Tensor Fp8LinearBackwardInput(const Context& context, const Tensor& dy, const Tensor& weight) {
  CheckWeight("dy", dy, weight, 0, 2);
  return Fp8Product(context, QuantiseRows(context, dy),
                    QuantiseWeight(context, weight, Fp8Side::kRows))
      .Reshaped(WithLast(dy.shape(), weight.dim(1)));
}

void Fp8LinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                             const Tensor& dweight, Accumulate accumulate) {
  Fp8ProductInto(context, QuantiseColumns(context, dy), QuantiseColumns(context, x), dweight,
                 accumulate);
}

Tensor Fp8GroupedLinear(const Context& context, const Tensor& x, const Tensor& weight_LOI,
                        const Tensor& offsets_L1) {
  CheckWeight("x", x, weight_LOI, 2, 3);
  return Fp8GroupedProduct(context, QuantiseRows(context, x),
                           QuantiseWeight(context, weight_LOI, Fp8Side::kColumns), offsets_L1);
}

Tensor Fp8GroupedLinearBackwardInput(const Context& context, const Tensor& dy,
                                     const Tensor& weight_LOI, const Tensor& offsets_L1) {
  CheckWeight("dy", dy, weight_LOI, 1, 3);
  return Fp8GroupedProduct(context, QuantiseRows(context, dy),
                           QuantiseWeight(context, weight_LOI, Fp8Side::kRows), offsets_L1);
}

}  // namespace baleen
