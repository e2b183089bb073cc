// Moving rows to experts and back.
//
// Bytes for T tokens of A slots in N rows of D elements of s bytes: gather 2 N D s; spread (a
// token's row to the places of its slots) T D s + N D s; sum of slots as much; its backward (T + 2
// N) D s, dy being read once for all slots of its token.
#include <algorithm>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/row.cuh"
#include "kernels/ops/moe/permute_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kUnroll = 4;

// A thread moves kUnroll words of type W, one block apart.
template <typename W>
__global__ void __launch_bounds__(kFlatThreads)
    GatherKernel(int64_t words, uint32_t row_words, const W* x, const int32_t* source, W* y) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kUnroll * kFlatThreads + threadIdx.x;
  W moved[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i >= words) break;
    const int64_t row =
        words <= 0xFFFFFFFFll ? static_cast<uint32_t>(i) / row_words : i / row_words;
    moved[u] = x[int64_t{source[row]} * row_words + (i - row * row_words)];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i < words) y[i] = moved[u];
  }
}

template <typename W>
void LaunchGather(int64_t rows, int64_t row_bytes, const void* x, const int32_t* source, void* y,
                  void* stream) {
  const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(W)), words = rows * row_words;
  const int64_t blocks = CeilDiv(words, int64_t{kUnroll} * kFlatThreads);
  GatherKernel<W><<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(
      words, static_cast<uint32_t>(row_words), static_cast<const W*>(x), source,
      static_cast<W*>(y));
  CheckLaunch("gather rows");
}

// Shared to global; `bytes`, like the addresses, a multiple of 16.
__device__ __forceinline__ void BulkStore(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
}

// A thread loads kUnroll words of x, one block apart, and stores each at its token's places.
template <typename W>
__global__ void __launch_bounds__(kFlatThreads)
    SpreadKernel(int64_t words, uint32_t row_words, int A, const W* __restrict__ x,
                 const int32_t* __restrict__ row_of_slot, W* __restrict__ y) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kUnroll * kFlatThreads + threadIdx.x;
  W moved[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i < words) moved[u] = x[i];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i >= words) break;
    const int64_t token =
        words <= 0xFFFFFFFFll ? static_cast<uint32_t>(i) / row_words : i / row_words;
    W* const column = y + (i - token * row_words);
    const int32_t* const slots = row_of_slot + token * A;
#pragma unroll 8
    for (int a = 0; a < A; ++a) {
      const int32_t row = slots[a];
      if (row >= 0) column[int64_t{row} * row_words] = moved[u];
    }
  }
}

template <typename W>
void LaunchSpread(int64_t tokens, int64_t A, int64_t row_bytes, const void* x,
                  const int32_t* row_of_slot, void* y, void* stream) {
  const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(W)), words = tokens * row_words;
  const int64_t blocks = CeilDiv(words, int64_t{kUnroll} * kFlatThreads);
  SpreadKernel<W><<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(
      words, static_cast<uint32_t>(row_words), static_cast<int>(A), static_cast<const W*>(x),
      row_of_slot, static_cast<W*>(y));
  CheckLaunch("spread rows");
}

// Rows that the copy engine moves: long enough to be worth a warp, short enough for several to be
// under way on a multiprocessor.
bool BulkRows(int64_t row_bytes) { return row_bytes >= 2048 && row_bytes <= 32 * 1024; }

// One warp a token: its row comes to shared memory, and a lane for each slot sends it on.
__global__ void __launch_bounds__(32) SpreadBulkKernel(int A, uint32_t row_bytes, const char* x,
                                                       const int32_t* row_of_slot, char* y) {
  extern __shared__ __align__(128) char row[];
  __shared__ uint64_t full;
  const int64_t t = blockIdx.x;
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    FenceBarrierInit();
    BarrierArriveExpect(&full, row_bytes);
    BulkLoad(SharedAddress(row), x + t * row_bytes, row_bytes, &full);
  }
  __syncwarp();
  for (int a = threadIdx.x; a < A; a += 32) {
    const int32_t place = row_of_slot[t * A + a];
    BarrierWait(&full, 0);
    if (place >= 0) BulkStore(y + int64_t{place} * row_bytes, SharedAddress(row), row_bytes);
  }
  BulkCommit();
  BulkWaitRead<0>();  // shared memory ends with the block
}

constexpr int kSlotsAtOnce = 8;  // rows of a token in flight

