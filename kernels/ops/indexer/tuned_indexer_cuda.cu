// From the ops' plain arguments to the launches of the indexer's tuned kernels, chunk by chunk.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/indexer/dense_indexer_loss_cuda.h"
#include "kernels/ops/indexer/indexer_backward_cuda.h"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "kernels/ops/indexer/indexer_scores_cuda.h"
#include "kernels/ops/indexer/topk_select_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

static_assert(kTopkSelectCudaMostChosen == kTopkSelectMaxK &&
              kTopkSelectCudaMostKeys == kTopkSelectMaxKeys);

// TopkSelect's kernel lowers the row of the first NaN from here; no row is as high.
constexpr int kNoNanByte = 0x7f;
constexpr int32_t kNoNanRow = 0x7f7f7f7f;

__global__ void NameNanRow(int32_t* nan_row) {
  if (*nan_row == kNoNanRow) *nan_row = -1;
}

const char* At(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }
char* At(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

// Rows without keys.
void ZeroResults(const IndexerLossCudaArgs& args, void* stream) {
  const auto zero = [&](void* data, int64_t bytes) {
    CheckCuda(cudaMemsetAsync(data, 0, bytes, AsStream(stream)), "indexer loss without keys");
  };
  zero(args.loss_T, args.T * sizeof(float));
  zero(args.dw_TI, args.T * args.I * sizeof(float));
  zero(args.dq_TIJ, args.T * args.I * args.J * 2);
}

// What scores of bf16 and of codes share.
template <typename Args>
IndexerScoresArgs TunedScores(const Args& args) {
  IndexerScoresArgs tuned;
  tuned.q_TIJ = args.q_TIJ;
  tuned.k_SJ = args.k_SJ;
  tuned.w_TI = args.w_TI;
  tuned.key_begin_T = args.begin_T;
  tuned.key_end_T = args.end_T;
  tuned.num_rows = static_cast<int>(args.T);
  tuned.num_keys = static_cast<int>(args.S);
  tuned.num_heads = static_cast<int>(args.I);
  tuned.scores_TS = args.scores_TS;
  tuned.score_stride = args.S;
  return tuned;
}

}  // namespace

void IndexerScoresTunedCuda(const IndexerScoresCudaArgs& args, void* stream) {
  CheckCuda(LaunchIndexerScores(IndexerDtype::kBf16, TunedScores(args), AsStream(stream)),
            "indexer scores");
}

void IndexerScoresFp8Cuda(const IndexerScoresFp8CudaArgs& args, void* stream) {
  IndexerScoresArgs tuned = TunedScores(args);
  tuned.q_scale_TI = args.q_scale_TI;
  tuned.k_scale_S = args.k_scale_S;
  CheckCuda(LaunchIndexerScores(IndexerDtype::kE4m3, tuned, AsStream(stream)),
            "indexer scores of e4m3 codes");
}

void TopkSelectCuda(const TopkSelectCudaArgs& args, void* stream) {
  CheckCuda(cudaMemsetAsync(args.nan_row_1, kNoNanByte, sizeof(int32_t), AsStream(stream)),
            "first NaN row");
  TopkSelectArgs tuned;
  tuned.scores_TS = args.scores_TS;
  tuned.score_stride = args.S;
  tuned.key_begin_T = args.begin_T;
  tuned.key_end_T = args.end_T;
  tuned.num_rows = static_cast<int>(args.T);
  tuned.num_keys = static_cast<int>(args.S);
  tuned.topk = static_cast<int>(args.K);
  tuned.ids_TK = args.ids_TK;
  tuned.ties_cut_T = args.ties_T;
  tuned.chosen_scores_TK = args.chosen_scores_TK;
  tuned.first_nan_row = args.nan_row_1;
  CheckCuda(LaunchTopkSelect(tuned, AsStream(stream)), "top-k");
  NameNanRow<<<1, 1, 0, AsStream(stream)>>>(args.nan_row_1);
  CheckLaunch("first NaN row");
}

int64_t SparseIndexerLossTunedBytes(int64_t T, int64_t S, int64_t K) {
  return static_cast<int64_t>(
      IndexerBackwardWorkspaceBytes(static_cast<int>(T), static_cast<int>(S), static_cast<int>(K)));
}

