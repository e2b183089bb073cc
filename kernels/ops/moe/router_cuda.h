// Internal: the kernels behind router.h's choice and its backward. Scores, weights and gradients
// are fp32; logits may be bf16.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

inline constexpr int64_t kRouterCudaMaxExperts = 1024;
inline constexpr int64_t kRouterCudaMaxGroups = 32;
inline constexpr int64_t kRouterCudaMaxChosen = 32;

struct RouterCudaParams {
  int E = 0, n_group = 1, topk_group = 1, A = 1;
  float factor = 1;
  bool norm_topk_prob = true;
};

struct RouteCudaArgs {
  RouterCudaParams params;
  CudaElement logits_element = CudaElement::kF32;
  int64_t tokens = 0;
  const void* logits_TE = nullptr;
  const float* bias_E = nullptr;     // null: ids are given
  float* scores_TE = nullptr;        // out
  int32_t* expert_ids_TA = nullptr;  // out; in where they are given
  float* weights_TA = nullptr;       // out
};
void RouteCuda(const RouteCudaArgs& args, void* stream);

struct RouteBackwardCudaArgs {
  RouterCudaParams params;
  int64_t tokens = 0;
  const float* scores_TE = nullptr;
  const int32_t* expert_ids_TA = nullptr;
  const float* dweights_TA = nullptr;
  const float* dscores_TE = nullptr;  // may be null
  float* dlogits_TE = nullptr;
};
void RouteBackwardCuda(const RouteBackwardCudaArgs& args, void* stream);

}  // namespace baleen
