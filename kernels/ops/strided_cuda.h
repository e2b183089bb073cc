// Internal: the kernels behind strided.h, and the column moves of elementwise.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// Row r of matrix b: row_bytes bytes at from + b * from_batch_bytes + r * from_row_bytes, copied to
// the same place of `to`. Bytes only: any element type.
struct CopyViewCudaArgs {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t batch = 0, rows = 0, row_bytes = 0;
  int64_t from_batch_bytes = 0, from_row_bytes = 0;
  int64_t to_batch_bytes = 0, to_row_bytes = 0;
};
void CopyViewCuda(const CopyViewCudaArgs& args, void* stream);

// to[r, c] += sum over b of from[b, r, c], summed in fp32 in the order of b and rounded once.
// Strides in elements.
struct AddBatchSumCudaArgs {
  CudaElement element = CudaElement::kF32;
  const void* from = nullptr;
  void* to = nullptr;
  int64_t batch = 0, rows = 0, cols = 0;
  int64_t from_batch_stride = 0, from_row_stride = 0, to_row_stride = 0;
};
void AddBatchSumCuda(const AddBatchSumCudaArgs& args, void* stream);

}  // namespace baleen
