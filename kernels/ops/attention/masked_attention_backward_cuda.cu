// Backward of masked dense attention: schedule and statistics, dk and dv, dq, target.
//
// A pair (row, key) of a head has five products: S (192 columns) and dP (128) again, dv (128), dk
// (192), dq (192): 1664 FLOP. One kernel that keeps dk and dv of its keys in registers must add its
// share of dq to memory, 4 x 192 bytes of fp32 a row and key tile: 48 KB for 64 rows x 128 keys, 2
// TB/s at 500 TF, and for reproducible bits in a fixed order, tile after tile. Two kernels that
// make S and dP twice execute 2304 FLOP a pair instead (7 products), but each sums all it sums in
// registers: no order to keep, no fp32 dq and its conversion, no products that wait for another
// thread block. Better still, the first keeps dS in bf16, 2 bytes a pair and head, for the second,
// which then is one product and bound by reading them: 1664 FLOP, and still no order to keep. So
// where MaskedScoreGradientBytes says so; heads go in rounds of as many as fit into the workspace.
//   1. Schedule     windows or bits of the selection, row by row and key by key; lists of tiles.
//   2. Statistics   D = do.o and lse, head by head, so that a step's 64 rows are one copy.
//   3. Keys stay    (masked_attention_key_gradient_cuda.cuh) rows pass: dk, dv. 1280 FLOP a pair.
//   4. Rows stay    (masked_attention_kept_gradient_cuda.cuh) keys pass: dq of a kept dS. 384.
//              or   (masked_attention_query_gradient_cuda.cuh) dS made again: dq. 1024 FLOP a pair.
//   5. Target       (masked_attention_target_cuda.cu) S once more, heads as the loop. 384 FLOP.
//
// Roofline of 64 rows x 128 keys in 3: 2560 clocks of tensor cores; exponentials 512; shared memory
// 2180 for what products read, 450 for what copies and dS write: 2630, the limit; 128 more where
// dS is kept. In 4, 128 rows x 64 keys: 768 clocks of tensor cores, 1270 for 16 KB of dS from
// device memory; made again, 2048 of tensor cores, 1984 of shared memory. Memory: dk and dv are
// read and written once, 2560 bytes a key and head: 0.45 ms of 4 at 4096 tokens and 128 heads,
// beside the products.
#include <algorithm>
#include <cmath>

#include "kernels/ops/attention/masked_attention_backward_cuda.h"
#include "kernels/ops/attention/masked_attention_kept_gradient_cuda.cuh"
#include "kernels/ops/attention/masked_attention_key_gradient_cuda.cuh"
#include "kernels/ops/attention/masked_attention_query_gradient_cuda.cuh"
#include "kernels/ops/attention/masked_attention_target_cuda.h"

namespace baleen {
namespace {

using namespace masked_attention;  // NOLINT: the kernels of this operation, in files of their own

// 16 lanes a row and head: D = do.o and log2(e) lse, head by head.
__global__ void StatisticsKernel(const GradientParams params) {
  const MaskedAttentionBackwardArgs& args = params.args;
  const int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  const int row = static_cast<int>(i / args.num_heads), head = static_cast<int>(i % args.num_heads);
  if (row >= params.schedule.padded_rows) return;  // whole warps: the rows are a multiple of 2
  float delta = 0, lse = INFINITY;
  if (row < args.keys.num_rows) {
    const uint4 o = __ldg(static_cast<const uint4*>(args.o_THV) + i * (kValueDim / 8) + lane);
    const uint4 d_o = __ldg(static_cast<const uint4*>(args.do_THV) + i * (kValueDim / 8) + lane);
    const auto add = [&](uint32_t a, uint32_t b) {
      delta = fmaf(cuda::LowBf16(a), cuda::LowBf16(b), delta);
      delta = fmaf(cuda::HighBf16(a), cuda::HighBf16(b), delta);
    };
    add(o.x, d_o.x);
    add(o.y, d_o.y);
    add(o.z, d_o.z);
    add(o.w, d_o.w);
    const float natural = args.lse_TH[i];
    if (!isinf(natural)) lse = natural * kLog2E;
  }
#pragma unroll
  for (int step = 8; step > 0; step /= 2) delta += __shfl_xor_sync(kAllLanes, delta, step);
  float* out = const_cast<float*>(StatisticsOf(params, head, row / kStep)) + row % kStep;
  if (lane == 0) out[0] = lse;
  if (lane == 1) out[kStep] = delta;
}

void LaunchTarget(const GradientParams& params, int chunk, void* workspace, cudaStream_t stream) {
  const MaskedAttentionBackwardArgs& args = params.args;
  MaskedTargetArgs target;
  target.keys = args.keys;
  target.begin_T = params.schedule.begin_T;
  target.end_T = params.schedule.end_T;
  target.q_THQ = args.q_THQ;
  target.k_SHQ = args.k_SHQ;
  target.lse_TH = args.lse_TH;
  target.num_heads = args.num_heads;
  target.scale = args.scale;
  target.chunk = chunk;
  target.target_TK = args.target_TK;
  target.workspace = workspace;
  LaunchMaskedTarget(target, stream);
}

template <class Kernel, class SharedMemory>
void AllowShared(Kernel kernel) {
  cuda::CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       sizeof(SharedMemory)),
                  "masked attention backward: shared memory");
}

