// What a run leaves to read: metrics.jsonl, TensorBoard events, the report and its charts.
#include "trainer/metrics.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "kernels/core/file.h"
#include "nlohmann/json.hpp"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"
#include "trainer/crc32c.h"
#include "trainer/report.h"
#include "trainer/svg_chart.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::TemporaryDirectory;

TEST(Metrics, LeaveOutWhatDoesNotApply) {
  StepRecord record;
  record.step = 3;
  record.stage = "warm";
  record.indexer_kl = 0.5;
  const auto json = nlohmann::json::parse(ToJson(record));
  EXPECT_EQ(json["kind"], "step");
  EXPECT_EQ(json["indexer_kl"], 0.5);
  EXPECT_FALSE(json.contains("lm_loss"));
  EXPECT_FALSE(json.contains("mfu"));
  EXPECT_FALSE(json.contains("topk_mass_per_layer"));
}

TEST(Metrics, AResumedRunCutsWhatItWillDoAgainAndATornLine) {
  const TemporaryDirectory directory;
  const std::string path = directory.File("metrics.jsonl");
  StepRecord record;
  std::string text;
  for (record.step = 1; record.step <= 5; ++record.step)
    absl::StrAppend(&text, ToJson(record), "\n");
  ASSERT_THAT(WriteFileDurably(path, text + "{\"kind\":\"st"), IsOk());
  {
    ASSERT_OK_AND_ASSIGN(const auto sink, OpenJsonlSink(path, 3, Log(0)));
    record.step = 4;
    sink->Step(record);
  }
  ASSERT_OK_AND_ASSIGN(const std::string after, ReadFile(path, 1 << 20));
  const std::vector<std::string> lines = absl::StrSplit(after, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 4);
  EXPECT_EQ(nlohmann::json::parse(lines[3])["step"], 4);
}

std::string RecordsOfSteps(int64_t last) {
  std::string text;
  StepRecord record;
  for (record.step = 1; record.step <= last; ++record.step)
    absl::StrAppend(&text, ToJson(record), "\n");
  return text;
}

std::string AfterOpening(const std::string& path, const std::string& before, int64_t resume_step) {
  EXPECT_THAT(WriteFileDurably(path, before), IsOk());
  EXPECT_THAT(OpenJsonlSink(path, resume_step, Log(0)).status(), IsOk());
  return ReadFile(path, 1 << 20).value_or("cannot be read");
}

TEST(Metrics, AreCutAtTheLastRecordOfTheStateWhateverStandsAround) {
  const TemporaryDirectory directory;
  const std::string path = directory.File("metrics.jsonl");
  ValidationRecord validation;
  validation.step = 3;
  const std::string upto3 = RecordsOfSteps(3) + ToJson(validation) + "\n";
  const std::string all = upto3 + RecordsOfSteps(6).substr(RecordsOfSteps(3).size());
  EXPECT_EQ(AfterOpening(path, all, 3), upto3);
  EXPECT_EQ(AfterOpening(path, all, 6), all);
  EXPECT_EQ(AfterOpening(path, all, 9), all);
  EXPECT_EQ(AfterOpening(path, all, 0), "");
  EXPECT_EQ(AfterOpening(path, "", 3), "");
  EXPECT_EQ(AfterOpening(path, "\n", 3), "");
  EXPECT_EQ(AfterOpening(path, "{\"kind\":\"step\",\"step\":1", 3), "");  // torn, and alone
  // A line that a full disk tore, joined by the next one; a torn last line; zeros of a lost block.
  EXPECT_EQ(AfterOpening(path, upto3 + "{\"kind\":\"st{\"step\":2}\n{\"st", 3), upto3);
  EXPECT_EQ(AfterOpening(path, upto3 + std::string(4096, '\0'), 3), upto3);
  // What stands before the cut is not looked at.
  EXPECT_EQ(AfterOpening(path, "not a record\n" + all, 3), "not a record\n" + upto3);
}

TEST(Metrics, OfADaysLongRunAreNotWrittenAgain) {
  const TemporaryDirectory directory;
  const std::string path = directory.File("metrics.jsonl");
  ASSERT_THAT(WriteFileDurably(path, RecordsOfSteps(5)), IsOk());
  struct stat before, after;
  ASSERT_EQ(::stat(path.c_str(), &before), 0);
  ASSERT_THAT(OpenJsonlSink(path, 3, Log(0)).status(), IsOk());
  ASSERT_EQ(::stat(path.c_str(), &after), 0);
  EXPECT_EQ(after.st_ino, before.st_ino);  // the same file, shorter
  EXPECT_EQ(after.st_size, static_cast<off_t>(RecordsOfSteps(3).size()));
}

TEST(Metrics, SayTheLoadOfExpertsInThousandths) {
  StepRecord record;
  record.expert_load = {{1.0546875, 0, 1.0 / 3}, {256, 2.0005, 12.3456789}};
  EXPECT_TRUE(
      absl::StrContains(ToJson(record), "\"expert_load\":[[1.055,0.0,0.333],[256.0,2.001,12.346]]"))
      << ToJson(record);
}

