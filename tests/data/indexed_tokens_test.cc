// Megatron's .bin/.idx: exact bytes, sound sets of each type, and everything an .idx or .bin can
// get wrong.
#include "data/indexed_tokens.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <limits>

#include "data/indexed_tokens_writer.h"
#include "data/token_source.h"
#include "tests/data/token_files.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using absl::StatusCode;
using testing::HasStatus;
using testing::IndexOf;
using testing::IsOk;
using testing::OpenTokenSet;
using testing::RawIndex;
using testing::ReadBytes;
using testing::TestDirectory;
using testing::WriteBytes;
using testing::WriteTokenSet;

std::vector<int32_t> Copy(const TokenSource& source, int64_t begin, int64_t count) {
  std::vector<int32_t> out(count);
  EXPECT_THAT(source.CopyTokens(begin, absl::MakeSpan(out)), IsOk());
  return out;
}

// Three documents, [5, 6, 7], [], [70000]: the bytes Megatron's builder writes for them with dtype
// int32.
constexpr absl::string_view kHandWrittenIdx(
    "MMIDIDX\0\0"                                                              // magic
    "\x01\0\0\0\0\0\0\0"                                                       // version
    "\x04"                                                                     // i32
    "\x03\0\0\0\0\0\0\0"                                                       // sequences
    "\x04\0\0\0\0\0\0\0"                                                       // document indices
    "\x03\0\0\0\0\0\0\0\x01\0\0\0"                                             // lengths
    "\0\0\0\0\0\0\0\0\x0c\0\0\0\0\0\0\0\x0c\0\0\0\0\0\0\0"                     // byte offsets
    "\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0",  // documents
    34 + 12 + 24 + 32);
constexpr absl::string_view kHandWrittenBin("\x05\0\0\0\x06\0\0\0\x07\0\0\0\x70\x11\x01\0", 16);

TEST(IndexedTokens, ReadsBytesWrittenByHand) {
  const TestDirectory directory;
  WriteBytes(directory.Path("set.idx"), kHandWrittenIdx);
  WriteBytes(directory.Path("set.bin"), kHandWrittenBin);
  const TokenSource source = OpenTokenSet(directory.Path("set"));
  EXPECT_EQ(source.Format(), "Megatron i32");
  ASSERT_EQ(source.num_documents(), 3);
  EXPECT_EQ(source.num_tokens(), 4);
  EXPECT_EQ(source.document_length(0), 3);
  EXPECT_EQ(source.document_length(1), 0);
  EXPECT_EQ(source.document_length(2), 1);
  EXPECT_EQ(Copy(source, 0, 4), (std::vector<int32_t>{5, 6, 7, 70000}));
  EXPECT_EQ(source.DocumentOf(2), 0);
  EXPECT_EQ(source.DocumentOf(3), 2);
}

TEST(IndexedTokens, WritesTheBytesOfMegatronsBuilder) {
  const TestDirectory directory;
  WriteTokenSet(directory.Path("new/set"), {{5, 6, 7}, {}, {70000}});
  EXPECT_EQ(ReadBytes(directory.Path("new/set.idx")), kHandWrittenIdx);
  EXPECT_EQ(ReadBytes(directory.Path("new/set.bin")), kHandWrittenBin);
  int entries = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory.Path("new"))) {
    entries += entry.exists();
  }
  EXPECT_EQ(entries, 2) << "temporary files stayed behind";
}

TEST(IndexedTokens, KeepsIdsOfEveryTypeAndReadsAnyPathOfTheSet) {
  const TestDirectory directory;
  const testing::Documents documents = {{0, 255}, {7}};
  for (const TokenType type : {TokenType::kUint8, TokenType::kUint16, TokenType::kInt32}) {
    const std::string prefix = directory.Path(TokenTypeName(type));
    WriteTokenSet(prefix, documents, type);
    EXPECT_EQ(std::filesystem::file_size(prefix + ".bin"), 3 * TokenBytes(type));
    for (const char* ending : {"", ".bin", ".idx"}) {
      const TokenSource source = OpenTokenSet(prefix + ending);
      EXPECT_EQ(Copy(source, 0, 3), (std::vector<int32_t>{0, 255, 7}));
      EXPECT_EQ(Copy(source, 1, 1), (std::vector<int32_t>{255}));
    }
  }
  WriteTokenSet(directory.Path("large"), {{65535, 1}}, TokenType::kUint16);
  EXPECT_EQ(Copy(OpenTokenSet(directory.Path("large")), 0, 2), (std::vector<int32_t>{65535, 1}));
}