// blockIdx.x: the token; blockIdx.y and the thread: the vector of the row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads) SumKernel(SumRowsCudaArgs args) {
  const int64_t t = blockIdx.x;
  const int64_t col =
      (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * int64_t{kWidth};
  if (col >= args.D) return;
  const T* const x = static_cast<const T*>(args.x) + col;
  const int32_t* const slots = args.row_of_slot_TA + t * args.A;
  float sum[kWidth] = {};
  for (int64_t begin = 0; begin < args.A; begin += kSlotsAtOnce) {
    Word<T, kWidth> words[kSlotsAtOnce];
    int32_t rows[kSlotsAtOnce];
#pragma unroll
    for (int u = 0; u < kSlotsAtOnce; ++u) {
      rows[u] = begin + u < args.A ? slots[begin + u] : -1;
      if (rows[u] >= 0) words[u] = LoadWord<T, kWidth>(x + rows[u] * args.D);
    }
#pragma unroll
    for (int u = 0; u < kSlotsAtOnce; ++u) {
      if (rows[u] < 0) continue;
      float v[kWidth];
      Unpack<T, kWidth>(words[u], v);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += v[k];
    }
  }
  Store<T, kWidth>(static_cast<T*>(args.y) + t * args.D + col, sum);
}

__global__ void __launch_bounds__(kFlatThreads)
    GroupsKernel(int64_t tokens, int64_t A, int64_t groups, int64_t group_size, const int32_t* ids,
                 int32_t* result) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= tokens * groups) return;
  const int64_t t = i / groups, m = i - t * groups;
  bool found = false;
  for (int64_t a = 0; a < A; ++a) {
    const int32_t id = ids[t * A + a];
    found = found || (id >= m * group_size && id < (m + 1) * group_size);
  }
  result[i] = found ? static_cast<int32_t>(m) : -1;
}

}  // namespace

void GatherRowsCuda(int64_t rows, int64_t row_bytes, const void* x, const int32_t* source_row_N,
                    void* y, void* stream) {
  if (rows == 0 || row_bytes == 0) return;
  const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y) |
                    static_cast<uintptr_t>(row_bytes);
  const auto launch = [&](auto word) {
    LaunchGather<decltype(word)>(rows, row_bytes, x, source_row_N, y, stream);
  };
  if (bits % 16 == 0) return launch(uint4{});
  if (bits % 8 == 0) return launch(uint2{});
  if (bits % 4 == 0) return launch(uint32_t{});
  if (bits % 2 == 0) return launch(uint16_t{});
  launch(uint8_t{});
}

void SpreadRowsCuda(int64_t tokens, int64_t A, int64_t row_bytes, const void* x,
                    const int32_t* row_of_slot_TA, void* y, void* stream) {
  if (tokens * A == 0 || row_bytes == 0) return;
  const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y) |
                    static_cast<uintptr_t>(row_bytes);
  if (bits % 16 == 0 && BulkRows(row_bytes)) {
    SpreadBulkKernel<<<static_cast<unsigned>(tokens), 32, static_cast<size_t>(row_bytes),
                       AsStream(stream)>>>(static_cast<int>(A), static_cast<uint32_t>(row_bytes),
                                           static_cast<const char*>(x), row_of_slot_TA,
                                           static_cast<char*>(y));
    CheckLaunch("spread rows");
    return;
  }
  const auto launch = [&](auto word) {
    LaunchSpread<decltype(word)>(tokens, A, row_bytes, x, row_of_slot_TA, y, stream);
  };
  if (bits % 16 == 0) return launch(uint4{});
  if (bits % 8 == 0) return launch(uint2{});
  if (bits % 4 == 0) return launch(uint32_t{});
  if (bits % 2 == 0) return launch(uint16_t{});
  launch(uint8_t{});
}

void SumRowsCuda(const SumRowsCudaArgs& args, void* stream) {
  if (args.tokens == 0 || args.D == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(args.D % kLanes<T> == 0 && Aligned16({args.x, args.y}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const int64_t vectors = args.D / kWidth;
      // Whole warps, and as few threads without work as that allows.
      const int64_t threads = std::min<int64_t>(
          kFlatThreads, CeilDiv(CeilDiv(vectors, CeilDiv(vectors, kFlatThreads)), 32) * 32);
      const dim3 grid(static_cast<unsigned>(args.tokens),
                      static_cast<unsigned>(CeilDiv(vectors, threads)));
      SumKernel<T, kWidth><<<grid, static_cast<unsigned>(threads), 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("sum rows");
  });
}

void GroupsOfTokensCuda(int64_t tokens, int64_t A, int64_t groups, int64_t group_size,
                        const int32_t* ids_TA, int32_t* groups_TM, void* stream) {
  if (tokens * groups == 0) return;
  GroupsKernel<<<static_cast<unsigned>(CeilDiv(tokens * groups, kFlatThreads)), kFlatThreads, 0,
                 AsStream(stream)>>>(tokens, A, groups, group_size, ids_TA, groups_TM);
  CheckLaunch("groups of tokens");
}

}  // namespace baleen
