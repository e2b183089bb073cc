// Copies of a CPU context, and what a machine without a GPU answers. With one: tests/cuda.
#include "kernels/core/transfer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/random_tensor.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IntTensorOf;

TEST(Transfer, OnTheCpuTheArgumentComesBack) {
  const Context context = Context::Cpu();
  const Tensor x = IntTensorOf(context, {3}, {1, 2, 3});
  EXPECT_EQ(CopyToDevice(context, x).raw(), x.raw());
  EXPECT_EQ(CopyToHost(context, x).raw(), x.raw());
  PendingCopy pending = StartCopyToHost(context, x);
  EXPECT_TRUE(pending.IsDone(context));
  EXPECT_EQ(pending.Wait(context).raw(), x.raw());
}

TEST(Transfer, CopiesBetweenHostTensors) {
  const Context context = Context::Cpu();
  const Tensor x = IntTensorOf(context, {2, 2}, {1, 2, 3, 4});
  const Tensor y = context.Zeros(DType::kI32, {4});
  Transfer(context, x, y);
  EXPECT_TRUE(testing::SameBits(y, x.Reshaped({4})));
}

TEST(TransferDeathTest, RefusesUnequalTensors) {
  const Context context = Context::Cpu();
  const Tensor x = context.Zeros(DType::kI32, {2}), y = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(Transfer(context, x, y), "I32\\[2\\] into F32\\[2\\]");
  EXPECT_DEATH(Transfer(context, x, context.Zeros(DType::kI32, {3})), "I32\\[2\\] into I32\\[3\\]");
}

TEST(CudaContext, AMachineWithoutAGpuSaysSo) {
  if (CudaDeviceCount() > 0) GTEST_SKIP() << "this machine has a GPU";
  EXPECT_THAT(MakeCudaContext(0),
              HasStatus(absl::StatusCode::kFailedPrecondition, "run.device: cpu"));
}

TEST(CudaContextDeathTest, ACpuContextHasNoCudaDevice) {
  const Context context = Context::Cpu();
  EXPECT_EQ(context.stream(), nullptr);
  EXPECT_DEATH(context.cuda(), "a CPU context has no CUDA device");
}

}  // namespace
}  // namespace baleen
