// Dense indexer loss: scores, target, loss, query gradient, key gradient.
//
// Roofline of a pair (t, s) with 128 main heads: target 128 * 192 * 2 = 49 152 FLOP; the indexer's
// scores, dq and dk 64 * 128 * 2 = 16 384 each (its masks are kept, so no product is made twice;
// a recomputation of the scores would be a fourth). 98 304 FLOP = 0.123 ns on the whole chip at 800
// TF. Bytes a pair through device memory: scores 4 written, 4 read; masks 8 written, 16 read; delta
// 2 written, 4 read: 38 B = 0.013 ns at 3 TB/s, beside the products. Exponentials: 128 a pair, 16 a
// clock: two thirds of the target's time on the tensor cores, so they must run beside them.
//
// Chunks of rows, not tiles, are what passes from kernel to kernel: a pair costs so much arithmetic
// that 14 bytes of it in device memory are free, and each kernel can hold in registers what it
// sums.
//   1. Scores    4 rows x all keys of their windows. I, lse_I and a bit 1[a > 0] for each head.
//   2. Target    256 rows x 192 keys a cluster, heads as the loop: p in registers; then with I
//                and lse_I the loss shares and delta = pi - p. No p in memory.
//   3. Loss      shares of a row, in order.
//   4. dq, dw    rows stay, keys pass: A = mask & delta from the bits, in registers.
//   5-6.         which rows touch which key block; equal runs of (key block, row) steps.
//   7. dk        keys stay, rows pass: A = mask & delta w. Parts of a run, then
//   8. Sum       the parts in the order of the runs. No sum is made by atomics.
// dw needs no product of its own: dw_j = sum_s delta relu(a_j) = q_j . (sum_s delta 1[a_j > 0]
// k_s).
#include <algorithm>

#include "kernels/ops/indexer/dense_indexer_loss_cuda.h"
#include "kernels/ops/indexer/dense_indexer_loss_gradient.cuh"
#include "kernels/ops/indexer/dense_indexer_loss_params.cuh"
#include "kernels/ops/indexer/dense_indexer_loss_scores.cuh"
#include "kernels/ops/indexer/dense_indexer_loss_target.cuh"

