// HfCheckpoint: a Hugging Face directory (config.json, index, safetensors shards) opened for
// reading.
//
// Shards are mapped; Read copies one box of one tensor as F32 or F64, multiplying FP8 blocks out
// with their scale, and holds no other memory. The dtype is the header's, never an assumption.
// Account says what happens to each tensor.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "checkpoints/hf_config.h"
#include "checkpoints/safetensors.h"
#include "checkpoints/tensor_catalog.h"
#include "kernels/core/box.h"

namespace baleen {

// Of a shard's data DataHash reads this many samples of this size: 256 KiB of several GiB.
inline constexpr int64_t kDataSamples = 64;
inline constexpr int64_t kDataSampleBytes = 4096;

// "model-00001-of-00163.safetensors": letters, digits, '.', '_', '-', no leading dot.
bool IsShardName(absl::string_view name);

// model.safetensors.index.json. An empty `metadata` is valid.
struct CheckpointIndex {
  std::map<std::string, std::string> weight_map;  // tensor -> shard
  int64_t total_size = -1;                        // -1: the file does not say
};
absl::StatusOr<CheckpointIndex> ParseIndex(absl::string_view text, absl::string_view where);

struct CheckpointTensor {
  DType dtype = DType::kF32;
  Shape shape;
  std::string shard;  // file name inside the directory
  int shard_index = 0;
  int64_t begin = 0;  // bytes in the shard's data
  int64_t end = 0;
};

// What happens to each tensor when `ModelConfig` is loaded from the checkpoint. FP8 scales are
// loaded with their weight and not listed.
struct Accounting {
  struct Ignored {
    std::string name;
    std::string reason;
  };
  std::vector<std::string> loaded;
  std::vector<std::string> initialised;  // indexer tensors the checkpoint does not have
  std::vector<Ignored> ignored;          // in the checkpoint, of no use to the model
  std::vector<std::string> errors;       // missing, misshapen or unknown tensors, one line each

  // DataError with every line of `errors`, if any.
  absl::Status ToStatus(absl::string_view where) const;
};

class HfCheckpoint {
 public:
  // Reads config.json, the index (or a lone model.safetensors) and every shard's header.
  static absl::StatusOr<HfCheckpoint> Open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  const ModelConfig& config() const { return config_.model; }
  const HfConfig& hf_config() const { return config_; }

  // nullptr when the checkpoint has no tensor of that name.
  const CheckpointTensor* Find(absl::string_view name) const;
  // All names, scales included, sorted.
  std::vector<std::string> TensorNames() const;
  const std::vector<std::string>& ShardNames() const { return shard_names_; }

  // Copies `box` of a tensor to `destination` (row-major, dense) as kF32 or kF64. BF16 and F32 are
  // converted, E4M3 is multiplied by its scale. DataError: no such tensor, scale missing or
  // misshapen, not a floating type.
  absl::Status Read(absl::string_view name, const Box& box, DType out, void* destination) const;
  // The stored bytes of the whole tensor, as they lie in the file; valid while the checkpoint
  // lives.
  absl::StatusOr<absl::Span<const uint8_t>> RawBytes(absl::string_view name) const;

  // The multipliers of an F8_E4M3 weight, row-major over the block grid. DataError: missing,
  // misshapen, not finite.
  absl::StatusOr<std::vector<float>> Scales(absl::string_view name) const;

  // A hash over config.json, the index and all shard headers with their file sizes. It does not
  // read the data.
  const std::string& SourceHash() const { return source_hash_; }
  // A hash of the shard's data at kDataSamples evenly spaced places (of all of it where it is no
  // longer than they are): other weights of the same shapes have another. DataError when the file
  // cannot be read.
  absl::StatusOr<std::string> DataHash(size_t shard) const;

  // What is odd about the index but harms nothing (a total_size that is not the sum); empty when
  // nothing is.
  const std::string& index_note() const { return index_note_; }

  Accounting Account(const ModelConfig& model, CatalogOptions options) const;

 private:
  HfCheckpoint() = default;
  absl::Status OpenIndexed(const CheckpointIndex& index, const std::string& where);
  // Without an index every tensor of the shard is taken.
  absl::Status AddShard(const std::string& shard, const CheckpointIndex* index);
  // "DIR/SHARD: NAME", for messages.
  std::string Describe(absl::string_view name, const CheckpointTensor& tensor) const;

  std::string directory_;
  HfConfig config_;
  std::vector<std::string> shard_names_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, CheckpointTensor, std::less<>> tensors_;
  std::string source_hash_;
  std::string index_note_;
};

}  // namespace baleen