void SparseIndexerLossTunedCuda(const SparseIndexerLossCudaArgs& args, void* stream) {
  const IndexerLossCudaArgs& indexer = args.indexer;
  if (indexer.S == 0 || args.K == 0) return ZeroResults(indexer, stream);
  const int64_t query_bytes = indexer.I * indexer.J * 2;
  for (int64_t first = 0; first < indexer.T; first += indexer.rows_per_chunk) {
    IndexerBackwardArgs tuned;
    tuned.q_TIJ = At(indexer.q_TIJ, first * query_bytes);
    tuned.k_SJ = indexer.k_SJ;
    tuned.w_TI = indexer.w_TI + first * indexer.I;
    tuned.ids_TK = args.ids_TK + first * args.K;
    tuned.target_TK = args.target_TK + first * args.K;
    if (args.scores_TK != nullptr) tuned.scores_TK = args.scores_TK + first * args.K;
    tuned.target_scale = args.target_scale;
    tuned.grad_scale = indexer.grad_scale;
    tuned.num_rows = static_cast<int>(std::min(indexer.rows_per_chunk, indexer.T - first));
    tuned.num_keys = static_cast<int>(indexer.S);
    tuned.num_heads = static_cast<int>(indexer.I);
    tuned.topk = static_cast<int>(args.K);
    tuned.loss_T = indexer.loss_T + first;
    tuned.dw_TI = indexer.dw_TI + first * indexer.I;
    tuned.dq_TIJ = At(indexer.dq_TIJ, first * query_bytes);
    tuned.dk_SJ = indexer.dk_SJ;
    tuned.workspace = indexer.workspace;
    CheckCuda(LaunchIndexerBackward(tuned, AsStream(stream)), "sparse indexer loss");
  }
}

int64_t DenseIndexerLossTunedBytes(int64_t rows, int64_t S, int64_t multiprocessors) {
  const DenseIndexerLossPlan plan =
      PlanDenseIndexerLoss(static_cast<int>(rows), static_cast<int>(S),
                           static_cast<int>(multiprocessors), size_t{1} << 62);
  return static_cast<int64_t>(plan.workspace_bytes);
}

void DenseIndexerLossTunedCuda(const IndexerLossCudaArgs& indexer,
                               const DenseTargetCudaArgs& target, void* stream) {
  if (indexer.S == 0) return ZeroResults(indexer, stream);
  DenseIndexerLossArgs tuned;
  tuned.q_TIJ = indexer.q_TIJ;
  tuned.k_SJ = indexer.k_SJ;
  tuned.w_TI = indexer.w_TI;
  tuned.main_q_THQ = target.q_THQ;
  tuned.main_k_SHQ = target.k_SHQ;
  tuned.lse_TH = target.lse_TH;
  tuned.key_begin_T = target.begin_T;
  tuned.key_end_T = target.end_T;
  tuned.softmax_scale = target.softmax_scale;
  tuned.grad_scale = indexer.grad_scale;
  tuned.num_rows = static_cast<int>(indexer.T);
  tuned.num_keys = static_cast<int>(indexer.S);
  tuned.num_main_heads = static_cast<int>(target.H);
  tuned.loss_T = indexer.loss_T;
  tuned.dw_TI = indexer.dw_TI;
  tuned.dq_TIJ = indexer.dq_TIJ;
  tuned.dk_SJ = indexer.dk_SJ;
  tuned.workspace = indexer.workspace;
  // Chunks of about equal size, each within the workspace.
  const DenseIndexerLossPlan plan =
      PlanDenseIndexerLoss(tuned.num_rows, tuned.num_keys, NumMultiprocessors(),
                           static_cast<size_t>(indexer.workspace_bytes));
  if (static_cast<int64_t>(plan.workspace_bytes) > indexer.workspace_bytes) {
    std::fprintf(stderr, "dense indexer loss: %zu bytes of workspace needed, %lld given\n",
                 plan.workspace_bytes, static_cast<long long>(indexer.workspace_bytes));
    std::abort();
  }
  CheckCuda(LaunchDenseIndexerLoss(tuned, plan, AsStream(stream)), "dense indexer loss");
}

}  // namespace baleen
