// Which kernel serves an op of the indexer on CUDA, and the memory that it takes while it runs:
// functions of shapes and dtypes alone, so that a plan made on any machine says what the run takes.
//
// The tuned kernels are made for the published models (bf16 on tensor cores); the general ones take
// every shape, in bf16 and fp32. Legend: T query rows, S keys, I index heads, J their width, K
// chosen keys, Q width of the main attention's heads.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels/core/context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor.h"

namespace baleen {

enum class IndexerKernel : uint8_t { kTuned, kGeneral };

// In words, for the banner.
std::string NameOf(IndexerKernel kernel);

IndexerKernel ChooseIndexerScores(DType dtype, int64_t I, int64_t J);
// From E4M3 codes; kGeneral: no CUDA kernel.
IndexerKernel ChooseIndexerScoresFp8(int64_t I, int64_t J);
IndexerKernel ChooseSparseIndexerLoss(DType dtype, int64_t I, int64_t J, int64_t K);
IndexerKernel ChooseDenseIndexerLoss(DType dtype, int64_t I, int64_t J, int64_t Q);
// The heads that the tuned dense kernels work on; fewer come with heads of zeros behind them.
inline constexpr int64_t kTunedDenseHeads = 64;

// The tuned kernels move 16 bytes at a time. Tensors of their shapes begin so, and so do their
// rows.
void CheckTunedAlignment(const char* op, std::initializer_list<const Tensor*> operands);

// The rows of a call go through its kernels in chunks, so that what is kept for each pair of row
// and key stays within a budget (which one chunk of the fewest rows may exceed).
struct IndexerChunks {
  int64_t rows = 0;   // of a chunk; the last one may be shorter
  int64_t bytes = 0;  // of workspace
};
IndexerChunks PlanSparseIndexerChunks(DType dtype, int64_t T, int64_t S, int64_t I, int64_t J,
                                      int64_t K);
IndexerChunks PlanDenseIndexerChunks(DType dtype, int64_t T, int64_t S, int64_t I, int64_t J,
                                     int64_t Q);

// The workspace, 256-byte aligned, held as the use "indexer workspace".
struct IndexerWorkspace {
  Tensor memory;
  void* begin = nullptr;
};
IndexerWorkspace MakeIndexerWorkspace(const Context& context, int64_t bytes);

}  // namespace baleen