TEST(IndexedTokens, ReadsDocumentsOfSeveralSequencesAndEmptyOnesAtTheEnd) {
  const TestDirectory directory;
  RawIndex index = IndexOf({1, 2, 3});
  index.documents = {0, 0, 2, 3, 3};  // empty, two sequences, one sequence, empty
  index.num_indices = 5;
  WriteBytes(directory.Path("set.idx"), index.Bytes());
  WriteBytes(directory.Path("set.bin"), std::string(24, '\1'));
  const TokenSource source = OpenTokenSet(directory.Path("set"));
  ASSERT_EQ(source.num_documents(), 4);
  const std::vector<int64_t> expected = {0, 0, 3, 6, 6};
  for (int64_t d = 0; d <= 4; ++d) EXPECT_EQ(source.document_begin(d), expected[d]) << d;
}

TEST(IndexedTokens, AcceptsAnEmptySet) {
  const TestDirectory directory;
  WriteTokenSet(directory.Path("set"), {});
  const TokenSource source = OpenTokenSet(directory.Path("set"));
  EXPECT_EQ(source.num_documents(), 0);
  EXPECT_EQ(source.num_tokens(), 0);
}

struct BrokenSet {
  const char* name;
  std::function<void(RawIndex&)> breakage;  // of the index of documents of 2, 0 and 3 tokens
  const char* message;
  size_t bin_bytes = 20;
  size_t cut_bytes = 0;  // from the end of the .idx
};

std::vector<BrokenSet> BrokenSets() {
  const auto keep = [](RawIndex&) {};
  constexpr uint64_t kHuge = uint64_t{1} << 63;
  return {
      {"empty_idx", [](RawIndex& x) { x = RawIndex{.magic = ""}; },
       "the file has 0 bytes, expected at least a header of 34", 20, 25},
      {"half_a_header", [](RawIndex& x) { x = RawIndex(); }, "has 33 bytes, expected at least", 20,
       1},
      {"other_magic", [](RawIndex& x) { x.magic[0] = 'T'; }, "bytes 0-8: expected the magic"},
      {"version_2", [](RawIndex& x) { x.version = 2; }, "version at byte 9: found 2, expected 1"},
      {"big_endian", [](RawIndex& x) { x.version = uint64_t{1} << 56; }, "found 72057594037927936"},
      {"type_0", [](RawIndex& x) { x.type = 0; },
       "found 0 (no type of the format), expected 1 (u8)"},
      {"type_i64", [](RawIndex& x) { x.type = 5; }, "type code at byte 17: found 5 (i64)"},
      {"type_f32", [](RawIndex& x) { x.type = 7; }, "found 7 (f32)"},
      {"type_200", [](RawIndex& x) { x.type = 200; }, "found 200"},
      {"sequences_2_63", [](RawIndex& x) { x.num_sequences = kHuge; },
       "sequence count at byte 18: found 9223372036854775808, but 68 bytes after the header hold "
       "at most 5"},
      {"sequences_2_64", [](RawIndex& x) { x.num_sequences = ~uint64_t{0}; },
       "found 18446744073709551615"},
      {"sequences_wrap", [](RawIndex& x) { x.num_sequences = kHuge / 4 + 3; },
       "found 2305843009213693955"},
      {"documents_2_63", [](RawIndex& x) { x.num_indices = kHuge; },
       "document index count at byte 26: found 9223372036854775808, but 3 sequences leave room for "
       "at most 4"},
      {"documents_wrap", [](RawIndex& x) { x.num_indices = kHuge / 4 + 4; },
       "found 2305843009213693956"},
      {"no_documents",
       [](RawIndex& x) {
         x.num_indices = 0;
         x.documents.clear();
       },
       "found 0, expected documents + 1"},
      {"idx_cut", keep, "3 sequences leave room for at most 3", 20, 1},
      {"idx_longer", [](RawIndex& x) { x.tail = "ab"; },
       "has 104 bytes, expected 102 for 3 sequences"},
      {"multimodal", [](RawIndex& x) { x.tail = std::string(3, '\0'); }, "a multimodal set"},
      {"negative_length", [](RawIndex& x) { x.lengths[2] = -3; },
       "length of sequence 2: found -3, expected 0 or more"},
      {"negative_pointer", [](RawIndex& x) { x.pointers[1] = -8; },
       "byte offset of sequence 1: found -8, expected 8"},
      {"overlap", [](RawIndex& x) { x.pointers[2] = 4; },
       "byte offset of sequence 2: found 4, expected 8"},
      {"hole", [](RawIndex& x) { x.pointers[2] = 12; },
       "byte offset of sequence 2: found 12, expected 8"},
      {"pointer_outside", [](RawIndex& x) { x.pointers[2] = std::numeric_limits<int64_t>::max(); },
       "found 9223372036854775807, expected 8"},
      {"length_outside", [](RawIndex& x) { x.lengths[2] = std::numeric_limits<int32_t>::max(); },
       "sequence 2 ends at byte 8589934596, but "},
      {"first_document", [](RawIndex& x) { x.documents[0] = 1; },
       "document index 0: found sequence 1, expected 0"},
      {"documents_fall",
       [](RawIndex& x) {
         x.documents = {0, 2, 1, 3};
       },
       "document index 2: found sequence 1, expected one from 2 to 3"},
      {"document_negative", [](RawIndex& x) { x.documents[1] = -1; },
       "document index 1: found sequence -1"},
      {"document_outside", [](RawIndex& x) { x.documents[3] = 4; },
       "document index 3: found sequence 4, expected one from 2 to 3"},
      {"last_document", [](RawIndex& x) { x.documents[3] = 2; },
       "last document index (3): found sequence 2, expected 3, the sequence count"},
      {"odd_bin", keep, "the file has 19 bytes, expected a multiple of 4 (i32 tokens", 19},
      {"bin_short", keep, "sequence 2 ends at byte 20, but ", 16},
      {"bin_long", keep, "the file has 24 bytes, expected 20 as ", 24},
      {"bin_empty", keep, "sequence 0 ends at byte 8, but ", 0},
      {"bin_of_u16", [](RawIndex& x) { x.type = 8; },
       "byte offset of sequence 1: found 8, expected 4"},
  };
}

