// Rows to experts and back, and the embedding, on the GPU: the sort exactly, sums to tolerance.
#include "kernels/core/random.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/moe/permute.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::kGpuDtypes;
using testing::OnBoth;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ToDoubles;

// A different ids a token; `skew`: half of the tokens want expert `skew` first.
OnBoth SomeIds(int64_t tokens, int64_t A, int64_t experts, int64_t skew, uint64_t seed) {
  const RandomStream random(seed, 17);
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t id = static_cast<int64_t>(random.Integer(t) % experts);
    if (skew >= 0 && t % 2 == 0) id = skew;
    for (int64_t a = 0; a < A; ++a) ids.push_back(static_cast<int32_t>((id + a * 3) % experts));
  }
  return IntsOnBoth({tokens, A}, ids);
}

struct SortCase {
  int64_t tokens, A, experts, first, count, skew;
};
// Expert ranges, everything at one expert, empty inputs, more keys than one pass takes.
constexpr SortCase kSorts[] = {{4099, 8, 256, 0, 256, -1},
                               {4099, 8, 256, 64, 32, 70},
                               {1, 1, 4, 0, 4, -1},
                               {7, 3, 6, 2, 1, -1},
                               {0, 2, 4, 0, 4, -1},
                               {3000, 1, 1, 0, 1, 0},
                               {5000, 1, 64, 60, 4, -1},
                               {9001, 1, 5000, 0, 5000, -1},
                               {2500, 1, 129280, 0, 129280, -1},
                               {300, 2, 8, 8, 0, -1},
                               {6000, 1, 2000000, 5, 1999990, -1}};

TEST(CudaPermute, SortsLikeTheCpu) {
  for (const SortCase& c : kSorts) {
    SCOPED_TRACE(::testing::Message() << c.tokens << " x " << c.A << " of " << c.experts);
    const OnBoth ids = SomeIds(c.tokens, c.A, c.experts, c.skew, 1);
    const Permutation cpu = BuildPermutation(Cpu(), ids.cpu, c.first, c.count);
    const int64_t known = cpu.source_row_N.num_elements();
    for (const int64_t num_rows : {kUnknownRows, known}) {
      const Permutation gpu = BuildPermutation(Gpu(), ids.gpu, c.first, c.count, num_rows);
      ExpectSameBits(gpu.source_row_N, cpu.source_row_N);
      ExpectSameBits(gpu.row_of_slot_TA, cpu.row_of_slot_TA);
      ExpectSameBits(gpu.offsets_L1, cpu.offsets_L1);
    }
  }
}

struct MoveCase {
  int64_t tokens, A, experts, first, count, D;
};
constexpr MoveCase kMoves[] = {
    {65, 8, 256, 0, 256, 7168}, {33, 8, 32, 8, 16, 512}, {40, 1, 4, 0, 4, 24}, {9, 3, 6, 0, 6, 7},
    {129, 10, 64, 0, 64, 64},   {0, 2, 4, 0, 4, 16},     {5, 2, 8, 8, 0, 16}};

TEST(CudaPermute, GathersAndSumsRows) {
  for (const DType dtype : kGpuDtypes) {
    for (const MoveCase& c : kMoves) {
      SCOPED_TRACE(::testing::Message()
                   << c.tokens << " x " << c.A << " x " << c.D << " " << dtype);
      const OnBoth ids = SomeIds(c.tokens, c.A, c.experts, -1, 2);
      const Permutation gpu = BuildPermutation(Gpu(), ids.gpu, c.first, c.count);
      const Permutation cpu = BuildPermutation(Cpu(), ids.cpu, c.first, c.count);
      const int64_t N = cpu.source_row_N.dim(0);
      const OnBoth x = RandomOnBoth(dtype, {c.tokens, c.D}, 3);
      EXPECT_EQ(ToDoubles(OnHost(GatherRows(Gpu(), x.gpu, gpu.source_row_N))),
                ToDoubles(GatherRows(Cpu(), x.cpu, cpu.source_row_N)));
      ExpectSameBits(GatherRows(Gpu(), x.gpu, gpu),
                     OnHost(GatherRows(Gpu(), x.gpu, gpu.source_row_N)));
      const OnBoth rows = RandomOnBoth(dtype, {N, c.D}, 4);
      ExpectClose(GatherRowsBackward(Gpu(), rows.gpu, gpu.row_of_slot_TA),
                  GatherRowsBackward(Cpu(), rows.cpu, cpu.row_of_slot_TA), c.A);
    }
  }
}

