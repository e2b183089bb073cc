// Internal: the kernels behind adamw.h. All arrays fp32; the working copy bf16, and
// the moments where bf16_moments says so.
#pragma once

#include <cstdint>

namespace baleen {

struct AdamwCudaArgs {
  int64_t count = 0;
  float lr = 0, beta1 = 0, beta2 = 0, rest1 = 0, rest2 = 0;  // rest = 1 - beta
  float correction1 = 1, correction2 = 1;                    // 1 - beta^t
  float eps = 0, weight_decay = 0;
  float* param = nullptr;
  const float* grad = nullptr;
  void* m = nullptr;  // fp32, or bf16
  void* v = nullptr;
  bool bf16_moments = false;
  const float* control_2 = nullptr;  // {clip scale, skip}
  void* working = nullptr;           // bf16 [count] or null
  // Elements [begin[n], begin[n + 1]) decay with decay[n] instead of weight_decay; null: all with
  // weight_decay.
  int num_segments = 0;
  const int64_t* begin_N1 = nullptr;
  const float* decay_N = nullptr;
};
void AdamwCuda(const AdamwCudaArgs& args, void* stream);

void ClipControlCuda(const double* sum_of_squares_1, double max_norm, float* control_2,
                     void* stream);
void ShareSkipFlagCuda(float* a_2, float* b_2, void* stream);

}  // namespace baleen
