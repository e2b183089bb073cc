// Checks that an op's x.cc makes before its CPU loops: views stay inside their tensors, indices
// inside their tables.
#pragma once

#include "kernels/core/check.h"
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// The last element that the view reaches lies inside its tensor.
inline void CheckViewInside(const char* op, const char* name, const MatrixView& view) {
  const bool inside = view.batch >= 0 && view.rows >= 0 && view.cols >= 0 && view.offset >= 0 &&
                      view.batch_stride >= 0 && view.row_stride >= 0 &&
                      (view.batch == 0 || view.rows == 0 || view.cols == 0 ||
                       view.offset + (view.batch - 1) * view.batch_stride +
                               (view.rows - 1) * view.row_stride + view.cols <=
                           view.tensor.num_elements());
  CHECK(inside) << op << ": view " << name << " of batch " << view.batch << ", rows " << view.rows
                << ", cols " << view.cols << ", offset " << view.offset << ", strides "
                << view.batch_stride << " and " << view.row_stride << " leaves "
                << view.tensor.DebugString();
}

// Every element of a kI32 tensor in host memory is in [low, high). Unknown in a dry context.
inline void CheckIndices(const Context& context, const char* op, const char* name,
                         const Tensor& indices, int64_t low, int64_t high) {
  if (context.dry()) return;
  const int32_t* const values = indices.data<int32_t>();
  for (int64_t i = 0; i < indices.num_elements(); ++i) {
    CHECK(values[i] >= low && values[i] < high)
        << op << ": " << name << "[" << i << "] is " << values[i] << ", expected " << low << " .. "
        << high - 1;
  }
}

}  // namespace baleen
