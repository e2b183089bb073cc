#include "kernels/ops/moe/permute.h"

#include <cstring>
#include <limits>

#include "kernels/core/transfer.h"
#include "kernels/ops/bounds.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/moe/permute_cpu.h"
#include "kernels/ops/moe/permute_cuda.h"
#include "kernels/ops/stable_sort_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "permute";

// row_of_slot [T, A] points into `rows_ND` or is -1.
void CheckSlots(const Context& context, const Tensor& rows_ND, const Tensor& row_of_slot_TA) {
  CheckRank(kOp, "rows", rows_ND, 2);
  CheckRank(kOp, "row_of_slot", row_of_slot_TA, 2);
  CheckTensor(context, kOp, "rows", rows_ND, rows_ND.dtype(), rows_ND.shape());
  CheckTensor(context, kOp, "row_of_slot", row_of_slot_TA, DType::kI32, row_of_slot_TA.shape());
  if (OnCuda(context)) return;  // the host does not read what lies there
  CheckIndices(context, kOp, "row_of_slot", row_of_slot_TA, -1, rows_ND.dim(0));
}

Permutation BuildOnCuda(const Context& context, const Tensor& expert_ids_TA, int64_t first_expert,
                        int64_t num_experts, int64_t num_rows) {
  const int64_t slots = expert_ids_TA.num_elements();
  Permutation permutation;
  permutation.row_of_slot_TA = context.Empty(DType::kI32, expert_ids_TA.shape());
  permutation.offsets_L1 = context.Empty(DType::kI32, {num_experts + 1});
  const Tensor sorted_experts = context.Empty(DType::kI32, {slots});
  const Tensor sorted_slots = context.Empty(DType::kI32, {slots});
  const Tensor workspace =
      context.Empty(DType::kI32, {StableSortWorkspaceInts(slots, num_experts)});
  StableSortCuda({.count = slots,
                  .keys = expert_ids_TA.data<int32_t>(),
                  .first = first_expert,
                  .num_keys = num_experts,
                  .workspace = workspace.data<int32_t>(),
                  .sorted_keys = sorted_experts.data<int32_t>(),
                  .sorted_items = sorted_slots.data<int32_t>()},
                 context.stream());
  // Without a number the rows are written after it is known: two launches and a wait.
  SortedPlacesCudaArgs places{.count = slots,
                              .num_keys = num_experts,
                              .slots_per_row = expert_ids_TA.dim(1),
                              .sorted_keys = sorted_experts.data<int32_t>(),
                              .sorted_items = sorted_slots.data<int32_t>(),
                              .offsets = permutation.offsets_L1.data<int32_t>(),
                              .place_of_item = permutation.row_of_slot_TA.data<int32_t>()};
  if (num_rows == kUnknownRows) {
    SortedPlacesCuda(places, context.stream());
    const Tensor last = permutation.offsets_L1.Rows(num_experts, num_experts + 1);
    num_rows = CopyToHost(context, last).data<int32_t>()[0];
  }
  permutation.source_row_N = context.Empty(DType::kI32, {num_rows});
  places.num_rows = num_rows;
  places.row_of_place = permutation.source_row_N.data<int32_t>();
  SortedPlacesCuda(places, context.stream());
  return permutation;
}

}  // namespace

Permutation BuildPermutation(const Context& context, const Tensor& expert_ids_TA,
                             int64_t first_expert, int64_t num_experts, int64_t num_rows) {
  CheckRank(kOp, "expert_ids", expert_ids_TA, 2);
  CheckTensor(context, kOp, "expert_ids", expert_ids_TA, DType::kI32, expert_ids_TA.shape());
  CHECK(first_expert >= 0 && num_experts >= 0)
      << kOp << ": first expert " << first_expert << ", experts " << num_experts;
  const int64_t A = expert_ids_TA.dim(1), slots = expert_ids_TA.num_elements();
  CHECK_LE(slots, std::numeric_limits<int32_t>::max()) << kOp << ": slots of one microbatch";
  CHECK(num_rows >= kUnknownRows && num_rows <= slots) << kOp << ": " << num_rows << " rows";
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return BuildOnCuda(context, expert_ids_TA, first_expert, num_experts, num_rows);
    }
    NoCudaKernel(kOp);
  }
  Permutation permutation;
  permutation.row_of_slot_TA = context.Empty(DType::kI32, expert_ids_TA.shape());
  permutation.offsets_L1 = context.Empty(DType::kI32, {num_experts + 1});
  const std::vector<int32_t> sorted_slots = SortSlotsCpu(
      slots, expert_ids_TA.data<int32_t>(), first_expert, num_experts,
      permutation.row_of_slot_TA.data<int32_t>(), permutation.offsets_L1.data<int32_t>());
  const int64_t N = static_cast<int64_t>(sorted_slots.size());
  CHECK(num_rows == kUnknownRows || num_rows == N)
      << kOp << ": " << N << " slots in range, the caller expected " << num_rows;
  permutation.source_row_N = context.Empty(DType::kI32, {N});
  int32_t* const source_row = permutation.source_row_N.data<int32_t>();
  for (int64_t n = 0; n < N; ++n) source_row[n] = static_cast<int32_t>(sorted_slots[n] / A);
  return permutation;
}

