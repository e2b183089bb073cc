#include "kernels/ops/reduce.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/reduce_cpu.h"
#include "kernels/ops/reduce_cuda.h"

namespace baleen {
namespace {

ReduceElement ReduceElementOf(const char* op, const Tensor& x) {
  switch (x.dtype()) {
    case DType::kF32:
      return ReduceElement::kF32;
    case DType::kBF16:
      return ReduceElement::kBF16;
    case DType::kF64:
      return ReduceElement::kF64;
    case DType::kI32:
      return ReduceElement::kI32;
    default:
      CHECK(false) << op << ": x is " << x.DebugString();
      return ReduceElement::kF32;
  }
}

// y: null but for products.
void ReduceOnCuda(const Context& context, const char* op, ReduceTerm term, const Tensor& x,
                  const void* y, double factor, const Tensor& result_1) {
  const Tensor workspace = context.Empty(DType::kF64, {ReduceWorkspaceDoubles(x.num_elements())});
  ReduceCuda({.element = ReduceElementOf(op, x),
              .term = term,
              .count = x.num_elements(),
              .x = x.raw(),
              .y = y,
              .factor = factor,
              .workspace = workspace.data<double>(),
              .result = result_1.data<double>()},
             context.stream());
}

}  // namespace

void AddSumOfSquares(const Context& context, const Tensor& x, const Tensor& result_1) {
  constexpr char kOp[] = "sum of squares";
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  CheckTensor(context, kOp, "result", result_1, DType::kF64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ReduceOnCuda(context, kOp, ReduceTerm::kSquare, x, nullptr, 1, result_1);
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, x.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    result_1.data<double>()[0] += SumOfSquaresCpu(x.num_elements(), x.data<T>());
  });
}

void AddSum(const Context& context, const Tensor& x, const Tensor& result_1) {
  constexpr char kOp[] = "sum";
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  CheckTensor(context, kOp, "result", result_1, DType::kF64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ReduceOnCuda(context, kOp, ReduceTerm::kValue, x, nullptr, 1, result_1);
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, x.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    result_1.data<double>()[0] += SumCpu(x.num_elements(), x.data<T>());
  });
}

void AddIntSum(const Context& context, const Tensor& x, const Tensor& result_1) {
  constexpr char kOp[] = "sum of integers";
  CheckTensor(context, kOp, "x", x, DType::kI32, x.shape());
  CheckTensor(context, kOp, "result", result_1, DType::kF64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ReduceOnCuda(context, kOp, ReduceTerm::kValue, x, nullptr, 1, result_1);
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, x.bytes());
  if (context.dry()) return;
  result_1.data<double>()[0] += SumCpu(x.num_elements(), x.data<int32_t>());
}

void AddDot(const Context& context, const Tensor& a, const Tensor& b, double factor,
            const Tensor& result_1) {
  constexpr char kOp[] = "dot";
  CheckTensor(context, kOp, "a", a, a.dtype(), a.shape());
  CheckTensor(context, kOp, "b", b, a.dtype(), a.shape());
  CheckTensor(context, kOp, "result", result_1, DType::kF64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ReduceOnCuda(context, kOp, ReduceTerm::kProduct, a, b.raw(), factor, result_1);
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, a.bytes() + b.bytes());
  ForFloatOrDouble(context, kOp, a.dtype(), [&](auto element) {
    using T = decltype(element);
    result_1.data<double>()[0] += factor * DotCpu(a.num_elements(), a.data<T>(), b.data<T>());
  });
}

void AddConstant(const Context& context, double value, const Tensor& result_1) {
  constexpr char kOp[] = "add constant";
  CheckTensor(context, kOp, "result", result_1, DType::kF64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return AddConstantCuda(value, result_1.data<double>(), context.stream());
    }
    NoCudaKernel(kOp);
  }
  if (context.dry()) return;
  result_1.data<double>()[0] += value;
}

}  // namespace baleen
