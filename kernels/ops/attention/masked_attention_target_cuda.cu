// Head-summed probabilities of selected keys: the tiles of the dense indexer loss (256 rows x 192
// keys a cluster, heads as the loop, sums in registers), stored for a chunk of rows, and a gather
// by the ids. A pair costs H * 384 operations and 4 bytes of sums: memory is no matter. Tiles
// outside every row's window are skipped; the sums of keys in a window that are not selected may be
// anything, infinite too, and are not read.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention/masked_attention_target_cuda.h"
#include "kernels/ops/indexer/dense_indexer_loss_target.cuh"

namespace baleen {
namespace {

using namespace dense_indexer_loss;  // NOLINT: its device code makes the sums

static_assert(kMaskedTargetRows == kPadRows && kMaskedTargetKeys == kPadKeys, "the plan's padding");

// Stores the sums of the thread's rows `row` and row + 8 of the chunk: keys 8 j + 2 c + e of the
// tile.
struct StoreSums {
  float* sums;  // [rows, padded keys]

  __device__ __forceinline__ void operator()(const Params& params, int row, int first_key,
                                             const float (&mean)[kTargetRegisters]) const {
    const float heads = static_cast<float>(params.args.num_main_heads);
    const int64_t width = int64_t{params.num_tiles} * kTileKeys;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= params.args.num_rows) continue;
      float* out = sums + (row + 8 * r) * width + first_key + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < kTargetKeys / 8; ++j) {
        __stcs(reinterpret_cast<float2*>(out + 8 * j),
               make_float2(mean[4 * j + 2 * r] * heads, mean[4 * j + 2 * r + 1] * heads));
      }
    }
  }
};

// One thread block a row of the chunk.
__global__ void GatherKernel(const MaskedTargetArgs args, int first_row, const float* sums,
                             int64_t width) {
  const int row = first_row + static_cast<int>(blockIdx.x);
  const float* from = sums + blockIdx.x * width;
  const int begin = args.begin_T[row], end = args.end_T[row];
  const int64_t at = int64_t{row} * args.keys.num_selected;
  for (int i = threadIdx.x; i < args.keys.num_selected; i += blockDim.x) {
    const int id = args.keys.ids_TK[at + i];
    args.target_TK[at + i] = id >= begin && id < end ? from[id] : 0.0f;
  }
}

CUtensorMap HeadsMap(const void* base, int rows, int heads, int lines) {
  CUtensorMap map;
  cuda::CheckCuda(cuda::MakeTensorMap(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, rows,
                                      int64_t{2} * heads * kMainDim, lines),
                  "masked attention target: tensor map");
  return map;
}

}  // namespace

void LaunchMaskedTarget(const MaskedTargetArgs& args, cudaStream_t stream) {
  const int num_rows = args.keys.num_rows, num_keys = args.keys.num_keys;
  const int64_t width = MaskedRoundUp(num_keys, kPadKeys), row_heads = args.num_heads;
  float* sums = reinterpret_cast<float*>(static_cast<uint8_t*>(args.workspace) + 256);
  cuda::CheckCuda(
      cudaFuncSetAttribute(TargetKernel<StoreSums>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           kTargetSharedBytes),
      "masked attention target: shared memory");
  const CUtensorMap key_map = HeadsMap(args.k_SHQ, num_keys, args.num_heads, kTargetKeys / 2);
  for (int first = 0; first < num_rows; first += args.chunk) {
    const int rows = std::min(args.chunk, num_rows - first);
    Params params = {};
    params.args.lse_TH = args.lse_TH + first * row_heads;
    params.args.key_begin_T = args.begin_T + first;
    params.args.key_end_T = args.end_T + first;
    params.args.softmax_scale = args.scale;
    params.args.num_rows = rows;
    params.args.num_keys = num_keys;
    params.args.num_main_heads = args.num_heads;
    params.num_tiles = static_cast<int>(width / kTileKeys);
    params.num_runs = cuda::NumMultiprocessors();
    params.target_waves = static_cast<TargetWaves*>(args.workspace);
    cuda::CheckCuda(cudaMemsetAsync(args.workspace, 0, sizeof(TargetWaves), stream),
                    "masked attention target: waves");
    const int64_t row_blocks = cuda::CeilDiv(rows, int64_t{kPadRows} * kRowBlocksOfGroup);
    const unsigned blocks =
        static_cast<unsigned>(2 * row_blocks * kRowBlocksOfGroup * (width / kTargetKeys));
    const auto* q = static_cast<const __nv_bfloat16*>(args.q_THQ) + first * row_heads * kMainDim;
    TargetKernel<<<blocks, kThreads, kTargetSharedBytes, stream>>>(
        params, HeadsMap(q, rows, args.num_heads, kTargetRows / 2), key_map, StoreSums{sums});
    cuda::CheckLaunch("masked attention target: sums");
    GatherKernel<<<static_cast<unsigned>(rows), 256, 0, stream>>>(args, first, sums, width);
    cuda::CheckLaunch("masked attention target: gather");
  }
}

}  // namespace baleen
