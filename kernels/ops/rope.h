// Rotary position embedding with YaRN frequencies, in the two layouts of V3.2:
//
//   kInterleaved  pairs (2i, 2i+1): the main attention
//   kHalfSplit    pairs (i, i + R/2): the lightning indexer (mixing them up is the known
//   bug) (a, b) -> (a cos - b sin, a sin + b cos), angle = position * frequency[i] backward =
//   rotation by -angle
// x on the CPU kF32 or kF64, on CUDA kF32 or kBF16 (arithmetic in fp32, rounded once); cos and sin
// kF32 (kF64 for kF64 x), of angles formed in fp64.
#pragma once

#include <vector>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct RopeFrequencyParams {
  int64_t dim = 64;  // R
  double theta = 10000;
  double factor = 1;  // 1: plain RoPE; else YaRN with the fields below
  int64_t original_max_position = 4096;
  double beta_fast = 32;
  double beta_slow = 1;
};

// R/2 frequencies in radians per position.
std::vector<double> RopeFrequencies(const RopeFrequencyParams& params);

// cos and sin of position * frequency for positions 0 .. num_positions-1: two [num_positions, R/2]
// tensors (kF32, or kF64 where dtype is kF64).
struct RopeTable {
  Tensor cos;
  Tensor sin;
};
RopeTable MakeRopeTable(const Context& context, DType dtype, const std::vector<double>& frequencies,
                        int64_t num_positions);

enum class RopeLayout : uint8_t { kInterleaved, kHalfSplit };
enum class RopeDirection : uint8_t { kForward, kBackward };

// Rotates in place the R columns of `x` (a view: batch = heads, rows = tokens, cols = R), position
// of row t = positions_T[t] (kI32, inside the table; on CUDA the caller answers for that).
void ApplyRope(const Context& context, const MatrixView& x, const Tensor& positions_T,
               const RopeTable& table, RopeLayout layout, RopeDirection direction);

}  // namespace baleen
