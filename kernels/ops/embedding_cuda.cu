// Embedding rows and the gradient of the table.
//
// Bytes for T tokens of D elements of s bytes: lookup 2 T D s; backward T D s + 8 D for each
// different word (and the sort's 40 T). Backward: the block that has the first place of a word (in
// sorted order) adds up all of that word's rows, so every element of the table has one writer and
// one order of terms. A word that comes n times is a chain of n / 8 loads, beside the other words'
// blocks: n = 5000 (5 % of 128K tokens) is 0.5 ms.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/embedding_cuda.h"
#include "kernels/ops/read_once.cuh"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kUnroll = 4;

template <typename W>
__global__ void __launch_bounds__(kFlatThreads)
    LookupKernel(EmbeddingLookupCudaArgs args, uint32_t row_words) {
  const int64_t words = args.tokens * row_words;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kUnroll * kFlatThreads + threadIdx.x;
  const W* const table = static_cast<const W*>(args.table);
  W moved[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i >= words) break;
    const int64_t t = words <= 0xFFFFFFFFll ? static_cast<uint32_t>(i) / row_words : i / row_words;
    const int64_t row = args.ids_T[t] - args.vocab_begin;
    moved[u] = row >= 0 && row < args.W ? table[row * row_words + (i - t * row_words)] : W{};
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i < words) static_cast<W*>(args.y)[i] = moved[u];
  }
}

template <typename W>
void LaunchLookup(const EmbeddingLookupCudaArgs& args, void* stream) {
  const int64_t row_words = args.row_bytes / static_cast<int64_t>(sizeof(W));
  const int64_t blocks = CeilDiv(args.tokens * row_words, int64_t{kUnroll} * kFlatThreads);
  LookupKernel<W><<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(
      args, static_cast<uint32_t>(row_words));
  CheckLaunch("embedding lookup");
}

constexpr int kBackwardThreads = 128;
constexpr int kPlaces = 4;      // of a block: rows of dy and of the table in flight together
constexpr int kRowsAtOnce = 8;  // of a word that goes on behind them

// Places begin .. begin + 31 of the sorted tokens, one a lane; behind the last, no word.
struct Places {
  int32_t word, token;

  __device__ __forceinline__ void Load(const EmbeddingBackwardCudaArgs& args, int64_t begin) {
    const int64_t place = begin + threadIdx.x % 32;
    word = place < args.tokens ? args.sorted_words_T[place] : static_cast<int32_t>(args.W);
    token = place < args.tokens ? args.sorted_tokens_T[place] : 0;
  }
  __device__ __forceinline__ int32_t WordAt(int lane) const { return __shfl_sync(~0u, word, lane); }
  __device__ __forceinline__ int64_t TokenAt(int lane) const {
    return __shfl_sync(~0u, token, lane);
  }
};

// Four floats an access, where there are as many.
template <int kWidth>
__device__ __forceinline__ void LoadFloats(const float* from, float (&values)[kWidth]) {
  constexpr int kPart = kWidth == 1 ? 1 : 4;
#pragma unroll
  for (int k = 0; k < kWidth; k += kPart) {
    Load<float, kPart>(from + k, reinterpret_cast<float(&)[kPart]>(values[k]));
  }
}
template <int kWidth>
__device__ __forceinline__ void StoreSum(float* to, const float (&a)[kWidth],
                                         const float (&b)[kWidth]) {
  constexpr int kPart = kWidth == 1 ? 1 : 4;
#pragma unroll
  for (int k = 0; k < kWidth; k += kPart) {
    float sum[kPart];
#pragma unroll
    for (int j = 0; j < kPart; ++j) sum[j] = a[k + j] + b[k + j];
    Store<float, kPart>(to + k, sum);
  }
}
template <typename T, int kWidth>
__device__ __forceinline__ void AddWord(const Word<T, kWidth>& word, float (&sum)[kWidth]) {
  float term[kWidth];
  Unpack<T, kWidth>(word, term);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum[k] += term[k];
}

