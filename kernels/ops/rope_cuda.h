// Internal: the kernels behind rope.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// The most pairs R / 2 that the table kernel takes.
inline constexpr int kRopeCudaMaxPairs = 256;

// cos and sin [positions, half] in fp32, of angles formed in fp64.
struct RopeTableCudaArgs {
  int64_t positions = 0;
  int half = 0;
  double frequencies[kRopeCudaMaxPairs] = {};
  float* cos = nullptr;
  float* sin = nullptr;
};
void RopeTableCuda(const RopeTableCudaArgs& args, void* stream);

// Rotates in place: element (head, t, r) at x[head * head_stride + t * row_stride + r], r < 2 half.
struct ApplyRopeCudaArgs {
  CudaElement element = CudaElement::kF32;
  bool interleaved = true;  // pairs (2i, 2i + 1); else (i, i + half)
  float sign = 1;           // -1: by -angle
  int64_t heads = 0, tokens = 0;
  int half = 0;
  int64_t head_stride = 0, row_stride = 0;
  void* x = nullptr;
  const int32_t* positions_T = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
};
void ApplyRopeCuda(const ApplyRopeCudaArgs& args, void* stream);

}  // namespace baleen
