// Where cuBLASLt's first choice of a kernel is not its best: the products of DeepSeek-V3's widths
// for which another of its own suggestions was measured to be faster, on an H100 with the L2
// emptied before each call and the two taking turns (kernels/bench/NOTES_gemm.md). All else runs
// what cuBLASLt names first. Host functions only; they depend on the shape alone, so that a run's
// bits do.
#pragma once

#include <cstdint>
#include <optional>

namespace baleen {

// cuBLASLt's names (CUBLASLT_ALGO_CONFIG_TILE_ID, ..._CLUSTER_SHAPE_ID).
struct MatmulKernelChoice {
  int32_t tile;
  uint16_t cluster;
};

enum class MatmulPass : uint8_t { kForward, kInput, kWeight };

// c [m, n] (+)= a [m, k] b [k, n], row major; kForward: b transposed, kInput: neither, kWeight: a
// transposed, c in fp32.
struct MatmulShape {
  MatmulPass pass;
  int64_t m, n, k;
};

inline std::optional<MatmulKernelChoice> ChooseMatmulKernel(const MatmulShape& shape) {
  constexpr MatmulKernelChoice kWide = {201, 5}, kSplit = {29, 3};
  struct Row {
    MatmulPass pass;
    int64_t n, k;  // of kWeight: n and m, the weight's widths
    MatmulKernelChoice choice;
  };
  constexpr Row kTable[] = {
      {MatmulPass::kForward, 32768, 512, kWide},   // kv_b_proj: 1.20 times as fast
      {MatmulPass::kForward, 7168, 2048, kWide},   // down_proj of shared experts: 1.07
      {MatmulPass::kInput, 7168, 576, kSplit},     // kv_a_proj_with_mqa: 1.11
      {MatmulPass::kInput, 7168, 1536, kSplit},    // q_a_proj: 1.03
      {MatmulPass::kInput, 7168, 2048, kSplit},    // gate_proj, up_proj of shared experts: 1.03
      {MatmulPass::kWeight, 16384, 7168, kSplit},  // o_proj: 1.03
  };
  // Measured with 8192 rows; fewer fill the GPU in other ways.
  constexpr int64_t kFewestRows = 4096;
  const bool weight = shape.pass == MatmulPass::kWeight;
  if ((weight ? shape.k : shape.m) < kFewestRows) return std::nullopt;
  for (const Row& row : kTable) {
    if (row.pass == shape.pass && row.n == shape.n && row.k == (weight ? shape.m : shape.k)) {
      return row.choice;
    }
  }
  return std::nullopt;
}

}  // namespace baleen