namespace baleen {
namespace dense_indexer_loss {
namespace {

// One warp a row: the shares of the key blocks that its window touches.
__global__ void LossKernel(const Params params) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= params.args.num_rows) return;
  const KeyRange window = RowWindow(params, row);
  const int blocks = params.num_tiles * kTileKeys / kTargetKeys;
  float sum = 0;
  if (window.begin < window.end) {
    for (int i = window.begin / kTargetKeys + lane; i * kTargetKeys < window.end; i += 32) {
      sum += params.loss_TX[static_cast<int64_t>(row) * blocks + i];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0) params.args.loss_T[row] = sum;
}

int64_t DivideUp(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Hands out the workspace; counts its bytes when there is none.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <typename T>
  T* Take(size_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return taken;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// Sizes and buffers of chunks of `rows` rows.
Params MakeParams(int rows, int num_keys, int num_runs, Workspace& workspace) {
  Params params = {};
  const size_t padded_rows = DivideUp(rows, kPadRows) * kPadRows;
  const size_t padded_keys = DivideUp(num_keys, kPadKeys) * kPadKeys;
  params.num_tiles = static_cast<int>(padded_keys / kTileKeys);
  params.num_key_blocks = static_cast<int>(DivideUp(num_keys, kKeyBlock));
  params.num_runs = num_runs;
  const size_t tiles = padded_rows * params.num_tiles;
  params.negated_k_SJ = workspace.Take<__nv_bfloat16>(size_t(num_keys) * kDim);
  params.score_TS = workspace.Take<float>(tiles * kTileKeys);
  params.mask_TX = workspace.Take<uint32_t>(tiles * kMaskWords);
  params.delta_TX = workspace.Take<__nv_bfloat16>(tiles * kTileKeys);
  params.lse_T = workspace.Take<float>(padded_rows);
  params.loss_TX = workspace.Take<float>(padded_rows * padded_keys / kTargetKeys);
  params.w_TX = workspace.Take<uint32_t>(padded_rows * kHeads / 2);
  params.key_block_rows = workspace.Take<int2>(params.num_key_blocks);
  params.first_step = workspace.Take<int>(params.num_key_blocks + 1);
  params.target_waves = workspace.Take<TargetWaves>(1);
  params.partial_dk =
      workspace.Take<float>(size_t(num_runs + params.num_key_blocks) * kKeyBlock * kDim);
  return params;
}

size_t BytesOfChunk(int rows, int num_keys, int num_runs) {
  Workspace workspace(nullptr);
  MakeParams(rows, num_keys, num_runs, workspace);
  return workspace.used();
}

// The arguments of rows [first, first + rows).
DenseIndexerLossArgs RowsOf(DenseIndexerLossArgs args, int64_t first, int rows) {
  const int64_t heads = args.num_main_heads;
  args.q_TIJ = static_cast<const __nv_bfloat16*>(args.q_TIJ) + first * kHeads * kDim;
  args.w_TI += first * kHeads;
  args.main_q_THQ = static_cast<const __nv_bfloat16*>(args.main_q_THQ) + first * heads * kMainDim;
  args.lse_TH += first * heads;
  args.key_begin_T += first;
  args.key_end_T += first;
  args.loss_T += first;
  args.dw_TI += first * kHeads;
  args.dq_TIJ = static_cast<__nv_bfloat16*>(args.dq_TIJ) + first * kHeads * kDim;
  args.num_rows = rows;
  return args;
}

struct Maps {
  CUtensorMap score_queries, score_keys, keys, main_queries, main_keys, queries;
};

cudaError_t MakeMaps(const Params& params, Maps* maps) {
  const DenseIndexerLossArgs& args = params.args;
  const auto make = [](CUtensorMap* map, const void* base, int64_t rows, int64_t columns, int box) {
    return cuda::MakeTensorMap(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, rows, 2 * columns,
                               box);
  };
  const int64_t query_rows = int64_t{args.num_rows} * kHeads;
  const int64_t main_columns = int64_t{args.num_main_heads} * kMainDim;
  for (const cudaError_t error :
       {make(&maps->score_queries, args.q_TIJ, query_rows, kDim, kColumns),
        make(&maps->score_keys, params.negated_k_SJ, args.num_keys, kDim, kTileKeys),
        make(&maps->queries, args.q_TIJ, query_rows, kDim, kHeads),
        make(&maps->keys, args.k_SJ, args.num_keys, kDim, kTileKeys),
        make(&maps->main_queries, args.main_q_THQ, args.num_rows, main_columns, kTargetRows / 2),
        make(&maps->main_keys, args.main_k_SHQ, args.num_keys, main_columns, kTargetKeys / 2)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t AllowShared() {
  const auto allow = [](auto kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  for (const cudaError_t error :
       {allow(ScoreKernel, kScoreSharedBytes), allow(TargetKernel<FinishLoss>, kTargetSharedBytes),
        allow(QueryGradientKernel, kGradientSharedBytes),
        allow(KeyGradientKernel, kGradientSharedBytes)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchChunk(const Params& params, cudaStream_t stream) {
  const int rows = params.args.num_rows;
  Maps maps;
  const cudaError_t error = MakeMaps(params, &maps);
  if (error != cudaSuccess) return error;
  const unsigned row_groups = static_cast<unsigned>(DivideUp(rows, kRowGroup));
  const unsigned cluster_rows = static_cast<unsigned>(
      DivideUp(DivideUp(rows, kPadRows), kRowBlocksOfGroup) * kRowBlocksOfGroup);
  const unsigned target_blocks = 2 * cluster_rows * (params.num_tiles * kTileKeys / kTargetKeys);
  ScoreKernel<<<row_groups, kThreads, kScoreSharedBytes, stream>>>(params, maps.score_queries,
                                                                   maps.score_keys);
  TargetKernel<<<target_blocks, kThreads, kTargetSharedBytes, stream>>>(
      params, maps.main_queries, maps.main_keys, FinishLoss{});
  LossKernel<<<static_cast<unsigned>(DivideUp(rows, 8)), 256, 0, stream>>>(params);
  QueryGradientKernel<<<row_groups, kThreads, kGradientSharedBytes, stream>>>(params, maps.keys);
  KeyBlockRowsKernel<<<params.num_key_blocks, 512, 0, stream>>>(params);
  FirstStepKernel<<<1, 1024, 0, stream>>>(params);
  KeyGradientKernel<<<params.num_runs, kThreads, kGradientSharedBytes, stream>>>(params,
                                                                                 maps.queries);
  const int64_t vectors = int64_t{params.args.num_keys} * kDim / 4;
  SumKeyGradientKernel<<<static_cast<unsigned>(DivideUp(vectors, 256)), 256, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t CountSms(int* num_sms) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace
}  // namespace dense_indexer_loss

using namespace dense_indexer_loss;  // NOLINT: the kernels of this operation, in files of their own

DenseIndexerLossPlan PlanDenseIndexerLoss(int num_rows, int num_keys, int num_sms,
                                          size_t most_bytes) {
  const int most_units = static_cast<int>(std::max<int64_t>(1, DivideUp(num_rows, kPadRows)));
  int units = most_units;
  while (units > 1 && BytesOfChunk(units * kPadRows, num_keys, num_sms) > most_bytes) --units;
  const int64_t chunks = DivideUp(most_units, units);
  const int rows = static_cast<int>(DivideUp(most_units, chunks)) * kPadRows;
  return {rows, BytesOfChunk(rows, num_keys, num_sms)};
}

cudaError_t LaunchDenseIndexerLoss(const DenseIndexerLossArgs& args,
                                   const DenseIndexerLossPlan& plan, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows < 0 || args.num_keys < 1 || args.num_main_heads < 1 ||
      plan.rows_per_chunk < 1 || args.workspace == nullptr || args.key_begin_T == nullptr ||
      args.key_end_T == nullptr) {
    return cudaErrorInvalidValue;
  }
  int num_sms = 0;
  cudaError_t error = CountSms(&num_sms);
  if (error == cudaSuccess) error = AllowShared();
  if (error != cudaSuccess) return error;
  Workspace workspace(args.workspace);
  Params params = MakeParams(plan.rows_per_chunk, args.num_keys, num_sms, workspace);
  if (workspace.used() > plan.workspace_bytes) return cudaErrorInvalidValue;
  const int64_t vectors = int64_t{args.num_keys} * kDim / 4;
  NegateKernel<<<static_cast<unsigned>(DivideUp(vectors, 256)), 256, 0, stream>>>(
      static_cast<const uint2*>(args.k_SJ), reinterpret_cast<uint2*>(params.negated_k_SJ), vectors);
  for (int first = 0; first < args.num_rows; first += plan.rows_per_chunk) {
    params.args = RowsOf(args, first, std::min(plan.rows_per_chunk, args.num_rows - first));
    error = LaunchChunk(params, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace baleen
