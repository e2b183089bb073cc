// The dense SwiGLU MLP of the first layers, and the shared expert of the others:
//   y = W_down (silu(W_gate x) * (W_up x))
//
// The inner width is cut over tp: rows are gathered over the group, the partial outputs summed and
// scattered back. Many rows go through in chunks (ModelOptions::mlp_chunk), unless all is to be
// kept: the inner activations of one chunk are what lives at a time, and the backward forms its
// weight gradients while they do. Legend: R own rows, G = R * tp rows of the group, D hidden.
#pragma once

#include "trainer/model/model_context.h"

namespace baleen {

class Mlp {
 public:
  // Declares `prefix`.{gate,up,down}_proj.weight.
  Mlp(int64_t hidden_size, int64_t intermediate_size, const std::string& prefix,
      const Placement& placement, ParameterStore& store);

  struct Inner {
    Tensor gate, up, hidden;  // hidden = swiglu(gate, up); the group's rows, own columns
    Tensor dgate, dup;        // of the backward
  };
  struct Saved {
    Tensor x_RD;
    Tensor x_GD;   // the group's rows
    Inner inner;   // empty with several chunks
    Tensor dy_GD;  // for BackwardWeight; empty with several chunks
  };

  Tensor Forward(const ModelContext& model, const Tensor& x_RD, Saved& saved) const;
  Tensor BackwardInput(const ModelContext& model, const Tensor& dy_RD, Saved& saved) const;
  void BackwardWeight(const ModelContext& model, Saved& saved) const;
  // Frees what the backward makes again from x (selective recompute).
  void DropExpanded(Saved& saved) const {
    saved.x_GD = Tensor();
    saved.inner = Inner();
  }

 private:
  Inner Expand(const ModelContext& model, const Tensor& x_GD) const;
  Tensor InnerBackward(const ModelContext& model, const Tensor& dy_GD, Inner& inner) const;
  void InnerWeights(const ModelContext& model, const Tensor& x_GD, const Tensor& dy_GD,
                    const Inner& inner) const;
  std::string label_;
  int gate_proj_, up_proj_, down_proj_;
};

}  // namespace baleen
