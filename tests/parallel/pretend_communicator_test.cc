// The pretended world: what is counted, and what its small tensors hold.
#include "parallel/pretend_communicator.h"

#include <gtest/gtest.h>

#include "kernels/core/context.h"
#include "parallel/agree.h"
#include "tests/support/random_tensor.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::ToDoubles;

class PretendCommunicatorTest : public ::testing::Test {
 protected:
  Tensor Doubles(const std::vector<double>& values) {
    return testing::TensorOf(context_, DType::kF64, {static_cast<int64_t>(values.size())}, values);
  }
  CommunicationLog::Count Counted(const char* label, const char* operation) {
    return log_.counts.at({"tp", label, operation});
  }

  Context context_ = Context::Dry();
  CommunicationLog log_;
  std::unique_ptr<Communicator> tp_ = MakePretendCommunicator(1, 4, "tp", &log_);
};

TEST_F(PretendCommunicatorTest, CountsWhatLeavesTheRank) {
  const Tensor part = context_.Empty(DType::kBF16, {1000}),
               whole = context_.Empty(DType::kBF16, {4000});
  tp_->AllGather("keys", part, whole);
  tp_->AllGather("keys", part, whole);
  tp_->ReduceScatter("dkeys", whole, part);
  tp_->AllReduce("sum", context_.Empty(DType::kF32, {400}));
  tp_->AllToAllV("rows", whole, {1000, 500, 2000, 500}, part, {250, 250, 250, 250});
  tp_->Broadcast("text", part, 2);
  tp_->Send("0F3>1", part, 2);
  tp_->Recv("1F3<0", part, 0);
  EXPECT_EQ(Counted("keys", "AllGather").calls, 2);
  EXPECT_EQ(Counted("keys", "AllGather").bytes_sent, 2 * 3 * 2000);
  EXPECT_EQ(Counted("dkeys", "ReduceScatter").bytes_sent, 3 * 2000);
  EXPECT_EQ(Counted("sum", "AllReduce").bytes_sent, 2 * 3 * 100 * 4);
  EXPECT_EQ(Counted("rows", "AllToAllV").bytes_sent, 3500 * 2);  // all but the own 500
  EXPECT_EQ(Counted("text", "Broadcast").bytes_sent, 2000);
  EXPECT_EQ(Counted("0F3>1", "Send").bytes_sent, 2000);
  EXPECT_EQ(Counted("1F3<0", "Recv").calls, 1);
  EXPECT_EQ(Counted("1F3<0", "Recv").bytes_sent, 0);
  EXPECT_EQ(log_.counts.size(), 7u);
}

TEST_F(PretendCommunicatorTest, OtherRanksHoldWhatThisOneHolds) {
  const Tensor sum = Doubles({1, 2}), maximum = Doubles({5, 6});
  tp_->AllReduce("sum", sum);
  tp_->AllReduce("max", maximum, ReduceOp::kMax);
  EXPECT_EQ(ToDoubles(sum), (std::vector<double>{4, 8}));
  EXPECT_EQ(ToDoubles(maximum), (std::vector<double>{5, 6}));

  const Tensor whole = Doubles({0, 0, 0, 0, 0, 0, 0, 0});
  tp_->AllGather("gather", Doubles({3, 4}), whole);
  EXPECT_EQ(ToDoubles(whole), (std::vector<double>{3, 4, 3, 4, 3, 4, 3, 4}));

  const Tensor scattered = Doubles({0});
  tp_->ReduceScatter("scatter", Doubles({1, 2, 3, 4}), scattered);
  EXPECT_EQ(ToDoubles(scattered), (std::vector<double>{8}));

  // Rank 1 gets from everyone what it would send itself.
  const Tensor received = Doubles({0, 0, 0, 0});
  tp_->AllToAllV("counts", Doubles({7, 8, 9, 10}), {1, 1, 1, 1}, received, {1, 1, 1, 1});
  EXPECT_EQ(ToDoubles(received), (std::vector<double>{8, 8, 8, 8}));
}

TEST_F(PretendCommunicatorTest, LargeTensorsAreLeftAlone) {
  const Tensor large = context_.Zeros(DType::kF32, {1 << 20});
  large.data<float>()[5] = 3;
  tp_->AllReduce("gradients", large);
  EXPECT_EQ(large.data<float>()[5], 3);
}

TEST_F(PretendCommunicatorTest, InPlaceRangesWorkAsWithRealRanks) {
  const Tensor whole = Doubles({1, 2, 3, 4, 5, 6, 7, 8});
  tp_->ReduceScatter("in place", whole, whole.Flat(2, 2));
  EXPECT_EQ(ToDoubles(whole.Flat(2, 2)), (std::vector<double>{12, 16}));
  tp_->AllGather("in place", whole.Flat(2, 2), whole);
  EXPECT_EQ(ToDoubles(whole), (std::vector<double>{12, 16, 12, 16, 12, 16, 12, 16}));
}

TEST_F(PretendCommunicatorTest, AgreesWithItself) {
  EXPECT_THAT(Agree(*tp_, absl::OkStatus()), testing::IsOk());
  EXPECT_THAT(Agree(*tp_, ConfigError("no such layout")),
              testing::HasStatus(absl::StatusCode::kInvalidArgument, "rank 1: no such layout"));
}

TEST_F(PretendCommunicatorTest, OneRankAloneIsNotCounted) {
  const std::unique_ptr<Communicator> self = MakePretendCommunicator(0, 1, "ep", &log_);
  const Tensor x = Doubles({1, 2}), y = Doubles({0, 0});
  self->AllGather("gather", x, y);
  self->AllToAllV("rows", y, {2}, x, {2});
  EXPECT_EQ(ToDoubles(x), (std::vector<double>{1, 2}));
  EXPECT_TRUE(log_.counts.empty());
}

TEST(PretendCommunicatorDeathTest, DoesNotSplit) {
  CommunicationLog log;
  const std::unique_ptr<Communicator> world = MakePretendCommunicator(0, 8, "world", &log);
  EXPECT_DEATH(world->Split(0, 0, "tp"), "splitting the pretended world into tp");
}

}  // namespace
}  // namespace baleen
