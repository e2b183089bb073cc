// libFuzzer target for Megatron .idx files: any bytes are refused, or give an index that keeps its
// promises. The first 8 bytes of the input are the size of .bin, the rest is the .idx.
#include <cstdint>
#include <cstring>

#include "data/indexed_tokens.h"
#include "kernels/core/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  int64_t bin_bytes = 0;
  if (size < sizeof(bin_bytes)) return 0;
  std::memcpy(&bin_bytes, data, sizeof(bin_bytes));
  bin_bytes &= (int64_t{1} << 62) - 1;  // what fstat can say
  const auto index = baleen::TokenIndex::Parse(
      absl::MakeConstSpan(data + sizeof(bin_bytes), size - sizeof(bin_bytes)), bin_bytes,
      "fuzz.idx", "fuzz.bin");
  if (!index.ok()) {
    CHECK(index.status().code() == absl::StatusCode::kDataLoss) << index.status().ToString();
    return 0;
  }
  CHECK_EQ(index->num_tokens() * baleen::TokenBytes(index->type()), bin_bytes);
  CHECK_EQ(index->document_begin(0), 0);
  for (int64_t document = 0; document < index->num_documents(); ++document) {
    CHECK_LE(index->document_begin(document), index->document_begin(document + 1));
  }
  CHECK_EQ(index->document_begin(index->num_documents()), index->num_tokens());
  return 0;
}
