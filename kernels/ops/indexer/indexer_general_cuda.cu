// The indexer's scores, the dense target and the indexer's losses for every shape, in plain fp32.
//
// Two sums over heads have one kernel, 64 rows x 64 keys a block, one head after the other:
//   scores  I[t, s] = sum_j w relu(q_j . k),   target  p[t, s] = 1/H sum_h exp(scale q_h . k_h -
//   lse)
//
// Both losses go through chunks of rows. A row has a list of slots, each with a key or none: the
// chosen ones (sparse), or all keys, of which its window holds some (dense). For a chunk:
//   1. Products   a[row, slot, head] = q . k, into the workspace
//   2. Row loss   scores, lse, loss, delta; dw; a becomes b = w delta 1[a > 0] in place
//   3. dq         b^T k of the row's keys
//   4. dk         a block owns a key, walks the rows of the chunk that have it and adds b q. Which
//                 slot of a row that is: the key itself (dense), or a table that each chunk writes.
// Every sum has one owner and a fixed order. Bytes of dk: each pair of row and key reads its row's
// q, I J elements, from L2; that bounds these kernels where I J is large (tuned kernels are made
// for those shapes).
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/block_sum.cuh"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "kernels/ops/tile_product.cuh"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kTile = 64;
constexpr int kKeyLanes = 4;  // rows that a block of the key gradient adds side by side
constexpr int kKeyColumns = 128;

__device__ __forceinline__ float MinusInfinity() { return __int_as_float(0xff800000); }
// Lets NaN through, and gives +0 at both zeros.
__device__ __forceinline__ float Relu(float a) { return a <= 0 ? 0.0f : a; }

// --- Sums over heads ------------------------------------------------------------------------

struct ScoreTerm {
  const float* w_TI;
  static __device__ __forceinline__ float Outside() { return MinusInfinity(); }
  __device__ __forceinline__ float OfRow(int64_t row_and_head) const { return w_TI[row_and_head]; }
  __device__ __forceinline__ float Of(float product, float w) const { return w * Relu(product); }
  __device__ __forceinline__ float Whole(float sum) const { return sum; }
};

struct TargetTerm {
  const float* lse_TH;
  float scale, factor;
  static __device__ __forceinline__ float Outside() { return 0; }
  __device__ __forceinline__ float OfRow(int64_t row_and_head) const {
    return lse_TH[row_and_head];
  }
  __device__ __forceinline__ float Of(float product, float lse) const {
    return expf(product * scale - lse);
  }
  __device__ __forceinline__ float Whole(float sum) const { return sum * factor; }
};

struct HeadSumShape {
  int64_t T, S, heads, width;
  const void* q;  // [T, heads, width]
  const void* k;  // row s of head h at s * key_stride + h * key_head_stride
  int64_t key_stride, key_head_stride;
  const int32_t* begin_T;
  const int32_t* end_T;
  float* out_TS;
};

template <typename T, typename Term>
__global__ void __launch_bounds__(kTileThreads) HeadSumKernel(HeadSumShape shape, Term term) {
  __shared__ ProductTiles<4, 4> tiles;
  __shared__ int begin[kTile], end[kTile];
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_key = static_cast<int64_t>(blockIdx.x) * kTile;
  bool seen = false;
  if (threadIdx.x < kTile) {
    const int64_t row = first_row + threadIdx.x;
    begin[threadIdx.x] = row < shape.T ? shape.begin_T[row] : 0;
    end[threadIdx.x] = row < shape.T ? shape.end_T[row] : 0;
    seen = max(int64_t{begin[threadIdx.x]}, first_key) <
           min(int64_t{end[threadIdx.x]}, first_key + kTile);
  }
  const bool any = __syncthreads_or(seen);
  const T* const q = static_cast<const T*>(shape.q);
  const T* const k = static_cast<const T*>(shape.k);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float sum[4][4] = {};
  for (int64_t head = 0; any && head < shape.heads; ++head) {
    float product[4][4] = {};
    for (int64_t first = 0; first < shape.width; first += kTileDepth) {
      AddTileProduct<Contiguous::kDepth>(
          tiles,
          [&](int row, int depth) {
            const int64_t t = first_row + row, d = first + depth;
            if (t >= shape.T || d >= shape.width) return 0.0f;
            return AsFloat(q[(t * shape.heads + head) * shape.width + d]);
          },
          [&](int row, int depth) {
            const int64_t s = first_key + row, d = first + depth;
            if (s >= shape.S || d >= shape.width) return 0.0f;
            return AsFloat(k[s * shape.key_stride + head * shape.key_head_stride + d]);
          },
          product);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t t = min(first_row + ty + 16 * i, shape.T - 1);
      const float of_row = term.OfRow(t * shape.heads + head);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += term.Of(product[i][j], of_row);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = ty + 16 * i;
    if (first_row + row >= shape.T) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t s = first_key + tx + 16 * j;
      if (s >= shape.S) continue;
      const bool inside = s >= begin[row] && s < end[row];
      shape.out_TS[(first_row + row) * shape.S + s] =
          inside ? term.Whole(sum[i][j]) : Term::Outside();
    }
  }
}

