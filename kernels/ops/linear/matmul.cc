#include "kernels/ops/linear/matmul.h"

#include "kernels/ops/bounds.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/linear/matmul_cpu.h"
#include "kernels/ops/linear/matmul_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "matmul";

template <typename T>
StridedMatrix<const T> Operand(const MatrixView& view, Transpose transpose) {
  const T* const data = view.tensor.empty() ? nullptr : view.tensor.data<T>() + view.offset;
  const int64_t batch_stride = view.batch == 1 ? 0 : view.batch_stride;
  if (transpose == Transpose::kYes) return {data, batch_stride, 1, view.row_stride};
  return {data, batch_stride, view.row_stride, 1};
}

template <typename T>
void RunCpu(const Context& context, const MatrixView& a, Transpose transpose_a, const MatrixView& b,
            Transpose transpose_b, const MatrixView& c, Accumulate accumulate, double alpha) {
  MatmulProblem<T> problem;
  problem.batch = c.batch;
  problem.m = c.rows;
  problem.n = c.cols;
  problem.k = transpose_a == Transpose::kYes ? a.rows : a.cols;
  problem.a = Operand<T>(a, transpose_a);
  problem.b = Operand<T>(b, transpose_b);
  problem.c = {c.tensor.empty() ? nullptr : c.tensor.data<T>() + c.offset, c.batch_stride,
               c.row_stride, 1};
  problem.alpha = static_cast<T>(alpha);
  problem.add = accumulate == Accumulate::kAdd;
  MatmulCpu(context, problem, SupportedVectorIsas().back());
}

// A and B of one dtype. C is of theirs; on the GPU it may be the fp32 sum of bf16 products.
bool OperandsFit(const Context& context, DType a, DType b, DType c) {
  const bool sums = (OnCuda(context) || context.dry()) && a == DType::kBF16 && c == DType::kF32;
  return a == b && (a == c || sums);
}

MatmulCudaOperand CudaOperand(const MatrixView& view, Transpose transpose) {
  const char* const data = view.tensor.empty() ? nullptr : static_cast<char*>(view.tensor.raw());
  return {data == nullptr ? nullptr : data + view.offset * DTypeBytes(view.dtype()),
          view.batch == 1 ? 0 : view.batch_stride, view.row_stride, transpose == Transpose::kYes};
}

CudaElement ElementOf(DType dtype) {
  return dtype == DType::kBF16 ? CudaElement::kBF16 : CudaElement::kF32;
}

void RunCuda(const Context& context, const MatrixView& a, Transpose transpose_a,
             const MatrixView& b, Transpose transpose_b, const MatrixView& c, Accumulate accumulate,
             double alpha) {
  CheckCudaActivation(kOp, "A", a.tensor);
  if (c.tensor.empty()) return;
  MatmulCudaArgs args;
  args.element = ElementOf(a.dtype());
  args.result_element = ElementOf(c.dtype());
  args.batch = c.batch;
  args.m = c.rows;
  args.n = c.cols;
  args.k = transpose_a == Transpose::kYes ? a.rows : a.cols;
  args.a = CudaOperand(a, transpose_a);
  args.b = CudaOperand(b, transpose_b);
  args.c = static_cast<char*>(c.tensor.raw()) + c.offset * DTypeBytes(c.dtype());
  args.c_batch_stride = c.batch == 1 ? 0 : c.batch_stride;
  args.c_row_stride = c.row_stride;
  args.alpha = static_cast<float>(alpha);
  args.add = accumulate == Accumulate::kAdd;
  if constexpr (kHaveCuda) {
    const CublasLt library = context.cuda().cublaslt();
    MatmulCuda(args, {library.handle, library.workspace, library.workspace_bytes},
               context.stream());
    CheckLaunch(kOp);
    return;
  }
  NoCudaKernel(kOp);
}

// Takes the panels' memory and counts the work of C [M, N] = A B over K.
void DryMatmul(const Context& context, const MatrixView& a, const MatrixView& b,
               const MatrixView& c, int64_t k) {
  if (c.rows > 0) ReserveMatmulPanels(context, c.dtype(), c.cols, k);
  const auto bytes = [](const MatrixView& view) {
    return static_cast<double>(view.batch * view.rows * view.cols * DTypeBytes(view.dtype()));
  };
  const double products = static_cast<double>(c.batch * c.rows) * static_cast<double>(c.cols * k);
  CountWork(context, kOp, 2 * products, bytes(a) + bytes(b) + bytes(c));
}

