// Values that are gathered beside what the GPU computes: who reads one gets the gathered one, and
// steps have the bits of steps that gather and wait.
#include <gtest/gtest.h>
#include <unistd.h>

#include <deque>

#include "tests/cuda/gpu.h"
#include "tests/cuda/layout_case_support.h"
#include "tests/cuda/nccl_world_support.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/forwarding_communicator.h"
#include "tests/trainer/same_step.h"

namespace baleen::testing {
namespace {

// Every begun gather starts a while after it could: what does not wait for it reads old values.
class SlowGathers : public ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;

  void Wait(uint64_t call) override {
    for (; !begun_.empty() && begun_.front().first <= call; begun_.pop_front())
      inner().Wait(begun_.front().second);
  }

 protected:
  std::unique_ptr<Communicator> Wrap(std::unique_ptr<Communicator> part) const override {
    return std::make_unique<SlowGathers>(std::move(part));
  }
  void DoBeginAllGather(const Tensor& part, const Tensor& whole) override {
    if (whole.device().kind == DeviceKind::kCuda && size() > 1) {
      const auto stream = static_cast<cudaStream_t>(Gpu().cuda().communication_stream());
      CHECK(cudaLaunchHostFunc(
                stream, [](void*) { ::usleep(1500); }, nullptr) == cudaSuccess);
    }
    const uint64_t call = inner().BeginAllGather(current_label(), part, whole);
    begun_.emplace_back(current_call(), call);
  }

 private:
  std::deque<std::pair<uint64_t, uint64_t>> begun_;  // own number, the inner one's
};

// Two steps: the second one's forward runs into the first one's gathers.
void ExpectSameSteps(RigCase c, ForwardingCommunicator& waiting_world, SlowGathers& slow_world,
                     const GridCommunicators& waiting_axes, const GridCommunicators& slow_axes) {
  c.steps = 2;
  RigBackend backend{.context = Gpu(), .dtype = DType::kBF16, .axes = &waiting_axes};
  ASSERT_OK_AND_ASSIGN(const StepOutcome waiting, RunOneStep(c, waiting_world, backend));
  backend.axes = &slow_axes;
  ASSERT_OK_AND_ASSIGN(const StepOutcome slow, RunOneStep(c, slow_world, backend));
  ExpectSameStep(slow, waiting);
  EXPECT_TRUE(slow.values_are_rounded_masters);
}

TEST(ParameterGatherOnRanks, StepsBesideItHaveTheBitsOfStepsThatWait) {
  const int size = GpuWorld().size();
  // launch/gpu_tests.sh runs all tests of ranks on one rank too, where there is no gather to be
  // late.
  if (size == 1) GTEST_SKIP() << "one rank gathers nothing";
  Layout layout{.data = size};
  if (size == 4) layout = {.pipeline = 2, .expert = 2, .data = 2};
  // Begun gathers of the one are done at once: the default of what forwards.
  ForwardingCommunicator waiting_world(GpuWorld().Split(0, GpuWorld().rank(), "waiting"));
  SlowGathers slow_world(GpuWorld().Split(0, GpuWorld().rank(), "slow"));
  const RigCase sparse = MakeGpuCase(RecipeKind::kSparse, layout);
  ASSERT_OK_AND_ASSIGN(const GridCommunicators waiting_axes, SplitForCase(sparse, waiting_world));
  ASSERT_OK_AND_ASSIGN(const GridCommunicators slow_axes, SplitForCase(sparse, slow_world));
  ExpectSameSteps(sparse, waiting_world, slow_world, waiting_axes, slow_axes);
  if (size > 2) return;
  SCOPED_TRACE("dense");
  ExpectSameSteps(MakeGpuCase(RecipeKind::kDense, layout), waiting_world, slow_world, waiting_axes,
                  slow_axes);
}

// A value that is asked for right behind the update waits on the device, and the host does not.
TEST(ParameterGatherOnRanks, AValueIsReadBehindItsGather) {
  // As above: with one rank nothing is on its way.
  if (GpuWorld().size() == 1) GTEST_SKIP() << "one rank gathers nothing";
  CudaDevice& device = Gpu().cuda();
  const int size = GpuWorld().size(), rank = GpuWorld().rank();
  GridCommunicators axes = MakeSelfGrid();
  axes.stage = GpuWorld().Split(0, rank, "stage");
  ParameterStore store;
  const int id = store.Declare("matrix", {size, 64}, ParameterGroup::kMain);
  store.Allocate(Gpu(), DType::kF32, axes, {ParameterGroup::kMain});
  axes.stage->AllReduce("warm", Gpu().Zeros(DType::kF32, {1}));
  Tensor own = Context::Cpu().Empty(DType::kF32, {1, 64});
  for (int i = 0; i < 64; ++i) own.data<float>()[i] = static_cast<float>(100 * rank + i);
  Transfer(Gpu(), own.Reshaped({64}), store.bucket_values(0).Flat(64 * rank, 64));
  Gate gate;
  gate.Close(device.communication_stream());
  store.BeginGather(0, *axes.stage);
  device.HostWait(device.Record(device.compute_stream()));  // nobody waits
  const Tensor value = store.value(id);
  EXPECT_FALSE(device.IsDone(device.Record(device.compute_stream())));
  gate.Open();
  const Tensor host = OnHost(value);
  for (int r = 0; r < size; ++r) {
    for (int i = 0; i < 64; ++i)
      ASSERT_EQ(host.data<float>()[64 * r + i], static_cast<float>(100 * r + i));
  }
}

}  // namespace
}  // namespace baleen::testing
