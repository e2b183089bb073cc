// `baleen data build`: documents out of files, directories and jsonl; tokenizers; what the files
// hold; its faults.
#include "data/build.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/helper_process.h"
#include "data/inspect_tokens.h"
#include "data/token_source.h"
#include "tests/data/token_files.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using testing::HasStatus;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::OpenTokenSet;
using testing::ReadBytes;
using testing::TestDirectory;
using testing::WriteBytes;

std::vector<std::string> DecodedDocuments(const std::string& prefix) {
  const TokenSource source = OpenTokenSet(prefix);
  std::vector<std::string> texts;
  for (int64_t d = 0; d < source.num_documents(); ++d) {
    std::vector<int32_t> tokens(source.document_length(d));
    EXPECT_THAT(source.CopyTokens(source.document_begin(d), absl::MakeSpan(tokens)), IsOk());
    texts.push_back(DecodeBytes(tokens));
  }
  return texts;
}

class BuildTest : public ::testing::Test {
 protected:
  BuildOptions Options(const std::vector<std::string>& inputs) const {
    BuildOptions options;
    for (const std::string& input : inputs)
      options.documents.inputs.push_back(directory_.Path(input));
    options.prefix = directory_.Path("out/set");
    return options;
  }
  void Write(const std::string& name, absl::string_view text) const {
    WriteBytes(directory_.Path(name), text);
  }
  std::vector<std::string> Built() const { return DecodedDocuments(directory_.Path("out/set")); }
  TestDirectory directory_;
};

TEST(ByteTokenizer, LeavesIdsZeroAndOneFree) {
  EXPECT_THAT(EncodeBytes(absl::string_view("\0A\xff", 3)), ElementsAre(2, 67, 257));
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  EXPECT_EQ(DecodeBytes(EncodeBytes(all)), all);
  EXPECT_EQ(DecodeBytes({kByteBosId, 67, kByteEosId}), "A");
}

TEST(FindNonText, AcceptsUtf8AndFindsTheFirstBadByte) {
  EXPECT_EQ(FindNonText("plain"), -1);
  EXPECT_EQ(FindNonText("\xc3\xa4 \xe2\x82\xac \xf0\x9f\x90\x8b"), -1);
  EXPECT_EQ(FindNonText(absl::string_view("ab\0c", 4)), 2);
  EXPECT_EQ(FindNonText("a\xe4"), 1);             // Latin-1
  EXPECT_EQ(FindNonText("\xc0\x80"), 0);          // overlong
  EXPECT_EQ(FindNonText("\xe0\x9f\xbf"), 0);      // overlong
  EXPECT_EQ(FindNonText("\xed\xa0\x80"), 0);      // surrogate
  EXPECT_EQ(FindNonText("\xf4\x90\x80\x80"), 0);  // above U+10FFFF
  EXPECT_EQ(FindNonText("ok\xe2\x82"), 2);        // cut off
  EXPECT_EQ(FindNonText("\xf0\x9f\x90\x28"), 0);
}

TEST_F(BuildTest, TakesOneDocumentPerFileInTheOrderGiven) {
  Write("b.txt", "second");
  Write("a.txt", "first");
  ASSERT_OK_AND_ASSIGN(const BuildReport report, BuildTokens(Options({"b.txt", "a.txt"})));
  EXPECT_THAT(Built(), ElementsAre("second", "first"));
  EXPECT_EQ(report.num_documents, 2);
  EXPECT_EQ(report.num_tokens, 11);
  EXPECT_EQ(report.text_bytes, 11);
  EXPECT_EQ(report.type, TokenType::kUint16);
  EXPECT_THAT(Describe(report, "p"), HasSubstr("2 documents, 11 tokens (u16), vocabulary 258"));
}

