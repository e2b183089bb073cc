#include "checkpoints/safetensors.h"

#include <sys/resource.h>

#include <ctime>

#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::SafetensorsText;
using testing::ScratchDirectory;

constexpr absl::StatusCode kBad = absl::StatusCode::kDataLoss;

absl::StatusOr<SafetensorsHeader> Parse(const std::string& file) {
  return ParseSafetensors({reinterpret_cast<const uint8_t*>(file.data()), file.size()},
                          "x.safetensors");
}

TEST(Safetensors, ReadsEntriesInTheOrderOfTheData) {
  ASSERT_OK_AND_ASSIGN(const SafetensorsHeader header,
                       Parse(SafetensorsText(R"({"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},
        "a":{"shape":[2],"data_offsets":[0,4],"dtype":"BF16"}}   )",
                                             28)));
  ASSERT_EQ(header.entries.size(), 2u);
  EXPECT_EQ(header.entries[0].name, "a");
  EXPECT_EQ(header.entries[0].dtype, DType::kBF16);
  EXPECT_EQ(header.entries[1].shape, (Shape{2, 3}));
  EXPECT_EQ(header.entries[1].begin, 4);
  EXPECT_EQ(header.entries[1].end, 28);
  EXPECT_EQ(header.metadata.at("format"), "pt");
}

TEST(Safetensors, TakesScalarsEmptyTensorsAndNoTensorsAtAll) {
  ASSERT_OK_AND_ASSIGN(const SafetensorsHeader some,
                       Parse(SafetensorsText(
                           R"( {"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
                                "e":{"dtype":"I64","shape":[0,5],"data_offsets":[4,4]},
                                "f":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[4,7]}})",
                           7)));
  ASSERT_EQ(some.entries.size(), 3u);
  EXPECT_EQ(some.entries[1].name, "e");
  EXPECT_THAT(Parse(SafetensorsText("{}", 0)), IsOk());
}

// Each line breaks one rule of the format.
TEST(Safetensors, RefusesEveryBrokenHeader) {
  struct Case {
    absl::string_view json;
    size_t data_bytes;
    const char* part;
  };
  const std::string long_name(1025, 'n');
  const std::string long_json =
      "{\"" + long_name + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})";
  const Case cases[] = {
      {"[]", 0, "expected an object at the top"},
      {"3", 0, "expected an object"},
      {"", 0, "not valid JSON"},
      {"{", 0, "not valid JSON"},
      {"{} {}", 0, "not valid JSON"},
      {R"({"a":3})", 0, "expected an object, found an integer"},
      {R"({"a":[]})", 0, "expected an object, found a list"},
      {R"({"a":{"dtype":"U8","shape":[1]}})", 1, "data_offsets"},
      {R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, "\"dtype\" is missing"},
      {R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, "\"shape\" is missing"},
      {R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", 2,
       "dtype F16 is not supported"},
      {R"({"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}})", 4, "dtype f32"},
      {R"({"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}})", 4, "dtype: unexpected"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", 1, "unknown key \"x\""},
      {R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", 1, "shape: found a number"},
      {R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "shape: found -1"},
      {R"({"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}})", 1, "shape: found a string"},
      {R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", 1, "unexpected a list"},
      {R"({"a":{"dtype":"U8","shape":3,"data_offsets":[0,1]}})", 1, "shape: unexpected an integer"},
      {R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1,
       "more than 8 dimensions"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "expected two numbers"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}})", 1, "expected two numbers"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}})", 1, "data_offsets: found -1"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, "data_offsets [1, 0]"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", 1, "expected 2 bytes"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
       "larger than any file"},
      {R"({"a":{"dtype":"U8","shape":[9223372036854775807,0],"data_offsets":[0,0]}})", 0, "2^53"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
           "a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2, "stands twice"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
           "b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, "overlap"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
           "b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
       2, "overlap"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
           "b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3, "a hole before it"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2, "a hole before it"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 3, "truncated?"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 5, "trailing bytes"},
      {"{}", 1, "trailing bytes"},
      {R"({"__metadata__":{"format":1}})", 0, "__metadata__: expected strings"},
      {R"({"__metadata__":{"format":{}}})", 0, "unexpected an object"},
      {R"({"__metadata__":"pt"})", 0, "expected an object, found a string"},
      {R"({"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "without a name"},
      {R"({"a\u001b[2J":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0,
       "control characters"},
      {R"({"a\u0000":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "control characters"},
      {long_json, 0, "a tensor name of 1025 bytes"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(Parse(SafetensorsText(c.json, c.data_bytes)), HasStatus(kBad, c.part))
        << c.json.substr(0, 200);
    EXPECT_THAT(Parse(SafetensorsText(c.json, c.data_bytes)), HasStatus(kBad, "x.safetensors"));
  }
}

TEST(Safetensors, RefusesBrokenLengthWords) {
  EXPECT_THAT(Parse(""), HasStatus(kBad, "0 bytes"));
  EXPECT_THAT(Parse("1234567"), HasStatus(kBad, "7 bytes"));
  EXPECT_THAT(Parse(std::string(8, '\xff') + "{}"), HasStatus(kBad, "the limit is 100000000"));
  EXPECT_THAT(Parse(std::string("\x00\x00\x00\x00\x00\x00\x00\x80{}", 10)),
              HasStatus(kBad, "limit"));
  EXPECT_THAT(Parse(std::string("\x01\xe1\xf5\x05\x00\x00\x00\x00{}", 10)),
              HasStatus(kBad, "100000001"));
  EXPECT_THAT(Parse(std::string("\x00\xe1\xf5\x05\x00\x00\x00\x00{}", 10)),
              HasStatus(kBad, "should end at byte 100000008"));
}

// A 30 MB header of 500,000 tensors that all claim the same byte: refused quickly, in bounded
// memory.
TEST(Safetensors, RefusesManyTensorsOverOneByteQuickly) {
  std::string json = "{";
  for (int i = 0; i < 500'000; ++i) {
    absl::StrAppend(&json, i > 0 ? "," : "", "\"", i,
                    R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})");
  }
  const std::string file = SafetensorsText(json + "}", 1);
  rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  const std::clock_t start = std::clock();  // CPU time: the machine may be busy
  EXPECT_THAT(Parse(file), HasStatus(kBad, "overlap"));
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  getrusage(RUSAGE_SELF, &after);
  EXPECT_LT(seconds, 10) << "sanitizers included";
  EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 256 * 1024) << "KiB";
}

