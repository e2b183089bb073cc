// Backward of general sparse attention. A block takes a query row and all its heads, group by
// group, so that it alone adds up the row's target and what each of its slots adds to dkv. Those
// rows go to memory; a block a key then adds its own in the order of the query rows.
#include "kernels/ops/attention/sparse_attention_general_tiles.cuh"
#include "kernels/ops/stable_sort_cuda.h"

namespace baleen {
namespace {

using namespace general_sparse_attention;  // NOLINT: the other part of this kernel

// Shared memory of a block of the backward.
struct BackwardShared {
  float *q, *d_o, *dq;  // [group, c4], [group, v4], [group, c4]
  float *p, *ds;        // [group, 32]; ds has the scale of the scores in it
  float* kv;            // [32, stride]

  __device__ BackwardShared(float* base, const Tiles& tiles) {
    const int group = tiles.Group();
    q = base;
    d_o = q + group * tiles.c4;
    dq = d_o + group * tiles.v4;
    p = dq + group * tiles.c4;
    ds = p + group * kSlots;
    kv = ds + group * kSlots;
  }
};

// What the group's heads add to dkv for the step's slots; the first group overwrites.
__device__ __forceinline__ void StoreContributions(const BackwardShared& s, const Tiles& tiles,
                                                   uint32_t listed, bool first_group, float* rows) {
  const int lane = threadIdx.x % 32, group = tiles.Group();
  for (int first = threadIdx.x / 32 * 4; first < kSlots; first += tiles.warps * 4) {
    if ((listed >> first & 15u) == 0) continue;
    for (int c = 4 * lane; c < tiles.c4; c += 128) {
      float4 sum[4] = {};
      for (int h = 0; h < group; ++h) {
        const float4 ds = At4(s.ds + h * kSlots + first), q = At4(s.q + h * tiles.c4 + c);
        AddScaled(sum[0], ds.x, q);
        AddScaled(sum[1], ds.y, q);
        AddScaled(sum[2], ds.z, q);
        AddScaled(sum[3], ds.w, q);
        if (c >= tiles.v4) continue;
        const float4 p = At4(s.p + h * kSlots + first), d_o = At4(s.d_o + h * tiles.v4 + c);
        AddScaled(sum[0], p.x, d_o);
        AddScaled(sum[1], p.y, d_o);
        AddScaled(sum[2], p.z, d_o);
        AddScaled(sum[3], p.w, d_o);
      }
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        if ((listed >> (first + x) & 1u) == 0) continue;
        float4* const out = reinterpret_cast<float4*>(rows + int64_t{first + x} * tiles.c4 + c);
        if (!first_group) AddScaled(sum[x], 1.0f, *out);
        *out = sum[x];
      }
    }
  }
}

// S and dP of the lane's slot for the warp's heads.
template <typename T, int kWidth, int kHeads>
__device__ __forceinline__ int ScoreStep(const SparseAttentionGeneralArgs& args, const Tiles& tiles,
                                         const int32_t* ids, int64_t step, const BackwardShared& s,
                                         float4 (&score)[kHeads], float4 (&dp)[kHeads]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int loaded = 0;
  for (int first = 0; first < tiles.c4; first += tiles.slice) {
    GatherSlice<T, kWidth>(args, tiles, ids, step, first, s.kv);
    loaded = first;
    for (int c = 0; c < min(tiles.slice, tiles.c4 - first); c += 4) {
      const float4 key = At4(s.kv + lane * tiles.stride + c);
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
        const int h = warp + j * tiles.warps;
        AddProducts(score[j], At4(s.q + h * tiles.c4 + first + c), key);
        if (first + c < tiles.v4) AddProducts(dp[j], At4(s.d_o + h * tiles.v4 + first + c), key);
      }
    }
  }
  return loaded;
}

