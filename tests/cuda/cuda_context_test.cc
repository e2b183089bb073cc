// The device's pool and its use table, streams and events, library handles, copies.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "tests/cuda/gpu.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::Gate;
using testing::Gpu;
using testing::IntTensorOf;
using testing::OnGpu;
using testing::OnHost;
using testing::SameBits;

constexpr int64_t kMebibyte = int64_t{1} << 20;

// Numbers that differ from their neighbours in every byte.
Tensor Numbers(const Context& context, int64_t count) {
  const Tensor tensor = context.Empty(DType::kI32, {count});
  for (int64_t i = 0; i < count; ++i) {
    tensor.data<int32_t>()[i] = static_cast<int32_t>(static_cast<uint32_t>(i) * 2654435761u);
  }
  return tensor;
}

TEST(CudaContext, NamesTheDeviceAndItsHandles) {
  const CudaDevice& device = Gpu().cuda();
  EXPECT_GT(device.properties().num_sms, 0);
  EXPECT_GT(device.properties().total_bytes, int64_t{1} << 30);
  EXPECT_NE(Gpu().stream(), nullptr);
  EXPECT_NE(device.communication_stream(), Gpu().stream());
  EXPECT_NE(device.cublaslt().handle, nullptr);
  EXPECT_GE(device.cublaslt().workspace_bytes, 32 * kMebibyte);
}

TEST(CudaContext, MakesTheCudnnHandleOnce) {
  const absl::StatusOr<void*> first = Gpu().cuda().cudnn();
  ASSERT_TRUE(first.ok()) << first.status();
  const absl::StatusOr<void*> second = Gpu().cuda().cudnn();
  EXPECT_EQ(*first, *second);
}

TEST(CudaContext, RefusesADeviceThatIsNotThere) {
  const absl::StatusOr<Context> made = MakeCudaContext(CudaDeviceCount());
  ASSERT_FALSE(made.ok());
  EXPECT_NE(made.status().message().find("visible"), absl::string_view::npos) << made.status();
}

TEST(CudaPool, CountsBytesByUseAndRemembersThePeak) {
  Context& context = Gpu();
  const auto held = [&](const std::string& use) { return context.pool().Uses()[use]; };
  context.pool().ResetPeak();
  const int64_t total = context.pool().Total().bytes;
  {
    const ScopedUse use(context, "pool test");
    const Tensor a = context.Empty(DType::kF32, {1000});
    {
      const Tensor b = context.Empty(DType::kU8, {1});
      EXPECT_EQ(held("pool test").bytes, 4032 + 64);  // rounded to 64 bytes, as on the host
    }
    EXPECT_EQ(held("pool test").bytes, 4032);
    EXPECT_EQ(context.pool().Total().bytes, total + 4032);
  }
  EXPECT_EQ(held("pool test").bytes, 0);
  EXPECT_EQ(held("pool test").peak_bytes, 4032 + 64);
  context.pool().ResetPeak();
  EXPECT_EQ(held("pool test").peak_bytes, 0);
}

TEST(CudaPool, HandsFreedMemoryOutAgainWithoutTheDriver) {
  Context& context = Gpu();
  void* first = nullptr;
  {
    const Tensor a = context.Empty(DType::kU8, {256 * kMebibyte});
    first = a.raw();
  }
  size_t free_before = 0, free_after = 0, total = 0;
  cudaMemGetInfo(&free_before, &total);
  const Tensor b = context.Empty(DType::kU8, {256 * kMebibyte});
  cudaMemGetInfo(&free_after, &total);
  EXPECT_EQ(free_before, free_after);
  EXPECT_EQ(b.raw(), first);
}

TEST(CudaPool, MakesRoomForALargeBlockOutOfFreedSmallOnes) {
  Context& context = Gpu();
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  const int64_t quarter = static_cast<int64_t>(free) / 4;
  {
    const Tensor a = context.Empty(DType::kU8, {quarter});
    const Tensor b = context.Empty(DType::kU8, {quarter});
    const Tensor c = context.Empty(DType::kU8, {quarter});
  }
  // All three are kept by the pool, none is large enough, and the rest is too small.
  const Tensor large = context.Empty(DType::kU8, {7 * quarter / 2});
  EXPECT_EQ(large.bytes(), 7 * quarter / 2);
}

TEST(CudaPoolDeathTest, SaysWhoHoldsTheMemoryWhenItEnds) {
  // A new process: CUDA does not survive a fork.
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(
      {
        Context context = *MakeCudaContext(0);
        const ScopedUse use(context, "parameters");
        const Tensor held = context.Empty(DType::kU8, {3 * kMebibyte});
        const ScopedUse more(context, "activations");
        context.Empty(DType::kU8, {int64_t{1} << 40});
      },
      "out of GPU memory: 1099511627776 bytes for activations.*workspaces: 33554432 now.*"
      "parameters: 3145728 now.*recompute: full");
}

TEST(CudaContext, ZerosReadAsZero) {
  Context& context = Gpu();
  {
    const Tensor dirty = context.Empty(DType::kI32, {4096});
    ASSERT_EQ(cudaMemsetAsync(dirty.raw(), 0xff, dirty.bytes(),
                              static_cast<cudaStream_t>(context.stream())),
              cudaSuccess);
  }
  const Tensor zeros = OnHost(context.Zeros(DType::kI32, {4096}));
  for (int i = 0; i < 4096; ++i) ASSERT_EQ(zeros.data<int32_t>()[i], 0) << i;
}

