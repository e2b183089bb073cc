// Collectives on real MPI ranks: sums in rank order, ranges, splits, agreement on errors, the
// flight record.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/core/context.h"
#include "parallel/agree.h"
#include "parallel/grid_communicators.h"
#include "parallel/mpi_communicator.h"
#include "tests/support/random_tensor.h"
#include "tests/support/status_matchers.h"

namespace baleen {

namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::ToDoubles;

class CommunicatorTest : public ::testing::Test {
 protected:
  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
  Context context_ = Context::Cpu();
  int rank() const { return world_->rank(); }
  int size() const { return world_->size(); }
};

TEST_F(CommunicatorTest, AllReduceAddsInRankOrder) {
  // 1e16 + 1 - 1e16 depends on the order of additions: rank order gives the value below on every
  // rank.
  const Tensor x = context_.Zeros(DType::kF64, {5});
  for (int i = 0; i < 5; ++i)
    x.data<double>()[i] = (rank() % 2 == 0 ? 1e16 : 1.0) * (rank() == 2 ? -1 : 1);
  world_->AllReduce("sum", x);
  double expected = 0;
  for (int r = 0; r < size(); ++r) expected += (r % 2 == 0 ? 1e16 : 1.0) * (r == 2 ? -1 : 1);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(x.data<double>()[i], expected);
}

TEST_F(CommunicatorTest, AllReduceMaximumKeepsNaN) {
  const Tensor x = context_.Zeros(DType::kF32, {2});
  x.data<float>()[0] = static_cast<float>(rank());
  x.data<float>()[1] = rank() == 0 ? NAN : 3.0f;
  world_->AllReduce("max", x, ReduceOp::kMax);
  EXPECT_EQ(x.data<float>()[0], static_cast<float>(size() - 1));
  EXPECT_TRUE(std::isnan(x.data<float>()[1]));
}

TEST_F(CommunicatorTest, ReduceScatterThenAllGatherIsAllReduce) {
  const int64_t part_count = 7;
  const Tensor whole =
      testing::RandomTensor(context_, DType::kF64, {part_count * size()}, 10 + rank());
  const Tensor summed = context_.Zeros(DType::kF64, {part_count * size()});
  std::memcpy(summed.raw(), whole.raw(), whole.bytes());
  world_->AllReduce("reference", summed);
  // In place: the part is the rank's own range of the whole.
  const Tensor part = whole.Flat(rank() * part_count, part_count);
  world_->ReduceScatter("scatter", whole, part);
  world_->AllGather("gather", part, whole);
  EXPECT_EQ(ToDoubles(whole), ToDoubles(summed));
}

TEST_F(CommunicatorTest, AllToAllVMovesUnevenRangesIncludingEmptyOnes) {
  // Rank r sends r * s elements of value 100 r + s to rank s.
  std::vector<int64_t> send_counts, recv_counts;
  std::vector<int32_t> values, expected;
  for (int s = 0; s < size(); ++s) {
    send_counts.push_back(rank() * s);
    recv_counts.push_back(s * rank());
    values.insert(values.end(), rank() * s, 100 * rank() + s);
    expected.insert(expected.end(), s * rank(), 100 * s + rank());
  }
  const Tensor send = testing::IntTensorOf(context_, {static_cast<int64_t>(values.size())}, values);
  const Tensor recv = context_.Zeros(DType::kI32, {static_cast<int64_t>(expected.size())});
  world_->AllToAllV("exchange", send, send_counts, recv, recv_counts);
  EXPECT_EQ(std::vector<int32_t>(recv.data<int32_t>(), recv.data<int32_t>() + expected.size()),
            expected);
}

TEST_F(CommunicatorTest, SendsAroundTheRing) {
  if (size() == 1) return;  // a ring of one has no neighbour
  const Tensor x = testing::IntTensorOf(context_, {1}, {rank()});
  const Tensor y = context_.Zeros(DType::kI32, {1});
  const int next = (rank() + 1) % size(), previous = (rank() + size() - 1) % size();
  if (rank() == 0) world_->Send("ring", x, next);
  world_->Recv("ring", y, previous);
  if (rank() != 0) world_->Send("ring", x, next);
  EXPECT_EQ(y.data<int32_t>()[0], previous);
}

TEST_F(CommunicatorTest, SplitsByColorAndOrdersByKey) {
  const auto half = world_->Split(rank() % 2, -rank(), "half");
  EXPECT_EQ(half->size(), (size() + 1 - rank() % 2) / 2);
  const Tensor x = testing::IntTensorOf(context_, {1}, {rank()});
  half->Broadcast("highest", x, 0);  // key -rank: the highest world rank comes first
  const int highest = size() - 1 - (size() - 1 - rank()) % 2;
  EXPECT_EQ(x.data<int32_t>()[0], highest);
}

TEST_F(CommunicatorTest, CutsTheGridAlongEveryAxis) {
  if (size() != 4) return;  // the layout below is for four ranks
  ASSERT_OK_AND_ASSIGN(const ProcessGrid grid, ProcessGrid::Make(4, {.tensor = 2, .expert = 4}));
  const GridCommunicators parts = SplitGrid(*world_, grid, {0});
  EXPECT_EQ(parts.tp->size(), 2);
  EXPECT_EQ(parts.dp->size(), 2);
  EXPECT_EQ(parts.ep->size(), 4);
  EXPECT_EQ(parts.edp->size(), 1);
  EXPECT_EQ(parts.dp_cp->size(), 2);
  const Tensor x = testing::IntTensorOf(context_, {1}, {rank()});
  parts.tp->AllReduce("tp", x);
  EXPECT_EQ(x.data<int32_t>()[0], rank() / 2 == 0 ? 1 : 5);
}

TEST_F(CommunicatorTest, AgreeReturnsTheLowestFailingRanksError) {
  EXPECT_THAT(Agree(*world_, absl::OkStatus()), IsOk());
  if (size() == 1) return;
  const absl::Status mine =
      rank() >= size() - 2 ? DataError("shard ", rank(), " is gone") : absl::OkStatus();
  const std::string said = absl::StrCat("rank ", size() - 2, ": shard ", size() - 2, " is gone");
  const absl::Status agreed = Agree(*world_, mine);
  EXPECT_EQ(agreed, absl::DataLossError(said));
  // A second time, as callers of callers do: the rank is named once.
  EXPECT_EQ(Agree(*world_, agreed), absl::DataLossError(said));
}

TEST_F(CommunicatorTest, GathersStringsOfDifferentLengths) {
  const auto texts = AllGatherStrings(*world_, "names", std::string(rank(), 'a' + rank()));
  ASSERT_EQ(texts.size(), static_cast<size_t>(size()));
  for (int r = 0; r < size(); ++r) EXPECT_EQ(texts[r], std::string(r, 'a' + r));
}

TEST_F(CommunicatorTest, FlightRecordNamesTheLastCalls) {
  for (int i = 0; i < 70; ++i) world_->Barrier(absl::StrCat("barrier ", i));
  const std::string record = world_->FlightRecord();
  EXPECT_EQ(record.find("barrier 5 "), std::string::npos);  // fell out of the ring of 64
  EXPECT_NE(record.find("#69 Barrier barrier 69 0 bytes done"), std::string::npos) << record;
  const std::string last = world_->FlightRecord(2);
  EXPECT_EQ(last.find("barrier 67"), std::string::npos) << last;
  EXPECT_EQ(std::count(last.begin(), last.end(), '\n'), 2) << last;
}

TEST_F(CommunicatorTest, WhatIsBegunOnTheHostIsDoneWhenItReturns) {
  const Tensor whole = context_.Zeros(DType::kI32, {size()});
  const Tensor own = whole.Flat(rank(), 1);  // in place
  own.data<int32_t>()[0] = rank() + 1;
  const uint64_t call = world_->BeginAllGather("values", own, whole);
  for (int r = 0; r < size(); ++r) EXPECT_EQ(whole.data<int32_t>()[r], r + 1);
  world_->Wait(call);
  EXPECT_NE(world_->FlightRecord(1).find("AllGather values"), std::string::npos);
}

TEST_F(CommunicatorTest, ForkAndJoinChangeNothingOnTheHost) {
  const Tensor x = testing::IntTensorOf(context_, {1}, {rank()});
  world_->Fork();
  world_->AllReduce("beside", x);
  EXPECT_EQ(x.data<int32_t>()[0], size() * (size() - 1) / 2);  // done when it returned
  world_->Join();
}

}  // namespace
}  // namespace baleen
