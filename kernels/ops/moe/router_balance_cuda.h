// Internal: the kernels behind router.h's counts, balance statistics and bias update. Scores and
// sums are fp32.
#pragma once

#include <cstdint>

namespace baleen {

// As many counters as fit a block's shared memory.
inline constexpr int64_t kCountExpertsCudaMax = 8192;
// counts[e] += how often e comes among ids; ids outside [0, num_experts) are passed over. Integer
// adds: the same result in any order.
void CountExpertsCuda(int64_t count, const int32_t* ids, int64_t num_experts, int64_t* counts_E,
                      void* stream);

struct BalanceStatsCudaArgs {
  int64_t tokens = 0, E = 0, num_sequences = 0, top_k = 0;
  const float* scores_TE = nullptr;
  const int32_t* sequence_T = nullptr;
  float* workspace = nullptr;    // BalanceWorkspaceFloats
  float* counts_BE = nullptr;    // out
  float* prob_sum_BE = nullptr;  // out
};
int64_t BalanceWorkspaceFloats(int64_t tokens, int64_t E, int64_t num_sequences);
void BalanceStatsCuda(const BalanceStatsCudaArgs& args, void* stream);

struct BalanceBackwardCudaArgs {
  int64_t tokens = 0, E = 0;
  const float* scores_TE = nullptr;
  const int32_t* sequence_T = nullptr;
  const float* coefficient_BE = nullptr;
  float* dscores_TE = nullptr;
};
void BalanceBackwardCuda(const BalanceBackwardCudaArgs& args, void* stream);

// bias[e] += speed where counts[e] is below the mean, -= where above.
void UpdateRouterBiasCuda(int64_t num_experts, const int64_t* counts_E, double speed, float* bias_E,
                          void* stream);

}  // namespace baleen
