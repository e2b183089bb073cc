// The products of a linear layer and of experts' linear layers in block FP8, as DeepSeek-V3 trains
// (DeepSeek-V3 report 3.3):
//
//   y = x W^T, dx = dy W       x, dy in 1 x 128, W in 128 x 128
//   dW += dy^T x (or =)        both in 1 x 128 along the rows
//
// Codes are E4M3 (fp8_quantise.h); products of 128 are summed by the tensor cores and added,
// scaled, to fp32 sums. Results are of the dtype of the values that were quantised; dW is added to
// in fp32. The experts' dW stays in the dtype of activations (GroupedLinearBackwardWeight).
//
// CPU (kF32, kF64): quantises, and multiplies what the codes stand for: the definition. CUDA:
// kBF16. Deterministic; a row's bits may change with the shape of the call. An expert's row has its
// bits whatever else is in the call.
#pragma once

#include "kernels/ops/linear/fp8_quantise.h"
#include "kernels/ops/linear/matmul.h"

namespace baleen {

// Whether a weight [out, in] has products in FP8: both widths are multiples of 16, as cuBLASLt
// wants. Rows may be any number, widths need be no multiples of 128 (zeros fill the last block).
constexpr bool Fp8Fits(int64_t out, int64_t in) {
  return out > 0 && in > 0 && out % kFp8RowMultiple == 0 && in % kFp8RowMultiple == 0;
}

Tensor Fp8Linear(const Context& context, const Tensor& x, const Tensor& weight);
Tensor Fp8LinearBackwardInput(const Context& context, const Tensor& dy, const Tensor& weight);
void Fp8LinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                             const Tensor& dweight, Accumulate accumulate = Accumulate::kAdd);

// Rows of x are sorted by expert (grouped_matmul.h).
Tensor Fp8GroupedLinear(const Context& context, const Tensor& x, const Tensor& weight_LOI,
                        const Tensor& offsets_L1);
Tensor Fp8GroupedLinearBackwardInput(const Context& context, const Tensor& dy,
                                     const Tensor& weight_LOI, const Tensor& offsets_L1);

// The same on operands that were quantised before, to use one for several products.
// C [.., N] = A [.., M rows, K] B [N, K]^T of A's leading dimensions `shape` without the last.
Tensor Fp8Product(const Context& context, const Fp8Operand& a, const Fp8Operand& b);
// C [M, N] (fp32 sums; kF64 for kF64) += A B^T, or = A B^T.
void Fp8ProductInto(const Context& context, const Fp8Operand& a, const Fp8Operand& b,
                    const Tensor& c, Accumulate accumulate);
// C [M, N]: row n times the matrix B[l(n)].
Tensor Fp8GroupedProduct(const Context& context, const Fp8Operand& a, const Fp8Operand& b,
                         const Tensor& offsets_L1);

}  // namespace baleen
