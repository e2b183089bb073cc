#include "trainer/model/row_exchange.h"

#include "kernels/ops/moe/permute.h"

namespace baleen {
namespace {

Shape WithRows(const Tensor& x, int64_t rows) {
  Shape shape = x.shape();
  shape[0] = rows;
  return shape;
}

Tensor AllGatherRows(const Context& context, Communicator& axis, absl::string_view label,
                     const Tensor& own) {
  if (axis.size() == 1) return own;
  const Tensor whole = context.Empty(own.dtype(), WithRows(own, own.dim(0) * axis.size()));
  axis.AllGather(label, own, whole);
  return whole;
}

Tensor ReduceScatterRows(const Context& context, Communicator& axis, absl::string_view label,
                         const Tensor& sum) {
  if (axis.size() == 1) return sum;
  const Tensor own = context.Empty(sum.dtype(), WithRows(sum, sum.dim(0) / axis.size()));
  axis.ReduceScatter(label, sum, own);
  return own;
}

// y[n] = x[order[n]] for rows of any shape.
Tensor Reorder(const Context& context, const Tensor& x, const Tensor& order) {
  const Tensor flat = x.Reshaped({x.dim(0), x.num_elements() / x.dim(0)});
  return GatherRows(context, flat, order).Reshaped(x.shape());
}

}  // namespace

Tensor GatherGroup(const ModelContext& model, absl::string_view label, const Tensor& own_R) {
  return AllGatherRows(model.context, *model.axes.tp, label, own_R);
}

Tensor ReduceScatterGroup(const ModelContext& model, absl::string_view label, const Tensor& sum_G) {
  return ReduceScatterRows(model.context, *model.axes.tp, label, sum_G);
}

Tensor GatherKeys(const ModelContext& model, const Batch& batch, absl::string_view label,
                  const Tensor& own_R) {
  const Tensor places = AllGatherRows(model.context, *model.axes.cp_tp, label, own_R);
  return batch.place_of_key_T.empty() ? places
                                      : Reorder(model.context, places, batch.place_of_key_T);
}

Tensor ReduceScatterKeys(const ModelContext& model, const Batch& batch, absl::string_view label,
                         const Tensor& sum_T) {
  const Tensor places =
      batch.key_of_place_T.empty() ? sum_T : Reorder(model.context, sum_T, batch.key_of_place_T);
  return ReduceScatterRows(model.context, *model.axes.cp_tp, label, places);
}

}  // namespace baleen
