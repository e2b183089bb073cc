#include "trainer/model/linear.h"

#include <algorithm>

#include "absl/strings/match.h"
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

void ProjectBackwardWeight(const ModelContext& model, const ProjectionRows& dy,
                           const ProjectionRows& x, int weight) {
  const Context& context = model.context;
  const Tensor& dw = model.parameters.grad(weight);
  if (!UsesFp8(model, dw)) {
    LinearBackwardWeight(context, dy.tensor(), x.tensor(), dw);
    return;
  }
  AddFp8Product(context, dy.AsColumns(context), x.AsColumns(context), dw);
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

void ProjectGroupsBackwardWeight(const ModelContext& model, const Tensor& dy, const Tensor& x,
                                 ExpertWeights weights, const Tensor& offsets_L1) {
  GroupedLinearBackwardWeight(model.context, dy, x, offsets_L1,
                              model.parameters.StackedGrad(weights.first, weights.count));
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
