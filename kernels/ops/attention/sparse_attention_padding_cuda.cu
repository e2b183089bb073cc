// One thread a word written.
#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention/sparse_attention_padding_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

__global__ void __launch_bounds__(kFlatThreads) ResizeListsKernel(ResizeListsCudaArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= args.rows * args.to_width) return;
  const int64_t t = i / args.to_width, k = i % args.to_width;
  static_cast<int32_t*>(args.to)[i] =
      k < args.from_width ? static_cast<const int32_t*>(args.from)[t * args.from_width + k] : -1;
}

}  // namespace

void ResizeListsCuda(const ResizeListsCudaArgs& args, void* stream) {
  const int64_t words = args.rows * args.to_width;
  if (words == 0) return;
  ResizeListsKernel<<<static_cast<unsigned>(CeilDiv(words, kFlatThreads)), kFlatThreads, 0,
                      AsStream(stream)>>>(args);
  CheckLaunch("resize lists");
}

}  // namespace baleen