TEST(Safetensors, WritesTheHeaderOfTheReferenceWriter) {
  // What Python's safetensors 0.8 writes for these tensors with metadata {"format": "pt"}.
  std::vector<PlannedTensor> tensors = {{"z", {2, 2}, DType::kBF16},
                                        {"b.weight", {3}, DType::kF8E4M3},
                                        {"a", {}, DType::kF32},
                                        {"ids", {2}, DType::kI64},
                                        {"c", {1}, DType::kF32}};
  SortForSafetensors(tensors);
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"ids":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[16,20]},)"
      R"("c":{"dtype":"F32","shape":[1],"data_offsets":[20,24]},)"
      R"("z":{"dtype":"BF16","shape":[2,2],"data_offsets":[24,32]},)"
      R"("b.weight":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[32,35]}})";
  const std::string text = SafetensorsHeaderText(tensors);
  EXPECT_EQ(text.size() % 8, 0u);
  EXPECT_EQ(text.substr(8, json.size()), json);
  EXPECT_EQ(text.find_first_not_of(' ', 8 + json.size()), std::string::npos);
  ASSERT_OK_AND_ASSIGN(const SafetensorsHeader header, Parse(text + std::string(35, '\0')));
  EXPECT_EQ(header.entries.size(), 5u);
}

TEST(Safetensors, OpensFilesAndNamesThemInErrors) {
  ScratchDirectory scratch;
  const std::string path = scratch.File("a.safetensors");
  EXPECT_THAT(SafetensorsFile::Open(path), HasStatus(kBad, path));
  std::string text = SafetensorsText(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2);
  text.back() = 'x';
  testing::WriteText(path, text);
  ASSERT_OK_AND_ASSIGN(const SafetensorsFile file, SafetensorsFile::Open(path));
  EXPECT_EQ(file.Data(1, 2)[0], 'x');
  EXPECT_EQ(file.HeaderBytes().size(), text.size() - 2);
}

}  // namespace
}  // namespace baleen