template <typename Term>
void LaunchHeadSum(CudaElement element, const HeadSumShape& shape, const Term& term,
                   const char* name, void* stream) {
  if (shape.T == 0 || shape.S == 0) return;
  const dim3 grid(static_cast<unsigned>(CeilDiv(shape.S, kTile)),
                  static_cast<unsigned>(CeilDiv(shape.T, kTile)));
  ForElement(element, [&](auto zero) {
    HeadSumKernel<decltype(zero), Term><<<grid, kTileThreads, 0, AsStream(stream)>>>(shape, term);
    CheckLaunch(name);
  });
}

// --- Losses ---------------------------------------------------------------------------------

// A chunk of rows; pointers are to its first row.
struct Chunk {
  int64_t rows, S, I, J, slots;
  const void* q;  // [rows, I, J]
  const void* k;  // [S, J]
  const float* w;
  const int32_t* ids;          // [rows, slots]; null: slot s is key s, if the window has it
  const int32_t *begin, *end;  // of windows; null with ids
  const float* target;         // [rows, slots]
  const float* scores;         // [rows, slots], of the ids; null: to be computed
  float target_scale, grad_scale;
  float* loss;
  void* dq;
  float* dw;
  float* dk;
  float* products;        // [rows, slots, I]
  float* delta;           // [rows, slots]
  int32_t* slots_of_key;  // [S, rows], -1: the row has not chosen the key; null without ids

  __device__ __forceinline__ int Key(int64_t row, int64_t slot) const {
    if (ids != nullptr) return ids[row * slots + slot];
    return slot >= begin[row] && slot < end[row] ? static_cast<int>(slot) : -1;
  }
  __device__ __forceinline__ int64_t Slot(int64_t row, int64_t key) const {
    if (slots_of_key != nullptr) return slots_of_key[key * rows + row];
    return key >= begin[row] && key < end[row] ? key : -1;
  }
};

// 64 slots of a row (blockIdx.x) times 16 kHeads heads. Slots without a key are left as they are.
template <typename T, int kHeads>
__global__ void __launch_bounds__(kTileThreads) ProductsKernel(Chunk chunk) {
  __shared__ ProductTiles<4, kHeads> tiles;
  __shared__ int keys[kTile];
  const int64_t row = blockIdx.x, first_slot = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_head = static_cast<int64_t>(blockIdx.z) * 16 * kHeads;
  bool seen = false;
  if (threadIdx.x < kTile) {
    const int64_t slot = first_slot + threadIdx.x;
    keys[threadIdx.x] = slot < chunk.slots ? chunk.Key(row, slot) : -1;
    seen = keys[threadIdx.x] >= 0;
  }
  if (!__syncthreads_or(seen)) return;
  const T* const q = static_cast<const T*>(chunk.q) + row * chunk.I * chunk.J;
  const T* const k = static_cast<const T*>(chunk.k);
  float sum[4][kHeads] = {};
  for (int64_t first = 0; first < chunk.J; first += kTileDepth) {
    AddTileProduct<Contiguous::kDepth>(
        tiles,
        [&](int slot, int depth) {
          const int64_t d = first + depth;
          return keys[slot] < 0 || d >= chunk.J ? 0.0f : AsFloat(k[keys[slot] * chunk.J + d]);
        },
        [&](int head, int depth) {
          const int64_t j = first_head + head, d = first + depth;
          return j >= chunk.I || d >= chunk.J ? 0.0f : AsFloat(q[j * chunk.J + d]);
        },
        sum);
  }
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = ty + 16 * i;
    if (keys[slot] < 0) continue;
    float* const out = chunk.products + (row * chunk.slots + first_slot + slot) * chunk.I;
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      if (first_head + tx + 16 * j < chunk.I) out[first_head + tx + 16 * j] = sum[i][j];
    }
  }
}

