// Internal: the kernels behind grouped_matmul.h for sm_90a.
//
// bf16 with both widths multiples of 8 runs on the tensor cores (TMA wants rows of whole 16 bytes);
// fp32, and bf16 of other widths, on a plain tiled kernel in fp32. Both add every element's
// products in one fixed order, so the same inputs give the same bits.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

enum class GroupedProduct : unsigned char {
  kForward,             // result y [N, out]: y[n] = W[l(n)] x[n]
  kBackwardInput,       // result dx [N, in]: dx[n] = W[l(n)]^T dy[n]
  kBackwardInputOfTwo,  // result dx [N, in]: dx[n] = W[l(n)]^T dy[n] + W'[l(n)]^T dy'[n]
  kBackwardWeight,      // result dW [L, out, in] fp32: dW[l] (+)= sum_n dy[n] x[n]^T
};

struct GroupedMatmulCudaArgs {
  CudaElement element = CudaElement::kBF16;  // of x, dy, W, y and dx
  int64_t num_rows = 0;                      // N
  int64_t num_experts = 0;                   // L
  int64_t in = 0, out = 0;
  // [L + 1] in device memory, never read by the host: non-decreasing from 0 to N. What lies beyond
  // N is neither read nor written, whatever they say.
  const int32_t* offsets_L1 = nullptr;
  const void* left = nullptr;   // x (forward) or dy, 16-byte aligned
  const void* right = nullptr;  // W, or x for kBackwardWeight, 16-byte aligned
  // dy' and W' of kBackwardInputOfTwo, as the first.
  const void* second_left = nullptr;
  const void* second_right = nullptr;
  void* result = nullptr;  // 16-byte aligned
  bool add = true;         // dW is added to; else written, and zero for an expert without rows
};

struct GroupedMatmulPlan {
  bool tensor_cores = false;
  int cluster = 1;  // blocks that share the loads of B: 1 or 2
  int tile_m = 0, tile_n = 0;
  int threads = 0;
  int num_blocks = 0;  // persistent; 0: nothing to do
  int shared_bytes = 0;
};

// `cluster` 1 or 2 asks for one (the bench tries both), 0 for the better one.
GroupedMatmulPlan PlanGroupedMatmul(GroupedProduct product, const GroupedMatmulCudaArgs& args,
                                    int num_sms, int cluster = 0);

// Enqueues one kernel on `stream` (a cudaStream_t); before a dW that is written one more, which
// fills those without rows; none where there is nothing to do.
void LaunchGroupedMatmul(GroupedProduct product, const GroupedMatmulCudaArgs& args,
                         const GroupedMatmulPlan& plan, void* stream);
void GroupedMatmulCuda(GroupedProduct product, const GroupedMatmulCudaArgs& args, void* stream);

}  // namespace baleen
