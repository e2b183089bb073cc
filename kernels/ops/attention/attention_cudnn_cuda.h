// Internal: what stands between cuDNN's layouts of attention and ours (attention_cudnn.h).
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// out [cols, rows] = in [rows, cols] transposed, where in has rows `in_stride` apart and out
// `out_stride`.
void TransposeFloatsCuda(int64_t rows, int64_t cols, const float* in, int64_t in_stride, float* out,
                         int64_t out_stride, void* stream);

// sums[row][0 .. width) += values[row][..] for bf16 values [rows, width], packed; rows of sums, of
// `element`, are `stride` apart. width and stride are multiples of 8, both arrays 16-byte aligned.
void AddBf16RowsCuda(int64_t rows, int64_t width, const void* values, CudaElement element,
                     void* sums, int64_t stride, void* stream);

}  // namespace baleen
