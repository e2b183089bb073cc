// The definitions of matmul.h and grouped_matmul.h once more, on the device, one thread an element
// and sums in double.
#pragma once

#include <cstdint>

#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "kernels/ops/linear/matmul_cuda.h"

namespace baleen::bench {

// Blocks of 64 columns, one row, one matrix. c holds what the result held before.
template <typename T>
__global__ void MatmulReference(MatmulCudaArgs args, double* c) {
  const int64_t n = blockIdx.x * int64_t{64} + threadIdx.x, m = blockIdx.y, batch = blockIdx.z;
  if (n >= args.n) return;
  const T* const a = static_cast<const T*>(args.a.data) + batch * args.a.batch_stride;
  const T* const b = static_cast<const T*>(args.b.data) + batch * args.b.batch_stride;
  double sum = 0;
  for (int64_t k = 0; k < args.k; ++k) {
    const float x = a[args.a.transposed ? k * args.a.row_stride + m : m * args.a.row_stride + k];
    const float y = b[args.b.transposed ? n * args.b.row_stride + k : k * args.b.row_stride + n];
    sum += static_cast<double>(x) * static_cast<double>(y);
  }
  double& element = c[batch * args.c_batch_stride + m * args.c_row_stride + n];
  element = args.alpha * sum + (args.add ? element : 0.0);
}

// One thread an element of the result, flat.
template <typename T>
__global__ void GroupedReference(GroupedProduct product, GroupedMatmulCudaArgs args, double* result,
                                 int64_t count) {
  const int64_t flat = blockIdx.x * int64_t{256} + threadIdx.x;
  if (flat >= count) return;
  const int64_t width = product == GroupedProduct::kForward ? args.out : args.in;
  const int64_t row = flat / width, column = flat % width;
  double sum = 0;
  const auto operand = [](const void* data, int64_t at) {
    return static_cast<double>(static_cast<float>(static_cast<const T*>(data)[at]));
  };
  if (product == GroupedProduct::kBackwardWeight) {
    const int64_t expert = row / args.out, o = row % args.out;
    for (int64_t n = args.offsets_L1[expert]; n < args.offsets_L1[expert + 1]; ++n) {
      sum += operand(args.left, n * args.out + o) * operand(args.right, n * args.in + column);
    }
    result[flat] += sum;
    return;
  }
  int64_t expert = 0;
  while (args.offsets_L1[expert + 1] <= row) ++expert;
  const int64_t weight = expert * args.in * args.out;
  const bool forward = product == GroupedProduct::kForward;
  const int64_t depth = forward ? args.in : args.out;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = weight + (forward ? column * args.in + k : k * args.in + column);
    sum += operand(args.left, row * depth + k) * operand(args.right, at);
    if (product == GroupedProduct::kBackwardInputOfTwo) {
      sum += operand(args.second_left, row * depth + k) * operand(args.second_right, at);
    }
  }
  result[flat] = sum;
}

}  // namespace baleen::bench
