// Sparse attention forward, part 3: adds the parts of works that were divided by blocks of keys.
// See sparse_attention_forward_cuda.cu for the whole.
#pragma once

#include "kernels/ops/attention/sparse_attention_forward_tile.cuh"

namespace baleen::sparse_forward {

constexpr int kAddBlocks = 8;                           // thread blocks a work
constexpr int kAddVectors = kPartVectors / kAddBlocks;  // of 4 elements of o a thread adds

// lse = log2 sum 2^lse_p, o = sum 2^(lse_p - lse) o_p over the parts in order. A thread has the
// elements of o that it has in a consumer: rows l / 4 (+ 8) of its warp, two columns of each.
template <bool kPacked>
__global__ void __launch_bounds__(256)
    AddPartsKernel(const __grid_constant__ SparseAttentionForwardArgs args,
                   const __grid_constant__ SparseAttentionForwardPlan plan) {
  const int divided = blockIdx.x, thread = threadIdx.x;
  const int warpgroup = thread / 128, warp = thread / 32 % 4, lane = thread % 32;
  const Rows rows = RowsOf<kPacked>(args, plan.whole + divided);
  const int row[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const float* lse = PartsLse(args, plan) + divided * kHeadTile;
  const int lse_step = plan.divided * kHeadTile;
  float largest[2] = {-1e30f, -1e30f};  // so that rows without keys get weights of 0
  for (int part = 0; part < plan.parts; ++part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], lse[part * lse_step + row[half]]);
    }
  }
  float4 o[kAddVectors] = {};
  float total[2] = {};
  for (int part = 0; part < plan.parts; ++part) {
    float weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weight[half] = Exp2(lse[part * lse_step + row[half]] - largest[half]);
      total[half] += weight[half];
    }
    if (weight[0] == 0 && weight[1] == 0) continue;  // a part without blocks has not written its o
    const float4* from =
        PartO(args, part * plan.divided + divided) + blockIdx.y * kAddVectors * 256 + thread;
#pragma unroll
    for (int x = 0; x < kAddVectors; ++x) {
      const float4 d = from[x * 256];
      o[x].x += weight[0] * d.x;
      o[x].y += weight[0] * d.y;
      o[x].z += weight[1] * d.z;
      o[x].w += weight[1] * d.w;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row[half] >= rows.count) continue;
    const float inverse = total[half] == 0 ? 0 : 1 / total[half];
    if (blockIdx.y == 0 && warpgroup == 0 && lane % 4 == 0) {
      args.lse_TH[rows.first + row[half]] =
          total[half] == 0 ? -INFINITY : (largest[half] + log2f(total[half])) * kLn2;
    }
    uint8_t* out = static_cast<uint8_t*>(args.o_THV) + (rows.first + row[half]) * (kV * 2);
#pragma unroll
    for (int x = 0; x < kAddVectors; ++x) {
      const int column = warpgroup * kHalf + (blockIdx.y * kAddVectors + x) * 8 + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(out + column * 2) =
          half == 0 ? PackBf16(o[x].x * inverse, o[x].y * inverse)
                    : PackBf16(o[x].z * inverse, o[x].w * inverse);
    }
  }
}

}  // namespace baleen::sparse_forward
