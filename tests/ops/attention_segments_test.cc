// Which rows make causal segments, and how their backward is cut: host functions.
#include "kernels/ops/attention/attention_segments.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/ops/attention/attention.h"

namespace baleen {

std::ostream& operator<<(std::ostream& out, const AttentionSegment& segment) {
  return out << (segment.kind == AttentionSegment::Kind::kCausal ? "causal" : "general")
             << " rows [" << segment.row_begin << ", " << segment.row_end << ") keys ["
             << segment.key_begin << ", " << segment.key_end << ")";
}

namespace {

using Kind = AttentionSegment::Kind;

struct Windows {
  std::vector<int32_t> begin, end;

  // `rows` rows that see keys from `first_key`, the first of them `first_end - first_key` keys.
  Windows& Causal(int64_t rows, int32_t first_key, int32_t first_end) {
    for (int32_t row = 0; row < rows; ++row) {
      begin.push_back(first_key);
      end.push_back(first_end + row);
    }
    return *this;
  }
  std::vector<AttentionSegment> Split() const {
    return SplitIntoSegments(begin.data(), end.data(), static_cast<int64_t>(begin.size()));
  }
};

using Segments = std::vector<AttentionSegment>;

TEST(SplitIntoSegments, TakesAWholeSequenceAsOne) {
  EXPECT_EQ(Windows().Causal(4096, 0, 1).Split(), (Segments{{Kind::kCausal, 0, 4096, 0, 4096}}));
  EXPECT_EQ(Windows().Split(), Segments{});
}

TEST(SplitIntoSegments, CutsAtDocumentsAndJoinsShortOnes) {
  EXPECT_EQ(Windows()
                .Causal(300, 0, 1)
                .Causal(100, 300, 301)
                .Causal(27, 400, 401)
                .Causal(256, 427, 428)
                .Causal(255, 683, 684)
                .Split(),
            (Segments{{Kind::kCausal, 0, 300, 0, 300},
                      {Kind::kGeneral, 300, 427, 0, 0},
                      {Kind::kCausal, 427, 683, 427, 683},
                      {Kind::kGeneral, 683, 938, 0, 0}}));
}

TEST(SplitIntoSegments, CutsBetweenTheTwoChunksOfARank) {
  // Rank 1 of 2 over 1024 tokens: chunks 1 and 2, rows that follow each other, so one segment;
  // rank 0: chunks 0 and 3.
  EXPECT_EQ(Windows().Causal(256, 0, 257).Causal(256, 0, 513).Split(),
            (Segments{{Kind::kCausal, 0, 512, 0, 768}}));
  EXPECT_EQ(Windows().Causal(256, 0, 1).Causal(256, 0, 769).Split(),
            (Segments{{Kind::kCausal, 0, 256, 0, 256}, {Kind::kCausal, 256, 512, 0, 1024}}));
}

TEST(SplitIntoSegments, LeavesRowsThatAreNotATriangleToTheGeneralKernels) {
  // All rows see the same keys; a row sees two more than the one before; rows that see nothing.
  EXPECT_EQ(Windows({std::vector<int32_t>(300, 0), std::vector<int32_t>(300, 300)}).Split(),
            (Segments{{Kind::kGeneral, 0, 300, 0, 0}}));
  Windows steep;
  for (int32_t row = 0; row < 300; ++row) steep.Causal(1, 0, 2 * row + 1);
  EXPECT_EQ(steep.Split(), (Segments{{Kind::kGeneral, 0, 300, 0, 0}}));
  EXPECT_EQ(Windows({std::vector<int32_t>(300, 7), std::vector<int32_t>(300, 7)}).Split(),
            (Segments{{Kind::kGeneral, 0, 300, 0, 0}}));
  // An empty row before a document is not its first one.
  EXPECT_EQ(Windows().Causal(1, 0, 0).Causal(300, 0, 1).Split(),
            (Segments{{Kind::kGeneral, 0, 1, 0, 0}, {Kind::kCausal, 1, 301, 0, 300}}));
}

TEST(SplitIntoSegments, NeverGivesACausalSegmentMoreRowsThanKeys) {
  for (int32_t first_end = 1; first_end < 5; ++first_end) {
    for (const AttentionSegment& segment : Windows().Causal(270, 0, first_end).Split()) {
      EXPECT_LE(segment.num_rows(), segment.num_keys()) << segment;
    }
  }
}

TEST(BackwardCalls, AreEqualAndKeepWithinTheBudget) {
  const int64_t budget = int64_t{1} << 30;
  // 32 MiB of dS a head: 32 heads fit.
  EXPECT_EQ(BackwardHeadsPerCall(4096, 4096, 128, budget), 32);
  EXPECT_EQ(BackwardRowsPerCall(4096, 4096, budget), 4096);
  EXPECT_EQ(BackwardHeadsPerCall(4096, 4096, 40, budget), 20);
  EXPECT_EQ(BackwardHeadsPerCall(200, 200, 4, budget), 4);
  EXPECT_EQ(BackwardRowsPerCall(200, 200, budget), 200);
  // One head of 32768 x 32768 is 2 GiB: two calls of rows.
  EXPECT_EQ(BackwardRowsPerCall(32768, 32768, budget), 16384);
  EXPECT_EQ(BackwardHeadsPerCall(16384, 32768, 128, budget), 1);
  for (const int64_t rows : {256, 1000, 4096, 10000, 131072}) {
    for (const int64_t keys : {rows, rows + 77, 4 * rows}) {
      const int64_t row_cut = BackwardRowsPerCall(rows, keys, budget);
      EXPECT_GE(row_cut, 1);
      EXPECT_LE(row_cut, rows);
      for (const int64_t heads : {1, 3, 128}) {
        const int64_t head_cut = BackwardHeadsPerCall(row_cut, keys, heads, budget);
        EXPECT_GE(head_cut, 1);
        EXPECT_LE(2 * row_cut * keys * head_cut, budget) << rows << " " << keys << " " << heads;
      }
    }
  }
  EXPECT_EQ(BackwardRowsPerCall(1000, 1 << 20, 1), 64);
  EXPECT_EQ(BackwardHeadsPerCall(64, 1 << 20, 8, 1), 1);
}

// Every pair that the segment's rows see is in one call, others in none; dq is written before it is
// added to.
TEST(BackwardCalls, CoverEachPairOnce) {
  constexpr int64_t kHeads = 3;
  for (const int64_t budget : {int64_t{1}, int64_t{100} << 10, int64_t{1} << 30}) {
    for (const int64_t more_keys : {0, 1, 130}) {
      const int64_t rows = 200, keys = rows + more_keys;
      const AttentionSegment segment = {Kind::kCausal, 10, 10 + rows, 5, 5 + keys};
      const std::vector<BackwardCall> calls = BackwardCalls(segment, kHeads, budget);
      std::vector<int> seen(kHeads * rows * keys, 0), written(kHeads * rows, 0);
      for (const BackwardCall& call : calls) {
        EXPECT_TRUE(!call.triangle || call.rows == call.keys);
        for (int64_t h = call.head; h < call.head + call.heads; ++h) {
          for (int64_t r = 0; r < call.rows; ++r) {
            const int64_t row = call.row - 10 + r;
            EXPECT_EQ(written[h * rows + row]++ > 0, call.adds_to_dq);
            const int64_t last = call.triangle ? r + 1 : call.keys;
            for (int64_t k = 0; k < last; ++k) ++seen[(h * rows + row) * keys + call.key - 5 + k];
          }
        }
      }
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t key = 0; key < keys; ++key) {
            ASSERT_EQ(seen[(h * rows + row) * keys + key], key <= row + more_keys ? 1 : 0)
                << budget << ": head " << h << " row " << row << " key " << key << " of " << keys;
          }
        }
      }
    }
  }
}

