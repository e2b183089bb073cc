// Host memory of import and export: the destination and a constant, however large the checkpoint.
//
// The work runs in a child process under RLIMIT_DATA (heap and private writable mappings; an
// allocation beyond it fails), a few times smaller than what it reads. The parent samples the
// child's RssAnon. Mapped safetensors pages are the kernel's page cache: they count as RssFile, and
// it takes them back at need.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "checkpoints/fp8_blocks.h"
#include "checkpoints/hf_export.h"
#include "checkpoints/state_reader.h"
#include "checkpoints/state_writer.h"
#include "kernels/core/context.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::IsOk;
using testing::ScratchDirectory;
using testing::TinyModel;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr Shape::value_type kRows = 5120, kCols = 8192;  // 40 MiB as FP8
constexpr int kNumFp8 = 14, kNumBf16 = 6;                // BF16: half the rows, 40 MiB too
constexpr int kRanks = 4;
// What an import may hold beside its destination: maps of names, scales of a tensor.
constexpr int64_t kImportConstant = 8 * kMiB;

// A line "Key:   123 kB" of /proc/PID/status in bytes; 0 when the process is gone.
int64_t StatusBytes(pid_t pid, const char* key) {
  std::FILE* file = std::fopen(absl::StrCat("/proc/", pid, "/status").c_str(), "r");
  if (file == nullptr) return 0;
  char line[256];
  long kilobytes = 0;
  while (std::fgets(line, sizeof(line), file) != nullptr) {
    if (std::sscanf(line, absl::StrCat(key, ": %ld kB").c_str(), &kilobytes) == 1) break;
  }
  std::fclose(file);
  return int64_t{kilobytes} << 10;
}

struct ChildResult {
  bool ok = false;
  int64_t peak_anonymous = 0, peak_file = 0;
};

// Runs `work` in a child that may take `extra_bytes` beyond what it has at its start; 0: no limit.
ChildResult RunInChild(int64_t extra_bytes, const std::function<absl::Status()>& work) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    if (extra_bytes > 0) {
      const auto most = static_cast<rlim_t>(StatusBytes(::getpid(), "VmData") + extra_bytes);
      const rlimit limit{most, most};
      if (::setrlimit(RLIMIT_DATA, &limit) != 0) ::_exit(2);
    }
    // bad_alloc ends the child: gtest would take it for this test's and go on with the next.
    const absl::Status status = [&]() noexcept { return work(); }();
    if (!status.ok()) std::fprintf(stderr, "child: %s\n", status.ToString().c_str());
    ::_exit(status.ok() ? 0 : 1);
  }
  ChildResult result;
  int ended = 0;
  while (::waitpid(child, &ended, WNOHANG) == 0) {
    result.peak_anonymous = std::max(result.peak_anonymous, StatusBytes(child, "RssAnon"));
    result.peak_file = std::max(result.peak_file, StatusBytes(child, "RssFile"));
    ::usleep(1000);
  }
  result.ok = WIFEXITED(ended) && WEXITSTATUS(ended) == 0;
  return result;
}

std::string WeightName(int t) { return absl::StrCat("w", t, ".weight"); }

// E4M3 without its NaN; the scale tells the tensors apart.
uint8_t PatternByte(int64_t element) { return static_cast<uint8_t>(element * 31 % 113); }
float PatternScale(int tensor, int64_t block) { return std::ldexp(1.0f, (tensor + block) % 5 - 8); }

absl::Status WriteCheckpoint(const std::string& directory) {
  std::vector<PlannedTensor> tensors;
  for (int t = 0; t < kNumFp8; ++t) {
    tensors.push_back({WeightName(t), {kRows, kCols}, DType::kF8E4M3});
    tensors.push_back({ScaleName(WeightName(t)), Fp8ScaleShape({kRows, kCols}), DType::kF32});
  }
  for (int t = kNumFp8; t < kNumFp8 + kNumBf16; ++t) {
    tensors.push_back({WeightName(t), {kRows / 2, kCols}, DType::kBF16});
  }
  ASSIGN_OR_RETURN(ShardPlan plan, PlanShards(tensors, 300 * kMiB));
  ASSIGN_OR_RETURN(
      HfWriter writer,
      HfWriter::Create(directory, std::move(plan),
                       {.config_json = HfConfigText({.model = TinyModel(), .fp8 = true})}));
  std::vector<uint8_t> bytes(kRows * kCols);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = PatternByte(static_cast<int64_t>(i));
  std::vector<float> scales(static_cast<size_t>(NumElements(Fp8ScaleShape({kRows, kCols}))));
  for (int t = 0; t < kNumFp8 + kNumBf16; ++t) {
    RETURN_IF_ERROR(writer.WriteRaw(WeightName(t), bytes));
    if (t >= kNumFp8) continue;
    for (size_t i = 0; i < scales.size(); ++i) {
      scales[i] = PatternScale(t, static_cast<int64_t>(i));
    }
    RETURN_IF_ERROR(writer.WriteRaw(
        ScaleName(WeightName(t)),
        {reinterpret_cast<const uint8_t*>(scales.data()), scales.size() * sizeof(float)}));
  }
  return writer.Finish();
}

