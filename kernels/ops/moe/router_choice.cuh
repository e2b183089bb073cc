// Choosing the best of a few hundred values by one warp: lane l looks after the values l, l + 32,
// ...; the lower index wins a tie.
#pragma once

#include <cstdint>

namespace baleen::cuda {

inline constexpr int kMaxValuesPerLane = 32;  // 1024 experts
inline constexpr int kMaxChosen = 32;

// Rows of shared memory are read by lanes 32 apart and by lanes a group apart: one float of padding
// after every 32 spreads the latter over the banks.
__host__ __device__ constexpr int Padded(int i) { return i + i / 32; }

// Rises with the value; NaN is the lowest; 0 belongs to no value.
__device__ __forceinline__ uint32_t ChoiceKey(float value) {
  if (value != value) return 1;
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `count` best of values[Padded(0 .. num_values)) among the lane's candidates (bit j: value
// 32 j + lane), ascending: lane n < count returns the n-th index, other lanes a larger number.
// There are at least `count` candidates. `scratch`: 32 ints of the warp's own.
__device__ __forceinline__ int ChooseBest(const float* values, int num_values, uint32_t candidates,
                                          int count, int* scratch) {
  const int lane = threadIdx.x % 32;
  int mine = 1 << 30;
  for (int n = 0; n < count; ++n) {
    uint32_t best = 0;
    int best_index = 1 << 30;
    for (int j = 0; 32 * j < num_values; ++j) {
      if (!(candidates >> j & 1)) continue;
      const uint32_t key = ChoiceKey(values[Padded(32 * j + lane)]);
      if (key > best) {
        best = key;
        best_index = 32 * j + lane;
      }
    }
    const uint32_t winner = __reduce_max_sync(~0u, best);
    const int index = __reduce_min_sync(~0u, best == winner && best != 0 ? best_index : 1 << 30);
    if (index % 32 == lane) candidates &= ~(1u << index / 32);
    if (n == lane) mine = index;
  }
  int rank = 0;
  for (int n = 0; n < count; ++n) rank += __shfl_sync(~0u, mine, n) < mine;
  __syncwarp();
  if (lane < count) scratch[rank] = mine;
  __syncwarp();
  return lane < count ? scratch[lane] : 1 << 30;
}

// All values are candidates.
__device__ __forceinline__ uint32_t AllCandidates(int num_values) {
  const int lane = threadIdx.x % 32, count = (num_values - lane + 31) / 32;
  return count <= 0 ? 0u : count >= 32 ? ~0u : (1u << count) - 1;
}

}  // namespace baleen::cuda
