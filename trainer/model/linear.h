// Products with the projections of attention, MLPs and experts: in the dtype of activations, or in
// block FP8 where the stage asks for it (precision.gemm) and the widths allow (Fp8Fits). What stays
// in the activations' dtype calls Linear itself: head, router's gate, indexer, MTP's eh_proj, and
// kv_b_proj where the sparse form absorbs it into attention.
//
//   y = x W^T     dx = dy W     dW += dy^T x
//
// Where two projections share their input, dx = dya Wa + dyb Wb is one function (OfTwo), with one
// dx in memory: experts in one sum, the others by adding to it. In FP8: two, and a sum.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/ops/linear/fp8_quantise.h"
#include "trainer/model/model_context.h"

namespace baleen {

// Rows that several projections multiply: quantised once, by the first that needs it.
class ProjectionRows {
 public:
  ProjectionRows(const Tensor& rows) : rows_(rows) {}  // NOLINT: a tensor is such rows
  const Tensor& tensor() const { return rows_; }
  const Fp8Operand& AsRows(const Context& context) const;     // for y and dx
  const Fp8Operand& AsColumns(const Context& context) const;  // for dW

 private:
  Tensor rows_;
  mutable std::optional<Fp8Operand> as_rows_, as_columns_;
};

Tensor ProjectForward(const ModelContext& model, const ProjectionRows& x, int weight);
Tensor ProjectBackwardInput(const ModelContext& model, const ProjectionRows& dy, int weight);
Tensor ProjectBackwardInputOfTwo(const ModelContext& model, const ProjectionRows& dya, int weight_a,
                                 const ProjectionRows& dyb, int weight_b);
void ProjectBackwardWeight(const ModelContext& model, const ProjectionRows& dy,
                           const ProjectionRows& x, int weight);
// The same for a weight whose products stay in the activations' dtype.
void LinearBackwardWeight(const ModelContext& model, const Tensor& dy, const Tensor& x, int weight);

// One projection of all experts of a rank, stacked: parameters first .. first + count - 1.
struct ExpertWeights {
  int first, count;
};
Tensor ProjectGroupsForward(const ModelContext& model, const ProjectionRows& x,
                            ExpertWeights weights, const Tensor& offsets_L1);
Tensor ProjectGroupsBackwardInput(const ModelContext& model, const ProjectionRows& dy,
                                  ExpertWeights weights, const Tensor& offsets_L1);
Tensor ProjectGroupsBackwardInputOfTwo(const ModelContext& model, const ProjectionRows& dya,
                                       ExpertWeights weights_a, const ProjectionRows& dyb,
                                       ExpertWeights weights_b, const Tensor& offsets_L1);
// Never in FP8: an expert's rows are no multiple of the 128 that share a scale.
void ProjectGroupsBackwardWeight(const ModelContext& model, const Tensor& dy, const Tensor& x,
                                 ExpertWeights weights, const Tensor& offsets_L1);

// For the banner: the projections of a rank by kind ("q_a_proj"), in the order of declaration, and
// whether their products are in FP8 where the stage asks for it.
struct ProjectionKind {
  std::string name;
  Shape shape;  // of this rank's weight
  bool fits = false;
};
std::vector<ProjectionKind> ProjectionKinds(const ParameterStore& parameters);

}  // namespace baleen