TEST_F(BuildTest, AppendsTheEosIdToEveryDocument) {
  Write("a.txt", "hi");
  BuildOptions options = Options({"a.txt"});
  options.append_eod = true;
  ASSERT_THAT(BuildTokens(options), IsOk());
  std::vector<int32_t> tokens(3);
  ASSERT_THAT(OpenTokenSet(options.prefix).CopyTokens(0, absl::MakeSpan(tokens)), IsOk());
  EXPECT_THAT(tokens, ElementsAre('h' + 2, 'i' + 2, kByteEosId));
}

TEST_F(BuildTest, WalksDirectoriesInByteOrderAndLeavesOutWhatIsNoText) {
  Write("d/z.c", "z");
  Write("d/a/x.c", "ax");
  Write("d/B.c", "b");
  Write("d/empty.c", "");
  Write("d/binary", absl::string_view("\x7f\x45\0", 3));
  Write("d/latin1.txt", "\xe4");
  Write("d/large.c", std::string(100, 'x'));
  std::filesystem::create_symlink(directory_.Path("d/z.c"), directory_.Path("d/link.c"));
  BuildOptions options = Options({"d"});
  options.documents.max_file_bytes = 50;
  ASSERT_OK_AND_ASSIGN(const BuildReport report, BuildTokens(options));
  EXPECT_THAT(Built(), ElementsAre("b", "ax", "z"));
  EXPECT_EQ(report.files.files_read, 4);
  EXPECT_EQ(report.files.files_not_text, 2);
  EXPECT_EQ(report.files.files_too_large, 1);
  EXPECT_EQ(report.files.empty_documents, 1);
}

TEST_F(BuildTest, TakesOnlyTheEndingsAskedFor) {
  Write("d/a.h", "header");
  Write("d/a.c", "source");
  Write("d/a.o", "object");
  BuildOptions options = Options({"d"});
  options.documents.extensions = {".h", ".c"};
  ASSERT_THAT(BuildTokens(options), IsOk());
  EXPECT_THAT(Built(), ElementsAre("source", "header"));
}

TEST_F(BuildTest, JoinsTheFilesOfADirectoryBehindTheirPaths) {
  Write("d/b.c", "b\n");
  Write("d/c.c", "no newline");
  Write("d/a/x.c", "x\n");
  Write("d/bb/y.c", "y\n");
  BuildOptions options = Options({"d"});
  options.documents.document_per = DocumentPer::kDirectory;
  ASSERT_THAT(BuildTokens(options), IsOk());
  EXPECT_THAT(Built(),
              ElementsAre("// b.c\nb\n// c.c\nno newline\n", "// a/x.c\nx\n", "// bb/y.c\ny\n"));
}

TEST_F(BuildTest, ReadsJsonLines) {
  Write("a.jsonl",
        "{\"text\": \"one\\u00e4\"}\r\n\n{\"id\": 3, \"text\": \"two\"}\n{\"text\": \"\"}");
  ASSERT_OK_AND_ASSIGN(const BuildReport report, BuildTokens(Options({"a.jsonl"})));
  EXPECT_THAT(Built(), ElementsAre("one\xc3\xa4", "two"));
  EXPECT_EQ(report.files.empty_documents, 1);
}

TEST_F(BuildTest, NamesTheBadLineOfAJsonlAndWritesNothing) {
  const std::vector<std::pair<absl::string_view, const char*>> cases = {
      {"{\"text\": \"a\"}\n{\"text\": \n", "a.jsonl:2: expected one JSON object a line"},
      {"{\"text\": \"a\"}{\"text\": \"b\"}", "a.jsonl:1: expected one JSON object a line"},
      {"[1]", "a.jsonl:1: found array, expected an object with a string \"text\""},
      {"\n{\"txt\": \"a\"}", "a.jsonl:2: found object without a string \"text\""},
      {"{\"text\": 3}", "a.jsonl:1: found object without a string \"text\""},
      {"{\"text\": \"\xff\"}", "a.jsonl:1: expected one JSON object a line"},
  };
  for (const auto& [lines, message] : cases) {
    Write("a.jsonl", lines);
    EXPECT_THAT(BuildTokens(Options({"a.jsonl"})), HasStatus(StatusCode::kDataLoss, message));
    EXPECT_TRUE(std::filesystem::is_empty(directory_.Path("out")));
  }
}