// Scores of the row's slots into delta; returns their lse and, by reference, the target's sum.
__device__ double RowScores(const Chunk& chunk, int64_t row, double& target_sum) {
  const float* const w = chunk.w + row * chunk.I;
  float largest = MinusInfinity();
  double sum = 0, own_target = 0;
  for (int64_t slot = threadIdx.x; slot < chunk.slots; slot += kBlockSumThreads) {
    if (chunk.Key(row, slot) < 0) continue;
    const int64_t place = row * chunk.slots + slot;
    const float* const a = chunk.products + place * chunk.I;
    float score = 0;
    if (chunk.scores != nullptr) {
      score = chunk.scores[place];
    } else {
      for (int64_t j = 0; j < chunk.I; ++j) score += w[j] * Relu(a[j]);
    }
    chunk.delta[place] = score;
    own_target += chunk.target[place] * chunk.target_scale;
    if (score > largest) {
      sum = sum * expf(largest - score) + 1;
      largest = score;
    } else {
      sum += expf(score - largest);
    }
  }
  target_sum = BlockSum(own_target);
  const float top = BlockCombine(largest, [](float a, float b) { return fmaxf(a, b); });
  const double whole = BlockSum(sum == 0 ? 0.0 : sum * expf(largest - top));
  return top + log(whole);
}

// One row a block: loss, delta; dw; products become w delta 1[a > 0].
__global__ void __launch_bounds__(kBlockSumThreads) RowLossKernel(Chunk chunk, bool whole_target) {
  constexpr int kLanes = kBlockSumThreads / 32;
  __shared__ double shared_dw[kLanes][32];
  const int64_t row = blockIdx.x;
  double target_sum;
  const double lse = RowScores(chunk, row, target_sum);
  if (whole_target) target_sum = 1;  // a mean of whole softmax rows
  double loss = 0;
  for (int64_t slot = threadIdx.x; slot < chunk.slots; slot += kBlockSumThreads) {
    if (chunk.Key(row, slot) < 0) continue;
    const int64_t place = row * chunk.slots + slot;
    const float score = chunk.delta[place], p = chunk.target[place] * chunk.target_scale;
    const double log_pi = score - lse;
    if (p != 0) loss += p * (logf(p) - log_pi);
    chunk.delta[place] =
        chunk.grad_scale * static_cast<float>(expf(static_cast<float>(log_pi)) * target_sum - p);
  }
  loss = BlockSum(loss);  // its barriers also show the block all of delta
  if (threadIdx.x == 0) chunk.loss[row] = static_cast<float>(loss);

  const int lane = threadIdx.x / 32, head = threadIdx.x % 32;
  for (int64_t first = 0; first < chunk.I; first += 32) {
    const int64_t j = first + head;
    double dw = 0;
    if (j < chunk.I) {
      const float w = chunk.w[row * chunk.I + j];
      for (int64_t slot = lane; slot < chunk.slots; slot += kLanes) {
        if (chunk.Key(row, slot) < 0) continue;
        const int64_t place = row * chunk.slots + slot;
        const float delta = chunk.delta[place], a = chunk.products[place * chunk.I + j];
        dw += static_cast<double>(delta) * Relu(a);
        chunk.products[place * chunk.I + j] = a <= 0 ? 0.0f : w * delta;
      }
    }
    __syncthreads();
    shared_dw[lane][head] = dw;
    __syncthreads();
    if (lane == 0 && j < chunk.I) {
      for (int other = 1; other < kLanes; ++other) dw += shared_dw[other][head];
      chunk.dw[row * chunk.I + j] = static_cast<float>(dw);
    }
  }
}