// One group of heads of one row: dq, and its part of target and contributions.
template <typename T, int kWidth, int kHeads>
__device__ void BackwardGroup(const SparseAttentionGeneralBackwardArgs& all, const Tiles& tiles,
                              const BackwardShared& s, int64_t t, int64_t first_head,
                              float* contributions) {
  const SparseAttentionGeneralArgs& args = all.forward;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = tiles.Group();
  const int32_t* const ids = args.ids_TK + t * args.num_slots;
  float* const target = all.target_TK + t * args.num_slots;
  const auto row_of = [&](const void* x, int h, int64_t width) -> const T* {
    if (first_head + h >= args.num_heads) return nullptr;
    return static_cast<const T*>(x) + (t * args.num_heads + first_head + h) * width;
  };
  __syncthreads();  // the group before is through
  LoadRows<T, kWidth>(s.q, tiles.c4, group, static_cast<int>(args.width), tiles.c4,
                      [&](int h) { return row_of(args.q_THC, h, args.width); });
  LoadRows<T, kWidth>(s.d_o, tiles.v4, group, static_cast<int>(args.value_dim), tiles.v4,
                      [&](int h) { return row_of(all.do_THV, h, args.value_dim); });
  for (int i = threadIdx.x; i < group * tiles.c4; i += blockDim.x) s.dq[i] = 0;
  __syncthreads();

  float lse[kHeads], delta[kHeads];
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const int h = warp + j * tiles.warps;
    const T* const o = row_of(args.o_THV, h, args.value_dim);
    lse[j] = o == nullptr ? INFINITY : args.lse_TH[t * args.num_heads + first_head + h];
    float sum = 0;
    for (int v = lane; o != nullptr && v < args.value_dim; v += 32) {
      float value[1];
      Load<T, 1>(o + v, value);
      sum += value[0] * s.d_o[h * tiles.v4 + v];
    }
    delta[j] = WarpSum(sum);
  }

  for (int64_t step = 0; step * kSlots < args.num_slots; ++step) {
    const int64_t slot = step * kSlots + lane;
    const bool in_list = slot < args.num_slots, listed = in_list && __ldg(ids + slot) >= 0;
    const uint32_t mask = __ballot_sync(~0u, listed);
    if (mask == 0) {  // in all warps
      if (warp == 0 && in_list) target[slot] = 0;
      continue;
    }
    float4 score[kHeads] = {}, dp[kHeads] = {};
    int loaded = ScoreStep<T, kWidth, kHeads>(args, tiles, ids, step, s, score, dp);
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int h = warp + j * tiles.warps;
      const float p = listed && !isinf(lse[j]) ? expf(Total(score[j]) * args.scale - lse[j]) : 0.0f;
      s.p[h * kSlots + lane] = p;
      s.ds[h * kSlots + lane] = args.scale * p * (Total(dp[j]) - delta[j]);
    }
    __syncthreads();
    if (warp == 0 && in_list) {
      float sum = first_head == 0 ? 0.0f : target[slot];
      for (int h = 0; h < group; ++h) sum += s.p[h * kSlots + lane];
      target[slot] = sum;
    }
    StoreContributions(s, tiles, mask, first_head == 0, contributions + step * kSlots * tiles.c4);
    // The slice that is there first: with one slice, nothing is gathered twice.
    for (int first = loaded; first >= 0; first -= tiles.slice) {
      if (loaded != first) GatherSlice<T, kWidth>(args, tiles, ids, step, first, s.kv);
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
        const int h = warp + j * tiles.warps;
        AddWeightedRows(s.dq + h * tiles.c4 + first, 1.0f, s.ds + h * kSlots, s.kv, tiles.stride,
                        min(tiles.slice, tiles.c4 - first));
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const int h = warp + j * tiles.warps;
    if (first_head + h >= args.num_heads) continue;
    T* const dq = static_cast<T*>(all.dq_THC) + (t * args.num_heads + first_head + h) * args.width;
    __syncwarp();
    for (int c = lane; c < args.width; c += 32) dq[c] = FromFloat<T>(s.dq[h * tiles.c4 + c]);
  }
}

