// Text that is not the YAML we accept: hostile, doubled, mis-encoded. Each case names place and
// fault.
#include <gmock/gmock.h>

#include <ctime>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/configs/run_texts.h"

namespace baleen {
namespace {

using testing::Edited;
using ::testing::HasSubstr;
using testing::kGoodRun;
using testing::RunError;

struct Case {
  std::string text;
  std::vector<std::string> parts;  // of the message
};

void ExpectErrors(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text.substr(0, 300));
    const std::string error = RunError(c.text);
    for (const std::string& part : c.parts) EXPECT_THAT(error, HasSubstr(part));
    EXPECT_THAT(error, HasSubstr("Nothing was started."));
  }
}

std::string Repeat(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

// Nine references a level: a walk over shared nodes would visit 9^7 of them.
std::string AliasBomb() {
  std::string text = "a: &a [x, x, x, x, x, x, x, x, x]\n";
  for (char c = 'b'; c <= 'h'; ++c) {
    const std::string before = absl::StrCat("*", std::string(1, c - 1));
    text += absl::StrCat(std::string(1, c), ": &", std::string(1, c), " [", before,
                         Repeat(", " + before, 8), "]\n");
  }
  return text;
}

std::string KeyFlood(int keys) {
  std::string text = kGoodRun;
  for (int i = 0; i < keys; ++i) absl::StrAppend(&text, "k", i, ": 1\n");
  return text;
}

TEST(BrokenYaml, AliasesAnchorsTagsAndMergeKeysAreRefusedByName) {
  ExpectErrors({
      {AliasBomb(), {"run.yaml:1:4: error: an anchor", "run.yaml:2:8: error: an alias (*name)"}},
      {"a: &a [1, *a]\n", {"run.yaml:1:4: error: an anchor", "run.yaml:1:11: error: an alias"}},
      {"a: *nowhere\n", {"run.yaml:1:4: error: an alias"}},
      {Edited("steps: 10", "steps: !!int 10"),
       {"run.yaml:12:12: error: a tag ('tag:yaml.org,2002:int')"}},
      {Edited("steps: 10", "steps: !!python/object:os.system 10"), {"12:12: error: a tag"}},
      {Edited("{tensor: 2}", "{<<: {expert: 2}, tensor: 2}"), {"3:15: error: a merge key (<<)"}},
      {Edited("steps: 10", "steps: ! 10"), {"12:12: error: a tag ('!')"}},
      {Edited("{tensor: 2}", "&p {tensor: 2}"), {"3:14: error: an anchor (&name)"}},
  });
}

TEST(BrokenYaml, RepeatedKeysNameBothLines) {
  ExpectErrors({
      {Edited("", "micro_batch_size: 2\n"),
       {"run.yaml:17:1: error: key 'micro_batch_size' is repeated; it was given in line 7 already",
        "   17 | micro_batch_size: 2", "^^^^^^^^^^^^^^^^"}},
      {Edited("    steps: 10", "    steps: 10\n    steps: 11"),
       {"13:5: error: key 'steps' is repeated; it was given in line 12"}},
      {Edited("{tensor: 2}", "{tensor: 2, \"tensor\": 3}"),
       {"3:26: error: key 'tensor' is repeated"}},
  });
}

TEST(BrokenYaml, OneDocumentOfWordsIsAllThereMayBe) {
  ExpectErrors({
      {Edited("", "---\na: 1\n"), {"17:1: error: a second document begins here"}},
      {Edited("", "...\n---\na: 1\n---\nb: 2\n---\n"), {"18:1: error: a second document"}},
      {std::string("%YAML 1.2\n---\n") + kGoodRun, {"1:1: error: a line that begins with %"}},
      {Edited("", "? [x, y]\n: 3\n"), {"17:3: error: a key must be a word, found a list"}},
      {Edited("", "{a: 1}: 3\n"), {"17:1: error: a key must be a word, found a section"}},
      {"", {"run.yaml:1:1: error: expected sections, found nothing"}},
      {"# only a comment\n", {"expected sections, found nothing"}},
      {"- a\n- b\n", {"run.yaml:1:1: error: expected sections, found a list"}},
      {"just words\n", {"expected sections, found 'just words'"}},
  });
}

TEST(BrokenYaml, SyntaxErrorsHaveLineColumnAndCaret) {
  ExpectErrors({
      {Edited("{tensor: 2}", "{tensor: 2"), {"error: not YAML: ", "inside what begins in line 3"}},
      {"run: {name: a\n",
       {"run.yaml:1:14: error: not YAML: end of map flow not found", "    1 | run: {name: a\n",
        "begins in line 1"}},
      {"a: b: c\n",
       {"run.yaml:1:5: error: not YAML: illegal map value", "    1 | a: b: c\n      |     ^"}},
      {Edited("steps: 10", "steps: \"10"), {"12:12: error: a quote that does not end"}},
      {Edited("", "dsa: {kernel: 'auto\n"), {"17:15: error: a quote that does not end"}},
      {Edited("", "checkpoint: {resume: \"a\\\"}\n"), {"17:22: error: a quote that does not end"}},
      {"a: @b\n", {"1:4: error: not YAML: unknown token"}},
  });
}

TEST(BrokenYaml, BytesThatAreNoPlainTextAreNamed) {
  ExpectErrors({
      {Edited("    steps: 10", "\tsteps: 10"), {"12:1: error: a tab in the indentation"}},
      {Edited("    steps: 10", "  \t  steps: 10"), {"12:3: error: a tab in the indentation"}},
      {Edited("name: test", "name: t\xff"), {"1:14: error: byte 0xff is not UTF-8"}},
      {Edited("name: test", "name: \xc0\xaf"), {"1:13: error: byte 0xc0 is not UTF-8"}},
      {Edited("name: test", "name: \xed\xa0\x80"), {"byte 0xed is not UTF-8"}},
      {Edited("name: test", "name: \x1b[31m"),
       {"1:13: error: control character 0x1b", "\\x1b[31m"}},
      {Edited("name: test", "name: \xc2\x9b"), {"control character 0x9b", "\\xc2"}},
      {Edited("micro_batch_size", std::string("mi\0cro", 6)),
       {"7:3: error: control character 0x00"}},
      {Edited("data:\n", "data:\r"), {"4:6: error: a carriage return inside a line"}},
      {Edited("data:\n", "data:\n\xEF\xBB\xBF"), {"5:1: error: a byte order mark"}},
      {std::string("\xFF\xFEr\0u\0n\0", 8), {"1:1: error: the file is UTF-16"}},
  });
}

TEST(BrokenYaml, HostileSizesEndQuicklyWithOneSentence) {
  const std::clock_t start = std::clock();  // CPU time: the machine may be busy
  ExpectErrors({
      {Repeat("[", 33) + Repeat("]", 33), {"1:33: error: nested more than 32 deep"}},
      {Repeat("[", 1000), {"error: nested more than 32 deep"}},
      {Repeat("{a: ", 200000), {"nested more than 32 deep"}},
      {Repeat("- ", 500000), {"nested more than 32 deep"}},
      {Repeat("? ", 500000), {"error: "}},
      {"a: [" + Repeat("1,", 60000) + "1]\n", {"error: more than 50000 values"}},
      {KeyFlood(10000),
       {"unknown key 'k0' at the top level", "... and 9950 more", "10000 errors."}},
      {"stages: [" + Repeat("{},", 40000) + "{}]\n",
       {"stages: expected a list of 1 to 100 sections, found a list of 40001"}},
      {Edited("[{path: data/a}]", absl::StrCat("[", Repeat("{path: a},", 9999), "{}]")),
       {"missing key 'path' in data.train[9999]"}},
      {KeyFlood(60000), {"error: more than 50000 values"}},
      {"a: \"" + Repeat("x", 1 << 20) + "\"\n",
       {"run.yaml: error: expected at most 1048576 bytes (1 MiB), found 1048582"}},
  });
  EXPECT_LT(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC, 20) << "seconds, all cases";
}

TEST(BrokenYaml, LongLinesAreShownAroundTheFault) {
  const std::string error = RunError("a: [" + Repeat("1, ", 1000) + "*x]\n");
  EXPECT_THAT(error, HasSubstr("run.yaml:1:3005: error: an alias"));
  EXPECT_THAT(error, HasSubstr("    1 | ..."));
  EXPECT_LT(error.size(), 500u);
}

TEST(BrokenYaml, CaretStandsUnderTheCharacterNotTheByte) {
  EXPECT_THAT(RunError("größe: {ä: 1}\n"), HasSubstr("    1 | größe: {ä: 1}\n      | ^^^^^\n"));
  EXPECT_THAT(RunError("ä: *ö\n"), HasSubstr("    1 | ä: *ö\n      |    ^"));
}

TEST(YamlText, ByteOrderMarkCrlfAndTabsBetweenValuesAreFine) {
  const std::string crlf = absl::StrReplaceAll(kGoodRun, {{"\n", "\r\n"}});
  EXPECT_EQ(RunError("\xEF\xBB\xBF" + crlf), "");
  EXPECT_EQ(RunError(Edited("micro_batch_size: 2", "micro_batch_size:\t2\t# two")), "");
  EXPECT_EQ(RunError(Edited("data:\n", "data:\n\t\n\t# a comment after a tab\n")), "");
  EXPECT_EQ(RunError(std::string("---\n") + kGoodRun + "...\n"), "");
}

}  // namespace
}  // namespace baleen
