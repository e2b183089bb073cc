// Copies between host and device. On a CPU context nothing is copied: the argument comes back.
//
// Copies run on the compute stream, so they need no further order with the ops around them. The
// host waits in CopyToHost, Transfer to the host and PendingCopy::Wait, and nowhere else.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/cuda_context.h"

namespace baleen {

// More than this goes in pieces: page-locking gigabytes takes longer than copying them.
inline constexpr int64_t kPieceBytes = int64_t{64} << 20;

// The host tensor on the context's device. The host may change its tensor at once: what is not in
// pinned memory is staged there first.
Tensor CopyToDevice(const Context& context, const Tensor& host);

// The device tensor in host memory (pinned up to 64 MiB). Waits.
Tensor CopyToHost(const Context& context, const Tensor& device);

// All of `from` into `to`, of the same dtype and number of elements; each may lie on either side.
// Waits where `to` is the host's.
void Transfer(const Context& context, const Tensor& from, const Tensor& to);

// A copy to the host under way, in pinned memory.
class PendingCopy {
 public:
  PendingCopy() = default;
  PendingCopy(Tensor host, CudaEvent done) : host_(std::move(host)), done_(std::move(done)) {}
  bool IsDone(const Context& context) const;
  // The host waits for the contents.
  Tensor Wait(const Context& context);

 private:
  Tensor host_;
  CudaEvent done_;  // empty on the CPU
};

// Starts to copy what the compute stream has made of `device` by now.
PendingCopy StartCopyToHost(const Context& context, const Tensor& device);

namespace cuda_internal {
// Transfer and StartCopyToHost behind their checks, where a device takes part.
void CopyTensor(const Context& context, const Tensor& from, const Tensor& to);
PendingCopy StartCopyTensor(const Context& context, const Tensor& device);
}  // namespace cuda_internal

}  // namespace baleen
