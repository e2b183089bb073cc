// On the GPU one kernel takes all experts (grouped_matmul_cuda.h).
// On the CPU the definition is the header's formula with one Matmul for each expert's rows: since a
// row's bits do not depend on the other rows of a call (matmul_cpu.cc), it does not matter which
// tokens share an expert.
#include "kernels/ops/linear/grouped_matmul.h"

#include <cstdint>
#include <vector>

#include "kernels/ops/dispatch.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/linear/matmul_cpu.h"

namespace baleen {
namespace {

constexpr char kOp[] = "grouped_matmul";

enum class Weight : uint8_t { kValues, kGradient };

// The dtype of W or dW beside rows of `rows`.
DType WeightOf(DType rows, Weight weight) {
  return weight == Weight::kGradient ? StatisticsOf(rows) : rows;
}

void CheckGroups(const Context& context, const Tensor& rows, const Tensor& weight_LOI,
                 const Tensor& offsets_L1, Weight weight) {
  CheckRank(kOp, "rows", rows, 2);
  CheckRank(kOp, "weight", weight_LOI, 3);
  CHECK(WeightOf(rows.dtype(), weight) == weight_LOI.dtype())
      << kOp << ": rows " << rows.DebugString() << ", weight " << weight_LOI.DebugString();
  const int64_t num_experts = weight_LOI.dim(0);
  CheckTensor(context, kOp, "offsets", offsets_L1, DType::kI32, {num_experts + 1});
  if (OnCuda(context)) return;  // reading the offsets would wait for the device
  const int32_t* const offsets = offsets_L1.data<int32_t>();
  CHECK(offsets[0] == 0 && offsets[num_experts] == rows.dim(0))
      << kOp << ": offsets go from " << offsets[0] << " to " << offsets[num_experts]
      << ", expected 0 to " << rows.dim(0);
  for (int64_t l = 0; l < num_experts; ++l) {
    CHECK_LE(offsets[l], offsets[l + 1]) << kOp << ": offsets fall after expert " << l;
  }
}

// Calls function(expert, begin, end) for the experts that own rows.
template <typename Function>
void ForEachGroup(const Tensor& offsets_L1, Function function) {
  const int32_t* const offsets = offsets_L1.data<int32_t>();
  for (int64_t l = 0; l + 1 < offsets_L1.dim(0); ++l) {
    if (offsets[l] < offsets[l + 1]) function(l, offsets[l], offsets[l + 1]);
  }
}

// `left` are the rows of x or dy, `right` is W or the rows of x (grouped_matmul_cuda.h).
struct Operands {
  Tensor left, right;
};

// `pairs`: one, or the two of kBackwardInputOfTwo.
void RunCuda(const Context& context, GroupedProduct product, const std::vector<Operands>& pairs,
             const Tensor& weight_LOI, const Tensor& offsets_L1, const Tensor& result,
             Accumulate accumulate = Accumulate::kOverwrite) {
  const Tensor &left = pairs[0].left, &right = pairs[0].right;
  CheckCudaActivation(kOp, "rows", left);
  GroupedMatmulCudaArgs args;
  args.element = left.dtype() == DType::kBF16 ? CudaElement::kBF16 : CudaElement::kF32;
  args.num_rows = left.dim(0);
  args.num_experts = weight_LOI.dim(0);
  args.out = weight_LOI.dim(1);
  args.in = weight_LOI.dim(2);
  // Tiles, rows and columns are counted in 32 bits on the device.
  CHECK(args.num_rows <= INT32_MAX && args.num_experts * args.out <= INT32_MAX &&
        args.in <= INT32_MAX)
      << kOp << ": rows " << left.DebugString() << ", weight " << weight_LOI.DebugString();
  args.add = accumulate == Accumulate::kAdd;
  if (result.empty()) return;
  if (left.empty() || right.empty()) {  // empty sums
    if (!args.add) FillZero(context, result);
    return;
  }
  args.offsets_L1 = offsets_L1.data<int32_t>();
  args.left = left.raw();
  args.right = right.raw();
  args.result = result.raw();
  if (pairs.size() > 1) {
    args.second_left = pairs[1].left.raw();
    args.second_right = pairs[1].right.raw();
  }
  if constexpr (kHaveCuda) {
    const bool tensor_cores = PlanGroupedMatmul(product, args, 1).tensor_cores;
    for (const Tensor* tensor : {&left, &right, &pairs.back().left, &pairs.back().right, &result}) {
      CHECK(!tensor_cores || reinterpret_cast<uintptr_t>(tensor->raw()) % 16 == 0)
          << kOp << ": " << tensor->DebugString() << " is not aligned to 16 bytes";
    }
    GroupedMatmulCuda(product, args, context.stream());
    CheckLaunch(kOp);
    return;
  }
  NoCudaKernel(kOp);
}

// Every row meets one expert's [out, in] matrix, or with two pairs the same of two layers, whatever
// the offsets say. The panels are those of one expert's product.
void DryGroups(const Context& context, const Tensor& rows, const Tensor& result,
               const Tensor& weight_LOI, int64_t n, int64_t k, int pairs = 1) {
  const int64_t num_rows = rows.dim(0), out = weight_LOI.dim(1), in = weight_LOI.dim(2);
  if (num_rows > 0) ReserveMatmulPanels(context, result.dtype(), n, k);
  const double moved = static_cast<double>(pairs * weight_LOI.bytes()) +
                       static_cast<double>(num_rows * DTypeBytes(rows.dtype())) *
                           static_cast<double>(in + pairs * out);
  CountWork(context, kOp,
            2.0 * pairs * static_cast<double>(num_rows) * static_cast<double>(in * out), moved);
}

MatrixView Expert(const Tensor& weight_LOI, int64_t l) {
  return AsMatrix(weight_LOI.Rows(l, l + 1));
}

}  // namespace

Tensor GroupedLinear(const Context& context, const Tensor& x, const Tensor& weight_LOI,
                     const Tensor& offsets_L1) {
  CheckGroups(context, x, weight_LOI, offsets_L1, Weight::kValues);
  CHECK_EQ(x.dim(1), weight_LOI.dim(2))
      << kOp << ": x " << x.DebugString() << ", weight " << weight_LOI.DebugString();
  const Tensor y = context.Empty(x.dtype(), {x.dim(0), weight_LOI.dim(1)});
  if (OnCuda(context)) {
    RunCuda(context, GroupedProduct::kForward, {{x, weight_LOI}}, weight_LOI, offsets_L1, y);
    return y;
  }
  if (context.dry()) {
    DryGroups(context, x, y, weight_LOI, weight_LOI.dim(1), weight_LOI.dim(2));
    return y;
  }
  ForEachGroup(offsets_L1, [&](int64_t l, int64_t begin, int64_t end) {
    Matmul(context, AsMatrix(x).RowRange(begin, end), Transpose::kNo, Expert(weight_LOI, l),
           Transpose::kYes, AsMatrix(y).RowRange(begin, end));
  });
  return y;
}

Tensor GroupedLinearBackwardInput(const Context& context, const Tensor& dy,
                                  const Tensor& weight_LOI, const Tensor& offsets_L1) {
  CheckGroups(context, dy, weight_LOI, offsets_L1, Weight::kValues);
  CHECK_EQ(dy.dim(1), weight_LOI.dim(1))
      << kOp << ": dy " << dy.DebugString() << ", weight " << weight_LOI.DebugString();
  const Tensor dx = context.Empty(dy.dtype(), {dy.dim(0), weight_LOI.dim(2)});
  if (OnCuda(context)) {
    RunCuda(context, GroupedProduct::kBackwardInput, {{dy, weight_LOI}}, weight_LOI, offsets_L1,
            dx);
    return dx;
  }
  if (context.dry()) {
    DryGroups(context, dy, dx, weight_LOI, weight_LOI.dim(2), weight_LOI.dim(1));
    return dx;
  }
  ForEachGroup(offsets_L1, [&](int64_t l, int64_t begin, int64_t end) {
    Matmul(context, AsMatrix(dy).RowRange(begin, end), Transpose::kNo, Expert(weight_LOI, l),
           Transpose::kNo, AsMatrix(dx).RowRange(begin, end));
  });
  return dx;
}

Tensor GroupedLinearBackwardInputOfTwo(const Context& context, const Tensor& dya,
                                       const Tensor& weight_a_LOI, const Tensor& dyb,
                                       const Tensor& weight_b_LOI, const Tensor& offsets_L1) {
  CheckGroups(context, dya, weight_a_LOI, offsets_L1, Weight::kValues);
  CHECK_EQ(dya.dim(1), weight_a_LOI.dim(1))
      << kOp << ": dya " << dya.DebugString() << ", weight " << weight_a_LOI.DebugString();
  CheckTensor(context, kOp, "dyb", dyb, dya.dtype(), dya.shape());
  CheckTensor(context, kOp, "second weight", weight_b_LOI, weight_a_LOI.dtype(),
              weight_a_LOI.shape());
  const int64_t out = weight_a_LOI.dim(1), in = weight_a_LOI.dim(2);
  const Tensor dx = context.Empty(dya.dtype(), {dya.dim(0), in});
  if (OnCuda(context)) {
    RunCuda(context, GroupedProduct::kBackwardInputOfTwo,
            {{dya, weight_a_LOI}, {dyb, weight_b_LOI}}, weight_a_LOI, offsets_L1, dx);
    return dx;
  }
  if (context.dry()) {
    DryGroups(context, dya, dx, weight_a_LOI, in, out, 2);
    return dx;
  }
  ForEachGroup(offsets_L1, [&](int64_t l, int64_t begin, int64_t end) {
    const MatrixView sum = AsMatrix(dx).RowRange(begin, end);
    Matmul(context, AsMatrix(dya).RowRange(begin, end), Transpose::kNo, Expert(weight_a_LOI, l),
           Transpose::kNo, sum);
    Matmul(context, AsMatrix(dyb).RowRange(begin, end), Transpose::kNo, Expert(weight_b_LOI, l),
           Transpose::kNo, sum, Accumulate::kAdd);
  });
  return dx;
}

void GroupedLinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                                 const Tensor& offsets_L1, const Tensor& dweight_LOI,
                                 Accumulate accumulate) {
  CheckGroups(context, dy, dweight_LOI, offsets_L1, Weight::kGradient);
  CHECK_EQ(dy.dim(1), dweight_LOI.dim(1))
      << kOp << ": dy " << dy.DebugString() << ", dweight " << dweight_LOI.DebugString();
  CheckTensor(context, kOp, "x", x, dy.dtype(), {dy.dim(0), dweight_LOI.dim(2)});
  if (OnCuda(context)) {
    RunCuda(context, GroupedProduct::kBackwardWeight, {{dy, x}}, dweight_LOI, offsets_L1,
            dweight_LOI, accumulate);
    return;
  }
  if (context.dry()) {
    // The depth of an expert's product is its rows: the even share stands for them.
    const int64_t share = (dy.dim(0) + dweight_LOI.dim(0) - 1) / dweight_LOI.dim(0);
    DryGroups(context, dy, dweight_LOI, dweight_LOI, dweight_LOI.dim(2), share);
    return;
  }
  const int32_t* const offsets = offsets_L1.data<int32_t>();
  for (int64_t l = 0; l < dweight_LOI.dim(0); ++l) {
    Matmul(context, AsMatrix(dy).RowRange(offsets[l], offsets[l + 1]), Transpose::kYes,
           AsMatrix(x).RowRange(offsets[l], offsets[l + 1]), Transpose::kNo, Expert(dweight_LOI, l),
           accumulate);
  }
}

}  // namespace baleen
