// HDF5 token files, written here with the C API in the layouts users have: contiguous, chunked; and
// broken ones.
#include "data/hdf5_tokens.h"

#include <gtest/gtest.h>
#include <hdf5.h>

#include <cstring>
#include <filesystem>

#include "data/token_source.h"
#include "tests/data/token_files.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using absl::StatusCode;
using testing::HasStatus;
using testing::IsOk;
using testing::OpenTokenSet;
using testing::TestDirectory;

struct Hdf5File {
  std::string format = "dsa-tokens";
  int64_t version = 1;
  std::vector<uint32_t> tokens = {10, 11, 12, 13, 14, 15, 16};
  std::vector<uint64_t> document_ends = {3, 3, 7};
  hsize_t chunk = 0;  // 0 = contiguous
  bool deflate = false;
  hsize_t userblock = 0;
  hid_t token_type = H5T_STD_U32LE;
  bool variable_string = false;  // as h5py writes attributes
  bool with_vocab = true;
  const char* tokens_link = nullptr;  // file that /tokens is an external link to
};

void WriteAttributes(hid_t file, const Hdf5File& what) {
  const hid_t scalar = H5Screate(H5S_SCALAR);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, what.variable_string ? H5T_VARIABLE : what.format.size());
  const hid_t format = H5Acreate2(file, "format", text, scalar, H5P_DEFAULT, H5P_DEFAULT);
  const char* pointer = what.format.c_str();
  H5Awrite(format, text, what.variable_string ? static_cast<const void*>(&pointer) : pointer);
  H5Aclose(format);
  const auto integer = [&](const char* name, int64_t value) {
    const hid_t attribute = H5Acreate2(file, name, H5T_STD_I64LE, scalar, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, H5T_NATIVE_INT64, &value);
    H5Aclose(attribute);
  };
  integer("version", what.version);
  if (what.with_vocab) integer("vocab_size", 100);
  integer("eos_id", 16);
  H5Tclose(text);
  H5Sclose(scalar);
}