TEST(BackwardCalls, NameTheirScratch) {
  // 4096 rows after 4096 keys, 128 heads: 64 heads a call of 2 GiB, rectangle or triangle alike.
  const std::vector<BackwardCall> calls =
      BackwardCalls({Kind::kCausal, 0, 4096, 0, 8192}, 128, int64_t{2} << 30);
  ASSERT_EQ(calls.size(), 4u);
  const BackwardScratch scratch = ScratchOf(calls, 192, 128);
  EXPECT_EQ(scratch.library_bytes, int64_t{2} << 30);
  EXPECT_EQ(scratch.dk_elements, 64 * 4096 * 192);
  EXPECT_EQ(scratch.dv_elements, 64 * 4096 * 128);
  EXPECT_EQ(scratch.dq_elements, 64 * 4096 * 192);
  EXPECT_EQ(scratch.lse_elements, 64 * 4096);
}

// What a dry backward call of 1024 causal rows and two heads takes beside its operands.
int64_t DryBackwardBytes(DType dtype, int64_t q_dim, int64_t v_dim, DType of_keys = DType::kF32) {
  const Context dry = Context::Dry();
  const int64_t rows = 1024, heads = 2;
  const auto tensor = [&](DType of, int64_t width) { return dry.Zeros(of, {rows, heads, width}); };
  const Tensor q = tensor(dtype, q_dim), k = tensor(dtype, q_dim), v = tensor(dtype, v_dim);
  KeyWindows windows{dry.Zeros(DType::kI32, {rows}), dry.Zeros(DType::kI32, {rows}), {}, {}};
  for (int32_t row = 0; row < rows; ++row) windows.end_T.data<int32_t>()[row] = row + 1;
  const AttentionResult forward{tensor(dtype, v_dim), dry.Zeros(DType::kF32, {rows, heads})};
  const Tensor dk = tensor(of_keys, q_dim), dv = tensor(of_keys, v_dim);
  const Tensor d_out = tensor(dtype, v_dim);
  const int64_t before = dry.pool().Total().bytes;
  dry.pool().ResetPeak();
  AttentionBackward(dry, d_out, q, k, v, forward, windows, 0.1, dk, dv);
  return dry.pool().Total().peak_bytes - before;
}

