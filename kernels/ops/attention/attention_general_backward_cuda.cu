// General attention, backward: one kernel gives dq (a block has 64 query rows of one head and walks
// the keys they see), one gives dk and dv (a block has 64 keys of one head and walks the rows that
// see them, ascending). Both compute P = exp(S - lse) and dS = P (dP - delta) again: no atomics.
#include <cmath>

#include "kernels/ops/attention/attention_general_tiles.cuh"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kQueryTiles = 3;  // two operands and dS
constexpr int kKeyTiles = 4;    // two operands, P and dS

// delta = do . o, a warp a row and head.
template <typename T>
__global__ void DeltaKernel(int64_t rows, int64_t V, const T* d_out, const T* o, float* delta) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (row >= rows) return;
  float sum = 0;
  for (int64_t v = threadIdx.x; v < V; v += 32) {
    sum += static_cast<float>(d_out[row * V + v]) * static_cast<float>(o[row * V + v]);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lane);
  if (threadIdx.x == 0) delta[row] = sum;
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kTileThreads)
    QueryGradientKernel(AttentionCudaArgs args, AttentionBackwardCudaArgs backward) {
  __shared__ uint64_t seen[kTile];
  const int64_t first_row = (gridDim.x - 1 - static_cast<int64_t>(blockIdx.x)) * kTile;
  const int head = static_cast<int>(blockIdx.y);
  const int64_t first_col = static_cast<int64_t>(blockIdx.z) * kMaxSlices * kTile;
  const HeadRows<T> q(args.q, args.T, args.H, args.Q, head),
      k(args.k, args.S, args.H, args.Q, head), v(args.v, args.S, args.H, args.V, head),
      d_out(backward.d_out, args.T, args.H, args.V, head);
  const Tile dlogits = SharedTile(2);
  float lse[4] = {}, delta[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + ThreadRow() + 16 * i;
    if (row >= args.T) continue;
    lse[i] = backward.lse[row * args.H + head];
    delta[i] = backward.delta[row * args.H + head];
  }

  float sums[kSlices][4][4] = {};
  const TileRange range = TilesOfKeys(args, first_row);
  for (int tile = range.begin; tile < range.end; ++tile) {
    const int64_t first_key = static_cast<int64_t>(tile) * kTile;
    if (!LoadSeen(args, first_row, first_key, seen)) continue;
    float logits[4][4] = {}, dprobs[4][4] = {};
    AddRowProducts(q, first_row, k, first_key, logits);
    AddRowProducts(d_out, first_row, v, first_key, dprobs);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = ThreadRow() + 16 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = ThreadCol() + 16 * j;
        const float prob = expf(logits[i][j] * args.scale - lse[i]);
        dlogits[row][key] =
            seen[row] >> key & 1 ? args.scale * prob * (dprobs[i][j] - delta[i]) : 0.0f;
      }
    }
    AddWeightedRows(dlogits, k, first_key, first_col, sums);
  }
  T* const dq = static_cast<T*>(backward.dq);
  ForEachResult(sums, first_col, args.Q, [&](int, int row, int64_t col, float value) {
    if (first_row + row >= args.T) return;
    dq[((first_row + row) * args.H + head) * args.Q + col] = static_cast<T>(value);
  });
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kTileThreads)
    KeyGradientKernel(AttentionCudaArgs args, AttentionBackwardCudaArgs backward) {
  __shared__ uint64_t seen[kTile];
  const int64_t first_key = static_cast<int64_t>(blockIdx.x) * kTile;
  const int head = static_cast<int>(blockIdx.y);
  const int64_t first_col = static_cast<int64_t>(blockIdx.z) * kMaxSlices * kTile;
  const HeadRows<T> q(args.q, args.T, args.H, args.Q, head),
      k(args.k, args.S, args.H, args.Q, head), v(args.v, args.S, args.H, args.V, head),
      d_out(backward.d_out, args.T, args.H, args.V, head);
  // Both with a row a key and a column a query row.
  const Tile probs = SharedTile(2), dlogits = SharedTile(3);

  float dk[kSlices][4][4] = {}, dv[kSlices][4][4] = {};
  for (int64_t first_row = 0; first_row < args.T; first_row += kTile) {
    if (!LoadSeen(args, first_row, first_key, seen)) continue;
    float logits[4][4] = {}, dprobs[4][4] = {};
    AddRowProducts(k, first_key, q, first_row, logits);
    AddRowProducts(v, first_key, d_out, first_row, dprobs);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = ThreadCol() + 16 * j;
      const int64_t at = (first_row + row) * args.H + head;
      const bool is_row = first_row + row < args.T;
      const float lse = is_row ? backward.lse[at] : 0, delta = is_row ? backward.delta[at] : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = ThreadRow() + 16 * i;
        const bool sees = seen[row] >> key & 1;
        const float prob = sees ? expf(logits[i][j] * args.scale - lse) : 0.0f;
        probs[key][row] = prob;
        dlogits[key][row] = sees ? args.scale * prob * (dprobs[i][j] - delta) : 0.0f;
      }
    }
    AddWeightedRows(probs, d_out, first_row, first_col, dv);
    AddWeightedRows(dlogits, q, first_row, first_col, dk);
    // The marks and tiles have been read, also where this group of columns has no dk or no dv.
    __syncthreads();
  }
  ForEachResult(dk, first_col, args.Q, [&](int, int key, int64_t col, float value) {
    if (first_key + key >= args.S) return;
    backward.dk[((first_key + key) * args.H + head) * args.Q + col] += value;
  });
  ForEachResult(dv, first_col, args.V, [&](int, int key, int64_t col, float value) {
    if (first_key + key >= args.S) return;
    backward.dv[((first_key + key) * args.H + head) * args.V + col] += value;
  });
}

unsigned Tiles(int64_t count) { return static_cast<unsigned>(CeilDiv(count, kTile)); }

}  // namespace

void AttentionBackwardCuda(const AttentionCudaArgs& args, const AttentionBackwardCudaArgs& backward,
                           void* stream) {
  if (args.T == 0 || args.H == 0) return;
  const unsigned heads = static_cast<unsigned>(args.H);
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const dim3 warps(32, kFlatThreads / 32);
    DeltaKernel<T>
        <<<static_cast<unsigned>(CeilDiv(args.T * args.H, warps.y)), warps, 0, AsStream(stream)>>>(
            args.T * args.H, args.V, static_cast<const T*>(backward.d_out),
            static_cast<const T*>(backward.o), backward.delta);
    CheckLaunch("attention backward: do . o");
    ForSlices(args.Q, [&](auto slices, unsigned groups) {
      const auto kernel = QueryGradientKernel<T, decltype(slices)::value>;
      AllowTiles(kernel, kQueryTiles);
      kernel<<<dim3(Tiles(args.T), heads, groups), kTileThreads, kQueryTiles * kTileBytes,
               AsStream(stream)>>>(args, backward);
    });
    CheckLaunch("attention backward: dq");
    if (args.S == 0) return;
    ForSlices(args.Q > args.V ? args.Q : args.V, [&](auto slices, unsigned groups) {
      const auto kernel = KeyGradientKernel<T, decltype(slices)::value>;
      AllowTiles(kernel, kKeyTiles);
      kernel<<<dim3(Tiles(args.S), heads, groups), kTileThreads, kKeyTiles * kTileBytes,
               AsStream(stream)>>>(args, backward);
    });
    CheckLaunch("attention backward: dk, dv");
  });
}

}  // namespace baleen