Tensor GatherRows(const Context& context, const Tensor& x_TD, const Tensor& source_row_N) {
  CheckRank(kOp, "x", x_TD, 2);
  CheckRank(kOp, "source_row", source_row_N, 1);
  CheckTensor(context, kOp, "source_row", source_row_N, DType::kI32, source_row_N.shape());
  CheckTensor(context, kOp, "x", x_TD, x_TD.dtype(), x_TD.shape());
  const int64_t N = source_row_N.dim(0), row_bytes = x_TD.dim(1) * DTypeBytes(x_TD.dtype());
  const Tensor y_ND = context.Empty(x_TD.dtype(), {N, x_TD.dim(1)});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      GatherRowsCuda(N, row_bytes, x_TD.raw(), source_row_N.data<int32_t>(), y_ND.raw(),
                     context.stream());
      return y_ND;
    }
    NoCudaKernel(kOp);
  }
  CheckIndices(context, kOp, "source_row", source_row_N, 0, x_TD.dim(0));
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

Tensor GatherRows(const Context& context, const Tensor& x_TD, const Permutation& permutation) {
  const Tensor& row_of_slot_TA = permutation.row_of_slot_TA;
  if (!OnCuda(context)) return GatherRows(context, x_TD, permutation.source_row_N);
  CheckRank(kOp, "x", x_TD, 2);
  CheckTensor(context, kOp, "x", x_TD, x_TD.dtype(), {row_of_slot_TA.dim(0), x_TD.dim(1)});
  const Tensor y_ND = context.Empty(x_TD.dtype(), {permutation.source_row_N.dim(0), x_TD.dim(1)});
  if (y_ND.num_elements() == 0) return y_ND;
  if constexpr (kHaveCuda) {
    SpreadRowsCuda(x_TD.dim(0), row_of_slot_TA.dim(1), x_TD.dim(1) * DTypeBytes(x_TD.dtype()),
                   x_TD.raw(), row_of_slot_TA.data<int32_t>(), y_ND.raw(), context.stream());
    return y_ND;
  }
  NoCudaKernel(kOp);
}

Tensor GatherRowsBackward(const Context& context, const Tensor& dy_ND,
                          const Tensor& row_of_slot_TA) {
  CheckSlots(context, dy_ND, row_of_slot_TA);
  const int64_t tokens = row_of_slot_TA.dim(0), A = row_of_slot_TA.dim(1), D = dy_ND.dim(1);
  const Tensor dx_TD = context.Empty(dy_ND.dtype(), {tokens, D});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      SumRowsCuda({.element = ElementOf(kOp, "rows", dy_ND),
                   .tokens = tokens,
                   .A = A,
                   .D = D,
                   .x = dy_ND.raw(),
                   .row_of_slot_TA = row_of_slot_TA.data<int32_t>(),
                   .y = dx_TD.raw()},
                  context.stream());
      return dx_TD;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, "gather rows", dy_ND.bytes() + dx_TD.bytes());
  ForFloatOrDouble(context, kOp, dy_ND.dtype(), [&](auto element) {
    using T = decltype(element);
    GatherRowsBackwardCpu(tokens, A, D, dy_ND.data<T>(), row_of_slot_TA.data<int32_t>(),
                          dx_TD.data<T>());
  });
  return dx_TD;
}

Tensor GroupsOfTokens(const Context& context, const Tensor& ids_TA, int64_t num_groups,
                      int64_t group_size) {
  CheckRank(kOp, "ids", ids_TA, 2);
  CheckTensor(context, kOp, "ids", ids_TA, DType::kI32, ids_TA.shape());
  CHECK(num_groups > 0 && group_size > 0) << kOp << ": " << num_groups << " of " << group_size;
  const int64_t tokens = ids_TA.dim(0), A = ids_TA.dim(1);
  const Tensor groups_TM = context.Empty(DType::kI32, {tokens, num_groups});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      GroupsOfTokensCuda(tokens, A, num_groups, group_size, ids_TA.data<int32_t>(),
                         groups_TM.data<int32_t>(), context.stream());
      return groups_TM;
    }
    NoCudaKernel(kOp);
  }
  // Ids decide shapes: known in a dry context too.
  GroupsOfTokensCpu(tokens, A, num_groups, group_size, ids_TA.data<int32_t>(),
                    groups_TM.data<int32_t>());
  return groups_TM;
}

}  // namespace baleen