TEST(CudaPermute, GathersRowsOfEveryWidth) {
  const OnBoth rows = IntsOnBoth({5}, {3, 0, 0, 6, 1});
  for (const int64_t width : {1, 2, 3, 4, 8, 9}) {
    for (const DType dtype : {DType::kI32, DType::kBF16, DType::kF32}) {
      const Tensor host = dtype == DType::kI32 ? SomeIds(7, width, 1000, -1, 3).cpu
                                               : OnHost(RandomOnBoth(dtype, {7, width}, 3).gpu);
      ExpectSameBits(GatherRows(Gpu(), testing::OnGpu(host), rows.gpu),
                     GatherRows(Cpu(), host, rows.cpu));
      // To every place of a token, also by the slots.
      const OnBoth ids = SomeIds(7, 3, 5, -1, 3);
      ExpectSameBits(
          GatherRows(Gpu(), testing::OnGpu(host), BuildPermutation(Gpu(), ids.gpu, 1, 3)),
          GatherRows(Cpu(), host, BuildPermutation(Cpu(), ids.cpu, 1, 3)));
    }
  }
}

TEST(CudaPermute, NamesTheNodesOfTokens) {
  for (const auto& [tokens, A, experts, groups] :
       {std::tuple<int64_t, int64_t, int64_t, int64_t>{501, 8, 256, 8},
        {3, 1, 4, 1},
        {0, 2, 4, 2}}) {
    const OnBoth ids = SomeIds(tokens, A, experts, -1, 4);
    ExpectSameBits(GroupsOfTokens(Gpu(), ids.gpu, groups, experts / groups),
                   GroupsOfTokens(Cpu(), ids.cpu, groups, experts / groups));
  }
}

TEST(CudaEmbedding, LooksUpAndAddsGradients) {
  struct Case {
    int64_t tokens, W, D, vocab_begin;
    bool one_word;
  };
  for (const DType dtype : kGpuDtypes) {
    for (const Case& c : {Case{700, 129280, 64, 0, false}, Case{301, 40, 7168, 20, false},
                          Case{2000, 3, 24, 1, true}, Case{9, 5, 7, 0, false},
                          Case{0, 5, 8, 0, false}, Case{8192, 129280, 16, 64640, false},
                          Case{11264, 9, 8, 3, false}, Case{11265, 9, 8, 3, false}}) {
      SCOPED_TRACE(::testing::Message() << c.tokens << " of " << c.W << " " << dtype);
      const RandomStream random(7, 8);
      std::vector<int32_t> values(c.tokens);
      for (int64_t t = 0; t < c.tokens; ++t) {
        // Some ids belong to other ranks.
        values[t] =
            c.one_word ? 2 : static_cast<int32_t>(random.Integer(t) % (c.W + 2 * c.vocab_begin));
      }
      const OnBoth ids = IntsOnBoth({c.tokens}, values);
      const OnBoth table = RandomOnBoth(dtype, {c.W, c.D}, 1);
      EXPECT_EQ(ToDoubles(OnHost(EmbeddingLookup(Gpu(), ids.gpu, table.gpu, c.vocab_begin))),
                ToDoubles(EmbeddingLookup(Cpu(), ids.cpu, table.cpu, c.vocab_begin)));
      const OnBoth dy = RandomOnBoth(dtype, {c.tokens, c.D}, 2);
      const OnBoth dtable = RandomOnBoth(DType::kF32, {c.W, c.D}, 3);
      const Tensor again = Clone(Gpu(), dtable.gpu);
      EmbeddingBackward(Gpu(), ids.gpu, dy.gpu, dtable.gpu, c.vocab_begin);
      EmbeddingBackward(Cpu(), ids.cpu, dy.cpu, dtable.cpu, c.vocab_begin);
      ExpectClose(dtable.gpu, dtable.cpu, c.one_word ? c.tokens : 16);
      EmbeddingBackward(Gpu(), ids.gpu, dy.gpu, again, c.vocab_begin);
      ExpectSameBits(again, OnHost(dtable.gpu));
    }
  }
}

}  // namespace
}  // namespace baleen