// blockIdx.x: kPlaces sorted places and, within them, the part of the row; the thread: a vector of
// it. A word is added up by the block that has its first place, to its last place.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kBackwardThreads)
    BackwardKernel(EmbeddingBackwardCudaArgs args, uint32_t row_blocks) {
  const uint32_t group = blockIdx.x / row_blocks;
  int64_t begin = int64_t{group} * kPlaces;
  const int64_t col =
      (int64_t{blockIdx.x - group * row_blocks} * kBackwardThreads + threadIdx.x) * kWidth;
  const bool active = col < args.D;
  const T* const dy = static_cast<const T*>(args.dy) + col;
  float* const table = args.dtable + col;
  const int32_t before = begin > 0 ? args.sorted_words_T[begin - 1] : -1;
  Places places;
  places.Load(args, begin);
  Word<T, kWidth> words[kPlaces];
  float old[kPlaces][kWidth];
  int32_t current = before;
#pragma unroll
  for (int u = 0; u < kPlaces; ++u) {
    const int32_t word = places.WordAt(u);
    const int64_t token = places.TokenAt(u);
    if (active && word < args.W && word != before) {
      words[u] = LoadWordOnce<T, kWidth>(dy + token * args.D);
      if (word != current) LoadFloats(table + word * args.D, old[u]);
    }
    current = word;
  }
  current = before;
  bool adds = false;  // whether `current` began in this block
  float base[kWidth], sum[kWidth];
#pragma unroll
  for (int u = 0; u < kPlaces; ++u) {
    const int32_t word = places.WordAt(u);
    if (word != current) {
      if (adds && active) StoreSum(table + current * args.D, base, sum);
      current = word;
      adds = word < args.W;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        base[k] = old[u][k];
        sum[k] = 0;
      }
    }
    if (adds) AddWord<T, kWidth>(words[u], sum);
  }
  if (!adds) return;
  // The last word may go on behind the block's places.
  bool more = places.WordAt(kPlaces) == current;
  for (begin += kPlaces; more; begin += 32) {
    places.Load(args, begin);
#pragma unroll 1
    for (int lane = 0; lane < 32 && more; lane += kRowsAtOnce) {
      Word<T, kWidth> rows[kRowsAtOnce];
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        const bool wanted = places.WordAt(lane + u) == current;
        const int64_t token = places.TokenAt(lane + u);
        if (active && wanted) rows[u] = LoadWordOnce<T, kWidth>(dy + token * args.D);
      }
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        more = places.WordAt(lane + u) == current;
        if (more) AddWord<T, kWidth>(rows[u], sum);
      }
    }
  }
  if (active) StoreSum(table + current * args.D, base, sum);
}

// --- Sorting few tokens by comparing all pairs: T^2 comparisons of two instructions, 5 us for 8192
// on 132 multiprocessors, where the passes of a radix sort are launches of a few blocks.

constexpr int64_t kMostRanked = 11264;     // their words fit 48 KB of shared memory with the rest
constexpr int64_t kMostWords = 1ll << 24;  // exact as floats
constexpr int kRankThreads = 256;
constexpr int kOwn = 4;     // tokens that a thread ranks, and compares them with at once
constexpr int kParts = 16;  // threads that share their comparisons
constexpr int kLoads = 16;  // of a thread in flight
constexpr int kRankTile = kRankThreads / kParts * kOwn;  // tokens of a block: 64

// 1 for a < b, else 0, of whole numbers: b - a cut to [0, 1].
__device__ __forceinline__ float IsLess(float a, float b) {
  float less;
  asm("sub.sat.f32 %0, %1, %2;" : "=f"(less) : "f"(b), "f"(a));
  return less;
}

