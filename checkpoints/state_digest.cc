#include "checkpoints/state_digest.h"

#include <algorithm>

#include "checkpoints/state_io.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

absl::StatusOr<std::string> HashTensor(StateReader& reader, const TensorRecord& tensor,
                                       int64_t block_bytes, std::vector<uint8_t>& block) {
  const Box whole{Shape(tensor.shape.size(), 0), tensor.shape};
  const int64_t element_bytes = DTypeBytes(tensor.dtype);
  const int64_t elements = NumElements(tensor.shape);
  const int64_t step = std::max<int64_t>(1, block_bytes / element_bytes);
  StreamHash hash;
  for (int64_t begin = 0; begin < elements; begin += step) {
    const int64_t count = std::min(step, elements - begin);
    block.resize(static_cast<size_t>(count * element_bytes));
    RETURN_IF_ERROR(reader.Read(tensor.name, whole, begin, count, tensor.dtype, block.data()));
    hash.Update(block);
  }
  return hash.Hex();
}

}  // namespace

absl::StatusOr<StateDigest> DigestState(StateReader& reader, int64_t block_bytes) {
  StateDigest digest;
  std::string lines;
  std::vector<uint8_t> block;
  for (const TensorRecord& tensor : reader.manifest().tensors) {
    ASSIGN_OR_RETURN(std::string hash, HashTensor(reader, tensor, block_bytes, block));
    absl::StrAppend(&lines, tensor.name, " ", std::string(DTypeName(tensor.dtype)),
                    ShapeString(tensor.shape), " ", hash, "\n");
    digest.tensors.push_back({tensor.name, tensor.dtype, tensor.shape, std::move(hash)});
  }
  digest.whole =
      Hash128(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(lines.data()), lines.size()));
  return digest;
}

}  // namespace baleen