TEST_F(BuildTest, RefusesInputsItCannotUse) {
  EXPECT_THAT(BuildTokens(Options({})), HasStatus(StatusCode::kInvalidArgument, "no input given"));
  EXPECT_THAT(BuildTokens(Options({"none.txt"})),
              HasStatus(StatusCode::kDataLoss, "none.txt: cannot open"));
  Write("latin1.txt",
        "Gr\xfc\xdf"
        "e");
  EXPECT_THAT(
      BuildTokens(Options({"latin1.txt"})),
      HasStatus(StatusCode::kDataLoss, "latin1.txt: byte 2: found 0xfc, expected UTF-8 text"));
  std::filesystem::create_directory(directory_.Path("d"));
  EXPECT_THAT(BuildTokens(Options({"d"})),
              HasStatus(StatusCode::kDataLoss, "no document found in the inputs"));
  BuildOptions options = Options({"latin1.txt"});
  options.prefix = "";
  EXPECT_THAT(BuildTokens(options), HasStatus(StatusCode::kInvalidArgument, "--to"));
}

TEST_F(BuildTest, ASetThatExistsIsNotReplaced) {
  Write("a.txt", "hello");
  const BuildOptions options = Options({"a.txt"});
  ASSERT_THAT(BuildTokens(options), IsOk());
  for (const char* suffix : {".bin", ".idx", ".json"}) {
    const std::string part = options.prefix + suffix;
    const std::string before = ReadBytes(part);
    EXPECT_THAT(BuildTokens(options),
                HasStatus(StatusCode::kInvalidArgument,
                          absl::StrCat(part, " exists; nothing is overwritten")));
    EXPECT_EQ(ReadBytes(part), before);
    std::filesystem::remove(part);
  }
  EXPECT_THAT(BuildTokens(options), IsOk());
}

TEST_F(BuildTest, RecordsHowTheSetWasMade) {
  Write("a.txt", "hello");
  BuildOptions options = Options({"a.txt"});
  options.append_eod = true;
  ASSERT_OK_AND_ASSIGN(const BuildReport report, BuildTokens(options));
  const auto record = nlohmann::json::parse(ReadBytes(options.prefix + ".json"));
  EXPECT_EQ(record["format"], "baleen-tokens");
  EXPECT_EQ(record["version"], 1);
  EXPECT_EQ(record["tokenizer"], "bytes");
  EXPECT_EQ(record["vocab_size"], 258);
  EXPECT_EQ(record["eos_id"], 1);
  EXPECT_EQ(record["append_eod"], true);
  EXPECT_EQ(record["documents"], 1);
  EXPECT_EQ(record["tokens"], 6);
  EXPECT_EQ(record["source_hash"], report.source_hash);
  Write("a.txt", "hellO");
  options.prefix = directory_.Path("out/other");
  ASSERT_OK_AND_ASSIGN(const BuildReport other, BuildTokens(options));
  EXPECT_NE(other.source_hash, report.source_hash);
}

