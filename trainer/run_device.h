// What a command's ranks compute on: the context of the CPU or of this rank's GPU, and a world that
// carries tensors of both sides.
#pragma once

#include <memory>

#include "configs/schema/run_config.h"
#include "kernels/core/context.h"
#include "parallel/mpi_communicator.h"

namespace baleen {

class RunDevice {
 public:
  // Every rank calls it. kAuto takes the GPUs where every rank sees one, the CPU where none does.
  // EnvironmentError: no GPU, fewer GPUs than ranks on a host, a driver or library that is missing,
  // a build without the CUDA backend.
  static absl::StatusOr<RunDevice> Start(DeviceChoice choice, MpiRuntime& mpi);

  Context& context() { return context_; }
  Communicator& world() const { return nccl_ ? *nccl_ : mpi_; }
  bool cuda() const { return context_.device().kind == DeviceKind::kCuda; }

 private:
  RunDevice(Context context, Communicator& mpi) : context_(std::move(context)), mpi_(mpi) {}
  Context context_;
  Communicator& mpi_;
  std::unique_ptr<Communicator> nccl_;  // null on the CPU
};

}  // namespace baleen