// blockIdx.x: the row, counted from first_row.
template <typename T, int kWidth, int kHeads>
__global__ void __launch_bounds__(32 * kMostWarps)
    BackwardKernel(SparseAttentionGeneralBackwardArgs args, Tiles tiles, int64_t first_row) {
  extern __shared__ __align__(16) float shared[];
  const BackwardShared s(shared, tiles);
  float* const contributions = args.contributions + blockIdx.x * args.forward.num_slots * tiles.c4;
  for (int64_t head = 0; head < args.forward.num_heads; head += tiles.Group()) {
    BackwardGroup<T, kWidth, kHeads>(args, tiles, s, first_row + blockIdx.x, head, contributions);
  }
}

// dkv[s] += the stored rows of key s in the order of the slots. A thread has four columns.
__global__ void SumContributionsKernel(SparseAttentionGeneralBackwardArgs args, int c4) {
  const int64_t s = blockIdx.x;
  const int column = 4 * static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const int begin = args.offsets[s], end = args.offsets[s + 1];
  if (column >= c4 || begin == end) return;
  float4 sum = {0, 0, 0, 0};
#pragma unroll 8
  for (int i = begin; i < end; ++i) {
    const int64_t slot = __ldg(args.sorted_slots + i);
    AddScaled(sum, 1.0f,
              __ldcs(reinterpret_cast<const float4*>(args.contributions + slot * c4 + column)));
  }
  const float parts[4] = {sum.x, sum.y, sum.z, sum.w};
  float* const out = args.dkv_SC + s * args.forward.width + column;
  for (int k = 0; k < 4 && column + k < args.forward.width; ++k) out[k] += parts[k];
}

// The slots of a chunk of rows from `first` on, by key and then by row.
void SortSlotsByKey(const SparseAttentionGeneralBackwardArgs& args, int64_t first, int64_t rows,
                    void* stream) {
  StableSortCudaArgs sort;
  sort.count = rows * args.forward.num_slots;
  sort.keys = args.forward.ids_TK + first * args.forward.num_slots;
  sort.num_keys = args.forward.num_keys;
  sort.workspace = args.sort_workspace;
  sort.sorted_keys = args.sorted_keys;
  sort.sorted_items = args.sorted_slots;
  StableSortCuda(sort, stream);
  SortedPlacesCudaArgs places;
  places.count = sort.count;
  places.num_keys = sort.num_keys;
  places.sorted_keys = args.sorted_keys;
  places.sorted_items = args.sorted_slots;
  places.offsets = args.offsets;
  SortedPlacesCuda(places, stream);
}

}  // namespace

void SparseAttentionGeneralBackwardCuda(const SparseAttentionGeneralBackwardArgs& args,
                                        const SparseAttentionGeneralChunk& chunk, void* stream) {
  const SparseAttentionGeneralArgs& forward = args.forward;
  if (forward.num_rows == 0 || forward.num_heads == 0) return;
  const Tiles tiles = PlanTiles(forward, /*backward=*/true);
  const int bytes = SharedBytes(tiles, /*backward=*/true);
  const int sum_threads = static_cast<int>(std::min<int64_t>(256, CeilDiv(tiles.c4, 128) * 32));
  for (int64_t first = 0; first < forward.num_rows; first += chunk.rows) {
    const int64_t rows = std::min(chunk.rows, forward.num_rows - first);
    ForInstance(forward, args.do_THV, tiles, [&](auto zero, auto width, auto heads) {
      auto* const kernel =
          BackwardKernel<decltype(zero), decltype(width)::value, decltype(heads)::value>;
      AllowShared(kernel, bytes);
      kernel<<<static_cast<unsigned>(rows), 32 * tiles.warps, bytes, AsStream(stream)>>>(
          args, tiles, first);
    });
    CheckLaunch("general sparse attention backward");
    if (forward.num_slots == 0 || forward.num_keys == 0) continue;
    SortSlotsByKey(args, first, rows, stream);
    const dim3 grid(static_cast<unsigned>(forward.num_keys),
                    static_cast<unsigned>(CeilDiv(tiles.c4, 4 * sum_threads)));
    SumContributionsKernel<<<grid, sum_threads, 0, AsStream(stream)>>>(args, tiles.c4);
    CheckLaunch("sums of general sparse attention backward");
  }
}

}  // namespace baleen