// A Python whose site packages hold only what the test wrote: a stand-in for tokenizers, or
// nothing.
class HelperTest : public BuildTest {
 protected:
  void SetUp() override {
    if (std::system("python3 -c '' 2>/dev/null") != 0) GTEST_SKIP() << "no python3";
    Write("python", absl::StrCat("#!/bin/sh\nPYTHONPATH=", directory_.Path("site"),
                                 " exec python3 -S \"$@\"\n"));
    std::filesystem::permissions(directory_.Path("python"), std::filesystem::perms::owner_all);
    Write("tokenizer.json", "{}");
    Write("a.txt", "a\xc3\xa4<e>");
  }
  // One id a character: its code point + 1000; "<e>" is id 3.
  void InstallStandIn() const {
    Write("site/tokenizers.py",
          "class Encoding:\n"
          "    def __init__(self, ids): self.ids = ids\n"
          "class Tokenizer:\n"
          "    @staticmethod\n"
          "    def from_file(path):\n"
          "        if 'bad' in path: raise Exception('no model')\n"
          "        return Tokenizer()\n"
          "    def get_vocab(self, with_added_tokens): return {'<e>': 3, 'x': 70000}\n"
          "    def token_to_id(self, text): return 3 if text == '<e>' else None\n"
          "    def encode_batch(self, texts, add_special_tokens):\n"
          "        assert self.encode_special_tokens and not add_special_tokens\n"
          "        return [Encoding([1000 + ord(c) for c in text]) for text in texts]\n");
  }
  BuildOptions HelperOptions() const {
    BuildOptions options = Options({"a.txt"});
    options.tokenizer = {.tokenizer = directory_.Path("tokenizer.json"),
                         .python = directory_.Path("python")};
    return options;
  }
};

TEST_F(HelperTest, TokenisesThroughPython) {
  InstallStandIn();
  BuildOptions options = HelperOptions();
  options.append_eod = true;
  options.tokenizer.eod_token = "<e>";
  ASSERT_OK_AND_ASSIGN(const BuildReport report, BuildTokens(options));
  EXPECT_EQ(report.type, TokenType::kInt32);
  EXPECT_EQ(report.tokenizer.vocab_size, 70001);
  EXPECT_EQ(report.tokenizer.eos_id, 3);
  EXPECT_EQ(report.tokenizer.sha256,
            "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");  // of "{}"
  std::vector<int32_t> tokens(6);
  ASSERT_THAT(OpenTokenSet(options.prefix).CopyTokens(0, absl::MakeSpan(tokens)), IsOk());
  EXPECT_THAT(tokens, ElementsAre(1000 + 'a', 1000 + 0xe4, 1000 + '<', 1000 + 'e', 1000 + '>', 3));
}

TEST_F(HelperTest, FindsTheEosTokenInTheConfigBesideTheTokenizer) {
  InstallStandIn();
  Write("tokenizer_config.json", "{\"eos_token\": {\"content\": \"<e>\"}}");
  BuildOptions options = HelperOptions();
  options.append_eod = true;
  ASSERT_OK_AND_ASSIGN(const BuildReport report, BuildTokens(options));
  EXPECT_EQ(report.tokenizer.eos_id, 3);
  EXPECT_EQ(report.tokenizer.bos_id, -1);
}

TEST_F(HelperTest, SaysWhatToInstallOrToGive) {
  EXPECT_THAT(BuildTokens(HelperOptions()),
              HasStatus(StatusCode::kFailedPrecondition, "-m pip install tokenizers"));
  InstallStandIn();
  BuildOptions options = HelperOptions();
  options.append_eod = true;
  EXPECT_THAT(BuildTokens(options),
              HasStatus(StatusCode::kInvalidArgument, "name it with --eod-token"));
  options.tokenizer.eod_token = "<none>";
  EXPECT_THAT(BuildTokens(options),
              HasStatus(StatusCode::kDataLoss, "'<none>' is not in the vocabulary"));
  Write("bad.json", "{}");
  options.tokenizer.tokenizer = directory_.Path("bad.json");
  EXPECT_THAT(BuildTokens(options),
              HasStatus(StatusCode::kDataLoss, "bad.json: not a tokenizer.json"));
  options.tokenizer.tokenizer = directory_.Path("missing.json");
  EXPECT_THAT(BuildTokens(options),
              HasStatus(StatusCode::kDataLoss, "missing.json: no such tokenizer"));
  options = HelperOptions();
  options.tokenizer.python = "/nonexistent/python";
  EXPECT_THAT(BuildTokens(options),
              HasStatus(StatusCode::kFailedPrecondition, "apt-get install python3"));
  options.tokenizer.python = "true";  // ends at once, says nothing
  EXPECT_THAT(BuildTokens(options),
              HasStatus(StatusCode::kFailedPrecondition, "ended without an answer"));
}