TEST(IndexedTokens, RefusesEveryBrokenSetAndNamesTheEntry) {
  const TestDirectory directory;
  for (const BrokenSet& broken : BrokenSets()) {
    RawIndex index = IndexOf({2, 0, 3});
    broken.breakage(index);
    const std::string prefix = directory.Path(broken.name);
    std::string bytes = index.Bytes();
    bytes.resize(bytes.size() - broken.cut_bytes);
    WriteBytes(prefix + ".idx", bytes);
    WriteBytes(prefix + ".bin", std::string(broken.bin_bytes, '\0'));
    const auto source = TokenSource::Open(prefix);
    EXPECT_THAT(source, HasStatus(StatusCode::kDataLoss, broken.message)) << broken.name;
    EXPECT_THAT(source, HasStatus(StatusCode::kDataLoss, prefix)) << broken.name;
  }
}

TEST(IndexedTokens, NamesWhatIsMissingOrNoFile) {
  const TestDirectory directory;
  EXPECT_THAT(TokenSource::Open(directory.Path("none")),
              HasStatus(StatusCode::kDataLoss, "none: no token file of this name: expected "));
  WriteTokenSet(directory.Path("a"), {{1}});
  std::filesystem::remove(directory.Path("a.bin"));
  EXPECT_THAT(TokenSource::Open(directory.Path("a")),
              HasStatus(StatusCode::kDataLoss, "a.bin: cannot open"));
  std::filesystem::create_directory(directory.Path("a.bin"));
  EXPECT_THAT(TokenSource::Open(directory.Path("a")),
              HasStatus(StatusCode::kDataLoss, "expected a regular file"));
}

TEST(IndexedTokens, FindsAPairOfTwoDifferentSets) {
  const TestDirectory directory;
  WriteTokenSet(directory.Path("a"), {{1, 2}, {3}});
  WriteTokenSet(directory.Path("b"), {{1, 2}, {3, 4, 5}});
  std::filesystem::rename(directory.Path("b.bin"), directory.Path("a.bin"));
  EXPECT_THAT(TokenSource::Open(directory.Path("a")),
              HasStatus(StatusCode::kDataLoss, "the file has 20 bytes, expected 12 as "));
}