template <bool kSelected, bool kKeeps>
void LaunchKeyGradient(const GradientParams& params, int counter, cudaStream_t stream) {
  const MaskedAttentionBackwardArgs& args = params.args;
  const MaskedAttentionSchedule& schedule = params.schedule;
  const int rows = args.keys.num_rows, keys = args.keys.num_keys, heads = args.num_heads;
  const Work work = {schedule.by_keys, heads,
                     HeadsPerGroup(rows, heads, kKeeps ? kRoundBytes : kGroupBytes),
                     /*last_first=*/false, schedule.counters + counter};
  auto* kernel = KeyGradientKernel<kSelected, kKeeps>;
  AllowShared<decltype(kernel), KeyShared>(kernel);
  kernel<<<cuda::NumMultiprocessors(), kThreads, sizeof(KeyShared), stream>>>(
      params, work, HeadsMap(args.q_THQ, rows, heads, kQueryDim, kStep),
      HeadsMap(args.do_THV, rows, heads, kValueDim, kStep),
      HeadsMap(args.k_SHQ, keys, heads, kQueryDim, kTile),
      HeadsMap(args.v_SHV, keys, heads, kValueDim, kTile));
  cuda::CheckLaunch("masked attention backward: keys");
}

template <bool kSelected>
void LaunchQueryGradient(const GradientParams& params, cudaStream_t stream) {
  const MaskedAttentionBackwardArgs& args = params.args;
  const MaskedAttentionSchedule& schedule = params.schedule;
  const int rows = args.keys.num_rows, keys = args.keys.num_keys, heads = args.num_heads;
  const Work work = {schedule.by_rows, heads, HeadsPerGroup(keys, heads), /*last_first=*/true,
                     schedule.counters + 1};
  auto* kernel = QueryGradientKernel<kSelected>;
  AllowShared<decltype(kernel), RowShared>(kernel);
  kernel<<<cuda::NumMultiprocessors(), kThreads, sizeof(RowShared), stream>>>(
      params, work, HeadsMap(args.q_THQ, rows, heads, kQueryDim, kTile),
      HeadsMap(args.do_THV, rows, heads, kValueDim, kTile),
      HeadsMap(args.k_SHQ, keys, heads, kQueryDim, kStep),
      HeadsMap(args.v_SHV, keys, heads, kValueDim, kStep));
  cuda::CheckLaunch("masked attention backward: queries");
}

// dq of a round of heads, of their kept dS.
void LaunchKeptGradient(const GradientParams& params, int counter, cudaStream_t stream) {
  const MaskedAttentionBackwardArgs& args = params.args;
  const int keys = args.keys.num_keys, heads = args.num_heads;
  const MaskedTileLists tiles = {
      nullptr, 0, static_cast<int>(cuda::CeilDiv(args.keys.num_rows, kMaskedKeptRows))};
  // At least two heads in a group, or a round would end with the longest item of its last head.
  const int group = std::max(HeadsPerGroup(keys, heads), std::min(heads, 2));
  const Work work = {tiles, heads, group, /*last_first=*/true, params.schedule.counters + counter};
  AllowShared<decltype(&KeptQueryGradientKernel), KeptShared>(&KeptQueryGradientKernel);
  KeptQueryGradientKernel<<<cuda::NumMultiprocessors(), kThreads, sizeof(KeptShared), stream>>>(
      params, work, HeadsMap(args.k_SHQ, keys, heads, kQueryDim, kStep));
  cuda::CheckLaunch("masked attention backward: queries of kept dS");
}

template <bool kSelected>
void LaunchGradients(GradientParams params, cudaStream_t stream) {
  if (!params.schedule.keeps_ds) {
    LaunchKeyGradient<kSelected, false>(params, 0, stream);
    LaunchQueryGradient<kSelected>(params, stream);
    return;
  }
  const int rounds = params.schedule.num_counters / 2;
  for (int i = 0; i < rounds; ++i) {
    params.head_round = i;
    LaunchKeyGradient<kSelected, true>(params, 2 * i, stream);
    LaunchKeptGradient(params, 2 * i + 1, stream);
  }
}

}  // namespace

void LaunchMaskedAttentionBackward(const MaskedAttentionBackwardArgs& args, void* stream) {
  if (args.keys.num_rows == 0 || args.num_heads == 0) return;
  const cudaStream_t on = cuda::AsStream(stream);
  constexpr MaskedAttentionPass kPass = MaskedAttentionPass::kBackward;
  const MaskedAttentionLayout layout = LayOutMaskedAttention(args.keys, kPass, args.num_heads);
  uint8_t* const workspace = static_cast<uint8_t*>(args.workspace);
  const GradientParams params = {
      args, PlaceMaskedAttentionSchedule(args.keys, kPass, layout, workspace),
      reinterpret_cast<float*>(workspace + layout.statistics), workspace + layout.ds};
  LaunchMaskedAttentionSchedule(args.keys, params.schedule, on);
  if (layout.keeps_ds) {
    LaunchMaskedAttentionPlaces(params.schedule, args.num_heads,
                                MaskedTilesHeld(args.keys, args.num_heads), on);
  }
  const int64_t threads = int64_t{layout.padded_rows} * args.num_heads * 16;
  StatisticsKernel<<<static_cast<unsigned>(cuda::CeilDiv(threads, 256)), 256, 0, on>>>(params);
  cuda::CheckLaunch("masked attention backward: statistics");
  params.schedule.selected ? LaunchGradients<true>(params, on) : LaunchGradients<false>(params, on);
  if (args.target_TK != nullptr && args.keys.num_selected > 0) {
    LaunchTarget(params, layout.target_chunk, workspace + layout.target, on);
  }
}

}  // namespace baleen