TEST_F(HelperTest, AHelperThatDiesBetweenDocumentsIsAnError) {
  InstallStandIn();
  Write("site/tokenizers.py", ReadBytes(directory_.Path("site/tokenizers.py")) +
                                  "    def encode_batch(self, texts, add_special_tokens):\n"
                                  "        import os\n"
                                  "        os._exit(7)\n");
  EXPECT_THAT(BuildTokens(HelperOptions()),
              HasStatus(StatusCode::kFailedPrecondition, "ended without an answer"));
  EXPECT_TRUE(std::filesystem::is_empty(directory_.Path("out")));
}

TEST(HelperProcess, SendingToAChildThatHasEndedIsAnErrorAndNoSigpipe) {
  ASSERT_OK_AND_ASSIGN(const auto child, HelperProcess::Start({"true"}));
  EXPECT_THAT(child->ReceiveLine(100),  // waits for its end
              HasStatus(StatusCode::kFailedPrecondition, "ended without an answer"));
  EXPECT_THAT(child->Send("request"),
              HasStatus(StatusCode::kFailedPrecondition, "true: ended early: Broken pipe"));
}

TEST_F(BuildTest, InspectReportsLengthsIdsAndDocumentEnds) {
  Write("a.txt", "abc");
  Write("b.txt", std::string(100, 'z'));
  BuildOptions options = Options({"a.txt", "b.txt"});
  options.append_eod = true;
  ASSERT_THAT(BuildTokens(options), IsOk());
  ASSERT_OK_AND_ASSIGN(const std::string text,
                       InspectTokens(options.prefix + ".idx", TokenScan::kAllTokens));
  EXPECT_EQ(text,
            absl::StrCat(options.prefix, ": token file (Megatron u16)\n",
                         "tokenizer   bytes\n"
                         "vocabulary  258\n"
                         "documents   2\n"
                         "tokens      105\n"
                         "ids         1 to 124\n"
                         "eos         id 1 ends 2 of 2 documents, stands inside them 0 times\n"
                         "length      4 to 101 tokens, mean 52.5\n"
                         "\n"
                         "  length in tokens        documents          tokens\n"
                         "          4 .. 7                  1               4  #\n"
                         "         64 .. 127                1             101  ",
                         std::string(40, '#'), "\n"));
  ASSERT_OK_AND_ASSIGN(const std::string index_only,
                       InspectTokens(options.prefix, TokenScan::kIndexOnly));
  EXPECT_THAT(index_only, ::testing::Not(HasSubstr("ids")));
}

TEST_F(BuildTest, InspectFindsWhatDisagreesWithTheRecord) {
  Write("a.txt", "abc");
  const BuildOptions options = Options({"a.txt"});
  ASSERT_THAT(BuildTokens(options), IsOk());
  const std::string record = ReadBytes(options.prefix + ".json");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = record;
    changed.replace(changed.find(from), from.size(), to);
    WriteBytes(options.prefix + ".json", changed);
    return InspectTokens(options.prefix, TokenScan::kAllTokens);
  };
  EXPECT_THAT(with("\"tokens\": 3", "\"tokens\": 4"),
              HasStatus(StatusCode::kDataLoss, "tokens: found 4, but the token files hold 3"));
  EXPECT_THAT(with("258", "50"), HasStatus(StatusCode::kDataLoss, "document 0, token 0"));
  EXPECT_THAT(with("258", "\"x\""),
              HasStatus(StatusCode::kDataLoss, "vocab_size: expected a whole number"));
  EXPECT_THAT(with("{", "["), HasStatus(StatusCode::kDataLoss, "expected a JSON object"));
}

}  // namespace
}  // namespace baleen
