// The NCCL communicator: each body runs over host tensors (through MPI) and over device tensors,
// and says the same of both; then what devices have besides: order, overlap, the record of what is
// under way.
#include "parallel/nccl_communicator.h"

#include <gtest/gtest.h>

#include "parallel/grid_communicators.h"
#include "parallel/mpi_communicator.h"
#include "tests/cuda/gpu.h"
#include "tests/support/random_tensor.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::Gate;
using testing::Gpu;
using testing::IntTensorOf;
using testing::OnHost;
using testing::TensorOf;
using testing::ToDoubles;

// One for all tests: NCCL takes a second to start.
Communicator& World() {
  static Communicator* const world = [] {
    auto made = MakeNcclCommunicator(Gpu(), WrapMpiWorld());
    CHECK_OK(made.status());
    return made->release();
  }();
  return *world;
}

Tensor BFloat16TensorOf(const Context& context, const std::vector<double>& values) {
  const Tensor tensor = context.Empty(DType::kBF16, {static_cast<int64_t>(values.size())});
  for (size_t i = 0; i < values.size(); ++i) {
    tensor.data<BFloat16>()[i] = BFloat16::FromFloat(static_cast<float>(values[i]));
  }
  return tensor;
}

// Values small enough to be exact in every dtype: NCCL adds in an order of its own.
class NcclOnRanks : public ::testing::TestWithParam<DeviceKind> {
 protected:
  int rank() const { return World().rank(); }
  int size() const { return World().size(); }
  const Context& context() const { return GetParam() == DeviceKind::kCpu ? cpu_ : Gpu(); }

  Tensor Put(const Tensor& host) const { return CopyToDevice(context(), host); }
  std::vector<double> Get(const Tensor& tensor) const {
    return ToDoubles(CopyToHost(context(), tensor));
  }
  Tensor Floats(const std::vector<double>& values) const {
    return Put(TensorOf(cpu_, DType::kF32, {static_cast<int64_t>(values.size())}, values));
  }
  Tensor Ints(const std::vector<int32_t>& values) const {
    return Put(IntTensorOf(cpu_, {static_cast<int64_t>(values.size())}, values));
  }

  Context cpu_ = Context::Cpu();
};

INSTANTIATE_TEST_SUITE_P(Kinds, NcclOnRanks, ::testing::Values(DeviceKind::kCpu, DeviceKind::kCuda),
                         [](const auto& info) {
                           return info.param == DeviceKind::kCpu ? "Host" : "Device";
                         });

TEST_P(NcclOnRanks, AllReduceAddsEveryDType) {
  const double ranks = size() * (size() - 1) / 2.0;  // 0 + 1 + ... of ranks
  const std::vector<double> mine = {1.0 * rank(), -2.0 * rank(), 0.5};
  const std::vector<double> sums = {ranks, -2 * ranks, 0.5 * size()};
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor x = Put(TensorOf(cpu_, dtype, {3}, mine));
    World().AllReduce("sum", x);
    EXPECT_EQ(Get(x), sums) << DTypeName(dtype);
  }
  const Tensor n = Ints({rank(), 7});
  World().AllReduce("sum", n);
  EXPECT_EQ(Get(n), (std::vector<double>{ranks, 7.0 * size()}));
  const Tensor wide = cpu_.Zeros(DType::kI64, {1});
  wide.data<int64_t>()[0] = int64_t{1} << 40;
  const Tensor w = Put(wide);
  World().AllReduce("sum", w);
  EXPECT_EQ(Get(w)[0], static_cast<double>(size() * (int64_t{1} << 40)));
  if (GetParam() == DeviceKind::kCpu) return;  // MPI adds no bf16
  const Tensor b = Put(BFloat16TensorOf(cpu_, mine));
  World().AllReduce("sum", b);
  EXPECT_EQ(Get(b), sums);
}

TEST_P(NcclOnRanks, AllReduceTakesTheMaximumOfIntegers) {
  const Tensor x = Ints({rank(), -rank()});
  World().AllReduce("max", x, ReduceOp::kMax);
  EXPECT_EQ(Get(x), (std::vector<double>{1.0 * size() - 1, 0}));
}

