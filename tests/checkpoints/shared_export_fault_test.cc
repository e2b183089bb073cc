// Every file operation of every rank of a shared export fails once, one after the other: all ranks
// end with that rank's error and nothing is left, or the checkpoint is there and whole.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <filesystem>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/checkpoints/io_faults.h"
#include "tests/support/status_matchers.h"
#include "trainer/shared_export.h"

namespace baleen {
namespace {

using testing::ArmFaults;
using testing::DisarmFaults;
using testing::Fault;
using testing::HasStatus;
using testing::IsOk;
using testing::MakeCheckpoint;
using testing::ReadAll;
using testing::ScratchDirectory;
using testing::TinyModel;

bool IsIndexer(const std::string& name) { return name.find(".indexer.") != std::string::npos; }

// A directory that rank 0 makes and removes, with a source checkpoint in it.
class SharedExport : public ::testing::Test {
 protected:
  SharedExport() : world_(WrapMpiWorld()) {
    if (world_->rank() == 0) scratch_ = std::make_unique<ScratchDirectory>();
    folder_ = BroadcastString(*world_, "folder", scratch_ ? scratch_->path() : std::string(), 0);
    if (world_->rank() == 0) MakeCheckpoint(JoinPath(folder_, "source"));
    world_->Barrier("source");
    auto source = HfCheckpoint::Open(JoinPath(folder_, "source"));
    CHECK_OK(source.status());
    source_ = std::make_unique<HfCheckpoint>(*std::move(source));
    request_ = {.model = TinyModel(),
                .dtype = ExportDType::kBF16,
                .source = source_.get(),
                .trained = IsIndexer,
                .max_shard_bytes = 200'000};
    values_ = [this](const std::string&, const Box& band) -> absl::StatusOr<Tensor> {
      const Tensor tensor = buffer_.Take(DType::kF32, band.extent);
      for (int64_t i = 0; i < tensor.num_elements(); ++i) {
        tensor.data<float>()[i] = 0.01f * static_cast<float>(i % 100);
      }
      return tensor;
    };
  }
  ~SharedExport() override { world_->Barrier("end of test"); }

  std::string Target() const { return JoinPath(folder_, "out"); }
  absl::Status Export(const TensorValues& values) {
    return ExportShared(request_, values, Target(), *world_);
  }
  // Nothing but the source, on every rank.
  void ExpectNothingLeft() {
    world_->Barrier("look");
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      names.push_back(entry.path().filename().string());
    }
    EXPECT_EQ(names, std::vector<std::string>{"source"});
    world_->Barrier("looked");
  }
  void RemoveTarget() {
    world_->Barrier("read");
    if (world_->rank() == 0) std::filesystem::remove_all(Target());
    world_->Barrier("removed");
  }
  // One number of one rank, on all.
  int64_t FromRank(int rank, int64_t number) {
    int64_t result = 0;
    CHECK(
        absl::SimpleAtoi(BroadcastString(*world_, "number", absl::StrCat(number), rank), &result));
    return result;
  }

  std::unique_ptr<Communicator> world_;
  std::unique_ptr<ScratchDirectory> scratch_;
  std::string folder_;
  std::unique_ptr<HfCheckpoint> source_;
  ExportRequest request_;
  BandBuffer buffer_;
  TensorValues values_;
};

TEST_F(SharedExport, EveryFailingFileOperationOfEveryRankEndsAllRanksAlike) {
  ASSERT_THAT(Export(values_), IsOk());  // also connects the ranks: MPI opens no file later
  const auto whole = ReadAll(Target());
  RemoveTarget();
  int num_failed = 0, num_harmless = 0;
  for (int failing = 0; failing < world_->size(); ++failing) {
    int failed_here = 0;
    for (int nth = 1;; ++nth) {
      ASSERT_LT(nth, 500);
      if (world_->rank() == failing) ArmFaults({Fault::kErrorOnce, nth, ENOSPC});
      const absl::Status status = Export(values_);
      const int64_t calls = FromRank(failing, world_->rank() == failing ? DisarmFaults() : 0);
      // What rank 0 returned, every rank did.
      EXPECT_EQ(BroadcastString(*world_, "status", status.ToString(), 0), status.ToString());
      if (calls < nth) {
        ASSERT_THAT(status, IsOk());
        RemoveTarget();
        break;
      }
      if (status.ok()) {
        // Closing a file that was synced may fail without harm.
        EXPECT_EQ(ReadAll(Target()), whole) << "rank " << failing << ", operation " << nth;
        ++num_harmless;
        RemoveTarget();
        continue;
      }
      ++num_failed;
      ++failed_here;
      EXPECT_THAT(status, HasStatus(absl::StatusCode::kFailedPrecondition, "No space left"));
      EXPECT_TRUE(absl::StartsWith(status.message(), absl::StrCat("rank ", failing, ": ")))
          << status;
      if (std::filesystem::exists(Target())) {
        // Published, and only the sync of the folder around it failed: whole, and said.
        EXPECT_EQ(ReadAll(Target()), whole);
        EXPECT_EQ(failing, 0);
        RemoveTarget();
      }
      ExpectNothingLeft();
    }
    EXPECT_GT(failed_here, 10) << "rank " << failing;
  }
  if (world_->rank() == 0) {
    std::printf("%d failing operations, %d harmless ones\n", num_failed, num_harmless);
  }
}

TEST_F(SharedExport, ARankThatFailsInTheMiddleStopsAllAndLeavesNothing) {
  const int last = world_->size() - 1;
  int asked = 0;
  const TensorValues failing = [&](const std::string& name, const Box& band) {
    if (world_->rank() == last && ++asked == 2) {
      return absl::StatusOr<Tensor>(DataError("state: tensor ", name, ": damaged"));
    }
    return values_(name, band);
  };
  EXPECT_THAT(Export(failing), HasStatus(absl::StatusCode::kDataLoss,
                                         absl::StrCat("rank ", last, ": state: tensor")));
  ExpectNothingLeft();
  // The ranks are still in step.
  EXPECT_THAT(Export(values_), IsOk());
  EXPECT_EQ(FromRank(last, asked), 2);
  RemoveTarget();
}

TEST_F(SharedExport, ATargetThatExistsAndRanksThatDifferAreRefused) {
  if (world_->rank() == 0) std::filesystem::create_directories(JoinPath(Target(), "notes"));
  world_->Barrier("made");
  EXPECT_THAT(Export(values_), HasStatus(absl::StatusCode::kInvalidArgument,
                                         "exists and is not an empty directory"));
  RemoveTarget();
  // Rank 1 believes that something else trained too.
  if (world_->rank() == 1) request_.trained = [](const std::string&) { return true; };
  EXPECT_THAT(Export(values_), HasStatus(absl::StatusCode::kDataLoss,
                                         "this rank plans another checkpoint than rank 0"));
  ExpectNothingLeft();
}

}  // namespace
}  // namespace baleen
