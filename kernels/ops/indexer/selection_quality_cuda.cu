// Selection quality on the GPU, one row a block: the n-th largest p of the window by radix
// selection (n = how many keys the row has chosen), then the sums above it.
//
// Equal p: the lower key is the larger, so of those equal to the n-th largest only the first few
// count, up to a last key. Four passes over the window for the digits, one for that key, one for
// the sum; only a sample of rows comes here.
#include "kernels/cuda/launch.cuh"
#include "kernels/ops/block_sum.cuh"
#include "kernels/ops/indexer/indexer_ops_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kThreads = kBlockSumThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;

// Unsigned numbers in the order of the floats; both zeros are equal.
__device__ __forceinline__ uint32_t OrderOf(float p) {
  const uint32_t bits = p == 0 ? 0 : __float_as_uint(p);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The keys that count as the best: those above `order`, and those equal to it up to `last_key`.
struct Best {
  uint32_t order;
  int ties;  // how many equal ones count
  int last_key;

  __device__ __forceinline__ bool Has(uint32_t other, int key) const {
    return other > order || (other == order && key <= last_key);
  }
};

// order and ties of the n-th largest, 1 <= n <= end - begin.
__device__ Best FindThreshold(const float* p, int begin, int end, int n) {
  __shared__ int counts[kDigits];
  __shared__ int shared_digit, shared_left;
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int s = begin + threadIdx.x; s < end; s += kThreads) {
      const uint32_t order = OrderOf(p[s]);
      if ((order & mask) == prefix) atomicAdd(&counts[order >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = kDigits - 1, left = n;
      while (digit > 0 && counts[digit] < left) left -= counts[digit--];
      shared_digit = digit;
      shared_left = left;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(shared_digit) << shift;
    mask |= static_cast<uint32_t>(kDigits - 1) << shift;
    n = shared_left;
  }
  return {prefix, n, end};
}

// The key of the best.ties-th element equal to best.order.
__device__ int FindLastKey(const float* p, int begin, int end, const Best& best) {
  __shared__ int warp_counts[kWarps];
  __shared__ int last_key;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0;  // equal ones in front of `first`, the same in all threads
  for (int first = begin; first < end; first += kThreads) {
    const int s = first + threadIdx.x;
    const bool equal = s < end && OrderOf(p[s]) == best.order;
    const unsigned votes = __ballot_sync(~0u, equal);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int own = before + __popc(votes & ((2u << lane) - 1)), all = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) own += warp_counts[w];
      all += warp_counts[w];
    }
    if (equal && own == best.ties) last_key = s;
    __syncthreads();
    if (all >= best.ties) break;
    before = all;
  }
  return last_key;
}

__global__ void __launch_bounds__(kThreads) SelectionQualityKernel(SelectionQualityCudaArgs args) {
  const int64_t row = blockIdx.x;
  const float* const p = args.p_TS + row * args.S;
  const int32_t* const ids = args.ids_TK + row * args.K;
  const int begin = args.begin_T[row], end = args.end_T[row];
  double mass = 0;
  int num_ids = 0;
  bool stray = false;
  for (int64_t i = threadIdx.x; i < args.K; i += kThreads) {
    const int s = ids[i];
    if (s < 0) continue;
    ++num_ids;
    if (s < begin || s >= end) {
      stray = true;
    } else {
      mass += p[s];
    }
  }
  stray = __syncthreads_or(stray);
  mass = BlockSum(mass);
  num_ids = BlockSum(num_ids);
  float best_mass = 0, recall = 1;  // where nothing is chosen nothing was missed
  if (stray) {
    mass = best_mass = recall = __int_as_float(0x7fffffff);
  } else if (num_ids > 0) {
    Best best = FindThreshold(p, begin, end, num_ids);
    best.last_key = FindLastKey(p, begin, end, best);
    double sum = 0;
    for (int s = begin + threadIdx.x; s < end; s += kThreads) {
      if (best.Has(OrderOf(p[s]), s)) sum += p[s];
    }
    int common = 0;
    for (int64_t i = threadIdx.x; i < args.K; i += kThreads) {
      if (ids[i] >= 0 && best.Has(OrderOf(p[ids[i]]), ids[i])) ++common;
    }
    best_mass = static_cast<float>(BlockSum(sum));
    recall = static_cast<float>(static_cast<double>(BlockSum(common)) / num_ids);
  }
  if (threadIdx.x == 0) {
    args.mass_T[row] = static_cast<float>(mass);
    args.best_mass_T[row] = best_mass;
    args.recall_T[row] = recall;
  }
}

}  // namespace

void SelectionQualityCuda(const SelectionQualityCudaArgs& args, void* stream) {
  if (args.T == 0) return;
  SelectionQualityKernel<<<static_cast<unsigned>(args.T), kThreads, 0, AsStream(stream)>>>(args);
  CheckLaunch("selection quality");
}

}  // namespace baleen
