// CudaTrace: what ran between Start and Stop is in the record with names, counts, bytes and times
// that a GPU can have, and nothing else; and CudaSeconds, which times the same without CUPTI.
#include "kernels/core/cuda_trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>

#include "absl/strings/match.h"
#include "kernels/core/cuda_timer.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/rms_norm.h"
#include "kernels/ops/swiglu.h"
#include "tests/cuda/gpu.h"

namespace baleen {
namespace {

using testing::Gpu;

constexpr int64_t kRows = 8192, kWidth = 7168;
constexpr int kNorms = 3;
// 117 MB of bf16: far more than the L2 keeps, so that a time has a lower bound.
constexpr double kTensorBytes = 2.0 * kRows * kWidth;
// Above what the memory of any GPU with these kernels moves, and far below what it does.
constexpr double kFastest = 6e12, kSlowest = 1e11;

struct Operands {
  Tensor x = Gpu().Zeros(DType::kBF16, {kRows, kWidth});
  Tensor y = Gpu().Zeros(DType::kBF16, {kRows, kWidth});
  Tensor weight = Gpu().Zeros(DType::kBF16, {kWidth});
};

using Records = std::vector<DeviceRecord>;

int64_t Count(const Records& records, DeviceWork work, const std::string& part = "") {
  return std::count_if(records.begin(), records.end(), [&](const DeviceRecord& record) {
    return record.work == work && absl::StrContains(record.name, part);
  });
}

// Norms, a copy and zeros between two marks.
void RunMarked(CudaTrace& trace, const Operands& operands) {
  trace.Mark(0);
  for (int n = 0; n < kNorms; ++n) RmsNorm(Gpu(), operands.x, operands.weight, 1e-6);
  Copy(Gpu(), operands.x, operands.y);
  FillZero(Gpu(), operands.x);
  trace.Mark(1);
}

void Wait() { Gpu().cuda().HostWait(Gpu().cuda().Record(Gpu().stream())); }

// A machine without libcupti has no traces: nothing to test. All other reasons are failures.
#define START_TRACE(trace)                                                         \
  auto trace = CudaTrace::Start(Gpu());                                            \
  if (!trace.ok() && absl::StrContains(trace.status().message(), "no libcupti"))   \
    GTEST_SKIP() << "the GPU cannot be traced here: " << trace.status().message(); \
  ASSERT_TRUE(trace.ok()) << trace.status()

TEST(CudaTrace, RecordsWhatRanWithNamesCountsAndBytes) {
  const Operands operands;
  START_TRACE(trace);
  RunMarked(**trace, operands);
  const absl::StatusOr<Records> records = (*trace)->Stop();
  ASSERT_TRUE(records.ok()) << records.status();
  EXPECT_EQ(Count(*records, DeviceWork::kKernel), kNorms);
  EXPECT_EQ(Count(*records, DeviceWork::kKernel, "RmsNormKernel"), kNorms);
  EXPECT_EQ(Count(*records, DeviceWork::kCopy, "DtoD"), 1);
  EXPECT_EQ(Count(*records, DeviceWork::kCopy), 1);
  EXPECT_EQ(Count(*records, DeviceWork::kSet), 1);
  EXPECT_EQ(Count(*records, DeviceWork::kMark), 2);
  for (const DeviceRecord& record : *records) {
    if (record.work == DeviceWork::kCopy || record.work == DeviceWork::kSet)
      EXPECT_EQ(record.bytes, operands.x.bytes()) << record.name;
    EXPECT_EQ(record.stream, records->front().stream);
  }
  EXPECT_EQ(records->front().work, DeviceWork::kMark);
  EXPECT_EQ(records->front().mark, 0);
  EXPECT_EQ(records->back().work, DeviceWork::kMark);
  EXPECT_EQ(records->back().mark, 1);
}

TEST(CudaTrace, TimesAreThoseOfAMemoryAndOfTheWallClock) {
  const Operands operands;
  START_TRACE(trace);
  const auto start = std::chrono::steady_clock::now();
  RunMarked(**trace, operands);
  Wait();
  const double wall =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const absl::StatusOr<Records> records = (*trace)->Stop();
  ASSERT_TRUE(records.ok()) << records.status();
  ASSERT_EQ(records->size(), static_cast<size_t>(kNorms) + 4);
  EXPECT_EQ(records->front().begin, 0);
  double previous = 0;
  for (const DeviceRecord& record : *records) {
    EXPECT_GE(record.begin, previous) << record.name << ": one stream, one after the other";
    EXPECT_GE(record.end, record.begin) << record.name;
    previous = record.end;
    if (record.work == DeviceWork::kMark) continue;
    const double bytes = record.work == DeviceWork::kSet ? kTensorBytes : 2 * kTensorBytes;
    EXPECT_GT(record.end - record.begin, bytes / kFastest) << record.name;
    EXPECT_LT(record.end - record.begin, bytes / kSlowest) << record.name;
  }
  EXPECT_LT(records->back().begin - records->front().begin, wall);
}

TEST(CudaTrace, HasNothingFromBeforeAfterOrAnotherTrace) {
  const Operands operands;
  Swiglu(Gpu(), operands.x, operands.y);
  START_TRACE(first);
  RunMarked(**first, operands);
  const absl::StatusOr<Records> of_first = (*first)->Stop();
  ASSERT_TRUE(of_first.ok()) << of_first.status();
  EXPECT_EQ(Count(*of_first, DeviceWork::kKernel), kNorms);
  first->reset();
  Swiglu(Gpu(), operands.x, operands.y);
  Wait();
  START_TRACE(second);
  AddInPlace(Gpu(), operands.x, operands.y);
  const absl::StatusOr<Records> of_second = (*second)->Stop();
  ASSERT_TRUE(of_second.ok()) << of_second.status();
  ASSERT_EQ(of_second->size(), 1u);
  EXPECT_EQ(of_second->front().work, DeviceWork::kKernel);
  EXPECT_FALSE(absl::StrContains(of_second->front().name, "RmsNorm")) << of_second->front().name;
  EXPECT_FALSE(absl::StrContains(of_second->front().name, "Swiglu")) << of_second->front().name;
}

// The shortest of several times of `work`, each behind `before`: whoever shares the GPU lengthens
// some of them by whole time slices.
double ShortestSeconds(const std::function<void()>& before, const std::function<void()>& work) {
  double shortest = std::numeric_limits<double>::infinity();
  for (int n = 0; n < 10; ++n) {
    before();
    shortest = std::min(shortest, CudaSeconds(Gpu(), work));
  }
  return shortest;
}

TEST(CudaTimer, TimesWhatIsEnqueuedAndNothingBefore) {
  const Operands operands;
  const auto norms = [&](int times) {
    return [&operands, times] {
      for (int n = 0; n < times; ++n) RmsNorm(Gpu(), operands.x, operands.weight, 1e-6);
    };
  };
  CudaSeconds(Gpu(), norms(1));  // loads the code
  const double one = ShortestSeconds(norms(50), norms(1));
  EXPECT_GT(one, 2 * kTensorBytes / kFastest);
  EXPECT_LT(one, 2 * kTensorBytes / kSlowest);
  const double ten = ShortestSeconds(norms(50), norms(10));
  EXPECT_GT(ten, 6 * one);
  EXPECT_LT(ten, 20 * one);
}

}  // namespace
}  // namespace baleen
