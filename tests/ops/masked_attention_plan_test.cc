// The workspace of masked dense attention: parts that lie apart, are large enough for what the
// kernels write, and only where a pass needs them.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/masked_attention_plan_cuda.h"

namespace baleen {
namespace {

struct Part {
  const char* name;
  size_t begin, bytes;
};

MaskedAttentionKeys Keys(int rows, int keys, int selected) {
  MaskedAttentionKeys result;
  result.num_rows = rows;
  result.num_keys = keys;
  result.num_selected = selected;
  return result;
}

size_t Tiles(int length, int tile) { return static_cast<size_t>((length + tile - 1) / tile); }

// What the kernels touch: whole blocks of 32, tiles of 128, and of each list its count and all
// candidates.
std::vector<Part> PartsOf(const MaskedAttentionKeys& keys, MaskedAttentionPass pass, int heads) {
  const MaskedAttentionLayout l = LayOutMaskedAttention(keys, pass, heads);
  const bool backward = pass == MaskedAttentionPass::kBackward, selected = keys.num_selected >= 0;
  const size_t rows = Tiles(keys.num_rows, 256) * 256, columns = Tiles(keys.num_keys, 384) * 384;
  const size_t row_blocks = rows / 32, words = columns / 32, stride = l.list_stride;
  EXPECT_EQ(static_cast<size_t>(l.padded_rows), rows);
  EXPECT_EQ(static_cast<size_t>(l.padded_keys), columns);
  EXPECT_GE(stride, 1 + Tiles(keys.num_keys, backward ? kMaskedStep : kMaskedTile));
  EXPECT_GE(stride, backward ? 1 + Tiles(keys.num_rows, kMaskedStep) : 0);
  const size_t row_tiles = rows / 128;
  const size_t counters =
      l.keeps_ds ? 2 * static_cast<size_t>(MaskedHeadRounds(keys, heads)) : kMaskedCounters;
  EXPECT_EQ(l.keeps_ds, backward && KeepsScoreGradients(keys));
  EXPECT_EQ(static_cast<size_t>(l.num_counters), counters);
  std::vector<Part> parts = {{"counters", l.counters, 4 * counters},
                             {"begin_T", l.begin_T, 4 * rows},
                             {"end_T", l.end_T, 4 * rows},
                             {"block_windows", l.block_windows, 16 * row_blocks}};
  if (!l.keeps_ds) {
    parts.push_back({"row_lists", l.row_lists, Tiles(keys.num_rows, 128) * stride * 4});
  } else {
    parts.push_back({"places", l.places, row_tiles * (columns / 128) * 4});
    parts.push_back({"tile_counts", l.tile_counts, row_tiles * 4});
    parts.push_back({"rounds", l.rounds, 8});
    // The target lies where dS did.
    EXPECT_LE(l.ds + static_cast<size_t>(MaskedTilesHeld(keys, heads)) * 32768, l.bytes);
    EXPECT_EQ(l.ds, l.target);
  }
  if (selected) {
    parts.push_back({"row_bits", l.row_bits, words * rows * 4});
    parts.push_back({"flags", l.flags, row_blocks * words});
  }
  if (backward) {
    parts.push_back({"key_lists", l.key_lists, Tiles(keys.num_keys, 128) * stride * 4});
    parts.push_back({"statistics", l.statistics, 2 * rows * heads * 4});
  }
  if (backward && selected) {
    parts.push_back({"key_bits", l.key_bits, row_blocks * columns * 4});
    parts.push_back(
        {"target", l.target, 256 + Tiles(keys.num_keys, 768) * 768 * 4 * l.target_chunk});
  }
  parts.push_back({"end", l.bytes, 0});
  return parts;
}

struct Call {
  int rows, keys, selected, heads;
};
constexpr Call kCalls[] = {{1, 1, -1, 1},           {1, 1, 0, 1},
                           {129, 5000, -1, 3},      {5000, 129, 64, 16},
                           {4096, 4096, 2048, 128}, {300, 131072, 2048, 128},
                           {40000, 40000, 2048, 4}};

TEST(MaskedAttentionPlan, PartsLieApartAndHoldWhatTheKernelsWrite) {
  constexpr MaskedAttentionPass kForward = MaskedAttentionPass::kForward;
  constexpr MaskedAttentionPass kBackward = MaskedAttentionPass::kBackward;
  for (const auto& [pass, ds_bytes] : {std::pair<MaskedAttentionPass, int64_t>{kForward, 0},
                                       {kBackward, 0},
                                       {kBackward, kMaskedScoreGradientBytes}}) {
    for (const Call& call : kCalls) {
      SCOPED_TRACE(::testing::Message()
                   << call.rows << " x " << call.keys << ", " << call.selected << " selected, pass "
                   << static_cast<int>(pass) << ", dS of " << ds_bytes << " bytes");
      MaskedAttentionKeys keys = Keys(call.rows, call.keys, call.selected);
      keys.ds_bytes = ds_bytes;
      std::vector<Part> parts = PartsOf(keys, pass, call.heads);
      std::stable_sort(parts.begin(), parts.end(),
                       [](const Part& a, const Part& b) { return a.begin < b.begin; });
      EXPECT_EQ(parts.front().begin, 0u);
      EXPECT_STREQ(parts.back().name, "end");
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        EXPECT_EQ(parts[i].begin % 256, 0u) << parts[i].name;
        EXPECT_LE(parts[i].begin + parts[i].bytes, parts[i + 1].begin)
            << parts[i].name << " reaches into " << parts[i + 1].name;
      }
    }
  }
}

TEST(MaskedAttentionPlan, ChunksOfTheTargetAreWholeClustersOfAboutEqualSize) {
  EXPECT_EQ(MaskedTargetChunk(Keys(4096, 4096, 2048)), 4096);
  // 16896 padded keys: 7936 rows fit into half a GiB, so three chunks.
  EXPECT_EQ(MaskedTargetChunk(Keys(16384, 16384, 2048)), 5632);
  EXPECT_EQ(MaskedTargetChunk(Keys(1, 1, 1)), 256);
  // More than half a GiB for 256 rows: one cluster's rows at a time.
  EXPECT_EQ(MaskedTargetChunk(Keys(1000, 1 << 20, 2048)), 256);
}

TEST(MaskedAttentionPlan, OnlyASelectionNeedsBitsAndOnlyItsBackwardATarget) {
  const MaskedAttentionPass forward = MaskedAttentionPass::kForward;
  const MaskedAttentionPass backward = MaskedAttentionPass::kBackward;
  const size_t windows = LayOutMaskedAttention(Keys(4096, 4096, -1), forward, 128).bytes;
  EXPECT_LT(windows, size_t{1} << 18);
  const size_t bits = 4224 / 32 * 4096 * 4;
  EXPECT_GE(LayOutMaskedAttention(Keys(4096, 4096, 64), forward, 128).bytes, windows + bits);
  EXPECT_EQ(LayOutMaskedAttention(Keys(4096, 4096, 64), forward, 128).target_chunk, 0);
  EXPECT_EQ(LayOutMaskedAttention(Keys(4096, 4096, -1), backward, 128).target_chunk, 0);
  EXPECT_EQ(LayOutMaskedAttention(Keys(4096, 4096, 64), backward, 128).target_chunk, 4096);
}

// Tiles of 128 x 128 pairs take 32 KiB: 73728 of them 2.25 GiB.
TEST(MaskedAttentionPlan, KeepsScoreGradientsWhereThoseOfAHeadFit) {
  MaskedAttentionKeys keys = Keys(300, 257, -1);
  EXPECT_EQ(MaskedTilesOfHead(keys), 9);
  EXPECT_FALSE(KeepsScoreGradients(keys));
  keys.ds_bytes = 9 * 32768;
  EXPECT_TRUE(KeepsScoreGradients(keys));
  --keys.ds_bytes;
  EXPECT_FALSE(KeepsScoreGradients(keys));
}

TEST(MaskedAttentionPlan, KeepsScoreGradientsWhereRowsAreMoreThanHalfOfTheKeys) {
  const auto bytes = [](int rows, int num_keys, int heads) {
    return MaskedScoreGradientBytes(Keys(rows, num_keys, -1), heads);
  };
  constexpr int64_t kAll = int64_t{9} << 28;
  EXPECT_EQ(bytes(1, 1, 1), kAll);
  EXPECT_EQ(bytes(4096, 4096, 128), kAll);
  EXPECT_EQ(bytes(32768, 32768, 128), kAll);
  EXPECT_EQ(bytes(32768, 36864, 128), kAll);
  EXPECT_EQ(bytes(32768, 36865, 128), 0);  // 289 tiles: more than 2.25 GiB a head
  EXPECT_EQ(bytes(4097, 8192, 128), kAll);
  EXPECT_EQ(bytes(4096, 8192, 128), 0);
  EXPECT_EQ(bytes(1024, 16384, 1), 0);
  EXPECT_EQ(bytes(0, 1, 128), 0);
  EXPECT_EQ(bytes(4096, 4096, 0), 0);
}

TEST(MaskedAttentionPlan, HoldsAsManyHeadsAtOnceAsFitWhateverIsSeen) {
  const auto square = [](int length) {
    MaskedAttentionKeys keys = Keys(length, length, -1);
    keys.ds_bytes = kMaskedScoreGradientBytes;
    return keys;
  };
  EXPECT_EQ(MaskedHeadRounds(square(4096), 128), 2);
  EXPECT_EQ(MaskedTilesHeld(square(4096), 128), 73728);
  EXPECT_EQ(MaskedHeadRounds(square(4096), 72), 1);
  EXPECT_EQ(MaskedHeadRounds(square(4096), 73), 2);
  EXPECT_EQ(MaskedTilesHeld(square(4096), 3), 3 * 1024);
  EXPECT_EQ(MaskedHeadRounds(square(32768), 128), 128);
  EXPECT_EQ(MaskedHeadRounds(square(0), 128), 0);
}

TEST(MaskedAttentionKernel, IsChosenByDtypeAndWidths) {
  EXPECT_EQ(MaskedAttentionKernelName(DType::kBF16, 192, 128), "tensor cores");
  EXPECT_EQ(MaskedAttentionKernelName(DType::kF32, 192, 128), "general (fp32 arithmetic)");
  EXPECT_EQ(MaskedAttentionKernelName(DType::kBF16, 160, 64), "general (fp32 arithmetic)");
}

}  // namespace
}  // namespace baleen
