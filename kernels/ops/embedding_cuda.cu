// Embedding rows and the gradient of the table.
//
// Bytes for T tokens of D elements of s bytes: lookup 2 T D s; backward T D s + 8 D for each
// different word (and the sort's 40 T). Backward: the first token of a word (in sorted order) adds
// up all of that word's rows, so every element of the table has one writer and one order of terms.
// A word that comes n times is a chain of n / 8 loads: n = 5000 (5 % of 128K tokens) is 0.5 ms,
// beside the other words' blocks.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/embedding_cuda.h"

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
constexpr int kRowsAtOnce = 8;  // in flight

// blockIdx.x: the sorted place; blockIdx.y and the thread: the vector of the row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kBackwardThreads) BackwardKernel(EmbeddingBackwardCudaArgs args) {
  const int64_t begin = blockIdx.x;
  const int32_t word = args.sorted_words_T[begin];
  if (word >= args.W || (begin > 0 && args.sorted_words_T[begin - 1] == word)) return;
  int64_t end = begin + 1;
  while (end < args.tokens && args.sorted_words_T[end] == word) ++end;
  const int64_t col =
      (static_cast<int64_t>(blockIdx.y) * kBackwardThreads + threadIdx.x) * int64_t{kWidth};
  if (col >= args.D) return;
  const T* const dy = static_cast<const T*>(args.dy) + col;
  float sum[kWidth] = {};
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    Word<T, kWidth> words[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (first + u >= end) break;
      words[u] = LoadWord<T, kWidth>(dy + args.sorted_tokens_T[first + u] * args.D);
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (first + u >= end) break;
      float term[kWidth];
      Unpack<T, kWidth>(words[u], term);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += term[k];
    }
  }
  float* const to = args.dtable + word * args.D + col;
  if constexpr (kWidth == 1) {
    to[0] += sum[0];
  } else {
    // Four floats an access.
#pragma unroll
    for (int part = 0; part < kWidth; part += 4) {
      float old[4];
      Load<float, 4>(to + part, old);
#pragma unroll
      for (int k = 0; k < 4; ++k) old[k] += sum[part + k];
      Store<float, 4>(to + part, old);
    }
  }
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
      const dim3 grid(static_cast<unsigned>(args.tokens),
                      static_cast<unsigned>(CeilDiv(args.D / kWidth, kBackwardThreads)));
      BackwardKernel<T, kWidth><<<grid, kBackwardThreads, 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("embedding backward");
  });
}

}  // namespace baleen
