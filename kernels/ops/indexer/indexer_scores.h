// Lightning-indexer scores (DeepSeek-V3.2 report 2.1, eq. 1): I[t, s] = sum_j w[t, j] * relu(q^I[t,
// j] . k^I[s]).
//
// Legend: T query rows, S keys, I index heads, J index_head_dim. w has the folded scale I^-0.5
// J^-0.5 in it.
#pragma once

#include <string>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/attention/attention.h"
#include "kernels/ops/indexer/fp8_simulate.h"

namespace baleen {

// scores_TS, kF32 (kF64 for kF64), inside each row's window. Outside the CPU gives -inf; on CUDA
// what lies there is not defined, so a reader stays inside the windows, as TopkSelect does. The
// caller chooses chunks of query rows: T x S is what is allocated. q and k are of one dtype, on the
// CPU kF32 or kF64, on CUDA kF32 or kBF16; w_TI is like the scores.
Tensor IndexerScores(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                     const Tensor& w_TI, const KeyWindows& windows);

// From E4M3 codes, with one scale s a query and head (q's scales [T, I, 1]) and one a key ([S, 1]):
//
//   I[t, s] = s^k[s] sum_j w[t, j] s^q[t, j] relu(q[t, j] . k[s])
//
// All scales are positive, so this is IndexerScores of the values; on the CPU it has its bits. On
// CUDA (64 or 32 heads of width 128) the products run on the FP8 tensor cores, which are exact in
// each product and keep 13 bits below the largest of those that they add at once. w and scales are
// kF32, on the CPU kF64 too.
Tensor IndexerScoresFp8(const Context& context, const Fp8Codes& q_TIJ, const Fp8Codes& k_SJ,
                        const Tensor& w_TI, const KeyWindows& windows);

// Whether IndexerScoresFp8 has a kernel for these heads where activations are of this dtype, which
// is a GPU's bf16: elsewhere the values themselves are multiplied.
bool HasFp8IndexerScores(DType dtype, int64_t num_heads, int64_t width);

// The CUDA kernel that runs, in words, for operands of this dtype and these heads (of width J).
std::string IndexerScoresKernelName(DType dtype, int64_t num_heads, int64_t width);
std::string IndexerScoresFp8KernelName();

}  // namespace baleen
