// StateDigest: hashes of a training state that do not know its layout.
//
// A tensor's hash is XXH3-128 of its elements in row-major order of the global shape, put together
// from whatever pieces the ranks wrote; the whole state's is the hash of the lines
// "NAME TYPE[SHAPE] HASH" in order of names. Two states hold the same values and moments, bit for
// bit, exactly when their hashes are equal, whatever layouts saved them. Frozen tensors and the
// place in the run are no part of it.
#pragma once

#include <string>
#include <vector>

#include "checkpoints/state_reader.h"

namespace baleen {

struct TensorDigest {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;  // global
  std::string hash;
  bool operator==(const TensorDigest&) const = default;
};

struct StateDigest {
  std::vector<TensorDigest> tensors;  // ascending by name
  std::string whole;
};

// Reads the whole state, `block_bytes` of a tensor at a time: memory does not grow with the
// tensors. DataError as StateReader::Read.
inline constexpr int64_t kDigestBlockBytes = int64_t{64} << 20;
absl::StatusOr<StateDigest> DigestState(StateReader& reader,
                                        int64_t block_bytes = kDigestBlockBytes);

}  // namespace baleen
