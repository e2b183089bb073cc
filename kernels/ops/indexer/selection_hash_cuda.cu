// Hash of selected keys: one warp a row, integer adds (any order gives the same sum).
//
// Bytes for R rows of K ids: 4 R K.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/indexer/selection_hash_cuda.h"
#include "kernels/ops/indexer/selection_mix_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kWarps = kFlatThreads / 32;

__global__ void __launch_bounds__(kFlatThreads)
    HashKernel(SelectionHashCudaArgs args, bool vectors) {
  __shared__ unsigned long long sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  uint64_t sum = 0;
  if (r < args.rows) {
    const int32_t row = args.row_R[r];
    const int32_t* const ids = args.ids_RK + r * args.K;
    const auto add = [&](int32_t id) { sum += id >= 0 ? MixSelected(row, id) : 0; };
    if (vectors) {
      const int4* const quads = reinterpret_cast<const int4*>(ids);
#pragma unroll 4
      for (int64_t i = lane; i < args.K / 4; i += 32) {
        const int4 quad = quads[i];
        add(quad.x);
        add(quad.y);
        add(quad.z);
        add(quad.w);
      }
    } else {
      for (int64_t i = lane; i < args.K; i += 32) add(ids[i]);
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) sums[warp] = sum >> 33;
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned long long total = 0;
  for (const unsigned long long s : sums) total += s;
  atomicAdd(reinterpret_cast<unsigned long long*>(args.result_1), total);
}

__global__ void KeepFirstKernel(const int32_t* nan_row, int32_t offset, int32_t* first) {
  if (*nan_row >= 0 && *first < 0) *first = offset + *nan_row;
}

__global__ void CountNanRowKernel(const int32_t* nan_row, int64_t* count) {
  *count += *nan_row >= 0 ? 1 : 0;
}

}  // namespace

void AddSelectionHashCuda(const SelectionHashCudaArgs& args, void* stream) {
  if (args.rows == 0 || args.K == 0) return;
  HashKernel<<<static_cast<unsigned>(CeilDiv(args.rows, kWarps)), kFlatThreads, 0,
               AsStream(stream)>>>(args, args.K % 4 == 0 && Aligned16({args.ids_RK}));
  CheckLaunch("selection hash");
}

void KeepFirstNanRowCuda(const int32_t* nan_row_1, int64_t offset, int32_t* first_1, void* stream) {
  KeepFirstKernel<<<1, 1, 0, AsStream(stream)>>>(nan_row_1, static_cast<int32_t>(offset), first_1);
  CheckLaunch("first NaN row");
}

void CountNanRowCuda(const int32_t* nan_row_1, int64_t* count_1, void* stream) {
  CountNanRowKernel<<<1, 1, 0, AsStream(stream)>>>(nan_row_1, count_1);
  CheckLaunch("count NaN row");
}

}  // namespace baleen
