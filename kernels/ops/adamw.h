// AdamW (decoupled weight decay) on flat ranges:
//
//   g = grad * clip_scale;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   param -= lr * ( (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps) + weight_decay * param )
// clip_scale and the skip flag are read from device memory: the host never waits for a norm
// (architecture, decisions).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct AdamwParams {
  double lr = 0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0;
  int64_t step = 1;  // t, counted from 1
};

// All flat and of one length; param and grad of one dtype, kF32 (on the CPU kF64 too); m and v of
// that dtype too, or both kBF16: then they are read as they are and rounded once when written,
// while the parameter's update takes them unrounded.
struct AdamwTensors {
  Tensor param, grad, m, v;
  // kBF16: gets param, rounded, wherever param is written. May be empty.
  Tensor working;
  // Parameters of one range that decay differently: elements [decay_begin_N1[n],
  // decay_begin_N1[n+1]) (kI64 [N + 1], rising from 0 to the length) decay with decay_N[n] (dtype
  // of param). Both empty: all decay with params.weight_decay.
  Tensor decay_begin_N1, decay_N;
};

// One launch, whatever the number of parameters in the range. control_2 [2], same dtype as the
// gradient: {clip scale, skip}: skip != 0 leaves everything as it is. Fastest on CUDA where all
// ranges begin at a multiple of 16 bytes.
void AdamwUpdate(const Context& context, const AdamwParams& params, const AdamwTensors& tensors,
                 const Tensor& control_2);
// The same for one parameter without a working copy.
void AdamwUpdate(const Context& context, const AdamwParams& params, const Tensor& param,
                 const Tensor& grad, const Tensor& m, const Tensor& v, const Tensor& control_2);

// control_2 = {min(1, max_norm / (sqrt(sum_of_squares) + 1e-6)), 1 if sum_of_squares is not
// finite}; max_norm <= 0: no clipping. sum_of_squares_1 is kF64 [1].
void ClipControl(const Context& context, const Tensor& sum_of_squares_1, double max_norm,
                 const Tensor& control_2);

// Both clip groups skip where one does: a step is taken whole or not at all.
void ShareSkipFlag(const Context& context, const Tensor& a_2, const Tensor& b_2);

}  // namespace baleen
