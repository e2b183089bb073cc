#include "trainer/model/linear.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/fp8_linear.h"
#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/matmul.h"

namespace baleen {
namespace {

// As [out, in] or [L, out, in].
bool UsesFp8(const ModelContext& model, const Tensor& weight) {
  return model.options.gemm == GemmKind::kFp8Block && Fp8Fits(weight.dim(-2), weight.dim(-1));
}

}  // namespace

const Fp8Operand& ProjectionRows::AsRows(const Context& context) const {
  if (!as_rows_) as_rows_ = QuantiseRows(context, rows_);
  return *as_rows_;
}

const Fp8Operand& ProjectionRows::AsColumns(const Context& context) const {
  if (!as_columns_) as_columns_ = QuantiseColumns(context, rows_);
  return *as_columns_;
}

Tensor ProjectForward(const ModelContext& model, const ProjectionRows& x, int weight) {
  const Context& context = model.context;
  const Tensor& w = model.parameters.value(weight);
  if (!UsesFp8(model, w)) return Linear(context, x.tensor(), w);
  return Fp8Product(context, x.AsRows(context), QuantiseWeight(context, w, Fp8Side::kColumns));
}

Tensor ProjectBackwardInput(const ModelContext& model, const ProjectionRows& dy, int weight) {
  const Context& context = model.context;
  const Tensor& w = model.parameters.value(weight);
  if (!UsesFp8(model, w)) return LinearBackwardInput(context, dy.tensor(), w);
  return Fp8Product(context, dy.AsRows(context), QuantiseWeight(context, w, Fp8Side::kRows));
}

Tensor ProjectBackwardInputOfTwo(const ModelContext& model, const ProjectionRows& dya, int weight_a,
                                 const ProjectionRows& dyb, int weight_b) {
  const Tensor& wb = model.parameters.value(weight_b);
  const Tensor dx = ProjectBackwardInput(model, dya, weight_a);
  if (UsesFp8(model, wb)) {
    AddInPlace(model.context, dx, ProjectBackwardInput(model, dyb, weight_b));
  } else {
    Matmul(model.context, AsMatrix(dyb.tensor()), Transpose::kNo, AsMatrix(wb), Transpose::kNo,
           AsMatrix(dx), Accumulate::kAdd);
  }
  return dx;
}

void ProjectBackwardWeight(const ModelContext& model, const ProjectionRows& dy,
                           const ProjectionRows& x, int weight) {
  const Context& context = model.context;
  if (!UsesFp8(model, model.parameters.value(weight))) {
    LinearBackwardWeight(model, dy.tensor(), x.tensor(), weight);
    return;
  }
  const ParameterStore::GradientSum dw = model.parameters.sum(weight);
  Fp8ProductInto(context, dy.AsColumns(context), x.AsColumns(context), dw.tensor, dw.accumulate);
}

void LinearBackwardWeight(const ModelContext& model, const Tensor& dy, const Tensor& x,
                          int weight) {
  const ParameterStore::GradientSum dw = model.parameters.sum(weight);
  LinearBackwardWeight(model.context, dy, x, dw.tensor, dw.accumulate);
}

Tensor ProjectGroupsForward(const ModelContext& model, const ProjectionRows& x,
                            ExpertWeights weights, const Tensor& offsets_L1) {
  const Context& context = model.context;
  const Tensor w_LOI = model.parameters.StackedValue(weights.first, weights.count);
  if (!UsesFp8(model, w_LOI)) return GroupedLinear(context, x.tensor(), w_LOI, offsets_L1);
  return Fp8GroupedProduct(context, x.AsRows(context),
                           QuantiseWeight(context, w_LOI, Fp8Side::kColumns), offsets_L1);
}

Tensor ProjectGroupsBackwardInput(const ModelContext& model, const ProjectionRows& dy,
                                  ExpertWeights weights, const Tensor& offsets_L1) {
  const Context& context = model.context;
  const Tensor w_LOI = model.parameters.StackedValue(weights.first, weights.count);
  if (!UsesFp8(model, w_LOI)) {
    return GroupedLinearBackwardInput(context, dy.tensor(), w_LOI, offsets_L1);
  }
  return Fp8GroupedProduct(context, dy.AsRows(context),
                           QuantiseWeight(context, w_LOI, Fp8Side::kRows), offsets_L1);
}

Tensor ProjectGroupsBackwardInputOfTwo(const ModelContext& model, const ProjectionRows& dya,
                                       ExpertWeights weights_a, const ProjectionRows& dyb,
                                       ExpertWeights weights_b, const Tensor& offsets_L1) {
  const Context& context = model.context;
  const Tensor wa_LOI = model.parameters.StackedValue(weights_a.first, weights_a.count);
  const Tensor wb_LOI = model.parameters.StackedValue(weights_b.first, weights_b.count);
  if (!UsesFp8(model, wa_LOI)) {
    return GroupedLinearBackwardInputOfTwo(context, dya.tensor(), wa_LOI, dyb.tensor(), wb_LOI,
                                           offsets_L1);
  }
  const Tensor dx = ProjectGroupsBackwardInput(model, dya, weights_a, offsets_L1);
  AddInPlace(context, dx, ProjectGroupsBackwardInput(model, dyb, weights_b, offsets_L1));
  return dx;
}

void ProjectGroupsBackwardWeight(const ModelContext& model, const Tensor& dy, const Tensor& x,
                                 ExpertWeights weights, const Tensor& offsets_L1) {
  const ParameterStore::GradientSum dw = model.parameters.StackedSum(weights.first, weights.count);
  GroupedLinearBackwardWeight(model.context, dy, x, offsets_L1, dw.tensor, dw.accumulate);
}

std::vector<ProjectionKind> ProjectionKinds(const ParameterStore& parameters) {
  constexpr absl::string_view kParts[] = {"q_a_proj",  "q_b_proj", "kv_a_proj_with_mqa",
                                          "kv_b_proj", "o_proj",   "gate_proj",
                                          "up_proj",   "down_proj"};
  constexpr absl::string_view kOwners[] = {"mlp.experts", "mlp.shared_experts", "mlp"};
  std::vector<ProjectionKind> kinds;
  for (const Parameter& parameter : parameters.parameters()) {
    for (const absl::string_view part : kParts) {
      if (!absl::EndsWith(parameter.name, absl::StrCat(".", part, ".weight"))) continue;
      ProjectionKind kind{std::string(part), parameter.box.extent, false};
      for (const absl::string_view owner : kOwners) {
        if (absl::StrContains(parameter.name, absl::StrCat(".", owner, "."))) {
          kind.name = absl::StrCat(owner, ".", part);
          break;
        }
      }
      kind.fits = Fp8Fits(kind.shape[0], kind.shape[1]);
      const bool known = std::any_of(kinds.begin(), kinds.end(), [&](const ProjectionKind& other) {
        return other.name == kind.name && other.shape == kind.shape;
      });
      if (!known) kinds.push_back(std::move(kind));
    }
  }
  return kinds;
}

}  // namespace baleen