TEST_P(NcclOnRanks, ReduceScatterThenAllGatherIsAllReduceInPlace) {
  const int64_t count = 1000;
  std::vector<double> values(count * size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>((i + rank()) % 17);
  const Tensor whole = Floats(values), summed = Floats(values);
  World().AllReduce("reference", summed);
  const Tensor part = whole.Flat(rank() * count, count);
  World().ReduceScatter("scatter", whole, part);
  World().AllGather("gather", part, whole);
  EXPECT_EQ(Get(whole), Get(summed));
}

TEST_P(NcclOnRanks, AllGatherStandsInTheOrderOfRanks) {
  const Tensor part = Ints({10 * rank(), 10 * rank() + 1});
  const Tensor whole = context().Zeros(DType::kI32, {2 * size()});
  World().AllGather("gather", part, whole);
  std::vector<double> expected;
  for (int r = 0; r < size(); ++r) expected.insert(expected.end(), {10.0 * r, 10.0 * r + 1});
  EXPECT_EQ(Get(whole), expected);
}

TEST_P(NcclOnRanks, AllToAllVMovesUnevenRangesIncludingEmptyOnes) {
  // Rank r sends r * s elements of value 100 r + s to rank s.
  std::vector<int64_t> send_counts, recv_counts;
  std::vector<int32_t> values;
  std::vector<double> expected;
  for (int s = 0; s < size(); ++s) {
    send_counts.push_back(rank() * s);
    recv_counts.push_back(s * rank());
    values.insert(values.end(), rank() * s, 100 * rank() + s);
    expected.insert(expected.end(), s * rank(), 100 * s + rank());
  }
  const Tensor send = Ints(values);
  const Tensor recv = context().Zeros(DType::kI32, {static_cast<int64_t>(expected.size())});
  World().AllToAllV("exchange", send, send_counts, recv, recv_counts);
  EXPECT_EQ(Get(recv), expected);
}

TEST_P(NcclOnRanks, BroadcastsFromEveryRoot) {
  for (int root = 0; root < size(); ++root) {
    const Tensor x = Ints({rank() == root ? 40 + root : -1});
    World().Broadcast("broadcast", x, root);
    EXPECT_EQ(Get(x)[0], 40 + root);
  }
}

TEST_P(NcclOnRanks, SendsAroundTheRing) {
  if (size() == 1) return;  // a ring of one has no neighbour
  const int next = (rank() + 1) % size(), previous = (rank() + size() - 1) % size();
  const Tensor x = Ints({rank()}), y = Ints({-1});
  if (rank() == 0) World().Send("ring", x, next);
  World().Recv("ring", y, previous);
  if (rank() != 0) World().Send("ring", x, next);
  EXPECT_EQ(Get(y)[0], previous);
}

TEST_P(NcclOnRanks, ASentTensorMayBeDroppedAtOnce) {
  if (size() == 1) return;
  constexpr int64_t kCount = 1 << 20;
  for (int turn = 0; turn < 4; ++turn) {
    if (rank() == 0) {
      {
        const Tensor x = Ints(std::vector<int32_t>(kCount, turn));
        World().Send("message", x, 1);
      }
      context().Zeros(DType::kI32, {kCount});  // takes the memory, were it free
    } else if (rank() == 1) {
      const Tensor y = context().Zeros(DType::kI32, {kCount});
      World().Recv("message", y, 0);
      EXPECT_EQ(Get(y), std::vector<double>(kCount, turn));
    }
  }
}

TEST_P(NcclOnRanks, SplitsByColorAndOrdersByKey) {
  const auto half = World().Split(rank() % 2, -rank(), "half");
  EXPECT_EQ(half->size(), (size() + 1 - rank() % 2) / 2);
  const Tensor x = Ints({rank()});
  half->Broadcast("highest", x, 0);  // key -rank: the highest world rank comes first
  EXPECT_EQ(Get(x)[0], size() - 1 - (size() - 1 - rank()) % 2);
  const Tensor all = Ints({1});
  half->AllReduce("count", all);
  EXPECT_EQ(Get(all)[0], half->size());
}

TEST_P(NcclOnRanks, OneRankAloneCopies) {
  const auto alone = World().Split(rank(), 0, "alone");
  ASSERT_EQ(alone->size(), 1);
  const Tensor x = Ints({3, 4}), y = Ints({0, 0});
  alone->AllGather("gather", x, y);
  EXPECT_EQ(Get(y), Get(x));
  const Tensor z = Ints({0, 0});
  alone->ReduceScatter("scatter", x, z);
  EXPECT_EQ(Get(z), Get(x));
  const Tensor w = Ints({0, 0});
  alone->AllToAllV("exchange", x, {2}, w, {2});
  EXPECT_EQ(Get(w), Get(x));
}

TEST_P(NcclOnRanks, CutsTheGridAlongEveryAxis) {
  if (size() != 4) return;  // the layout below is for four ranks
  ASSERT_OK_AND_ASSIGN(const ProcessGrid grid, ProcessGrid::Make(4, {.tensor = 2, .expert = 4}));
  const GridCommunicators parts = SplitGrid(World(), grid, {0});
  const Tensor x = Ints({rank()});
  parts.tp->AllReduce("tp", x);
  EXPECT_EQ(Get(x)[0], rank() / 2 == 0 ? 1 : 5);
  parts.dp->AllReduce("dp", x);
  EXPECT_EQ(Get(x)[0], 6);
  parts.ep->AllReduce("ep", x);
  EXPECT_EQ(Get(x)[0], 24);
}

TEST_P(NcclOnRanks, ForkedCallsAreDoneAfterJoin) {
  const Tensor x = Ints({rank() + 1}), y = Ints({1});
  World().Fork();
  World().AllReduce("beside", x);
  World().AllReduce("beside", y);
  World().Join();
  World().AllReduce("in order", x);
  EXPECT_EQ(Get(x)[0], size() * size() * (size() + 1) / 2);
  EXPECT_EQ(Get(y)[0], size());
}

TEST_P(NcclOnRanks, WhatWasBegunIsThereAfterWaitWhateverIsBegunBehindIt) {
  const std::vector<int64_t> one(size(), 1);
  const Tensor mine = Ints(std::vector<int32_t>(size(), rank() + 1));
  const Tensor first = Ints(std::vector<int32_t>(size(), 0)),
               second = Ints(std::vector<int32_t>(size(), 0));
  const uint64_t call = World().BeginAllToAllV("first", mine, one, first, one);
  const uint64_t next = World().BeginAllToAllV("second", mine, one, second, one);
  World().Wait(call);
  for (int r = 0; r < size(); ++r) EXPECT_EQ(Get(first)[r], r + 1);
  // A call of the same axis comes behind what is under way.
  World().AllReduce("sum", mine);
  World().Wait(next);
  World().Wait(call);  // nothing is left to wait for
  for (int r = 0; r < size(); ++r) {
    EXPECT_EQ(Get(second)[r], r + 1);
    EXPECT_EQ(Get(mine)[r], size() * (size() + 1) / 2);
  }
}

TEST_P(NcclOnRanks, GathersBegunBesideExchangesAreThereAfterWait) {
  const std::vector<int64_t> one(size(), 1);
  const Tensor mine = Ints({rank() + 1}), each = Ints(std::vector<int32_t>(size(), rank() + 1));
  const Tensor first = Ints(std::vector<int32_t>(size(), 0)),
               exchanged = Ints(std::vector<int32_t>(size(), 0)),
               second = Ints(std::vector<int32_t>(size(), 0));
  const uint64_t gather = World().BeginAllGather("first", mine, first);
  World().BeginAllToAllV("exchange", each, one, exchanged, one);
  // In place: a rank's part is its own place of the whole.
  World().AllGather("in order", mine, second);
  const uint64_t last = World().BeginAllGather("second", second.Flat(rank(), 1), second);
  World().Wait(gather);
  for (int r = 0; r < size(); ++r) EXPECT_EQ(Get(first)[r], r + 1);
  World().Wait(last);  // and for all that was begun before it
  for (int r = 0; r < size(); ++r) {
    EXPECT_EQ(Get(exchanged)[r], r + 1);
    EXPECT_EQ(Get(second)[r], r + 1);
  }
}

class NcclDeviceOnRanks : public NcclOnRanks {};
INSTANTIATE_TEST_SUITE_P(Kinds, NcclDeviceOnRanks, ::testing::Values(DeviceKind::kCuda),
                         [](const auto&) { return "Device"; });

TEST_P(NcclDeviceOnRanks, ForkedCallsLetTheComputeStreamGoOn) {
  if (size() == 1) return;  // nothing to reduce, nothing to wait for
  CudaDevice& device = Gpu().cuda();
  const Tensor x = Ints({rank()});
  World().AllReduce("warm", Ints({0}));
  Gate gate;
  gate.Close(device.communication_stream());
  World().Fork();
  World().AllReduce("beside", x);
  device.HostWait(device.Record(device.compute_stream()));  // returns though the gate is closed
  const CudaEvent before = device.Record(device.communication_stream());
  EXPECT_FALSE(device.IsDone(before));
  World().Join();
  const CudaEvent joined = device.Record(device.compute_stream());
  EXPECT_FALSE(device.IsDone(joined));
  gate.Open();
  EXPECT_EQ(Get(x)[0], size() * (size() - 1) / 2);
}

TEST_P(NcclDeviceOnRanks, ABegunExchangeLetsTheComputeStreamGoOn) {
  if (size() == 1) return;
  CudaDevice& device = Gpu().cuda();
  const std::vector<int64_t> one(size(), 1);
  const Tensor mine = Ints(std::vector<int32_t>(size(), rank() + 1)),
               theirs = Ints(std::vector<int32_t>(size(), 0));
  World().AllReduce("warm", Ints({0}));
  Gate gate;
  gate.Close(device.exchange_stream());
  const uint64_t call = World().BeginAllToAllV("beside", mine, one, theirs, one);
  device.HostWait(device.Record(device.compute_stream()));  // returns though the gate is closed
  World().Wait(call);
  EXPECT_FALSE(device.IsDone(device.Record(device.compute_stream())));
  gate.Open();
  for (int r = 0; r < size(); ++r) EXPECT_EQ(Get(theirs)[r], r + 1);
}

TEST_P(NcclDeviceOnRanks, ABegunGatherLetsExchangesAndTheComputeStreamGoOn) {
  if (size() == 1) return;
  CudaDevice& device = Gpu().cuda();
  const std::unique_ptr<Communicator> other = World().Split(0, rank(), "other");
  const std::vector<int64_t> one(size(), 1);
  const Tensor mine = Ints({rank() + 1}), each = Ints(std::vector<int32_t>(size(), rank() + 1));
  const Tensor whole = Ints(std::vector<int32_t>(size(), 0)),
               exchanged = Ints(std::vector<int32_t>(size(), 0));
  World().AllReduce("warm", Ints({0}));
  other->AllReduce("warm", Ints({0}));
  Gate gate;
  gate.Close(device.communication_stream());
  const uint64_t gather = World().BeginAllGather("beside", mine, whole);
  other->Wait(other->BeginAllToAllV("soon", each, one, exchanged, one));
  // There though the gate is closed; waiting for an exchange of one axis is not for another's.
  for (int r = 0; r < size(); ++r) EXPECT_EQ(Get(exchanged)[r], r + 1);
  World().Wait(gather);
  EXPECT_FALSE(device.IsDone(device.Record(device.compute_stream())));
  gate.Open();
  for (int r = 0; r < size(); ++r) EXPECT_EQ(Get(whole)[r], r + 1);
}

TEST_P(NcclDeviceOnRanks, TheRecordSaysWhatTheDeviceHasNotDone) {
  CudaDevice& device = Gpu().cuda();
  const Tensor x = Ints({rank()});
  World().AllReduce("first", x);
  device.HostWait(device.Record(device.compute_stream()));
  Gate gate;
  gate.Close(device.compute_stream());
  World().AllReduce("second", x);
  const std::string record = World().FlightRecord(2);
  EXPECT_NE(record.find("AllReduce first 4 bytes done"), std::string::npos) << record;
  // One rank alone has nothing to do in an all-reduce.
  const char* expected = size() > 1 ? "second 4 bytes UNDER WAY" : "second 4 bytes done";
  EXPECT_NE(record.find(expected), std::string::npos) << record;
  gate.Open();
  device.HostWait(device.Record(device.compute_stream()));
  EXPECT_NE(World().FlightRecord(1).find("second 4 bytes done"), std::string::npos);
}

TEST_P(NcclDeviceOnRanks, MessagesOfAPipelineKeepTheirOrder) {
  // Forward to the next rank and back again, many at once, as the engine's program does.
  if (size() == 1) return;
  constexpr int kMicrobatches = 6;
  constexpr int64_t kCount = 100'000;
  std::vector<Tensor> received;
  for (int m = 0; m < kMicrobatches; ++m) {
    Tensor x = Ints(std::vector<int32_t>(kCount, m));
    if (rank() > 0) {
      x = context().Empty(DType::kI32, {kCount});
      World().Recv("forward", x, rank() - 1);
    }
    if (rank() + 1 < size()) World().Send("forward", x, rank() + 1);
    received.push_back(x);
  }
  for (int m = 0; m < kMicrobatches; ++m) {
    EXPECT_EQ(Get(received[m]), std::vector<double>(kCount, m)) << m;
  }
}

TEST(NcclDeathTest, AHungDeviceEndsTheRunWithItsRecord) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        const Context context = *MakeCudaContext(0);
        const NcclOptions options{.hang_seconds = 0.1};
        auto alone = *MakeNcclCommunicator(context, MakeSelfCommunicator("dp"), options);
        const Tensor x = context.Zeros(DType::kI32, {1});
        const Tensor y = context.Zeros(DType::kI32, {1});
        Gate gate;
        gate.Close(context.stream());
        alone->AllGather("gradients", x, y);
        CopyToHost(context, y);
      },
      ::testing::ExitedWithCode(76), "has not answered.*AllGather gradients 4 bytes UNDER WAY");
}

TEST(NcclDeathTest, RefusesHostAndDeviceTensorsInOneCall) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(
      {
        auto alone = *MakeNcclCommunicator(*MakeCudaContext(0), MakeSelfCommunicator("dp"));
        alone->AllToAllV("mixed", Context::Cpu().Zeros(DType::kI32, {1}), {1},
                         Gpu().Zeros(DType::kI32, {1}), {1});
      },
      "mixed: host and device tensors in one call");
}

}  // namespace
}  // namespace baleen
