#include "trainer/run_device.h"

#include "kernels/core/cuda_context.h"
#include "parallel/agree.h"
#include "parallel/choose_device.h"
#include "parallel/nccl_communicator.h"

namespace baleen {
namespace {

// How many ranks see a GPU: all ranks take the same side.
absl::StatusOr<bool> UseCuda(DeviceChoice choice, Communicator& world) {
  if (choice == DeviceChoice::kCpu) return false;
  if (choice == DeviceChoice::kCuda) {
    if (kHaveCuda) return true;
    return EnvironmentError(
        "run.device = cuda, but this binary was built without the CUDA backend (its CMake output "
        "says what was missing); use a bundle made where nvcc is (launch/bundle.sh), or "
        "run.device: cpu");
  }
  const Tensor with_gpu = Context::Cpu().Zeros(DType::kI64, {1});
  with_gpu.data<int64_t>()[0] = CudaDeviceCount() > 0 ? 1 : 0;
  world.AllReduce("ranks with a GPU", with_gpu);
  const int64_t count = with_gpu.data<int64_t>()[0];
  if (count == 0 || count == world.size()) return count > 0;
  return EnvironmentError("run.device = auto: ", count, " of ", world.size(),
                          " ranks see a GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES on the ",
                          "others, or choose with run.device: cpu or cuda");
}

absl::StatusOr<Context> MakeContext(const MpiRuntime& mpi) {
  ASSIGN_OR_RETURN(const int index,
                   ChooseDevice(CudaDeviceCount(), mpi.local_rank(), mpi.local_size()));
  return MakeCudaContext(index);
}

}  // namespace

absl::StatusOr<RunDevice> RunDevice::Start(DeviceChoice choice, MpiRuntime& mpi) {
  Communicator& world = mpi.world();
  ASSIGN_OR_RETURN(const bool cuda, UseCuda(choice, world));
  if (!cuda) return RunDevice(Context::Cpu(), world);
  const std::string asked = absl::StrCat("run.device = ", std::string(Name(choice)));
  absl::StatusOr<Context> context = MakeContext(mpi);
  RETURN_IF_ERROR(Agree(world, Annotate(context.status(), asked)));
  RunDevice device(*std::move(context), world);
  absl::StatusOr<std::unique_ptr<Communicator>> nccl =
      MakeNcclCommunicator(device.context_, world.Split(0, world.rank(), "world"));
  RETURN_IF_ERROR(Agree(world, Annotate(nccl.status(), asked)));
  device.nccl_ = *std::move(nccl);
  return device;
}

}  // namespace baleen
