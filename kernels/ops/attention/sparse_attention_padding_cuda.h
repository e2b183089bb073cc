// Internal: lists of one length as lists of another, where the kernels on tensor cores want K to be
// a multiple of 64.
#pragma once

#include <cstdint>

namespace baleen {

// Rows of 4-byte words: to[t, k] = from[t, k] for k < from_width, else -1 (as int32).
struct ResizeListsCudaArgs {
  int64_t rows = 0, from_width = 0, to_width = 0;
  const void* from = nullptr;
  void* to = nullptr;
};
void ResizeListsCuda(const ResizeListsCudaArgs& args, void* stream);

}  // namespace baleen