void WriteColumn(hid_t file, const char* name, hid_t type, hid_t memory_type, hsize_t count,
                 const void* data, const Hdf5File& what) {
  const hsize_t unlimited = H5S_UNLIMITED;  // lets a chunk be larger than the data
  const hid_t space = H5Screate_simple(1, &count, what.chunk > 0 ? &unlimited : nullptr);
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  if (what.chunk > 0) H5Pset_chunk(properties, 1, &what.chunk);
  if (what.deflate) H5Pset_deflate(properties, 1);
  const hid_t dataset = H5Dcreate2(file, name, type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
  if (count > 0) H5Dwrite(dataset, memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
  H5Dclose(dataset);
  H5Pclose(properties);
  H5Sclose(space);
}

void WriteHdf5(const std::string& path, const Hdf5File& what) {
  const hid_t creation = H5Pcreate(H5P_FILE_CREATE);
  H5Pset_userblock(creation, what.userblock);
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation, H5P_DEFAULT);
  ASSERT_GE(file, 0);
  WriteAttributes(file, what);
  if (what.tokens_link != nullptr) {
    H5Lcreate_external(what.tokens_link, "/tokens", file, "tokens", H5P_DEFAULT, H5P_DEFAULT);
  } else {
    WriteColumn(file, "tokens", what.token_type, H5T_NATIVE_UINT32, what.tokens.size(),
                what.tokens.data(), what);
  }
  WriteColumn(file, "doc_ends", H5T_STD_U64LE, H5T_NATIVE_UINT64, what.document_ends.size(),
              what.document_ends.data(), what);
  H5Pclose(creation);
  H5Fclose(file);
}

TEST(Hdf5Tokens, ReadsContiguousAndChunkedFilesAlike) {
  const TestDirectory directory;
  for (const hsize_t chunk : {0, 1, 3, 7, 100}) {
    const std::string path = directory.Path(absl::StrCat("chunk", chunk, ".h5"));
    WriteHdf5(path, {.chunk = chunk, .variable_string = chunk % 2 == 1});
    const TokenSource source = OpenTokenSet(path);
    EXPECT_EQ(source.Format(), "HDF5 u32");
    ASSERT_EQ(source.num_documents(), 3);
    EXPECT_EQ(source.num_tokens(), 7);
    EXPECT_EQ(source.document_length(0), 3);
    EXPECT_EQ(source.document_length(1), 0);
    EXPECT_EQ(source.document_begin(2), 3);
    for (int begin = 0; begin <= 7; ++begin) {
      for (int count = 0; begin + count <= 7; ++count) {
        std::vector<int32_t> out(count), expected;
        for (int i = 0; i < count; ++i) expected.push_back(10 + begin + i);
        ASSERT_THAT(source.CopyTokens(begin, absl::MakeSpan(out)), IsOk());
        EXPECT_EQ(out, expected) << chunk;
      }
    }
    EXPECT_THAT(source.CheckVocabulary(17), IsOk());
    EXPECT_THAT(
        source.CheckVocabulary(16),
        HasStatus(StatusCode::kDataLoss, "document 2, token 3 (token 6 of the file): found id 16"));
  }
}

TEST(Hdf5Tokens, ReadsTheAttributesAndAnEmptySet) {
  const TestDirectory directory;
  WriteHdf5(directory.Path("a.h5"), {.tokens = {}, .document_ends = {}});
  ASSERT_OK_AND_ASSIGN(const auto tokens, Hdf5Tokens::Open(directory.Path("a.h5")));
  EXPECT_EQ(tokens.vocab_size(), 100);
  EXPECT_EQ(tokens.eos_id(), 16);
  EXPECT_EQ(tokens.num_documents(), 0);
  EXPECT_EQ(tokens.num_tokens(), 0);
}

TEST(Hdf5Tokens, RefusesFilesItWouldMisread) {
  const TestDirectory directory;
  const std::string other = directory.Path("other.h5");
  WriteHdf5(other, {});
  const std::vector<std::pair<Hdf5File, const char*>> cases = {
      {{.format = "tokens"}, "root attribute format: found \"tokens\", expected \"dsa-tokens\""},
      {{.version = 2}, "root attribute version: found 2, expected 1"},
      {{.with_vocab = false}, "root attribute vocab_size is missing"},
      {{.chunk = 4, .deflate = true}, "dataset /tokens: expected no filters"},
      {{.userblock = 512}, "found a user block of 512 bytes, expected none"},
      {{.token_type = H5T_STD_U32BE},
       "dataset /tokens: expected elements of type u32 (little-endian)"},
      {{.token_type = H5T_STD_I64LE}, "dataset /tokens: expected elements of type u32"},
      {{.tokens_link = other.c_str()}, "dataset /tokens: found a link, expected the data itself"},
      {{.document_ends = {3, 2, 7}}, "/doc_ends[1]: found 2, expected 3 to 7"},
      {{.document_ends = {3, 8}}, "/doc_ends[1]: found 8, expected 3 to 7"},
      {{.document_ends = {3, 6}},
       "the last of /doc_ends: found 6, expected 7, the length of /tokens"},
      {{.document_ends = {}}, "the last of /doc_ends: found 0, expected 7"},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::string path = directory.Path(absl::StrCat("case", i, ".h5"));
    WriteHdf5(path, cases[i].first);
    EXPECT_THAT(TokenSource::Open(path), HasStatus(StatusCode::kDataLoss, cases[i].second));
  }
}

TEST(Hdf5Tokens, RefusesALengthThatTheFileDoesNotHold) {
  const TestDirectory directory;
  const std::string path = directory.Path("huge.h5");
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  WriteAttributes(file, {});
  const hsize_t count = hsize_t{1} << 60, chunk = 1024;
  const hid_t space = H5Screate_simple(1, &count, nullptr);
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_chunk(properties, 1, &chunk);
  H5Dclose(H5Dcreate2(file, "tokens", H5T_STD_U32LE, space, H5P_DEFAULT, properties, H5P_DEFAULT));
  H5Pclose(properties);
  H5Sclose(space);
  H5Fclose(file);
  EXPECT_THAT(TokenSource::Open(path),
              HasStatus(StatusCode::kDataLoss,
                        "1152921504606846976 elements, but the file holds at most 0"));
}

TEST(Hdf5Tokens, RefusesWhatIsNoHdf5FileAndIdsAbove31Bits) {
  const TestDirectory directory;
  testing::WriteBytes(directory.Path("text.h5"), "not hdf5");
  EXPECT_THAT(TokenSource::Open(directory.Path("text.h5")),
              HasStatus(StatusCode::kDataLoss, "cannot be opened as an HDF5 file"));
  EXPECT_THAT(TokenSource::Open(directory.Path("none.h5")),
              HasStatus(StatusCode::kDataLoss, "cannot open"));
  WriteHdf5(directory.Path("big.h5"), {.tokens = {1, 4000000000u}, .document_ends = {2}});
  EXPECT_THAT(OpenTokenSet(directory.Path("big.h5")).CheckVocabulary(100),
              HasStatus(StatusCode::kDataLoss,
                        "/tokens[1]: found id 4000000000, expected at most 2147483647"));
}

TEST(Hdf5Tokens, ATruncatedOrReplacedFileIsAnError) {
  const TestDirectory directory;
  WriteHdf5(directory.Path("a.h5"), {});
  const TokenSource source = OpenTokenSet(directory.Path("a.h5"));
  EXPECT_THAT(source.CheckUnchanged(), IsOk());
  std::filesystem::resize_file(directory.Path("a.h5"), 100);
  EXPECT_THAT(source.CheckUnchanged(), HasStatus(StatusCode::kDataLoss, "found 100 bytes"));
  std::vector<int32_t> out(7);
  EXPECT_THAT(source.CopyTokens(0, absl::MakeSpan(out)),
              HasStatus(StatusCode::kDataLoss, "truncated while in use"));
}

}  // namespace
}  // namespace baleen