TEST(IndexedTokens, VocabularyCheckNamesFileDocumentAndOffset) {
  const TestDirectory directory;
  WriteTokenSet(directory.Path("set"), {{1, 2}, {}, {3, 99, 4}, {5}});
  const TokenSource source = OpenTokenSet(directory.Path("set"));
  EXPECT_THAT(source.CheckVocabulary(100), IsOk());
  EXPECT_THAT(
      source.CheckVocabulary(99),
      HasStatus(StatusCode::kDataLoss,
                "set: document 2, token 1 (token 3 of the file): found id 99, expected 0 to 98"));
  // A negative id is outside every vocabulary.
  std::string bytes = ReadBytes(directory.Path("set.bin"));
  bytes[3] = '\xff';
  WriteBytes(directory.Path("set.bin"), bytes);
  EXPECT_THAT(OpenTokenSet(directory.Path("set")).CheckVocabulary(int64_t{1} << 40),
              HasStatus(StatusCode::kDataLoss,
                        "document 0, token 0 (token 0 of the file): found id -16777215"));
}

TEST(IndexedTokens, ATruncatedFileIsAnErrorAndNoSigbus) {
  const TestDirectory directory;
  const std::vector<int32_t> document(5000, 1);  // five pages
  for (const char* ending : {".bin", ".idx"}) {
    WriteTokenSet(directory.Path("set"), {document});
    const TokenSource source = OpenTokenSet(directory.Path("set"));
    EXPECT_THAT(source.CheckUnchanged(), IsOk());
    std::filesystem::resize_file(directory.Path("set") + ending, 0);
    EXPECT_THAT(source.CheckUnchanged(), HasStatus(StatusCode::kDataLoss, "while it was in use"));
  }
  WriteTokenSet(directory.Path("set"), {document});
  const TokenSource source = OpenTokenSet(directory.Path("set"));
  std::filesystem::resize_file(directory.Path("set.bin"), 8192);
  std::vector<int32_t> out(5000);
  EXPECT_THAT(source.CopyTokens(0, absl::MakeSpan(out)),
              HasStatus(StatusCode::kDataLoss, "the file ends at byte 8192, expected 20000 bytes"));
}

TEST(IndexedTokens, AReplacedOrRemovedFileIsFound) {
  const TestDirectory directory;
  for (const char* ending : {".bin", ".idx"}) {
    WriteTokenSet(directory.Path("set"), {{1, 2, 3}});
    WriteTokenSet(directory.Path("other"), {{3, 2, 1}});
    const TokenSource source = OpenTokenSet(directory.Path("set"));
    std::filesystem::rename(directory.Path("other") + ending, directory.Path("set") + ending);
    EXPECT_THAT(source.CheckUnchanged(), HasStatus(StatusCode::kDataLoss, "replaced"));
    std::filesystem::remove(directory.Path("set") + ending);
    EXPECT_THAT(source.CheckUnchanged(), HasStatus(StatusCode::kDataLoss, ending));
  }
}

TEST(IndexedTokensWriter, RefusesIdsThatDoNotFitAndLeavesNothingBehind) {
  const TestDirectory directory;
  {
    ASSERT_OK_AND_ASSIGN(auto writer,
                         IndexedTokensWriter::Create(directory.Path("set"), TokenType::kUint16));
    EXPECT_THAT(writer.AddDocument(std::vector<int32_t>{1, 65536}),
                HasStatus(StatusCode::kDataLoss,
                          "document 0, token 1: found id 65536, expected 0 to 65535 (u16)"));
    EXPECT_THAT(writer.AddDocument(std::vector<int32_t>{-1}),
                HasStatus(StatusCode::kDataLoss, "found id -1"));
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.Path(".")));
}

TEST(IndexedTokensWriter, AnUnfinishedWriterLeavesTheOldSetAsItWas) {
  const TestDirectory directory;
  WriteTokenSet(directory.Path("set"), {{1, 2, 3}});
  const std::string idx = ReadBytes(directory.Path("set.idx"));
  {
    ASSERT_OK_AND_ASSIGN(auto writer,
                         IndexedTokensWriter::Create(directory.Path("set"), TokenType::kInt32));
    ASSERT_THAT(writer.AddDocument(std::vector<int32_t>{9}), IsOk());
  }
  EXPECT_EQ(ReadBytes(directory.Path("set.idx")), idx);
  EXPECT_EQ(Copy(OpenTokenSet(directory.Path("set")), 0, 3), (std::vector<int32_t>{1, 2, 3}));
}

TEST(IndexedTokensWriter, ChoosesTheTypeAsMegatronDoes) {
  EXPECT_EQ(TokenTypeForVocabulary(258), TokenType::kUint16);
  EXPECT_EQ(TokenTypeForVocabulary(65499), TokenType::kUint16);
  EXPECT_EQ(TokenTypeForVocabulary(65500), TokenType::kInt32);
  EXPECT_EQ(TokenTypeForVocabulary(129280), TokenType::kInt32);
}

}  // namespace
}  // namespace baleen
