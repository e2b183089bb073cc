#include "trainer/model/mlp.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/swiglu.h"
#include "trainer/model/linear.h"
#include "trainer/model/row_exchange.h"

namespace baleen {

Mlp::Mlp(int64_t hidden_size, int64_t intermediate_size, const std::string& prefix,
         const Placement& placement, ParameterStore& store)
    : label_(prefix) {
  const auto declare = [&](const char* name, Shape shape, int dim) {
    return store.DeclareShard(prefix + name, std::move(shape), dim, placement.tp_rank,
                              placement.tp_size, ParameterGroup::kTensor);
  };
  gate_proj_ = declare(".gate_proj.weight", {intermediate_size, hidden_size}, 0);
  up_proj_ = declare(".up_proj.weight", {intermediate_size, hidden_size}, 0);
  down_proj_ = declare(".down_proj.weight", {hidden_size, intermediate_size}, 1);
}

void Mlp::Expand(const ModelContext& model, Saved& saved) const {
  saved.x_GD = GatherGroup(model, label_, saved.x_RD);
  const ProjectionRows x(saved.x_GD);
  saved.gate = ProjectForward(model, x, gate_proj_);
  saved.up = ProjectForward(model, x, up_proj_);
  saved.hidden = Swiglu(model.context, saved.gate, saved.up);
}

Tensor Mlp::Forward(const ModelContext& model, const Tensor& x_RD, Saved& saved) const {
  saved.x_RD = x_RD;
  Expand(model, saved);
  const Tensor y_GD = ProjectForward(model, saved.hidden, down_proj_);
  return ReduceScatterGroup(model, label_, y_GD);
}

Tensor Mlp::BackwardInput(const ModelContext& model, const Tensor& dy_RD, Saved& saved) const {
  const Context& context = model.context;
  if (saved.gate.empty()) Expand(model, saved);
  saved.dy_GD = GatherGroup(model, label_, dy_RD);
  const Tensor dhidden = ProjectBackwardInput(model, saved.dy_GD, down_proj_);
  const SwigluGradients gradients = SwigluBackward(context, dhidden, saved.gate, saved.up);
  saved.dgate = gradients.dgate;
  saved.dup = gradients.dup;
  const Tensor dx = ProjectBackwardInput(model, saved.dgate, gate_proj_);
  AddInPlace(context, dx, ProjectBackwardInput(model, saved.dup, up_proj_));
  return ReduceScatterGroup(model, label_, dx);
}

void Mlp::BackwardWeight(const ModelContext& model, Saved& saved) const {
  ProjectBackwardWeight(model, saved.dy_GD, saved.hidden, down_proj_);
  const ProjectionRows x(saved.x_GD);
  ProjectBackwardWeight(model, saved.dgate, x, gate_proj_);
  ProjectBackwardWeight(model, saved.dup, x, up_proj_);
}

}  // namespace baleen
