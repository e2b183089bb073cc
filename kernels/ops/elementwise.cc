#include "kernels/ops/elementwise.h"

#include <cstring>

#include "kernels/ops/dispatch.h"
#include "kernels/ops/elementwise_cpu.h"

namespace baleen {
namespace {

void RequireCpu(const Context& context, const char* op) {
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel(op);
}

void AddInto(const Context& context, const char* op, const Tensor& a, const Tensor& b,
             const Tensor& sum) {
  CheckTensor(context, op, "b", b, a.dtype(), a.shape());
  RequireCpu(context, op);
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
  RequireCpu(context, "scale");
  CountBytes(context, "scale", 2 * a.bytes());
  ForFloatOrDouble(context, "scale", a.dtype(), [&](auto element) {
    using T = decltype(element);
    ScaleCpu(a.num_elements(), static_cast<T>(factor), a.data<T>());
  });
}

void FillZero(const Context& context, const Tensor& a) {
  RequireCpu(context, "fill zero");
  CountBytes(context, "fill zero", a.bytes());
  if (!context.dry() && a.num_elements() > 0)
    std::memset(a.raw(), 0, static_cast<size_t>(a.bytes()));
}

void Copy(const Context& context, const Tensor& source, const Tensor& target) {
  CHECK(DTypesFit(context, source.dtype(), target.dtype()) && source.num_elements() == target.num_elements())
      << "copy: from " << source.DebugString() << " to " << target.DebugString();
  RequireCpu(context, "copy");
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
  RequireCpu(context, "cast");
  const Tensor result = context.Empty(dtype, a.shape());
  CountBytes(context, "cast", a.bytes() + result.bytes());
  if (context.dry()) return result;
  ForCastable(a.dtype(), [&](auto from) {
    ForCastable(dtype, [&](auto to) {
      CastCpu(a.num_elements(), a.data<decltype(from)>(), result.data<decltype(to)>());
    });
  });
  return result;
}

Tensor ConcatColumns(const Context& context, const Tensor& a_TA, const Tensor& b_TB) {
  CheckRank("concat columns", "a", a_TA, 2);
  CheckTensor(context, "concat columns", "b", b_TB, a_TA.dtype(), {a_TA.dim(0), b_TB.dim(-1)});
  RequireCpu(context, "concat columns");
  const int64_t rows = a_TA.dim(0), element_bytes = DTypeBytes(a_TA.dtype());
  const int64_t a_bytes = a_TA.dim(1) * element_bytes, b_bytes = b_TB.dim(1) * element_bytes;
  const Tensor joined = context.Empty(a_TA.dtype(), {rows, a_TA.dim(1) + b_TB.dim(1)});
  CountBytes(context, "concat columns", 2 * joined.bytes());
  if (context.dry()) return joined;
  char* const out = static_cast<char*>(joined.raw());
  CopyRowsCpu(rows, a_bytes, a_TA.raw(), a_bytes, out, a_bytes + b_bytes);
  CopyRowsCpu(rows, b_bytes, b_TB.raw(), b_bytes, out + a_bytes, a_bytes + b_bytes);
  return joined;
}

Tensor SliceColumns(const Context& context, const Tensor& x_TW, int64_t begin, int64_t count) {
  CheckRank("slice columns", "x", x_TW, 2);
  CHECK(begin >= 0 && count >= 0 && begin + count <= x_TW.dim(1))
      << "slice columns: " << begin << " + " << count << " of " << x_TW.DebugString();
  RequireCpu(context, "slice columns");
  const int64_t element_bytes = DTypeBytes(x_TW.dtype());
  const Tensor slice = context.Empty(x_TW.dtype(), {x_TW.dim(0), count});
  CountBytes(context, "slice columns", 2 * slice.bytes());
  if (context.dry()) return slice;
  CopyRowsCpu(x_TW.dim(0), count * element_bytes,
              static_cast<const char*>(x_TW.raw()) + begin * element_bytes,
              x_TW.dim(1) * element_bytes, slice.raw(), count * element_bytes);
  return slice;
}

}  // namespace baleen
