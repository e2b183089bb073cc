// Matmul: C = alpha * op(A) op(B), overwriting C or adding to it; and the three products of a
// linear layer.
//
//   Linear               y = x W^T        x [.., in]  W [out, in]  y [.., out]
//   LinearBackwardInput  dx = dy W
//   LinearBackwardWeight dW += dy^T x, or dW = dy^T x: a step's first gradient of a weight need not
//                        read what it is added to
//
// CPU: operands and C have one dtype, kF32 or kF64, which is also what is accumulated in. A row of
// C has the same bits however many other rows the call has, unless alpha is not 1 and C is added
// to: then the last addition may or may not be fused. CUDA: A and B are kBF16 or kF32 (multiplied
// as fp32, not TF32), sums are fp32, C is of the operands' dtype or kF32 (gradients of parameters).
// The same call gives the same bits; a row's bits may change with the shape of the call, which
// chooses the kernel.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

enum class Transpose : uint8_t { kNo, kYes };
enum class Accumulate : uint8_t { kOverwrite, kAdd };

// For each of c.batch matrices. a and b need the same batch or a batch of 1, which then serves all.
// op(A) [M, K], op(B) [K, N], C [M, N]. C must not overlap A or B. M, N or K may be 0 (K = 0: C = 0
// or C unchanged).
void Matmul(const Context& context, const MatrixView& a, Transpose transpose_a, const MatrixView& b,
            Transpose transpose_b, const MatrixView& c,
            Accumulate accumulate = Accumulate::kOverwrite, double alpha = 1.0);

Tensor Linear(const Context& context, const Tensor& x, const Tensor& weight);
// y in the dtype of statistics (kF32; kF64 for kF64): what is compared or exponentiated next is not
// rounded first.
Tensor LinearToStatistics(const Context& context, const Tensor& x, const Tensor& weight);
Tensor LinearBackwardInput(const Context& context, const Tensor& dy, const Tensor& weight);
void LinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                          const Tensor& dweight, Accumulate accumulate = Accumulate::kAdd);

}  // namespace baleen
