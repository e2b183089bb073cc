// Tests of kernels/core: bit formats, tensors and views, pool, random streams, files.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "kernels/core/context.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "kernels/core/random.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;

TEST(BFloat16, RoundsToNearestEven) {
  EXPECT_EQ(BFloat16::FromFloat(1.0f).bits, 0x3f80);
  EXPECT_EQ(BFloat16::FromFloat(1.00390625f).bits, 0x3f80);  // tie to even, down
  EXPECT_EQ(BFloat16::FromFloat(1.01171875f).bits, 0x3f82);  // tie to even, up
  EXPECT_EQ(BFloat16::FromFloat(-2.5f).ToFloat(), -2.5f);
  EXPECT_TRUE(std::isnan(BFloat16::FromFloat(NAN).ToFloat()));
}

TEST(Float8E4M3, EveryCodeSurvivesTheRoundTrip) {
  for (int code = 0; code < 256; ++code) {
    const Float8E4M3 value{static_cast<uint8_t>(code)};
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value.ToFloat())) << code;
    } else {
      EXPECT_EQ(Float8E4M3::FromFloat(value.ToFloat()).bits, code);
    }
  }
}

TEST(Float8E4M3, RoundsToTheNearerNeighbourAndTiesToEven) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = Float8E4M3{static_cast<uint8_t>(code)}.ToFloat();
    const float high = Float8E4M3{static_cast<uint8_t>(code + 1)}.ToFloat();
    const float middle = (low + high) / 2;
    EXPECT_EQ(Float8E4M3::FromFloat(std::nextafter(middle, 0.0f)).bits, code);
    EXPECT_EQ(Float8E4M3::FromFloat(std::nextafter(middle, 1e9f)).bits, code + 1);
    EXPECT_EQ(Float8E4M3::FromFloat(middle).bits, code % 2 == 0 ? code : code + 1);
  }
  EXPECT_EQ(Float8E4M3::FromFloat(1e9f).ToFloat(), 448.0f);
  EXPECT_EQ(Float8E4M3::FromFloat(-1e9f).ToFloat(), -448.0f);
}

TEST(Philox, MatchesThePublishedKnownAnswers) {
  // Random123 kat_vectors, philox4x32-10.
  EXPECT_EQ(Philox::Block({0, 0}, {0, 0, 0, 0}),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(
      Philox::Block({0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}),
      (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(RandomStream, NormalHasUnitVariance) {
  const RandomStream random(7, NameStream("a"));
  double sum = 0, squares = 0;
  for (int i = 0; i < 20000; ++i) {
    const double x = random.Normal(i);
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 20000, 0, 0.03);
  EXPECT_NEAR(squares / 20000, 1, 0.05);
}

TEST(Tensor, SharesStorageBetweenViews) {
  const Context context = Context::Cpu();
  const Tensor t = context.Zeros(DType::kF32, {4, 3});
  t.Rows(1, 2).data<float>()[2] = 5;
  EXPECT_EQ(t.Flat(5, 1).data<float>()[0], 5);
  EXPECT_EQ(t.Reshaped({2, 6}).dim(-1), 6);
  const MatrixView heads = PerHead(t.Reshaped({2, 3, 2}));
  EXPECT_EQ(heads.batch, 3);
  EXPECT_EQ(heads.row_stride, 6);
  EXPECT_EQ(heads.batch_stride, 2);
}

TEST(TensorDeathTest, NamesTheValuesOfAWrongAccess) {
  const Context context = Context::Cpu();
  const Tensor t = context.Zeros(DType::kF32, {4, 3});
  EXPECT_DEATH(t.data<double>(), "asked for F64 of F32\\[4, 3\\]");
  EXPECT_DEATH(t.Rows(2, 5), "rows 2..5 of F32\\[4, 3\\]");
}

TEST(MemoryPool, CountsBytesByUse) {
  Context context = Context::Cpu();
  {
    const ScopedUse use(context, "parameters");
    const Tensor a = context.Empty(DType::kF32, {1024});
    EXPECT_EQ(context.pool().Uses().at("parameters").bytes, 4096);
  }
  EXPECT_EQ(context.pool().Uses().at("parameters").bytes, 0);
  EXPECT_EQ(context.pool().Uses().at("parameters").peak_bytes, 4096);
  context.pool().ResetPeak();
  EXPECT_EQ(context.pool().Total().peak_bytes, 0);
}

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/baleen_file_XXXXXX";
    directory_ = ::mkdtemp(name);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string directory_;
};

TEST_F(FileTest, WritesDurablyAndReadsBack) {
  const std::string path = JoinPath(directory_, "a.txt");
  EXPECT_THAT(WriteFileDurably(path, "hello"), IsOk());
  ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(path, 100));
  EXPECT_EQ(text, "hello");
  EXPECT_THAT(ReadFile(path, 4), HasStatus(absl::StatusCode::kDataLoss, "5 bytes, the limit is 4"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_), {}), 1);
}

TEST_F(FileTest, NamesTheFileThatIsMissingOrNotRegular) {
  EXPECT_THAT(MappedFile::Open(JoinPath(directory_, "none")),
              HasStatus(absl::StatusCode::kDataLoss, "none: cannot open: No such file"));
  EXPECT_THAT(MappedFile::Open(directory_),
              HasStatus(absl::StatusCode::kDataLoss, "expected a regular file"));
  EXPECT_THAT(WriteFileDurably("/nonexistent/dir/x", "a"),
              HasStatus(absl::StatusCode::kFailedPrecondition, "cannot create"));
}

TEST_F(FileTest, NoticesAFileThatChangedUnderTheMapping) {
  const std::string path = JoinPath(directory_, "a.bin");
  EXPECT_THAT(WriteFileDurably(path, "0123456789"), IsOk());
  ASSERT_OK_AND_ASSIGN(const MappedFile file, MappedFile::Open(path));
  EXPECT_THAT(file.CheckUnchanged(), IsOk());
  std::filesystem::resize_file(path, 4);
  EXPECT_THAT(file.CheckUnchanged(), HasStatus(absl::StatusCode::kDataLoss, "changed while"));
}

// Resident set of this process, from the kernel.
int64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * 4096;
}

