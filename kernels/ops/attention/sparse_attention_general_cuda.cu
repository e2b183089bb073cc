// Sparse attention of any shape, in fp32 on the ordinary cores: for small models, fp32 runs and
// widths that the kernel on tensor cores (sparse_attention_forward_cuda.h) is not made for. A block
// takes a query row and a group of heads.
#include "kernels/ops/attention/sparse_attention_general_tiles.cuh"

namespace baleen {
namespace {

using namespace general_sparse_attention;  // NOLINT: the other part of this kernel

template <typename T, int kWidth, int kHeads>
__global__ void __launch_bounds__(32 * kMostWarps)
    ForwardKernel(SparseAttentionGeneralArgs args, Tiles tiles) {
  extern __shared__ __align__(16) float shared[];
  const int group = tiles.Group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const q = shared;                // [group, c4]
  float* const o = q + group * tiles.c4;  // [group, v4]
  float* const p = o + group * tiles.v4;  // [group, 32]
  float* const kv = p + group * kSlots;   // [32, stride]
  const int64_t t = blockIdx.x, first_head = int64_t{blockIdx.y} * group;
  const int32_t* const ids = args.ids_TK + t * args.num_slots;

  LoadRows<T, kWidth>(q, tiles.c4, group, static_cast<int>(args.width), tiles.c4,
                      [&](int h) -> const T* {
                        if (first_head + h >= args.num_heads) return nullptr;
                        return static_cast<const T*>(args.q_THC) +
                               (t * args.num_heads + first_head + h) * args.width;
                      });
  for (int i = threadIdx.x; i < group * tiles.v4; i += blockDim.x) o[i] = 0;

  float largest[kHeads], sum[kHeads] = {};
  for (float& x : largest) x = -INFINITY;
  for (int64_t step = 0; step * kSlots < args.num_slots; ++step) {
    const int64_t slot = step * kSlots + lane;
    const bool listed = slot < args.num_slots && __ldg(ids + slot) >= 0;
    if (!__any_sync(~0u, listed)) continue;  // in all warps
    float4 dot[kHeads] = {};
    int loaded = 0;
    for (int first = 0; first < tiles.c4; first += tiles.slice) {
      GatherSlice<T, kWidth>(args, tiles, ids, step, first, kv);
      loaded = first;
      for (int c = 0; c < min(tiles.slice, tiles.c4 - first); c += 4) {
        const float4 key = At4(kv + lane * tiles.stride + c);
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
          AddProducts(dot[j], At4(q + (warp + j * tiles.warps) * tiles.c4 + first + c), key);
        }
      }
    }
    float shrink[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const float score = listed ? Total(dot[j]) * args.scale : -INFINITY;
      const float maximum = fmaxf(largest[j], WarpMax(score));
      shrink[j] = expf(largest[j] - maximum);
      const float weight = listed ? expf(score - maximum) : 0.0f;
      sum[j] = sum[j] * shrink[j] + WarpSum(weight);
      largest[j] = maximum;
      p[(warp + j * tiles.warps) * kSlots + lane] = weight;
    }
    __syncwarp();
    for (int first = 0; first < tiles.v4; first += tiles.slice) {
      if (loaded != first) GatherSlice<T, kWidth>(args, tiles, ids, step, first, kv);
      loaded = first;
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
        const int h = warp + j * tiles.warps;
        AddWeightedRows(o + h * tiles.v4 + first, shrink[j], p + h * kSlots, kv, tiles.stride,
                        min(tiles.slice, tiles.v4 - first));
      }
    }
  }

  __syncthreads();  // o is zeroed by all threads, also where no slot is listed
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const int h = warp + j * tiles.warps;
    if (first_head + h >= args.num_heads) continue;
    const int64_t row = t * args.num_heads + first_head + h;
    const float factor = sum[j] == 0 ? 0.0f : 1.0f / sum[j];
    T* const out = static_cast<T*>(args.o_THV) + row * args.value_dim;
    for (int v = lane; v < args.value_dim; v += 32) {
      out[v] = FromFloat<T>(o[h * tiles.v4 + v] * factor);
    }
    if (lane == 0) args.lse_TH[row] = sum[j] == 0 ? -INFINITY : largest[j] + logf(sum[j]);
  }
}

}  // namespace

void SparseAttentionGeneralCuda(const SparseAttentionGeneralArgs& args, void* stream) {
  if (args.num_rows == 0 || args.num_heads == 0) return;
  const Tiles tiles = PlanTiles(args, /*backward=*/false);
  const int bytes = SharedBytes(tiles, /*backward=*/false);
  const dim3 grid(static_cast<unsigned>(args.num_rows),
                  static_cast<unsigned>(CeilDiv(args.num_heads, tiles.Group())));
  ForInstance(args, nullptr, tiles, [&](auto zero, auto width, auto heads) {
    auto* const kernel =
        ForwardKernel<decltype(zero), decltype(width)::value, decltype(heads)::value>;
    AllowShared(kernel, bytes);
    kernel<<<grid, 32 * tiles.warps, bytes, AsStream(stream)>>>(args, tiles);
  });
  CheckLaunch("general sparse attention");
}

}  // namespace baleen
