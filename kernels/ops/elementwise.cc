#include "kernels/ops/elementwise.h"

#include <algorithm>
#include <cstring>

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/elementwise_cpu.h"
#include "kernels/ops/elementwise_cuda.h"
#include "kernels/ops/strided_cuda.h"

namespace baleen {
namespace {

void AddInto(const Context& context, const char* op, const Tensor& a, const Tensor& b,
             const Tensor& sum) {
  CheckTensor(context, op, "b", b, a.dtype(), a.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return AddCuda(ElementOf(op, "a", a), a.num_elements(), a.raw(), b.raw(), sum.raw(),
                     context.stream());
    }
    NoCudaKernel(op);
  }
  CountBytes(context, op, a.bytes() + b.bytes() + sum.bytes());
  ForFloatOrDouble(context, op, a.dtype(), [&](auto element) {
    using T = decltype(element);
    AddCpu(a.num_elements(), a.data<T>(), b.data<T>(), sum.data<T>());
  });
}

// Calls function(T{}) with the element type among those that Cast knows.
template <typename Function>
void ForCastable(DType dtype, Function function) {
  switch (dtype) {
    case DType::kF32:
      return function(float{});
    case DType::kF64:
      return function(double{});
    case DType::kBF16:
      return function(BFloat16{});
    default:
      CHECK(false) << "cast: F32, F64 and BF16 are defined, not " << dtype;
  }
}

// `rows` rows of `row_bytes` bytes between arrays with these distances between rows.
void CopyRows(const Context& context, const char* op, int64_t rows, int64_t row_bytes,
              const void* source, int64_t source_stride, void* target, int64_t target_stride) {
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return CopyViewCuda({.from = source,
                           .to = target,
                           .batch = 1,
                           .rows = rows,
                           .row_bytes = row_bytes,
                           .from_row_bytes = source_stride,
                           .to_row_bytes = target_stride},
                          context.stream());
    }
    NoCudaKernel(op);
  }
  CopyRowsCpu(rows, row_bytes, source, source_stride, target, target_stride);
}

}  // namespace

Tensor Add(const Context& context, const Tensor& a, const Tensor& b) {
  const Tensor sum = context.Empty(a.dtype(), a.shape());
  AddInto(context, "add", a, b, sum);
  return sum;
}

void AddInPlace(const Context& context, const Tensor& a, const Tensor& b) {
  AddInto(context, "add in place", a, b, a);
}

void ScaleInPlace(const Context& context, const Tensor& a, double factor) {
  constexpr char kOp[] = "scale";
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ScaleCuda(ElementOf(kOp, "a", a), a.num_elements(), factor, a.raw(), context.stream());
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 2 * a.bytes());
  ForFloatOrDouble(context, kOp, a.dtype(), [&](auto element) {
    using T = decltype(element);
    ScaleCpu(a.num_elements(), static_cast<T>(factor), a.data<T>());
  });
}

void FillZero(const Context& context, const Tensor& a) {
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return FillZeroCuda(a.bytes(), a.raw(), context.stream());
    NoCudaKernel("fill zero");
  }
  CountBytes(context, "fill zero", a.bytes());
  if (!context.dry() && a.num_elements() > 0)
    std::memset(a.raw(), 0, static_cast<size_t>(a.bytes()));
}

void FillInt(const Context& context, const Tensor& a, int32_t value) {
  CheckTensor(context, "fill int", "a", a, DType::kI32, a.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return FillIntCuda(a.num_elements(), value, a.data<int32_t>(), context.stream());
    }
    NoCudaKernel("fill int");
  }
  CountBytes(context, "fill int", a.bytes());
  std::fill_n(a.data<int32_t>(), a.num_elements(), value);
}

void Copy(const Context& context, const Tensor& source, const Tensor& target) {
  CHECK(source.dtype() == target.dtype() && source.num_elements() == target.num_elements())
      << "copy: from " << source.DebugString() << " to " << target.DebugString();
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return CopyCuda(source.bytes(), source.raw(), target.raw(), context.stream());
    }
    NoCudaKernel("copy");
  }
  CountBytes(context, "copy", 2 * source.bytes());
  if (context.dry() || source.num_elements() == 0) return;
  std::memmove(target.raw(), source.raw(), static_cast<size_t>(source.bytes()));
}

Tensor Clone(const Context& context, const Tensor& a) {
  const Tensor clone = context.Empty(a.dtype(), a.shape());
  Copy(context, a, clone);
  return clone;
}

Tensor Cast(const Context& context, const Tensor& a, DType dtype) {
  const Tensor result = context.Empty(dtype, a.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CastCuda(ElementOf("cast", "a", a), ElementOf("cast", "result", result), a.num_elements(),
               a.raw(), result.raw(), context.stream());
      return result;
    }
    NoCudaKernel("cast");
  }
  CountBytes(context, "cast", a.bytes() + result.bytes());
  if (context.dry()) return result;
  ForCastable(a.dtype(), [&](auto from) {
    ForCastable(dtype, [&](auto to) {
      CastCpu(a.num_elements(), a.data<decltype(from)>(), result.data<decltype(to)>());
    });
  });
  return result;
}

Tensor InDtype(const Context& context, const Tensor& a, DType dtype) {
  return a.dtype() == dtype ? a : Cast(context, a, dtype);
}

Tensor ConcatColumns(const Context& context, const Tensor& a_TA, const Tensor& b_TB) {
  constexpr char kOp[] = "concat columns";
  CheckRank(kOp, "a", a_TA, 2);
  CheckTensor(context, kOp, "b", b_TB, a_TA.dtype(), {a_TA.dim(0), b_TB.dim(-1)});
  const int64_t rows = a_TA.dim(0), element_bytes = DTypeBytes(a_TA.dtype());
  const int64_t a_bytes = a_TA.dim(1) * element_bytes, b_bytes = b_TB.dim(1) * element_bytes;
  const Tensor joined = context.Empty(a_TA.dtype(), {rows, a_TA.dim(1) + b_TB.dim(1)});
  CountBytes(context, kOp, 2 * joined.bytes());
  if (context.dry()) return joined;
  char* const out = static_cast<char*>(joined.raw());
  CopyRows(context, kOp, rows, a_bytes, a_TA.raw(), a_bytes, out, a_bytes + b_bytes);
  CopyRows(context, kOp, rows, b_bytes, b_TB.raw(), b_bytes, out + a_bytes, a_bytes + b_bytes);
  return joined;
}

Tensor SliceColumns(const Context& context, const Tensor& x_TW, int64_t begin, int64_t count) {
  constexpr char kOp[] = "slice columns";
  CheckRank(kOp, "x", x_TW, 2);
  CHECK(begin >= 0 && count >= 0 && begin + count <= x_TW.dim(1))
      << kOp << ": " << begin << " + " << count << " of " << x_TW.DebugString();
  const int64_t element_bytes = DTypeBytes(x_TW.dtype());
  const Tensor slice = context.Empty(x_TW.dtype(), {x_TW.dim(0), count});
  CountBytes(context, kOp, 2 * slice.bytes());
  if (context.dry()) return slice;
  CopyRows(context, kOp, x_TW.dim(0), count * element_bytes,
           static_cast<const char*>(x_TW.raw()) + begin * element_bytes,
           x_TW.dim(1) * element_bytes, slice.raw(), count * element_bytes);
  return slice;
}

}  // namespace baleen
