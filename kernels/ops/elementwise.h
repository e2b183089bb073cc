// The few elementwise operations that stand alone: copies, casts, sums. Everything else is fused
// into the op it serves.
//
// On the CPU kF32 and kF64 (casts: kBF16 too), on CUDA kF32 and kBF16, computed in fp32 and rounded
// once. What only moves bytes takes any dtype.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

Tensor Add(const Context& context, const Tensor& a, const Tensor& b);       // a + b
void AddInPlace(const Context& context, const Tensor& a, const Tensor& b);  // a += b
void ScaleInPlace(const Context& context, const Tensor& a, double factor);  // a *= factor
void FillZero(const Context& context, const Tensor& a);
void FillInt(const Context& context, const Tensor& a, int32_t value);  // kI32
// Same dtype and size.
void Copy(const Context& context, const Tensor& source, const Tensor& target);
Tensor Clone(const Context& context, const Tensor& a);
// kF32 <-> kF64 <-> kBF16; on CUDA kF32 <-> kBF16.
Tensor Cast(const Context& context, const Tensor& a, DType dtype);
// `a` itself where it has the dtype.
Tensor InDtype(const Context& context, const Tensor& a, DType dtype);

// Joins / splits columns: [T, A] and [T, B] to [T, A + B], and back.
Tensor ConcatColumns(const Context& context, const Tensor& a_TA, const Tensor& b_TB);
// Columns [begin, begin + count) of x [T, W] as a new [T, count].
Tensor SliceColumns(const Context& context, const Tensor& x_TW, int64_t begin, int64_t count);

}  // namespace baleen
