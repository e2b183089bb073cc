// The dense SwiGLU MLP of the first layers, and the shared expert of the others:
//   y = W_down (silu(W_gate x) * (W_up x))
#pragma once

#include "trainer/model/model_context.h"

namespace baleen {

class Mlp {
 public:
  // Declares `prefix`.{gate,up,down}_proj.weight.
  Mlp(int64_t hidden_size, int64_t intermediate_size, const std::string& prefix,
      ParameterStore& store);

  struct Saved {
    Tensor x;
    Tensor gate, up, hidden;  // hidden = swiglu(gate, up)
    Tensor dy, dgate, dup;    // for BackwardWeight
  };

  Tensor Forward(const ModelContext& model, const Tensor& x, Saved& saved) const;
  Tensor BackwardInput(const ModelContext& model, const Tensor& dy, Saved& saved) const;
  void BackwardWeight(const ModelContext& model, Saved& saved) const;
  // Frees what the backward makes again from x (selective recompute).
  void DropExpanded(Saved& saved) const { saved.gate = saved.up = saved.hidden = Tensor(); }

 private:
  void Expand(const ModelContext& model, Saved& saved) const;
  int gate_proj_, up_proj_, down_proj_;
};

}  // namespace baleen