TEST(TensorBoard, RecordsCarryTheChecksumsReadersVerify) {
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  const TemporaryDirectory directory;
  {
    ASSERT_OK_AND_ASSIGN(const auto sink,
                         OpenTensorBoardSink(directory.File("tensorboard"), Log(0)));
    StepRecord record;
    record.step = 7;
    record.lm_loss = 2.5;
    sink->Step(record);
  }
  const auto entry = *std::filesystem::directory_iterator(directory.File("tensorboard"));
  ASSERT_OK_AND_ASSIGN(const std::string bytes, ReadFile(entry.path(), 1 << 20));
  size_t at = 0;
  int records = 0;
  while (at < bytes.size()) {
    uint64_t length;
    uint32_t crc;
    std::memcpy(&length, bytes.data() + at, 8);
    std::memcpy(&crc, bytes.data() + at + 8, 4);
    const auto masked = [](absl::string_view data) {
      const uint32_t c = Crc32c(data);
      return ((c >> 15) | (c << 17)) + 0xa282ead8u;
    };
    EXPECT_EQ(crc, masked({bytes.data() + at, 8}));
    const absl::string_view data(bytes.data() + at + 12, length);
    std::memcpy(&crc, bytes.data() + at + 12 + length, 4);
    EXPECT_EQ(crc, masked(data));
    if (records == 1) {
      // Value {tag "train/lm_loss", simple_value 2.5f = 00 00 20 40}.
      const std::string expected =
          std::string("\x0a\x0dtrain/lm_loss\x15", 16) + std::string("\x00\x00\x20\x40", 4);
      EXPECT_TRUE(absl::StrContains(data, expected));
    }
    at += 16 + length;
    ++records;
  }
  EXPECT_EQ(records, 2);  // the version, and the step
}

TEST(Report, DrawsCurvesWithoutOutsideReferences) {
  const TemporaryDirectory directory;
  std::string text;
  StepRecord record;
  record.stage = "warm<up>";
  for (record.step = 1; record.step <= 4; ++record.step) {
    record.indexer_kl = 1.0 / static_cast<double>(record.step);
    record.expert_load = {{0.5, 1.5}};
    absl::StrAppend(&text, ToJson(record), "\n");
  }
  ASSERT_THAT(WriteFileDurably(directory.File("metrics.jsonl"), text), IsOk());
  ASSERT_OK_AND_ASSIGN(const std::string html, RunReport(directory.path(), {}));
  EXPECT_TRUE(absl::StrContains(html, "<polyline"));
  EXPECT_TRUE(absl::StrContains(html, "warm&lt;up&gt;"));
  EXPECT_FALSE(absl::StrContains(html, "http"));
  EXPECT_FALSE(absl::StrContains(html, "<script"));
  EXPECT_THAT(RunReport(directory.File("none"), {}),
              HasStatus(absl::StatusCode::kDataLoss, "metrics.jsonl"));
}

TEST(Report, DrawsTheLoadOfExpertsOfTheLastStepThatHasIt) {
  const TemporaryDirectory directory;
  std::string text;
  StepRecord record;
  for (record.step = 1; record.step <= 4; ++record.step) {
    record.expert_load.clear();
    if (record.step < 4) record.expert_load = {{0.5, 1.5, static_cast<double>(record.step)}};
    absl::StrAppend(&text, ToJson(record), "\n");
  }
  ASSERT_THAT(WriteFileDurably(directory.File("metrics.jsonl"), text), IsOk());
  ASSERT_OK_AND_ASSIGN(const std::string html, RunReport(directory.path(), {}));
  EXPECT_TRUE(absl::StrContains(html, "tokens of each expert over the mean, step 3 "));
}

// The x of each point of the first chart's n-th line.
std::vector<std::string> PlacesOfLine(absl::string_view html, int n) {
  const std::vector<absl::string_view> lines = absl::StrSplit(html, "points='");
  const absl::string_view points = lines.at(n + 1).substr(0, lines.at(n + 1).find('\''));
  std::vector<std::string> places;
  for (const absl::string_view point : absl::StrSplit(points, ' ', absl::SkipEmpty()))
    places.emplace_back(point.substr(0, point.find(',')));
  return places;
}

// A control without the warm-up: its first step belongs beside the first step with a loss.
TEST(Report, DrawsAnotherRunBesideTheStageThatHasLosses) {
  const TemporaryDirectory directory;
  StepRecord record;
  std::string run, control;
  for (record.step = 1; record.step <= 3; ++record.step)
    absl::StrAppend(&run, ToJson(record), "\n");
  record.lm_loss = 5;
  for (; record.step <= 7; ++record.step) absl::StrAppend(&run, ToJson(record), "\n");
  for (record.step = 1; record.step <= 4; ++record.step)
    absl::StrAppend(&control, ToJson(record), "\n");
  for (const auto& [name, text] : {std::pair("run", run), std::pair("control", control)}) {
    std::filesystem::create_directory(directory.File(name));
    ASSERT_THAT(WriteFileDurably(JoinPath(directory.File(name), "metrics.jsonl"), text), IsOk());
  }
  ASSERT_OK_AND_ASSIGN(const std::string html,
                       RunReport(directory.File("run"), {directory.File("control")}));
  // Lines of the losses: lm, mtp, validation, lm of the control.
  EXPECT_TRUE(absl::StrContains(html, "lm loss of control"));
  EXPECT_EQ(PlacesOfLine(html, 0).size(), 4);
  EXPECT_EQ(PlacesOfLine(html, 3), PlacesOfLine(html, 0));
}

TEST(SvgLineChart, IsEmptyWithoutTwoFinitePoints) {
  EXPECT_EQ(SvgLineChart({"t", "x", {{"a", {{1, 2}}, false}}, {}}), "");
  EXPECT_EQ(SvgLineChart({"t", "x", {{"a", {{1, NAN}, {2, NAN}, {3, 1}}, false}}, {}}), "");
  EXPECT_NE(SvgLineChart({"t", "x", {{"a", {{1, 2}, {2, 2}}, false}}, {}}), "");
}

}  // namespace
}  // namespace baleen