// A token's place is the number of tokens that stand before it: smaller words, and equal ones that
// came earlier.
__global__ void __launch_bounds__(kRankThreads) RankKernel(RankWordsCudaArgs args) {
  extern __shared__ float4 words[];  // of all tokens, four at a time
  __shared__ int counts[kRankThreads / 32][kRankTile];
  const int tokens = static_cast<int>(args.tokens);
  const int steps = static_cast<int>(CeilDiv(tokens, kOwn * kParts));
  for (int first = threadIdx.x; first < steps * kOwn * kParts; first += kLoads * kRankThreads) {
    int32_t ids[kLoads] = {};
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int i = first + u * kRankThreads;
      if (i < tokens) ids[u] = args.ids_T[i];
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int i = first + u * kRankThreads;
      if (i >= steps * kOwn * kParts) break;
      const int64_t local = ids[u] - args.vocab_begin;
      const int64_t word = local >= 0 && local < args.W ? local : args.W;
      // Behind the last token: before nobody.
      reinterpret_cast<float*>(words)[i] = i < tokens ? static_cast<float>(word) : INFINITY;
    }
  }
  __syncthreads();
  // Step s compares with tokens 64 s .. 64 s + 63: all before the block's own, own, or all behind.
  const int own = threadIdx.x % kParts, part = threadIdx.x / kParts, tile = blockIdx.x;
  const float4 mine4 = words[tile * kParts + own];
  const float mine[kOwn] = {mine4.x, mine4.y, mine4.z, mine4.w};
  float before[kOwn] = {};
  const auto compare = [&](int begin, int end, float equal) {
    float bound[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) bound[k] = mine[k] + equal;
#pragma unroll 4
    for (int step = begin; step < end; ++step) {
      const float4 other = words[step * kParts + part];
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        before[k] += IsLess(other.x, bound[k]) + IsLess(other.y, bound[k]) +
                     (IsLess(other.z, bound[k]) + IsLess(other.w, bound[k]));
      }
    }
  };
  compare(0, tile, 1.0f);
  compare(tile + 1, steps, 0.0f);
  const float* const own_tile = reinterpret_cast<const float*>(words) + tile * kRankTile;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    for (int j = 0; j < kOwn; ++j) {
      const int other = part * kOwn + j;
      const float equal = other < own * kOwn + k ? 1.0f : 0.0f;
      before[k] += IsLess(own_tile[other], mine[k] + equal);
    }
  }
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    // A warp has two parts.
    before[k] += __shfl_xor_sync(~0u, before[k], kParts);
    if (threadIdx.x % 32 < kParts) {
      counts[threadIdx.x / 32][own * kOwn + k] = static_cast<int>(before[k]);
    }
  }
  __syncthreads();
  const int token = tile * kRankTile + threadIdx.x;
  if (threadIdx.x >= kRankTile || token >= tokens) return;
  int place = 0;
#pragma unroll
  for (int warp = 0; warp < kRankThreads / 32; ++warp) place += counts[warp][threadIdx.x];
  args.sorted_words_T[place] = static_cast<int32_t>(own_tile[threadIdx.x]);
  args.sorted_tokens_T[place] = token;
}

}  // namespace

void EmbeddingLookupCuda(const EmbeddingLookupCudaArgs& args, void* stream) {
  if (args.tokens == 0 || args.row_bytes == 0) return;
  const auto bits = reinterpret_cast<uintptr_t>(args.table) | reinterpret_cast<uintptr_t>(args.y) |
                    static_cast<uintptr_t>(args.row_bytes);
  if (bits % 16 == 0) return LaunchLookup<uint4>(args, stream);
  if (bits % 4 == 0) return LaunchLookup<uint32_t>(args, stream);
  LaunchLookup<uint16_t>(args, stream);
}

void EmbeddingBackwardCuda(const EmbeddingBackwardCudaArgs& args, void* stream) {
  if (args.tokens == 0 || args.D == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(args.D % kLanes<T> == 0 && Aligned16({args.dy, args.dtable}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const int64_t row_blocks = CeilDiv(args.D / kWidth, kBackwardThreads);
      const int64_t blocks = CeilDiv(args.tokens, kPlaces) * row_blocks;
      BackwardKernel<T, kWidth>
          <<<static_cast<unsigned>(blocks), kBackwardThreads, 0, AsStream(stream)>>>(
              args, static_cast<uint32_t>(row_blocks));
    });
    CheckLaunch("embedding backward");
  });
}

bool RanksWordsCuda(int64_t tokens, int64_t W) { return tokens <= kMostRanked && W < kMostWords; }

void RankWordsCuda(const RankWordsCudaArgs& args, void* stream) {
  if (args.tokens == 0) return;
  const auto blocks = static_cast<unsigned>(CeilDiv(args.tokens, kRankTile));
  const size_t shared = blocks * kRankTile * sizeof(float);
  RankKernel<<<blocks, kRankThreads, shared, AsStream(stream)>>>(args);
  CheckLaunch("rank words");
}

}  // namespace baleen
