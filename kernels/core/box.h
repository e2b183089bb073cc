// Box: a rectangular part of a global tensor. What a rank holds of a tensor is a Box of it; what
// ZeRO-1 keeps of that is a flat range inside the Box (checkpoints/state).
#pragma once

#include <algorithm>
#include <optional>

#include "kernels/core/tensor.h"

namespace baleen {

struct Box {
  Shape offset;  // first index in each dimension
  Shape extent;  // number of indices in each dimension
  bool operator==(const Box&) const = default;
};

inline Box WholeBox(const Shape& shape) { return {Shape(shape.size(), 0), shape}; }

// The common part of two boxes of one tensor; nothing when they do not meet.
inline std::optional<Box> Intersect(const Box& a, const Box& b) {
  CHECK_EQ(a.offset.size(), b.offset.size());
  Box common;
  for (size_t d = 0; d < a.offset.size(); ++d) {
    const int64_t begin = std::max(a.offset[d], b.offset[d]);
    const int64_t end = std::min(a.offset[d] + a.extent[d], b.offset[d] + b.extent[d]);
    if (begin >= end) return std::nullopt;
    common.offset.push_back(begin);
    common.extent.push_back(end - begin);
  }
  return common;
}

}  // namespace baleen
