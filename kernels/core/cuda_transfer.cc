// The copies of transfer.h where a GPU takes part: host memory that may be paged goes through
// pinned blocks, two at a time.
#include <algorithm>
#include <cstring>

#include "kernels/core/cuda_check.h"
#include "kernels/core/transfer.h"

namespace baleen {
namespace {

Tensor PinnedEmpty(const Context& context, DType dtype, Shape shape) {
  const int64_t bytes = NumElements(shape) * DTypeBytes(dtype);
  return Tensor(context.cuda().pinned_pool().Allocate(bytes, "staging"), 0, dtype, std::move(shape),
                Device{});
}

void Enqueue(const Context& context, void* to, const void* from, int64_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault,
                             static_cast<cudaStream_t>(context.stream())));
}

// Bytes [begin, end) at a time with the pinned block of each piece; at most two pieces are under
// way at once.
template <typename Function>
void ForPieces(const Context& context, int64_t bytes, Function function) {
  struct Piece {
    Tensor block;
    CudaEvent done;
  };
  Piece pieces[2];
  int64_t number = 0;
  for (int64_t begin = 0; begin < bytes; begin += kPieceBytes, ++number) {
    Piece& piece = pieces[number % 2];
    if (piece.done) context.cuda().HostWait(piece.done);
    const int64_t size = std::min(kPieceBytes, bytes - begin);
    if (piece.block.empty()) piece.block = PinnedEmpty(context, DType::kU8, {size});
    function(begin, size, piece.block.raw());
    piece.done = context.cuda().Record(context.stream());
  }
}

void HostToDevice(const Context& context, const Tensor& from, const Tensor& to) {
  ForPieces(context, from.bytes(), [&](int64_t begin, int64_t size, void* block) {
    std::memcpy(block, static_cast<const char*>(from.raw()) + begin, static_cast<size_t>(size));
    Enqueue(context, static_cast<char*>(to.raw()) + begin, block, size);
  });
}

void DeviceToHost(const Context& context, const Tensor& from, const Tensor& to) {
  // The host empties a block while the next one fills.
  struct Filled {
    int64_t begin = 0, size = 0;
    Tensor block;
    CudaEvent done;
  };
  Filled filled[2];
  const auto empty = [&](Filled& piece) {
    if (piece.size == 0) return;
    context.cuda().HostWait(piece.done);
    std::memcpy(static_cast<char*>(to.raw()) + piece.begin, piece.block.raw(),
                static_cast<size_t>(piece.size));
    piece.size = 0;
  };
  int64_t number = 0;
  for (int64_t begin = 0; begin < from.bytes(); begin += kPieceBytes, ++number) {
    Filled& piece = filled[number % 2];
    empty(piece);
    piece.begin = begin;
    piece.size = std::min(kPieceBytes, from.bytes() - begin);
    if (piece.block.empty()) piece.block = PinnedEmpty(context, DType::kU8, {piece.size});
    Enqueue(context, piece.block.raw(), static_cast<const char*>(from.raw()) + begin, piece.size);
    piece.done = context.cuda().Record(context.stream());
  }
  empty(filled[number % 2]);
  empty(filled[(number + 1) % 2]);
}

}  // namespace

namespace cuda_internal {

void CopyTensor(const Context& context, const Tensor& from, const Tensor& to) {
  if (from.device().kind == DeviceKind::kCpu) return HostToDevice(context, from, to);
  if (to.device().kind == DeviceKind::kCpu) return DeviceToHost(context, from, to);
  Enqueue(context, to.raw(), from.raw(), from.bytes());
}

PendingCopy StartCopyTensor(const Context& context, const Tensor& device) {
  const Tensor host = PinnedEmpty(context, device.dtype(), device.shape());
  if (device.bytes() > 0) Enqueue(context, host.raw(), device.raw(), device.bytes());
  return PendingCopy(host, context.cuda().Record(context.stream()));
}

}  // namespace cuda_internal
}  // namespace baleen
