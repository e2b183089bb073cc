// Digests of training states: the same for every layout of the same elements, of row-major bytes,
// and another for any other bit, name, type or shape.
#include "checkpoints/state_digest.h"

#include <gtest/gtest.h>

#include "kernels/core/file.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen::testing {
namespace {

StateDigest DigestOf(const std::vector<TestTensor>& tensors, int64_t step, const Layout& layout,
                     int64_t block_bytes) {
  const TemporaryDirectory directory;
  auto saved = SaveState(directory.path(), step, tensors, layout);
  CHECK_OK(saved.status());
  auto reader = StateReader::Open(*saved);
  CHECK_OK(reader.status());
  auto digest = DigestState(*reader, block_bytes);
  CHECK_OK(digest.status());
  return *std::move(digest);
}

TEST(StateDigest, IsTheSameForEveryLayoutAndBlockSize) {
  const std::vector<TestTensor> tensors = SmallTensors();
  const StateDigest whole = DigestOf(tensors, 3, WholeLayout(tensors), kDigestBlockBytes);
  ASSERT_EQ(whole.tensors.size(), tensors.size());
  std::mt19937_64 random(17);
  for (const int64_t block_bytes : {1, 7, 100, 4096}) {
    const StateDigest cut =
        DigestOf(tensors, 3, RandomLayout(tensors, 1 + block_bytes % 5, random), block_bytes);
    EXPECT_EQ(cut.tensors, whole.tensors);
    EXPECT_EQ(cut.whole, whole.whole);
  }
}

TEST(StateDigest, OfATensorIsTheHashOfItsBytesInRowMajorOrder) {
  const std::vector<TestTensor> tensors = SmallTensors();
  std::mt19937_64 random(5);
  const StateDigest digest = DigestOf(tensors, 3, RandomLayout(tensors, 3, random), 64);
  for (const TestTensor& tensor : tensors) {
    const Box box{Shape(tensor.shape.size(), 0), tensor.shape};
    const StatePiece piece = FilledPiece(tensor, 3, box, 0, NumElements(tensor.shape));
    const std::string expected =
        Hash128(absl::MakeConstSpan(static_cast<const uint8_t*>(piece.data.raw()),
                                    piece.flat_count * DTypeBytes(tensor.dtype)));
    const auto found = std::find_if(digest.tensors.begin(), digest.tensors.end(),
                                    [&](const TensorDigest& t) { return t.name == tensor.name; });
    ASSERT_NE(found, digest.tensors.end()) << tensor.name;
    EXPECT_EQ(found->hash, expected) << tensor.name;
  }
}

TEST(StateDigest, ChangesWithValuesNamesAndShapes) {
  std::vector<TestTensor> tensors = SmallTensors();
  const auto whole = [&](int64_t step) {
    return DigestOf(tensors, step, WholeLayout(tensors), 4096).whole;
  };
  const std::string before = whole(3);
  EXPECT_NE(whole(4), before);  // the step is in every value
  tensors[0].name += "x";
  EXPECT_NE(whole(3), before);
  tensors = SmallTensors();
  tensors[0].shape.insert(tensors[0].shape.begin(), 1);  // the same bytes
  EXPECT_NE(whole(3), before);
}

}  // namespace
}  // namespace baleen::testing