// dq[row] for 16 kHeads heads and 64 columns.
template <typename T, int kHeads>
__global__ void __launch_bounds__(kTileThreads) QueryGradientKernel(Chunk chunk) {
  __shared__ ProductTiles<kHeads, 4> tiles;
  __shared__ int keys[kTileDepth];
  const int64_t row = blockIdx.x, first_column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_head = static_cast<int64_t>(blockIdx.z) * 16 * kHeads;
  const T* const k = static_cast<const T*>(chunk.k);
  float sum[kHeads][4] = {};
  for (int64_t first = 0; first < chunk.slots; first += kTileDepth) {
    bool seen = false;
    if (threadIdx.x < kTileDepth) {
      const int64_t slot = first + threadIdx.x;
      keys[threadIdx.x] = slot < chunk.slots ? chunk.Key(row, slot) : -1;
      seen = keys[threadIdx.x] >= 0;
    }
    if (!__syncthreads_or(seen)) continue;
    AddTileProduct<Contiguous::kRow>(
        tiles,
        [&](int head, int depth) {
          const int64_t j = first_head + head;
          if (j >= chunk.I || keys[depth] < 0) return 0.0f;
          return chunk.products[(row * chunk.slots + first + depth) * chunk.I + j];
        },
        [&](int column, int depth) {
          const int64_t c = first_column + column;
          if (c >= chunk.J || keys[depth] < 0) return 0.0f;
          return AsFloat(k[keys[depth] * chunk.J + c]);
        },
        sum);
  }
  T* const dq = static_cast<T*>(chunk.dq) + row * chunk.I * chunk.J;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int64_t j = first_head + ty + 16 * i;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t c = first_column + tx + 16 * n;
      if (j < chunk.I && c < chunk.J) Assign(dq[j * chunk.J + c], sum[i][n]);
    }
  }
}

__global__ void SlotsOfKeysKernel(Chunk chunk) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= chunk.rows * chunk.slots) return;
  const int key = chunk.ids[i];
  if (key < 0 || key >= chunk.S) return;
  chunk.slots_of_key[key * chunk.rows + i / chunk.slots] = static_cast<int32_t>(i % chunk.slots);
}

// A block owns a key (blockIdx.x); blockDim.x columns, kKeyLanes rows side by side.
template <typename T>
__global__ void __launch_bounds__(kKeyColumns* kKeyLanes) KeyGradientKernel(Chunk chunk) {
  __shared__ float shared[kKeyLanes][kKeyColumns];
  const int64_t key = blockIdx.x;
  const T* const q = static_cast<const T*>(chunk.q);
  for (int64_t first = 0; first < chunk.J; first += blockDim.x) {
    const int64_t column = first + threadIdx.x;
    float sum = 0;
    for (int64_t row = threadIdx.y; row < chunk.rows; row += kKeyLanes) {
      const int64_t slot = chunk.Slot(row, key);
      if (slot < 0 || column >= chunk.J) continue;
      const float* const b = chunk.products + (row * chunk.slots + slot) * chunk.I;
      const T* const own_q = q + row * chunk.I * chunk.J + column;
      float of_row = 0;
#pragma unroll 4
      for (int64_t j = 0; j < chunk.I; ++j) of_row += b[j] * AsFloat(own_q[j * chunk.J]);
      sum += of_row;
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < chunk.J) {
      for (int lane = 1; lane < kKeyLanes; ++lane) sum += shared[lane][threadIdx.x];
      chunk.dk[key * chunk.J + column] += sum;
    }
    __syncthreads();
  }
}

template <typename T, int kHeads>
void LaunchChunk(const Chunk& chunk, bool whole_target, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(chunk.rows);
  const auto head_tiles = static_cast<unsigned>(CeilDiv(chunk.I, 16 * kHeads));
  if (chunk.slots > 0) {
    const dim3 grid(rows, static_cast<unsigned>(CeilDiv(chunk.slots, kTile)), head_tiles);
    ProductsKernel<T, kHeads><<<grid, kTileThreads, 0, stream>>>(chunk);
    CheckLaunch("indexer products");
  }
  RowLossKernel<<<rows, kBlockSumThreads, 0, stream>>>(chunk, whole_target);
  CheckLaunch("indexer row loss");
  const dim3 grid(rows, static_cast<unsigned>(CeilDiv(chunk.J, kTile)), head_tiles);
  QueryGradientKernel<T, kHeads><<<grid, kTileThreads, 0, stream>>>(chunk);
  CheckLaunch("indexer query gradient");
  if (chunk.S == 0 || chunk.slots == 0) return;
  if (chunk.ids != nullptr) {
    CheckCuda(
        cudaMemsetAsync(chunk.slots_of_key, 0xff, chunk.S * chunk.rows * sizeof(int32_t), stream),
        "slots of keys");
    const int64_t blocks = CeilDiv(chunk.rows * chunk.slots, kFlatThreads);
    SlotsOfKeysKernel<<<static_cast<unsigned>(blocks), kFlatThreads, 0, stream>>>(chunk);
    CheckLaunch("slots of keys");
  }
  const auto columns =
      static_cast<unsigned>(std::min<int64_t>(kKeyColumns, CeilDiv(chunk.J, 32) * 32));
  KeyGradientKernel<T>
      <<<static_cast<unsigned>(chunk.S), dim3(columns, kKeyLanes), 0, stream>>>(chunk);
  CheckLaunch("indexer key gradient");
}

