// Internal: the experts' products in block FP8 for sm_90a, forward and for the gradient of the
// input: both are rows of codes times rows of codes (fp8_quantise.h transposes the weights).
//
// Every element is one sum in a fixed order: the same inputs give the same bits, and a row's bits
// depend on no other row.
#pragma once

#include <cstdint>

namespace baleen {

// C[n, :] = sum over K of A[n, :] W[l(n)][:, :]^T, rows of A sorted by expert.
struct Fp8GroupedCudaArgs {
  int64_t num_rows = 0;     // N
  int64_t num_experts = 0;  // L
  int64_t columns = 0;      // of C: a multiple of 8
  int64_t depth = 0;        // K: a multiple of 128
  // [L + 1] in device memory, never read by the host: non-decreasing from 0 to N. What lies beyond
  // N is neither read nor written, whatever they say.
  const int32_t* offsets_L1 = nullptr;
  const void* a_codes = nullptr;    // [>= N, K]
  const float* a_scales = nullptr;  // [K / 128, a_scale_stride], a multiple of 4
  int64_t a_scale_stride = 0;
  const void* b_codes = nullptr;    // [L * columns, K]
  const float* b_scales = nullptr;  // [L * ceil(columns / 128), b_scale_stride]
  int64_t b_scale_stride = 0;
  void* result = nullptr;  // bf16 [N, columns]
};

struct Fp8GroupedPlan {
  int cluster = 1;  // blocks that share the loads of B: 1 or 2
  int tile_m = 0, tile_n = 0;
  int threads = 0;
  int num_blocks = 0;  // persistent; 0: nothing to do
  int shared_bytes = 0;
};

// `cluster` 1 or 2, `tile_n` 128 or 192 ask for one (the bench tries them), 0 for the better one.
Fp8GroupedPlan PlanFp8Grouped(const Fp8GroupedCudaArgs& args, int num_sms, int cluster = 0,
                              int tile_n = 0);

// Enqueues at most one kernel on `stream` (a cudaStream_t).
void LaunchFp8Grouped(const Fp8GroupedCudaArgs& args, const Fp8GroupedPlan& plan, void* stream);
void Fp8GroupedCuda(const Fp8GroupedCudaArgs& args, void* stream);

}  // namespace baleen
