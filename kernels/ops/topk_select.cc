// TopkSelect: checks, then the definition for the device and the dtype.
#include "kernels/ops/topk_select.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/topk_select_cpu.h"

namespace baleen {

TopkResult TopkSelect(const Context& context, const Tensor& scores_TS, const KeyWindows& windows,
                      int64_t k) {
  constexpr const char* kOp = "TopkSelect";
  CheckRank(kOp, "scores_TS", scores_TS, 2);
  CheckTensor(context, kOp, "scores_TS", scores_TS, scores_TS.dtype(), scores_TS.shape());
  CheckTensor(context, kOp, "windows.begin_T", windows.begin_T, DType::kI32, {scores_TS.dim(0)});
  CheckTensor(context, kOp, "windows.end_T", windows.end_T, DType::kI32, {scores_TS.dim(0)});
  CHECK_GE(k, 1) << kOp << ": of " << scores_TS.DebugString();
  if (context.device().kind == DeviceKind::kCuda) NoCudaKernel(kOp);
  CountBytes(context, kOp, scores_TS.bytes());
  return ForFloatOrDouble(context, kOp, scores_TS.dtype(), [&](auto zero) {
    return TopkSelectCpu<decltype(zero)>(context, scores_TS, windows, k);
  });
}

}  // namespace baleen
