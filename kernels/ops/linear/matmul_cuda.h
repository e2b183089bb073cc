// Internal: the products behind matmul.h on the GPU, by cuBLASLt.
//
// Which of cuBLASLt's kernels runs is its heuristic's first answer for the shape, or what a
// compiled table names (matmul_choices_cuda.h), asked once for each shape and kept: never timed, so
// two runs choose the same. Kernels that add partial sums of a split K in an order that may vary
// are not asked for: the same call gives the same bits.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// Element (r, c) of matrix b is at data[b * batch_stride + r * row_stride + c], r and c as stored.
struct MatmulCudaOperand {
  const void* data = nullptr;
  int64_t batch_stride = 0;  // elements; 0: one matrix for all
  int64_t row_stride = 0;
  bool transposed = false;
};

// C [M, N] = alpha op(A) [M, K] op(B) [K, N] (+ C where add), for each of `batch` matrices, fp32
// accumulation. fp32 operands are multiplied as fp32, never as TF32.
struct MatmulCudaArgs {
  CudaElement element = CudaElement::kBF16;         // of A and B
  CudaElement result_element = CudaElement::kBF16;  // of C: theirs, or kF32
  int64_t batch = 0, m = 0, n = 0, k = 0;
  MatmulCudaOperand a, b;
  void* c = nullptr;
  int64_t c_batch_stride = 0, c_row_stride = 0;
  float alpha = 1.0f;
  bool add = false;
};

// cuBLASLt's handle and the memory its kernels may use; products that share it run one after the
// other.
struct MatmulCudaLibrary {
  void* handle = nullptr;  // cublasLtHandle_t
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

void MatmulCuda(const MatmulCudaArgs& args, const MatmulCudaLibrary& library, void* stream);

}  // namespace baleen