TEST(DryContext, HoldsAHundredGigabytesWithoutMemory) {
  Context context = Context::Dry();
  const int64_t before = ResidentBytes();
  {
    const Tensor large = context.Zeros(DType::kF32, {25'000'000'000});
    EXPECT_EQ(context.pool().Total().bytes, 100'000'000'000);
    EXPECT_EQ(large.data<float>()[24'999'999'999], 0.0f);
    large.data<float>()[12'345'678'901] = 1.0f;  // costs a page
    EXPECT_LT(ResidentBytes() - before, 16 << 20);
  }
  EXPECT_EQ(context.pool().Total().bytes, 0);
  EXPECT_EQ(context.pool().Total().peak_bytes, 100'000'000'000);
}

TEST(DryContext, GivesZerosAgainWhereSomethingWasWritten) {
  Context context = Context::Dry();
  for (const int64_t count : {int64_t{10}, int64_t{100'000}}) {
    for (int round = 0; round < 3; ++round) {
      const Tensor x = context.Zeros(DType::kI64, {count});
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(x.data<int64_t>()[i], 0) << round;
      std::fill_n(x.data<int64_t>(), count, 7);
    }
  }
}

TEST(DryContext, CountsTheBytesOfTheHostPool) {
  Context host = Context::Cpu(), dry = Context::Dry();
  for (Context* context : {&host, &dry}) {
    std::vector<Tensor> held;
    for (const int64_t bytes : {0, 1, 64, 65, 4095, 4096, 4097, 1'000'000}) {
      const ScopedUse use(*context, bytes % 2 == 0 ? "even" : "odd");
      held.push_back(context->Empty(DType::kU8, {bytes}));
      const Tensor gone = context->Empty(DType::kU8, {bytes});
    }
  }
  EXPECT_FALSE(host.dry());
  EXPECT_TRUE(dry.dry());
  for (const auto& [use, memory] : host.pool().Uses()) {
    EXPECT_EQ(dry.pool().Uses().at(use).bytes, memory.bytes) << use;
    EXPECT_EQ(dry.pool().Uses().at(use).peak_bytes, memory.peak_bytes) << use;
  }
  EXPECT_EQ(dry.pool().Total().peak_bytes, host.pool().Total().peak_bytes);
}

TEST(DryContext, AllocatesAHundredThousandTensorsInASecond) {
  const Context context = Context::Dry();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100'000; ++i) context.Empty(DType::kF32, {i % 2 == 0 ? 100 : 1'000'000});
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_LT(seconds.count(), 1.0);
  RecordProperty("microseconds_a_tensor", std::to_string(seconds.count() * 10));
}

TEST(Log, EscapesControlCharacters) { EXPECT_EQ(EscapeControl("a\x1b[31m\r"), "a\\x1b[31m\\x0d"); }

}  // namespace
}  // namespace baleen
