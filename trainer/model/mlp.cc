#include "trainer/model/mlp.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/swiglu.h"

namespace baleen {

Mlp::Mlp(int64_t hidden_size, int64_t intermediate_size, const std::string& prefix,
         ParameterStore& store)
    : gate_proj_(store.Declare(prefix + ".gate_proj.weight", {intermediate_size, hidden_size},
                               ParameterGroup::kMain)),
      up_proj_(store.Declare(prefix + ".up_proj.weight", {intermediate_size, hidden_size},
                             ParameterGroup::kMain)),
      down_proj_(store.Declare(prefix + ".down_proj.weight", {hidden_size, intermediate_size},
                               ParameterGroup::kMain)) {}

void Mlp::Expand(const ModelContext& model, Saved& saved) const {
  saved.gate = Linear(model.context, saved.x, model.parameters.value(gate_proj_));
  saved.up = Linear(model.context, saved.x, model.parameters.value(up_proj_));
  saved.hidden = Swiglu(model.context, saved.gate, saved.up);
}

Tensor Mlp::Forward(const ModelContext& model, const Tensor& x, Saved& saved) const {
  saved.x = x;
  Expand(model, saved);
  return Linear(model.context, saved.hidden, model.parameters.value(down_proj_));
}

Tensor Mlp::BackwardInput(const ModelContext& model, const Tensor& dy, Saved& saved) const {
  const Context& context = model.context;
  if (saved.gate.empty()) Expand(model, saved);
  saved.dy = dy;
  const Tensor dhidden = LinearBackwardInput(context, dy, model.parameters.value(down_proj_));
  const SwigluGradients gradients = SwigluBackward(context, dhidden, saved.gate, saved.up);
  saved.dgate = gradients.dgate;
  saved.dup = gradients.dup;
  const Tensor dx = LinearBackwardInput(context, saved.dgate, model.parameters.value(gate_proj_));
  AddInPlace(context, dx,
             LinearBackwardInput(context, saved.dup, model.parameters.value(up_proj_)));
  return dx;
}

void Mlp::BackwardWeight(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  LinearBackwardWeight(context, saved.dy, saved.hidden, model.parameters.grad(down_proj_));
  LinearBackwardWeight(context, saved.dgate, saved.x, model.parameters.grad(gate_proj_));
  LinearBackwardWeight(context, saved.dup, saved.x, model.parameters.grad(up_proj_));
}

}  // namespace baleen
