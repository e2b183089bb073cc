#include "kernels/ops/permute.h"

#include <cstring>
#include <limits>

#include "kernels/ops/bounds.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/permute_cpu.h"

namespace baleen {
namespace {

constexpr char kOp[] = "permute";

// row_of_slot [T, A] points into `rows_ND` or is -1.
void CheckSlots(const Context& context, const Tensor& rows_ND, const Tensor& row_of_slot_TA) {
  CheckRank(kOp, "rows", rows_ND, 2);
  CheckRank(kOp, "row_of_slot", row_of_slot_TA, 2);
  CheckTensor(context, kOp, "row_of_slot", row_of_slot_TA, DType::kI32, row_of_slot_TA.shape());
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel(kOp);
  CheckIndices(context, kOp, "row_of_slot", row_of_slot_TA, -1, rows_ND.dim(0));
}

}  // namespace

Permutation BuildPermutation(const Context& context, const Tensor& expert_ids_TA,
                             int64_t first_expert, int64_t num_experts) {
  CheckRank(kOp, "expert_ids", expert_ids_TA, 2);
  CheckTensor(context, kOp, "expert_ids", expert_ids_TA, DType::kI32, expert_ids_TA.shape());
  CHECK(first_expert >= 0 && num_experts >= 0)
      << kOp << ": first expert " << first_expert << ", experts " << num_experts;
  const int64_t A = expert_ids_TA.dim(1), slots = expert_ids_TA.num_elements();
  CHECK_LE(slots, std::numeric_limits<int32_t>::max()) << kOp << ": slots of one microbatch";
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel(kOp);
  Permutation permutation;
  permutation.row_of_slot_TA = context.Empty(DType::kI32, expert_ids_TA.shape());
  permutation.offsets_L1 = context.Empty(DType::kI32, {num_experts + 1});
  const std::vector<int32_t> sorted_slots = SortSlotsCpu(
      slots, expert_ids_TA.data<int32_t>(), first_expert, num_experts,
      permutation.row_of_slot_TA.data<int32_t>(), permutation.offsets_L1.data<int32_t>());
  const int64_t N = static_cast<int64_t>(sorted_slots.size());
  permutation.source_row_N = context.Empty(DType::kI32, {N});
  int32_t* const source_row = permutation.source_row_N.data<int32_t>();
  for (int64_t n = 0; n < N; ++n) source_row[n] = static_cast<int32_t>(sorted_slots[n] / A);
  return permutation;
}

Tensor GatherRows(const Context& context, const Tensor& x_TD, const Tensor& source_row_N) {
  CheckRank(kOp, "x", x_TD, 2);
  CheckRank(kOp, "source_row", source_row_N, 1);
  CheckTensor(context, kOp, "source_row", source_row_N, DType::kI32, source_row_N.shape());
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel(kOp);
  CheckIndices(context, kOp, "source_row", source_row_N, 0, x_TD.dim(0));
  const int64_t N = source_row_N.dim(0), row_bytes = x_TD.dim(1) * DTypeBytes(x_TD.dtype());
  const Tensor y_ND = context.Empty(x_TD.dtype(), {N, x_TD.dim(1)});
  CountBytes(context, "gather rows", 2 * y_ND.bytes());
  // Which experts a row is for is known dry too, what is in it is not.
  if (context.dry() && x_TD.dtype() != DType::kI32) return y_ND;
  for (int64_t n = 0; n < N; ++n) {
    std::memcpy(static_cast<char*>(y_ND.raw()) + n * row_bytes,
                static_cast<const char*>(x_TD.raw()) + source_row_N.data<int32_t>()[n] * row_bytes,
                static_cast<size_t>(row_bytes));
  }
  return y_ND;
}

Tensor GatherRowsBackward(const Context& context, const Tensor& dy_ND,
                          const Tensor& row_of_slot_TA) {
  CheckSlots(context, dy_ND, row_of_slot_TA);
  const int64_t tokens = row_of_slot_TA.dim(0), A = row_of_slot_TA.dim(1), D = dy_ND.dim(1);
  const Tensor dx_TD = context.Empty(dy_ND.dtype(), {tokens, D});
  CountBytes(context, "gather rows", dy_ND.bytes() + dx_TD.bytes());
  ForFloatOrDouble(context, kOp, dy_ND.dtype(), [&](auto element) {
    using T = decltype(element);
    GatherRowsBackwardCpu(tokens, A, D, dy_ND.data<T>(), row_of_slot_TA.data<int32_t>(),
                          dx_TD.data<T>());
  });
  return dx_TD;
}

Tensor CombineRows(const Context& context, const Tensor& x_ND, const Tensor& row_of_slot_TA,
                   const Tensor& weights_TA) {
  CheckSlots(context, x_ND, row_of_slot_TA);
  CheckStatistics(context, kOp, "weights", weights_TA, x_ND.dtype(), row_of_slot_TA.shape());
  const int64_t tokens = row_of_slot_TA.dim(0), A = row_of_slot_TA.dim(1), D = x_ND.dim(1);
  const Tensor y_TD = context.Empty(x_ND.dtype(), {tokens, D});
  CountBytes(context, "combine rows", x_ND.bytes() + y_TD.bytes());
  ForFloatOrDouble(context, kOp, x_ND.dtype(), [&](auto element) {
    using T = decltype(element);
    CombineRowsCpu(tokens, A, D, x_ND.data<T>(), row_of_slot_TA.data<int32_t>(),
                   weights_TA.data<T>(), y_TD.data<T>());
  });
  return y_TD;
}

CombineGradients CombineRowsBackward(const Context& context, const Tensor& dy_TD,
                                     const Tensor& x_ND, const Tensor& row_of_slot_TA,
                                     const Tensor& weights_TA) {
  CheckSlots(context, x_ND, row_of_slot_TA);
  CheckStatistics(context, kOp, "weights", weights_TA, x_ND.dtype(), row_of_slot_TA.shape());
  const int64_t tokens = row_of_slot_TA.dim(0), A = row_of_slot_TA.dim(1), D = x_ND.dim(1);
  CheckTensor(context, kOp, "dy", dy_TD, x_ND.dtype(), {tokens, D});
  const CombineGradients gradients{context.Zeros(x_ND.dtype(), x_ND.shape()),
                                   context.Empty(weights_TA.dtype(), {tokens, A})};
  CountBytes(context, "combine rows", 2 * x_ND.bytes() + dy_TD.bytes());
  ForFloatOrDouble(context, kOp, x_ND.dtype(), [&](auto element) {
    using T = decltype(element);
    CombineRowsBackwardCpu(tokens, A, D, dy_TD.data<T>(), x_ND.data<T>(),
                           row_of_slot_TA.data<int32_t>(), weights_TA.data<T>(),
                           gradients.dx_ND.data<T>(), gradients.dweights_TA.data<T>());
  });
  return gradients;
}

}  // namespace baleen
