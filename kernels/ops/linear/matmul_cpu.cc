// Matmul on the CPU, one thread: packed panels, a register tile, runs of kDepth in K (after Goto's
// scheme).
//
// The order of summation is part of the definition: element (i, j) is the sum over runs of kDepth
// consecutive k, each run summed in ascending k from zero, then scaled by alpha and added to C run
// by run. It depends on row i of A, column j of B, K and the instruction set alone, never on the
// other rows and columns of the call: splitting tokens over microbatches, chunks or experts gives
// the same bits. Hence tiles at the edge run the same kernel on padding.
#include "kernels/ops/linear/matmul_cpu.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace baleen {
namespace {

constexpr int64_t kDepth = 256;        // k in one run: an A panel of 8 rows stays in the L1 cache
constexpr int64_t kBlockBytes = 2048;  // of a packed row of B: kDepth rows stay in the L2 cache
constexpr int64_t kMaxTileBytes = 8 * 128;  // eight rows of two 64-byte vectors

template <typename T>
using TileFunction = void (*)(int64_t depth, const T* a, const T* b, T alpha, bool add, T* c,
                              int64_t c_row_stride);

template <typename T, int kRows>
void TilePortable(int64_t depth, const T* a, const T* b, T alpha, bool add, T* c,
                  int64_t c_row_stride) {
  constexpr int64_t kVectorBytes = 16;
#include "kernels/ops/linear/matmul_tile_cpu.inc"
}

#if defined(__x86_64__)
template <typename T, int kRows>
__attribute__((target("avx2,fma"))) void TileAvx2(int64_t depth, const T* a, const T* b, T alpha,
                                                  bool add, T* c, int64_t c_row_stride) {
  constexpr int64_t kVectorBytes = 32;
#include "kernels/ops/linear/matmul_tile_cpu.inc"
}

template <typename T, int kRows>
__attribute__((target("avx512f"))) void TileAvx512(int64_t depth, const T* a, const T* b, T alpha,
                                                   bool add, T* c, int64_t c_row_stride) {
  constexpr int64_t kVectorBytes = 64;
#include "kernels/ops/linear/matmul_tile_cpu.inc"
}
#endif

// The tile kernels of one instruction set; all heights give an element the same bits.
template <typename T>
struct TileKernels {
  int64_t columns;                 // two vectors
  int64_t max_rows;                // as many as the registers hold
  TileFunction<T> by_log_rows[4];  // 1, 2, 4, 8 rows
};

template <typename T>
TileKernels<T> KernelsOf(VectorIsa isa) {
#if defined(__x86_64__)
  if (isa == VectorIsa::kAvx512) {
    return {128 / sizeof(T),
            8,
            {TileAvx512<T, 1>, TileAvx512<T, 2>, TileAvx512<T, 4>, TileAvx512<T, 8>}};
  }
  if (isa == VectorIsa::kAvx2) {
    return {64 / sizeof(T), 4, {TileAvx2<T, 1>, TileAvx2<T, 2>, TileAvx2<T, 4>, nullptr}};
  }
#endif
  return {32 / sizeof(T), 4, {TilePortable<T, 1>, TilePortable<T, 2>, TilePortable<T, 4>, nullptr}};
}

// Rows of the last, possibly lower, panel of `rows` rows that starts at `row`.
int64_t PanelRows(int64_t row, int64_t rows, int64_t max_rows) {
  return std::min(max_rows, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows - row))));
}

// Four k of four consecutive panel lanes, transposed in registers.
template <typename T>
void Transpose4x4(const T* source, int64_t lane_stride, T* target, int64_t width) {
  T block[4][4];
  for (int lane = 0; lane < 4; ++lane) {
    std::memcpy(block[lane], source + lane * lane_stride, sizeof(block[lane]));
  }
  for (int k = 0; k < 4; ++k) {
    for (int lane = 0; lane < 4; ++lane) target[k * width + lane] = block[lane][k];
  }
}

// Packs `lanes` rows of A or columns of B as target[depth][width], zeros beyond `lanes`.
template <typename T>
void PackPanel(const T* source, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t depth,
               int64_t width, T* __restrict target) {
  if (lanes < width) std::fill_n(target, depth * width, T{0});
  if (lane_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* const from = source + k * k_stride;
      T* const to = target + k * width;
      for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = from[lane];
    }
    return;
  }
  const int64_t whole_lanes = lanes / 4 * 4, whole_depth = k_stride == 1 ? depth / 4 * 4 : 0;
  for (int64_t lane = 0; lane < whole_lanes; lane += 4) {
    for (int64_t k = 0; k < whole_depth; k += 4) {
      Transpose4x4(source + lane * lane_stride + k, lane_stride, target + k * width + lane, width);
    }
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t k = lane < whole_lanes ? whole_depth : 0; k < depth; ++k) {
      target[k * width + lane] = source[lane * lane_stride + k * k_stride];
    }
  }
}