// What element (r, c) of an FP8 tensor must be.
float ExpectedFp8(int tensor, int64_t r, int64_t c) {
  const int64_t block = r / kFp8Block * (kCols / kFp8Block) + c / kFp8Block;
  return Float8E4M3{PatternByte(r * kCols + c)}.ToFloat() * PatternScale(tensor, block);
}

// As a rank of four reads its weights: rows of the even tensors, columns of the odd ones.
absl::Status ImportShare(const std::string& directory, int rank, int64_t buffer_elements) {
  std::vector<float> buffer(static_cast<size_t>(buffer_elements));
  ASSIGN_OR_RETURN(const HfCheckpoint checkpoint, HfCheckpoint::Open(directory));
  for (int t = 0; t < kNumFp8 + kNumBf16; ++t) {
    Box box = WholeBox(checkpoint.Find(WeightName(t))->shape);
    const size_t dim = t % 2;
    box.extent[dim] /= kRanks;
    box.offset[dim] = rank * box.extent[dim];
    CHECK_LE(NumElements(box.extent), buffer_elements);
    RETURN_IF_ERROR(checkpoint.Read(WeightName(t), box, DType::kF32, buffer.data()));
    if (t >= kNumFp8) continue;
    for (int64_t i = 0; i < NumElements(box.extent); i += 9973) {
      const int64_t r = i / box.extent[1], c = i % box.extent[1];
      const float expected = ExpectedFp8(t, box.offset[0] + r, box.offset[1] + c);
      if (buffer[static_cast<size_t>(i)] != expected) {
        return absl::InternalError(absl::StrCat(WeightName(t), " [", r, ", ", c, "] is ",
                                                buffer[static_cast<size_t>(i)], ", expected ",
                                                expected));
      }
    }
  }
  return absl::OkStatus();
}

TEST(BoundedMemory, ImportHoldsItsDestinationAndAConstant) {
  ScratchDirectory scratch;
  const std::string directory = scratch.File("hf");
  ASSERT_TRUE(RunInChild(0, [&] { return WriteCheckpoint(directory); }).ok);
  const int64_t box_elements = kRows / kRanks * kCols;
  const int64_t box_bytes = box_elements * int64_t{sizeof(float)};
  const int64_t limit = box_bytes + kImportConstant;
  ChildResult most;
  for (int rank = 0; rank < kRanks; ++rank) {
    const ChildResult result =
        RunInChild(limit, [&] { return ImportShare(directory, rank, box_elements); });
    ASSERT_TRUE(result.ok) << "rank " << rank;
    most.peak_anonymous = std::max(most.peak_anonymous, result.peak_anonymous);
    most.peak_file = std::max(most.peak_file, result.peak_file);
  }
  const int64_t checkpoint_bytes = (kNumFp8 + kNumBf16) * kRows * kCols;
  std::printf(
      "import of %lld MiB: limit %lld MiB beyond the start, largest box %lld MiB, peak RssAnon "
      "%.1f MiB, RssFile %.1f MiB\n",
      static_cast<long long>(checkpoint_bytes / kMiB), static_cast<long long>(limit / kMiB),
      static_cast<long long>(box_bytes / kMiB), static_cast<double>(most.peak_anonymous) / kMiB,
      static_cast<double>(most.peak_file) / kMiB);
  EXPECT_GT(checkpoint_bytes, 8 * limit);
  EXPECT_GT(most.peak_anonymous, box_bytes);  // the destination was touched: the samples are real
  EXPECT_LT(most.peak_anonymous, limit + 4 * kMiB);  // and what the child had at its start
  // The limit is one: with less than the destination the child dies.
  EXPECT_FALSE(
      RunInChild(box_bytes / 2, [&] { return ImportShare(directory, 0, box_elements); }).ok);
}

constexpr int kStateTensors = 8;
const Shape kStateShape = {2560, 4096};  // 40 MiB as F32

float StateValue(int tensor, int64_t element) {
  return 0.001f * static_cast<float>(element % 1009 + tensor) - 0.5f;
}