// x [.., in] as its rows; a tensor without columns keeps its row count.
int64_t RowsOf(const Tensor& x) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < x.rank(); ++d) rows *= x.dim(d);
  return rows;
}

MatrixView RowsView(const Tensor& x) {
  MatrixView view = AsMatrix(x);
  view.rows = RowsOf(x);
  return view;
}

Shape WithLast(const Shape& shape, int64_t last) {
  Shape result = shape;
  result.back() = last;
  return result;
}

}  // namespace

void Matmul(const Context& context, const MatrixView& a, Transpose transpose_a, const MatrixView& b,
            Transpose transpose_b, const MatrixView& c, Accumulate accumulate, double alpha) {
  const bool ta = transpose_a == Transpose::kYes, tb = transpose_b == Transpose::kYes;
  const int64_t m = ta ? a.cols : a.rows, k = ta ? a.rows : a.cols;
  const int64_t k_of_b = tb ? b.cols : b.rows, n = tb ? b.rows : b.cols;
  CHECK(m == c.rows && n == c.cols && k == k_of_b)
      << "matmul: op(A) [" << m << ", " << k << "] times op(B) [" << k_of_b << ", " << n
      << "] is not C [" << c.rows << ", " << c.cols << "]";
  CHECK((a.batch == c.batch || a.batch == 1) && (b.batch == c.batch || b.batch == 1))
      << "matmul: batches A " << a.batch << ", B " << b.batch << ", C " << c.batch;
  CHECK(OperandsFit(context, a.dtype(), b.dtype(), c.dtype()))
      << "matmul: dtypes A " << a.dtype() << ", B " << b.dtype() << ", C " << c.dtype();
  CheckViewInside(kOp, "A", a);
  CheckViewInside(kOp, "B", b);
  CheckViewInside(kOp, "C", c);
  if (OnCuda(context)) {
    RunCuda(context, a, transpose_a, b, transpose_b, c, accumulate, alpha);
    return;
  }
  if (context.dry()) {
    DryMatmul(context, a, b, c, k);
    return;
  }
  ForFloatOrDouble(context, kOp, c.dtype(), [&](auto element) {
    RunCpu<decltype(element)>(context, a, transpose_a, b, transpose_b, c, accumulate, alpha);
  });
}

namespace {

Tensor LinearTo(const Context& context, DType dtype, const Tensor& x, const Tensor& weight) {
  CHECK(x.rank() >= 1 && weight.rank() == 2 && x.dim(-1) == weight.dim(1))
      << "linear: x " << x.DebugString() << ", weight " << weight.DebugString();
  const Tensor y = context.Empty(dtype, WithLast(x.shape(), weight.dim(0)));
  Matmul(context, RowsView(x), Transpose::kNo, RowsView(weight), Transpose::kYes, RowsView(y));
  return y;
}

}  // namespace

Tensor Linear(const Context& context, const Tensor& x, const Tensor& weight) {
  return LinearTo(context, x.dtype(), x, weight);
}

Tensor LinearToStatistics(const Context& context, const Tensor& x, const Tensor& weight) {
  return LinearTo(context, StatisticsOf(x.dtype()), x, weight);
}

Tensor LinearBackwardInput(const Context& context, const Tensor& dy, const Tensor& weight) {
  CHECK(dy.rank() >= 1 && weight.rank() == 2 && dy.dim(-1) == weight.dim(0))
      << "linear backward: dy " << dy.DebugString() << ", weight " << weight.DebugString();
  const Tensor dx = context.Empty(dy.dtype(), WithLast(dy.shape(), weight.dim(1)));
  Matmul(context, RowsView(dy), Transpose::kNo, RowsView(weight), Transpose::kNo, RowsView(dx));
  return dx;
}

void LinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                          const Tensor& dweight, Accumulate accumulate) {
  CHECK(dy.rank() >= 1 && x.rank() >= 1 && dweight.rank() == 2 && RowsOf(dy) == RowsOf(x) &&
        dy.dim(-1) == dweight.dim(0) && x.dim(-1) == dweight.dim(1))
      << "linear backward: dy " << dy.DebugString() << ", x " << x.DebugString() << ", dweight "
      << dweight.DebugString();
  Matmul(context, RowsView(dy), Transpose::kYes, RowsView(x), Transpose::kNo, RowsView(dweight),
         accumulate);
}

}  // namespace baleen
