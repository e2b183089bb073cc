// Internal: block FP8 products behind fp8_linear.h on the GPU, by cuBLASLt.
//
// Roofline: 1449 TF where one scale serves a whole operand; with scales for 128 elements cuBLASLt
// reaches 1160 to 1307 TF (its sums are promoted to fp32 every 128), 850 to 1000 with both sides
// 1 x 128.
#pragma once

#include <cstdint>

#include "kernels/ops/linear/matmul_cuda.h"

namespace baleen {

// Codes [outer, k] E4M3; scales as Fp8Operand has them.
struct Fp8MatmulCudaOperand {
  const void* codes = nullptr;
  const float* scales = nullptr;
  bool blocks = false;  // 128 x 128; else 1 x 128
};

// C [M, N] = A [M, K] B [N, K]^T (+ C where add); M and N multiples of 16, K of 128. A is 1 x 128.
struct Fp8MatmulCudaArgs {
  int64_t m = 0, n = 0, k = 0;
  Fp8MatmulCudaOperand a, b;
  CudaElement result_element = CudaElement::kBF16;
  void* c = nullptr;
  bool add = false;
};

void Fp8MatmulCuda(const Fp8MatmulCudaArgs& args, const MatmulCudaLibrary& library, void* stream);

}  // namespace baleen