TEST(CudaTransfer, MovesEveryBitThereAndBack) {
  const Context cpu = Context::Cpu();
  // One number; odd; a piece exactly; several pieces and a rest, which takes both pinned blocks.
  for (const int64_t bytes : {int64_t{4}, int64_t{4 * 1237}, kPieceBytes, 3 * kPieceBytes + 4}) {
    const Tensor host = Numbers(cpu, bytes / 4);
    const Tensor device = OnGpu(host);
    EXPECT_EQ(device.device(), (Device{DeviceKind::kCuda, 0}));
    EXPECT_TRUE(SameBits(OnHost(device), host)) << bytes;
    const Tensor into = cpu.Zeros(DType::kI32, {bytes / 4});
    Transfer(Gpu(), device, into);
    EXPECT_TRUE(SameBits(into, host)) << bytes;
    const Tensor second = Gpu().Zeros(DType::kI32, {bytes / 4});
    Transfer(Gpu(), device, second);
    EXPECT_TRUE(SameBits(OnHost(second), host)) << bytes;
  }
  EXPECT_EQ(OnHost(OnGpu(cpu.Empty(DType::kF32, {0, 3}))).shape(), (Shape{0, 3}));
}

TEST(CudaTransfer, TheHostMayChangeItsTensorAtOnce) {
  const Context cpu = Context::Cpu();
  const Tensor host = IntTensorOf(cpu, {3}, {1, 2, 3});
  OnHost(OnGpu(host));  // page-locking, at the first time, would wait for the stream
  Gate gate;
  gate.Close(Gpu().stream());  // the copy cannot have run yet
  const Tensor device = OnGpu(host);
  host.data<int32_t>()[0] = 99;
  gate.Open();
  EXPECT_TRUE(SameBits(OnHost(device), IntTensorOf(cpu, {3}, {1, 2, 3})));
}

TEST(CudaTransfer, AStartedCopyIsDoneWhenTheStreamHasPassedIt) {
  const Context cpu = Context::Cpu();
  const Tensor device = OnGpu(IntTensorOf(cpu, {2}, {5, 6}));
  OnHost(device);
  Gate gate;
  gate.Close(Gpu().stream());
  PendingCopy pending = StartCopyToHost(Gpu(), device);
  EXPECT_FALSE(pending.IsDone(Gpu()));
  gate.Open();
  EXPECT_TRUE(SameBits(pending.Wait(Gpu()), IntTensorOf(cpu, {2}, {5, 6})));
  EXPECT_TRUE(pending.IsDone(Gpu()));
}

TEST(CudaTransfer, PinnedBlocksAreKeptUntilTheStreamHasPassedThem) {
  MemoryPool& pool = Gpu().cuda().pinned_pool();
  { const auto a = pool.Allocate(10'000, "test"), b = pool.Allocate(10'000, "test"); }
  Gpu().cuda().HostWait(Gpu().cuda().Record(Gpu().stream()));
  Gate gate;
  gate.Close(Gpu().stream());
  const void* first = pool.Allocate(10'000, "test")->data();  // given up at once
  const auto second = pool.Allocate(10'000, "test");
  EXPECT_NE(second->data(), first);  // the stream has not passed yet
  gate.Open();
  Gpu().cuda().HostWait(Gpu().cuda().Record(Gpu().stream()));
  const auto third = pool.Allocate(12'000, "test");  // the same power of two
  EXPECT_EQ(third->data(), first);
}

TEST(CudaStreams, WorkOrderedBehindAnEventWaitsForIt) {
  CudaDevice& device = Gpu().cuda();
  Gate gate;
  gate.Close(device.communication_stream());
  const CudaEvent behind = device.Record(device.communication_stream());
  device.Order(device.compute_stream(), behind);
  const CudaEvent end = device.Record(device.compute_stream());
  EXPECT_FALSE(device.IsDone(behind));
  EXPECT_FALSE(device.IsDone(end));
  gate.Open();
  device.HostWait(end);
  EXPECT_TRUE(device.IsDone(behind));
  // That an event was not ready is nobody's error.
  CheckCudaLaunch("streams");
}

TEST(CudaStreams, WatchersAreCalledWhileTheHostWaits) {
  CudaDevice& device = Gpu().cuda();
  Gate gate;
  double longest = 0;
  const int number = device.AddWatcher([&](double seconds) {
    longest = seconds;
    if (seconds > 0.05) gate.Open();
  });
  gate.Close(device.compute_stream());
  device.HostWait(device.Record(device.compute_stream()));
  EXPECT_GT(longest, 0.05);
  device.RemoveWatcher(number);
  const double before = longest;
  device.HostWait(device.Record(device.compute_stream()));
  EXPECT_EQ(longest, before);
}

TEST(CudaLaunchDeathTest, NamesTheOpWhoseLaunchFailed) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(
      {
        const Context context = *MakeCudaContext(0);
        cudaSetDevice(-1);  // leaves an error behind, as a refused launch does
        CheckCudaLaunch("rms_norm");
      },
      "rms_norm");
}

}  // namespace
}  // namespace baleen