// Rows [first, first + rows) of the indexer, without keys and target; returns what is left of the
// workspace by reference.
Chunk RowsOf(const IndexerLossCudaArgs& args, int64_t first, int64_t slots, float*& rest) {
  const int64_t element_bytes = args.element == CudaElement::kBF16 ? 2 : 4;
  const int64_t query_bytes = first * args.I * args.J * element_bytes;
  Chunk chunk = {};
  chunk.rows = std::min(args.rows_per_chunk, args.T - first);
  chunk.S = args.S;
  chunk.I = args.I;
  chunk.J = args.J;
  chunk.slots = slots;
  chunk.q = static_cast<const char*>(args.q_TIJ) + query_bytes;
  chunk.k = args.k_SJ;
  chunk.w = args.w_TI + first * args.I;
  chunk.target_scale = 1;
  chunk.grad_scale = args.grad_scale;
  chunk.loss = args.loss_T + first;
  chunk.dq = static_cast<char*>(args.dq_TIJ) + query_bytes;
  chunk.dw = args.dw_TI + first * args.I;
  chunk.dk = args.dk_SJ;
  chunk.products = static_cast<float*>(args.workspace);
  chunk.delta = chunk.products + chunk.rows * slots * args.I;
  rest = chunk.delta + chunk.rows * slots;
  return chunk;
}

void LaunchLoss(CudaElement element, const Chunk& chunk, bool whole_target, void* stream) {
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    chunk.I <= 16 ? LaunchChunk<T, 1>(chunk, whole_target, AsStream(stream))
                  : LaunchChunk<T, 4>(chunk, whole_target, AsStream(stream));
  });
}

}  // namespace

void IndexerScoresCuda(const IndexerScoresCudaArgs& args, void* stream) {
  LaunchHeadSum(args.element,
                {args.T, args.S, args.I, args.J, args.q_TIJ, args.k_SJ, args.J, 0, args.begin_T,
                 args.end_T, args.scores_TS},
                ScoreTerm{args.w_TI}, "indexer scores", stream);
}

void DenseTargetProbabilitiesCuda(const DenseTargetCudaArgs& args, void* stream) {
  LaunchHeadSum(args.element,
                {args.T, args.S, args.H, args.Q, args.q_THQ, args.k_SHQ, args.H * args.Q, args.Q,
                 args.begin_T, args.end_T, args.p_TS},
                TargetTerm{args.lse_TH, args.softmax_scale, 1.0f / static_cast<float>(args.H)},
                "dense target", stream);
}

void SparseIndexerLossCuda(const SparseIndexerLossCudaArgs& args, void* stream) {
  const IndexerLossCudaArgs& indexer = args.indexer;
  for (int64_t first = 0; first < indexer.T; first += indexer.rows_per_chunk) {
    float* rest = nullptr;
    Chunk chunk = RowsOf(indexer, first, args.K, rest);
    chunk.ids = args.ids_TK + first * args.K;
    chunk.target = args.target_TK + first * args.K;
    chunk.target_scale = args.target_scale;
    if (args.scores_TK != nullptr) chunk.scores = args.scores_TK + first * args.K;
    chunk.slots_of_key = reinterpret_cast<int32_t*>(rest);
    LaunchLoss(indexer.element, chunk, false, stream);
  }
}

void DenseIndexerLossCuda(const IndexerLossCudaArgs& indexer, const DenseTargetCudaArgs& target,
                          void* stream) {
  const int64_t element_bytes = target.element == CudaElement::kBF16 ? 2 : 4;
  for (int64_t first = 0; first < indexer.T; first += indexer.rows_per_chunk) {
    float* rest = nullptr;
    Chunk chunk = RowsOf(indexer, first, indexer.S, rest);
    DenseTargetCudaArgs rows = target;
    rows.T = chunk.rows;
    rows.q_THQ =
        static_cast<const char*>(target.q_THQ) + first * target.H * target.Q * element_bytes;
    rows.lse_TH = target.lse_TH + first * target.H;
    rows.begin_T = target.begin_T + first;
    rows.end_T = target.end_T + first;
    rows.p_TS = rest;
    DenseTargetProbabilitiesCuda(rows, stream);
    chunk.begin = rows.begin_T;
    chunk.end = rows.end_T;
    chunk.target = rest;
    LaunchLoss(indexer.element, chunk, true, stream);
  }
}

}  // namespace baleen
