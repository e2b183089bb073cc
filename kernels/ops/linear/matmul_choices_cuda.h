// Where cuBLASLt's first choice of a kernel is not its best: the products of DeepSeek-V3's widths
// for which another configuration of its kernels was measured to be faster, on an H100 with the L2
// emptied before each call and the two taking turns (kernels/bench/NOTES_gemm.md). Most have tiles
// whose number fills the last wave of the 132 multiprocessors. All else runs what cuBLASLt names
// first, and so does a product whose configuration the library at hand refuses: a line on stderr
// then says so, and what is lost is the time named below. Host functions only; they depend on the
// shape alone, so that a run's bits do.
#pragma once

#include <cstdint>
#include <optional>

namespace baleen {

// A configuration of cuBLASLt's algorithm for Hopper (cublasLtMatmulAlgoInit), by cuBLASLt's own
// numbers: CUBLASLT_ALGO_CONFIG_TILE_ID, ..._CLUSTER_SHAPE_ID, ..._CUSTOM_OPTION.
struct MatmulKernelChoice {
  uint32_t tile;
  uint16_t cluster;
  uint32_t custom;
};
constexpr int kMatmulAlgorithm = 66;
constexpr uint32_t kMatmulStages = 35;  // CUBLASLT_MATMUL_STAGES_64xAUTO, all that it has

enum class MatmulPass : uint8_t { kForward, kInput, kWeight };

// c [m, n] (+)= a [m, k] b [k, n], row major; kForward: b transposed, kInput: neither, kWeight: a
// transposed, c in fp32.
struct MatmulShape {
  MatmulPass pass;
  int64_t m, n, k;
};

struct MatmulTableRow {
  MatmulPass pass;
  int64_t n, k;  // of kWeight: n and m, the weight's widths
  MatmulKernelChoice choice;
};

// Tiles as cuBLASLt counts: first along a row of c. Behind each row: how many times as fast as the
// first suggestion.
inline constexpr MatmulKernelChoice k128x152 = {407, 3, 1}, k128x160 = {29, 3, 1},
                                    k128x176 = {409, 3, 1}, k128x216 = {413, 3, 7},
                                    k128x288 = {421, 7, 7}, k176x128 = {201, 5, 2},
                                    k192x128 = {31, 5, 6}, k224x128 = {221, 5, 6},
                                    k256x112 = {497, 5, 7};
inline constexpr MatmulTableRow kMatmulTable[] = {
    {MatmulPass::kForward, 32768, 512, k128x152},   // kv_b_proj: 1.28
    {MatmulPass::kForward, 24576, 1536, k176x128},  // q_b_proj: 1.10
    {MatmulPass::kForward, 8192, 1536, k128x176},   // the indexer's wq_b: 1.11
    {MatmulPass::kForward, 7168, 2048, k128x152},   // down_proj of shared experts: 1.05
    {MatmulPass::kInput, 7168, 576, k128x152},      // kv_a_proj_with_mqa: 1.18
    {MatmulPass::kInput, 7168, 1536, k128x152},     // q_a_proj: 1.09
    {MatmulPass::kInput, 7168, 2048, k128x152},     // gate_proj, up_proj of shared experts: 1.08
    {MatmulPass::kInput, 16384, 7168, k128x216},    // o_proj: 1.05
    {MatmulPass::kWeight, 7168, 1536, k224x128},    // q_a_proj: 1.12
    {MatmulPass::kWeight, 7168, 576, k128x288},     // kv_a_proj_with_mqa: 1.02
    {MatmulPass::kWeight, 16384, 7168, k128x160},   // o_proj: 1.02
    {MatmulPass::kWeight, 7168, 18432, k224x128},   // gate_proj, up_proj: 1.03
    {MatmulPass::kWeight, 18432, 7168, k192x128},   // down_proj: 1.03
    {MatmulPass::kWeight, 7168, 2048, k224x128},    // gate_proj, up_proj of shared experts: 1.08
    {MatmulPass::kWeight, 2048, 7168, k256x112},    // down_proj of shared experts: 1.07
};

inline std::optional<MatmulKernelChoice> ChooseMatmulKernel(const MatmulShape& shape) {
  // Measured with 8192 rows; fewer fill the GPU in other ways.
  constexpr int64_t kFewestRows = 4096;
  const bool weight = shape.pass == MatmulPass::kWeight;
  if ((weight ? shape.k : shape.m) < kFewestRows) return std::nullopt;
  for (const MatmulTableRow& row : kMatmulTable) {
    if (row.pass == shape.pass && row.n == shape.n && row.k == (weight ? shape.m : shape.k)) {
      return row.choice;
    }
  }
  return std::nullopt;
}

}  // namespace baleen
