#include "kernels/core/transfer.h"

#include <cstring>

namespace baleen {
namespace {

bool IsHost(const Tensor& tensor) { return tensor.device().kind == DeviceKind::kCpu; }

[[noreturn]] void NoBackend(const Tensor& tensor) {
  CHECK(false) << "copying " << tensor.DebugString() << ": this build has no CUDA backend";
  __builtin_unreachable();
}

}  // namespace

Tensor CopyToDevice(const Context& context, const Tensor& host) {
  CHECK(IsHost(host)) << host.DebugString() << " lies on a device already";
  if (context.device().kind == DeviceKind::kCpu) return host;
  const Tensor device = context.Empty(host.dtype(), host.shape());
  Transfer(context, host, device);
  return device;
}

Tensor CopyToHost(const Context& context, const Tensor& device) {
  if (context.device().kind == DeviceKind::kCpu) return device;
  if (device.bytes() <= kPieceBytes) return StartCopyToHost(context, device).Wait(context);
  const Tensor host(context.cuda().host_pool().Allocate(device.bytes(), "copies from the GPU"), 0,
                    device.dtype(), device.shape(), Device{});
  Transfer(context, device, host);
  return host;
}

void Transfer(const Context& context, const Tensor& from, const Tensor& to) {
  CHECK(from.dtype() == to.dtype() && from.num_elements() == to.num_elements())
      << from.DebugString() << " into " << to.DebugString();
  for (const Tensor* tensor : {&from, &to}) {
    CHECK(IsHost(*tensor) || tensor->device() == context.device())
        << tensor->DebugString() << " lies on another device than the context";
  }
  if (from.num_elements() == 0) return;
  if (IsHost(from) && IsHost(to)) {
    std::memmove(to.raw(), from.raw(), static_cast<size_t>(from.bytes()));
    return;
  }
  if constexpr (kHaveCuda) return cuda_internal::CopyTensor(context, from, to);
  NoBackend(from);
}

PendingCopy StartCopyToHost(const Context& context, const Tensor& device) {
  if (context.device().kind == DeviceKind::kCpu) return PendingCopy(device, CudaEvent());
  CHECK(device.device() == context.device()) << device.DebugString();
  if constexpr (kHaveCuda) return cuda_internal::StartCopyTensor(context, device);
  NoBackend(device);
}

bool PendingCopy::IsDone(const Context& context) const {
  if constexpr (kHaveCuda) return !done_ || context.cuda().IsDone(done_);
  return true;
}

Tensor PendingCopy::Wait(const Context& context) {
  if constexpr (kHaveCuda) {
    if (done_) context.cuda().HostWait(done_);
  }
  return host_;
}

}  // namespace baleen