// One tile of C; where it reaches over the edge the kernel works on a copy of the part inside.
template <typename T>
void RunTile(TileFunction<T> kernel, int64_t depth, const T* a, const T* b, T alpha, bool add, T* c,
             int64_t c_row_stride, int64_t rows, int64_t columns, int64_t tile_rows,
             int64_t tile_columns) {
  if (rows == tile_rows && columns == tile_columns) {
    kernel(depth, a, b, alpha, add, c, c_row_stride);
    return;
  }
  alignas(64) T tile[kMaxTileBytes / sizeof(T)] = {};
  if (add) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(c + r * c_row_stride, columns, tile + r * tile_columns);
    }
  }
  kernel(depth, a, b, alpha, add, tile, tile_columns);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(tile + r * tile_columns, columns, c + r * c_row_stride);
  }
}

// The loops around the tiles for one matrix of the batch.
template <typename T>
void MultiplyOne(const MatmulProblem<T>& p, int64_t batch, const TileKernels<T>& kernels,
                 T* packed_a, T* packed_b) {
  const T* const a = p.a.data + batch * p.a.batch_stride;
  const T* const b = p.b.data + batch * p.b.batch_stride;
  T* const c = p.c.data + batch * p.c.batch_stride;
  const int64_t width = kernels.columns;
  const int64_t block_columns = kBlockBytes / sizeof(T);
  for (int64_t n0 = 0; n0 < p.n; n0 += block_columns) {
    const int64_t n1 = std::min(p.n, n0 + block_columns);
    for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
      const int64_t depth = std::min(kDepth, p.k - k0);
      const bool add = p.add || k0 > 0;
      for (int64_t n = n0; n < n1; n += width) {
        PackPanel(b + k0 * p.b.row_stride + n * p.b.col_stride, p.b.col_stride, p.b.row_stride,
                  std::min(width, n1 - n), depth, width, packed_b + (n - n0) * depth);
      }
      for (int64_t m = 0; m < p.m;) {
        const int64_t tile_rows = PanelRows(m, p.m, kernels.max_rows);
        const int64_t rows = std::min(tile_rows, p.m - m);
        const TileFunction<T> kernel =
            kernels.by_log_rows[std::countr_zero(static_cast<uint64_t>(tile_rows))];
        PackPanel(a + m * p.a.row_stride + k0 * p.a.col_stride, p.a.row_stride, p.a.col_stride,
                  rows, depth, tile_rows, packed_a);
        for (int64_t n = n0; n < n1; n += width) {
          RunTile(kernel, depth, packed_a, packed_b + (n - n0) * depth, p.alpha, add,
                  c + m * p.c.row_stride + n, p.c.row_stride, rows, std::min(width, n1 - n),
                  tile_rows, width);
        }
        m += rows;
      }
    }
  }
}

// One block of B and one panel of A, packed: B first.
struct Panels {
  std::shared_ptr<Storage> storage;
  int64_t elements_of_b;
};

template <typename T>
Panels AllocatePanels(const Context& context, const TileKernels<T>& kernels, int64_t n, int64_t k) {
  const int64_t depth = std::min(k, kDepth);
  const int64_t columns = std::min<int64_t>(n, kBlockBytes / sizeof(T));
  const int64_t padded = (columns + kernels.columns - 1) / kernels.columns * kernels.columns;
  const int64_t bytes = (kernels.max_rows + padded) * depth * static_cast<int64_t>(sizeof(T));
  return {context.pool().Allocate(bytes, "matmul panels"), padded * depth};
}

}  // namespace

std::vector<VectorIsa> SupportedVectorIsas() {
  std::vector<VectorIsa> isas = {VectorIsa::kPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(VectorIsa::kAvx2);
  }
  if (__builtin_cpu_supports("avx512f")) isas.push_back(VectorIsa::kAvx512);
#endif
  return isas;
}

template <typename T>
void MatmulCpu(const Context& context, const MatmulProblem<T>& problem, VectorIsa isa) {
  if (problem.k == 0 && !problem.add) {
    for (int64_t batch = 0; batch < problem.batch; ++batch) {
      for (int64_t i = 0; i < problem.m; ++i) {
        std::fill_n(problem.c.data + batch * problem.c.batch_stride + i * problem.c.row_stride,
                    problem.n, T{0});
      }
    }
  }
  if (problem.m == 0 || problem.n == 0 || problem.k == 0) return;
  const TileKernels<T> kernels = KernelsOf<T>(isa);
  const Panels panels = AllocatePanels(context, kernels, problem.n, problem.k);
  T* const packed_b = static_cast<T*>(panels.storage->data());
  T* const packed_a = packed_b + panels.elements_of_b;
  for (int64_t batch = 0; batch < problem.batch; ++batch) {
    MultiplyOne(problem, batch, kernels, packed_a, packed_b);
  }
}

void ReserveMatmulPanels(const Context& context, DType dtype, int64_t n, int64_t k) {
  if (n == 0 || k == 0) return;
  const VectorIsa isa = SupportedVectorIsas().back();
  if (dtype == DType::kF32) AllocatePanels(context, KernelsOf<float>(isa), n, k);
  if (dtype == DType::kF64) AllocatePanels(context, KernelsOf<double>(isa), n, k);
}

template void MatmulCpu(const Context&, const MatmulProblem<float>&, VectorIsa);
template void MatmulCpu(const Context&, const MatmulProblem<double>&, VectorIsa);

}  // namespace baleen
