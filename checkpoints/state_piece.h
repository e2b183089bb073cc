// StatePiece: what one rank holds of one tensor of the training state.
//
// A tensor of the model has a name and a global shape. A rank holds a Box of it, and of that box,
// read row by row, the elements [flat_begin, flat_begin + flat_count): a ZeRO-1 slice is a range of
// a flattened box and no box itself. What is held whole has flat_begin 0 and flat_count = the
// elements of the box. Nothing here knows how many ranks there are, so a state saved under one
// layout is read under any other by intersecting pieces.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/box.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct StatePiece {
  // The checkpoint's name, with the kind of state in front:
  // "model.layers.0.self_attn.q_a_proj.weight" (fp32 master), "adam_m/model.layers...",
  // "adam_v/model.layers...". [A-Za-z0-9._-] in parts divided by '/'.
  std::string name;
  Shape global_shape;
  Box box;
  int64_t flat_begin = 0;
  int64_t flat_count = 0;
  // flat_count elements on the host: F64, F32, BF16, I64, I32 or U8. Written by the reader, read by
  // the writer.
  Tensor data;
};

// The piece that is a whole box.
inline StatePiece WholePiece(std::string name, Shape global_shape, Box box, Tensor data) {
  const int64_t count = NumElements(box.extent);
  return {std::move(name), std::move(global_shape), std::move(box), 0, count, std::move(data)};
}

}  // namespace baleen
