#include "trainer/model/mlp.h"

#include <algorithm>

#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"
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

namespace {

// Calls body(begin, end) for chunks of rows; false, and nothing is done, where one chunk has all.
template <typename Body>
bool InChunks(const ModelContext& model, int64_t rows, Body body) {
  const int64_t step = model.options.mlp_chunk;
  if (rows <= step || model.options.recompute == RecomputeMode::kNone) return false;
  for (int64_t begin = 0; begin < rows; begin += step) body(begin, std::min(rows, begin + step));
  return true;
}

}  // namespace

Mlp::Inner Mlp::Expand(const ModelContext& model, const Tensor& x_GD) const {
  const ProjectionRows x(x_GD);
  Inner inner;
  inner.gate = ProjectForward(model, x, gate_proj_);
  inner.up = ProjectForward(model, x, up_proj_);
  inner.hidden = Swiglu(model.context, inner.gate, inner.up);
  return inner;
}

Tensor Mlp::Forward(const ModelContext& model, const Tensor& x_RD, Saved& saved) const {
  saved.x_RD = x_RD;
  saved.x_GD = GatherGroup(model, label_, x_RD);
  const int64_t rows = saved.x_GD.dim(0);
  Tensor y_GD;
  const bool chunked = InChunks(model, rows, [&](int64_t begin, int64_t end) {
    if (y_GD.empty()) y_GD = model.context.Empty(x_RD.dtype(), saved.x_GD.shape());
    const Inner inner = Expand(model, saved.x_GD.Rows(begin, end));
    Copy(model.context, ProjectForward(model, inner.hidden, down_proj_), y_GD.Rows(begin, end));
  });
  if (!chunked) {
    saved.inner = Expand(model, saved.x_GD);
    y_GD = ProjectForward(model, saved.inner.hidden, down_proj_);
  }
  return ReduceScatterGroup(model, label_, y_GD);
}

// dx of the group's rows, a partial sum over the inner width.
Tensor Mlp::InnerBackward(const ModelContext& model, const Tensor& dy_GD, Inner& inner) const {
  const Context& context = model.context;
  const SwigluGradients gradients =
      SwigluBackward(context, ProjectBackwardInput(model, dy_GD, down_proj_), inner.gate, inner.up);
  inner.dgate = gradients.dgate;
  inner.dup = gradients.dup;
  return ProjectBackwardInputOfTwo(model, inner.dgate, gate_proj_, inner.dup, up_proj_);
}

void Mlp::InnerWeights(const ModelContext& model, const Tensor& x_GD, const Tensor& dy_GD,
                       const Inner& inner) const {
  ProjectBackwardWeight(model, dy_GD, inner.hidden, down_proj_);
  const ProjectionRows x(x_GD);
  ProjectBackwardWeight(model, inner.dgate, x, gate_proj_);
  ProjectBackwardWeight(model, inner.dup, x, up_proj_);
}

Tensor Mlp::BackwardInput(const ModelContext& model, const Tensor& dy_RD, Saved& saved) const {
  if (saved.x_GD.empty()) saved.x_GD = GatherGroup(model, label_, saved.x_RD);
  const Tensor dy_GD = GatherGroup(model, label_, dy_RD);
  Tensor dx_GD;
  const bool chunked = InChunks(model, dy_GD.dim(0), [&](int64_t begin, int64_t end) {
    if (dx_GD.empty()) dx_GD = model.context.Empty(dy_GD.dtype(), dy_GD.shape());
    const Tensor x = saved.x_GD.Rows(begin, end), dy = dy_GD.Rows(begin, end);
    Inner inner = Expand(model, x);
    Copy(model.context, InnerBackward(model, dy, inner), dx_GD.Rows(begin, end));
    InnerWeights(model, x, dy, inner);
  });
  if (!chunked) {
    if (saved.inner.gate.empty()) saved.inner = Expand(model, saved.x_GD);
    saved.dy_GD = dy_GD;
    dx_GD = InnerBackward(model, dy_GD, saved.inner);
  }
  return ReduceScatterGroup(model, label_, dx_GD);
}

void Mlp::BackwardWeight(const ModelContext& model, Saved& saved) const {
  if (saved.dy_GD.empty()) return;  // formed chunk by chunk
  InnerWeights(model, saved.x_GD, saved.dy_GD, saved.inner);
}

}  // namespace baleen
