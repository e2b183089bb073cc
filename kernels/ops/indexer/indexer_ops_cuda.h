// Internal: the kernels behind indexer_scores.h, topk_select.h and indexer_loss.h. Those that end
// in TunedCuda launch the kernels of the published models' shapes (indexer_kernels.h says which);
// the others take every shape, in bf16 and fp32, with fp32 arithmetic. All are deterministic.
//
// Legend: T query rows, S keys, I index heads, J their width, K chosen keys, H main heads, Q their
// width. q [T, I, J], k [S, J] and dq are of `element`; everything else is fp32 or int32.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

struct IndexerScoresCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t T = 0, S = 0, I = 0, J = 0;
  const void* q_TIJ = nullptr;
  const void* k_SJ = nullptr;
  const float* w_TI = nullptr;
  const int32_t* begin_T = nullptr;  // 0 <= begin <= end <= S
  const int32_t* end_T = nullptr;
  // [T, S]; outside the windows: general -inf, tuned what was there before.
  float* scores_TS = nullptr;
};
void IndexerScoresCuda(const IndexerScoresCudaArgs& args, void* stream);
void IndexerScoresTunedCuda(const IndexerScoresCudaArgs& args, void* stream);

// Width 128; one scale a query and head, one a key.
struct IndexerScoresFp8CudaArgs {
  int64_t T = 0, S = 0, I = 0;
  const void* q_TIJ = nullptr;  // e4m3
  const float* q_scale_TI = nullptr;
  const void* k_SJ = nullptr;  // e4m3
  const float* k_scale_S = nullptr;
  const float* w_TI = nullptr;
  const int32_t* begin_T = nullptr;
  const int32_t* end_T = nullptr;
  float* scores_TS = nullptr;
};
void IndexerScoresFp8Cuda(const IndexerScoresFp8CudaArgs& args, void* stream);

inline constexpr int64_t kTopkSelectCudaMostChosen = 2048;
inline constexpr int64_t kTopkSelectCudaMostKeys = int64_t{1} << 18;
struct TopkSelectCudaArgs {
  int64_t T = 0, S = 0, K = 0;
  const float* scores_TS = nullptr;
  const int32_t* begin_T = nullptr;
  const int32_t* end_T = nullptr;
  int32_t* ids_TK = nullptr;
  int32_t* ties_T = nullptr;
  float* chosen_scores_TK = nullptr;  // null: nobody asks for them
  int32_t* nan_row_1 = nullptr;       // -1: none
};
void TopkSelectCuda(const TopkSelectCudaArgs& args, void* stream);

// The loss of indexer_loss.h. `workspace` as large as PlanSparseIndexerChunks or
// PlanDenseIndexerChunks says for `rows_per_chunk`.
struct IndexerLossCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t T = 0, S = 0, I = 0, J = 0;
  const void* q_TIJ = nullptr;
  const void* k_SJ = nullptr;
  const float* w_TI = nullptr;
  float grad_scale = 1;
  float* loss_T = nullptr;
  void* dq_TIJ = nullptr;
  float* dw_TI = nullptr;
  float* dk_SJ = nullptr;  // added to
  int64_t rows_per_chunk = 0;
  void* workspace = nullptr;  // 256-byte aligned
  int64_t workspace_bytes = 0;
};
struct SparseIndexerLossCudaArgs {
  IndexerLossCudaArgs indexer;
  int64_t K = 0;
  const int32_t* ids_TK = nullptr;  // -1: none; distinct in a row
  const float* target_TK = nullptr;
  const float* scores_TK = nullptr;  // of the ids; null: computed from q, k, w
  float target_scale = 1;
};
void SparseIndexerLossCuda(const SparseIndexerLossCudaArgs& args, void* stream);
void SparseIndexerLossTunedCuda(const SparseIndexerLossCudaArgs& args, void* stream);

struct DenseTargetCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t T = 0, S = 0, H = 0, Q = 0;
  const void* q_THQ = nullptr;
  const void* k_SHQ = nullptr;
  const float* lse_TH = nullptr;
  float softmax_scale = 1;
  const int32_t* begin_T = nullptr;
  const int32_t* end_T = nullptr;
  float* p_TS = nullptr;  // of DenseTargetProbabilitiesCuda alone
};
void DenseTargetProbabilitiesCuda(const DenseTargetCudaArgs& args, void* stream);
// T and S of the target are the indexer's.
void DenseIndexerLossCuda(const IndexerLossCudaArgs& indexer, const DenseTargetCudaArgs& target,
                          void* stream);
void DenseIndexerLossTunedCuda(const IndexerLossCudaArgs& indexer,
                               const DenseTargetCudaArgs& target, void* stream);

// A row that names a key outside its window gets NaN.
struct SelectionQualityCudaArgs {
  int64_t T = 0, S = 0, K = 0;
  const float* p_TS = nullptr;
  const int32_t* ids_TK = nullptr;
  const int32_t* begin_T = nullptr;
  const int32_t* end_T = nullptr;
  float* mass_T = nullptr;
  float* best_mass_T = nullptr;
  float* recall_T = nullptr;
};
void SelectionQualityCuda(const SelectionQualityCudaArgs& args, void* stream);

// What the tuned kernels themselves say that they need; for tests of indexer_kernels.h.
int64_t SparseIndexerLossTunedBytes(int64_t T, int64_t S, int64_t K);
int64_t DenseIndexerLossTunedBytes(int64_t rows, int64_t S, int64_t multiprocessors);

}  // namespace baleen
