// NCCL behind the Communicator interface: device tensors go through NCCL, host tensors through the
// MPI communicator it stands on, by tensor.device(). NCCL is loaded when a device communicator of
// more than one rank is made (kernels/core/shared_library.h).
//
// Order on the device. Collectives run on the compute stream, between the ops around them; from
// Fork to Join, and when begun as gathers, on the communication stream; begun exchanges on the
// exchange stream. Send and Recv run on the communication stream: the ops after a Recv wait for it,
// nothing waits for a Send, which holds its tensor until it is done. The host waits for none of
// them; errors of other ranks are noticed while it waits for the device (CudaDevice::HostWait): the
// record is printed, NCCL aborted and every rank stopped.
//
// NCCL wants a GPU per rank. Several ranks share one, as tests do, when each has an NCCL_HOSTID of
// its own and NCCL_SOCKET_IFNAME=lo: launch/one_gpu_rank.sh sets them.
#pragma once

#include <memory>

#include "kernels/core/context.h"
#include "kernels/core/status.h"
#include "parallel/communicator.h"

namespace baleen {

struct NcclOptions {
  // The host waits at most this long for the device before the run counts as hung (exit code 76).
  double hang_seconds = 600;
};

// Every rank of `host`, an MPI communicator that the result keeps, calls it. EnvironmentError when
// NCCL cannot be loaded or does not start; ranks may differ in that, so Agree afterwards.
absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(
    const Context& context, std::unique_ptr<Communicator> host, const NcclOptions& options = {});

}  // namespace baleen