// A dry call takes what the kernels take on a GPU: the library's dS, dk, dv and dq of a call; those
// for 192/128 heads only statistics and lists.
TEST(DryAttentionBackward, TakesTheScratchOfTheKernelsThatWouldRun) {
  const int64_t library = 2 * 1024 * (2 * 1024 + 2 * (160 + 64 + 160) + 4);
  EXPECT_GE(DryBackwardBytes(DType::kBF16, 160, 64), library);
  EXPECT_LT(DryBackwardBytes(DType::kF32, 160, 64), library);
  const int64_t dq = 2 * 1024 * 192 * 2, statistics = 2 * 1024 * 2 * 4;
  const int64_t kept = 2 * 1024 * 1024 * 2;  // dS
  EXPECT_GE(DryBackwardBytes(DType::kBF16, 192, 128), dq + statistics + kept);
  EXPECT_LT(DryBackwardBytes(DType::kBF16, 192, 128), dq + statistics + kept + (64 << 10));
  // Key gradients to be written in bf16: those kernels write them, others need fp32 sums.
  EXPECT_EQ(DryBackwardBytes(DType::kBF16, 192, 128, DType::kBF16),
            DryBackwardBytes(DType::kBF16, 192, 128));
  EXPECT_GE(DryBackwardBytes(DType::kBF16, 160, 64, DType::kBF16),
            library + 2 * 1024 * 4 * (160 + 64));
}

TEST(RowsOfSegment, SeeWhatTheySawBefore) {
  const AttentionSegment segment = {Kind::kCausal, 100, 300, 40, 280};
  EXPECT_EQ(RowsOf(segment, 0, 200), segment);
  // Its first 64 rows: the last of them sees 136 keys less than the segment's last.
  EXPECT_EQ(RowsOf(segment, 0, 64), (AttentionSegment{Kind::kCausal, 100, 164, 40, 144}));
  EXPECT_EQ(RowsOf(segment, 64, 200), (AttentionSegment{Kind::kCausal, 164, 300, 40, 280}));
}

}  // namespace
}  // namespace baleen