// Two ranks, each with one half of every tensor's columns.
absl::Status WriteState(const std::string& directory) {
  ASSIGN_OR_RETURN(const std::string temp, BeginState(directory, 1, "test", 0));
  const Context context = Context::Cpu();
  std::vector<RankFileRecord> records;
  for (int rank = 0; rank < 2; ++rank) {
    std::vector<StatePiece> pieces;
    const int64_t cols = kStateShape[1] / 2;
    const Box box{{0, rank * cols}, {kStateShape[0], cols}};
    for (int t = 0; t < kStateTensors; ++t) {
      const Tensor half = context.Empty(DType::kF32, box.extent);
      for (int64_t i = 0; i < half.num_elements(); ++i) {
        half.data<float>()[i] = StateValue(t, i / cols * kStateShape[1] + box.offset[1] + i % cols);
      }
      pieces.push_back(WholePiece(WeightName(t), kStateShape, box, half));
    }
    ASSIGN_OR_RETURN(RankFileRecord record, WriteRankFile(temp, rank, pieces));
    records.push_back(std::move(record));
  }
  StateMetadata metadata;
  metadata.step = 1;
  metadata.stage_name = "sparse";
  return PublishState(directory, temp, metadata, records).status();
}

// The even tensors leave as FP8, the odd ones as BF16.
absl::Status ExportState(const std::string& states, const std::string& out) {
  ASSIGN_OR_RETURN(StateReader state, StateReader::Open(JoinPath(states, "step-00000001")));
  RETURN_IF_ERROR(state.VerifyAllFiles());
  std::vector<PlannedTensor> tensors;
  for (int t = 0; t < kStateTensors; ++t) {
    const bool fp8 = t % 2 == 0;
    tensors.push_back({WeightName(t), kStateShape, fp8 ? DType::kF8E4M3 : DType::kBF16});
    if (fp8) tensors.push_back({ScaleName(WeightName(t)), Fp8ScaleShape(kStateShape), DType::kF32});
  }
  ASSIGN_OR_RETURN(ShardPlan plan, PlanShards(tensors, kDefaultShardBytes));
  ASSIGN_OR_RETURN(
      HfWriter writer,
      HfWriter::Create(out, std::move(plan),
                       {.config_json = HfConfigText({.model = TinyModel(), .fp8 = true})}));
  BandBuffer buffer;
  const TensorValues values = [&](const std::string& name,
                                  const Box& band) -> absl::StatusOr<Tensor> {
    const Tensor tensor = buffer.Take(DType::kF32, band.extent);
    RETURN_IF_ERROR(state.Read(name, band, 0, tensor.num_elements(), DType::kF32, tensor.raw()));
    return tensor;
  };
  BandBuffer unused;
  for (int t = 0; t < kStateTensors; ++t) {
    RETURN_IF_ERROR(ExportOne({WeightName(t), ExportTensor::From::kValues, WeightName(t)}, nullptr,
                              values, unused, writer));
  }
  return writer.Finish();
}

TEST(BoundedMemory, ExportOfAStateHoldsLessThanItsLargestTensor) {
  ScratchDirectory scratch;
  const std::string states = scratch.File("states"), out = scratch.File("hf");
  ASSERT_TRUE(RunInChild(0, [&] { return WriteState(states); }).ok);
  // One band (8 MiB), encoded (4 MiB), HDF5's chunk (4 MiB) and its own buffers.
  const int64_t limit = 32 * kMiB;
  const ChildResult result = RunInChild(limit, [&] { return ExportState(states, out); });
  ASSERT_TRUE(result.ok);
  const int64_t tensor_bytes = NumElements(kStateShape) * int64_t{sizeof(float)};
  std::printf(
      "export of a state of %lld MiB: limit %lld MiB beyond the start, largest tensor %lld "
      "MiB, peak RssAnon %.1f MiB\n",
      static_cast<long long>(kStateTensors * tensor_bytes / kMiB),
      static_cast<long long>(limit / kMiB), static_cast<long long>(tensor_bytes / kMiB),
      static_cast<double>(result.peak_anonymous) / kMiB);
  EXPECT_LT(limit, tensor_bytes);
  EXPECT_GT(result.peak_anonymous, 8 * kMiB);
  EXPECT_LT(result.peak_anonymous, limit + 4 * kMiB);
  // It did the work: an element of a later band, to BF16's rounding.
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint written, HfCheckpoint::Open(out));
  float found = 0;
  ASSERT_THAT(written.Read(WeightName(3), {{2000, 4000}, {1, 1}}, DType::kF32, &found), IsOk());
  EXPECT_NEAR(found, StateValue(3, 2000 * kStateShape[1] + 4000), 1.0 / 256);
}

}  // namespace
}  // namespace baleen
