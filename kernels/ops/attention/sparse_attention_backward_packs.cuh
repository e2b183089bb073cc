// Sparse attention backward of packs of queries: the kernels around the main one. Whether packs are
// used is decided on the device, from the unions of their lists; what was not chosen does nothing.
#pragma once

#include "kernels/ops/attention/sparse_attention_backward_scores.cuh"

namespace baleen::sparse_backward {

constexpr int kChoosingThreads = 1024;

// One thread block. Packs are chosen if their blocks of keys are few enough against those of single
// queries, and if the ring has slots enough for the rows of some chunk, the largest that does.
__global__ void __launch_bounds__(kChoosingThreads)
    ChoosePacksKernel(const SparseAttentionBackwardPacksPlan plan, const int32_t* counts_I,
                      int64_t single_blocks, int32_t* choice) {
  __shared__ unsigned long long blocks;
  __shared__ int most_rows[SparseAttentionBackwardPacksPlan::kChoices];
  const int thread = threadIdx.x, lane = thread % 32, num_packs = plan.shape.num_tokens;
  const int groups = (num_packs + 31) / 32;
  int32_t* rows_G = choice + kGroupRows;
  if (thread == 0) blocks = 0;
  if (thread < plan.kChoices) most_rows[thread] = 0;
  __syncthreads();
  for (int group = thread / 32; group < groups; group += kChoosingThreads / 32) {
    const int i = group * 32 + lane, count = i < num_packs ? __ldg(counts_I + i) : 0;
    const int rows = __reduce_add_sync(~0u, count);
    const int group_blocks = __reduce_add_sync(~0u, (count + kBlock - 1) / kBlock);
    if (lane == 0) {
      rows_G[group] = rows;
      atomicAdd(&blocks, (unsigned long long)group_blocks);
    }
  }
  __syncthreads();
  for (int c = 0; c < plan.kChoices; ++c) {
    const int a_chunk = plan.chunks[c] / 32;
    for (int first = thread * a_chunk; first < groups; first += kChoosingThreads * a_chunk) {
      int rows = 0;
      for (int x = first; x < min(first + a_chunk, groups); ++x) rows += rows_G[x];
      atomicMax(&most_rows[c], rows);
    }
  }
  __syncthreads();
  if (thread != 0) return;
  int chunk = 0, slot_rows = 0, slots = 0;
  if (int64_t(blocks) * 100 <= single_blocks * plan.most_percent) {
    for (int c = 0; c < plan.kChoices && chunk == 0; ++c) {
      slot_rows = max(1, most_rows[c]);
      slots = plan.ring_rows / slot_rows;
      if (slots >= FewestSlotsOfPacks(plan.chunks[c], plan.lag)) chunk = plan.chunks[c];
    }
  }
  choice[kChosenChunk] = chunk;
  choice[kSlotRows] = slot_rows;
  choice[kNumSlots] = slots;
}

// A row of the target whose keys do not ascend: from the order of the keys to that of the list.
__global__ void RestoreListOrderKernel(const int32_t* ids_TK, float* target_TK, int num_selected,
                                       const int32_t* choice) {
  extern __shared__ int32_t list[];
  if (NotChosen<true>(choice)) return;
  float* values = reinterpret_cast<float*>(list + num_selected);
  const int32_t* ids = ids_TK + size_t(blockIdx.x) * num_selected;
  float* target = target_TK + size_t(blockIdx.x) * num_selected;
  bool falls = false;
  for (int k = threadIdx.x * 4; k < num_selected; k += blockDim.x * 4) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(ids + k));
    const int32_t next = k + 4 < num_selected ? __ldg(ids + k + 4) : -1;
    falls = falls || (four.y >= 0 && four.y < four.x) || (four.z >= 0 && four.z < four.y) ||
            (four.w >= 0 && four.w < four.z) || (next >= 0 && next < four.w);
  }
  if (!__syncthreads_or(falls)) return;
  for (int k = threadIdx.x; k < num_selected; k += blockDim.x) {
    list[k] = ids[k];
    values[k] = target[k];
  }
  __syncthreads();
  for (int k = threadIdx.x; k < num_selected; k += blockDim.x) {
    const int32_t own = list[k];
    if (own < 0) continue;
    int rank = 0;
    for (int other = 0; other < num_selected; ++other) {
      rank += list[other] >= 0 && list[other] < own;
    }
    target[k] = values[rank];
  }
}

}  // namespace baleen::sparse_backward
