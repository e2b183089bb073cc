// Internal to the CPU matmul: one problem as pointers and strides, and the instruction sets it can
// run with.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/core/context.h"

namespace baleen {

// What the CPU offers; every binary holds all three and picks at run time.
enum class VectorIsa : uint8_t { kPortable, kAvx2, kAvx512 };

// Those this CPU can run, best last.
std::vector<VectorIsa> SupportedVectorIsas();

// Element (r, c) of matrix b of an operand is at data[b * batch_stride + r * row_stride + c *
// col_stride]; row_stride or col_stride is 1.
template <typename T>
struct StridedMatrix {
  T* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t col_stride;
};

// C [M, N] = alpha A [M, K] B [K, N] (+ C where add), for each of `batch` matrices; C has
// col_stride 1.
template <typename T>
struct MatmulProblem {
  int64_t batch, m, n, k;
  StridedMatrix<const T> a, b;
  StridedMatrix<T> c;
  T alpha;
  bool add;
};

// float and double. Packed panels of A and B live in memory of the context's pool during the call.
template <typename T>
void MatmulCpu(const Context& context, const MatmulProblem<T>& problem, VectorIsa isa);

// Takes and gives back what the panels of a product with N columns over K occupy, with the best
// instruction set: what a dry call does instead. Nothing for dtypes that the CPU has no matmul of.
void ReserveMatmulPanels(const Context& context, DType dtype, int64_t n, int64_t k);

}  // namespace baleen
