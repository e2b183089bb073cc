// The catalog: every tensor of a V3.1 / V3.2 checkpoint with its Hugging Face name, global shape
// and storage class.
//
// Order: embedding, layers 0..N-1, final norm, head, MTP layer N. Reader, writer, init and inspect
// all walk this one list, so a name exists in one place. Scales are not entries: a kF8Block weight
// of an FP8 file has one beside it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/model_config.h"
#include "kernels/core/tensor.h"

namespace baleen {

enum class TensorStorage : uint8_t {
  kF8Block,  // E4M3 with one F32 multiplier per 128 x 128 block; BF16 in a BF16 file
  kBF16,     // never quantised
  kF32,      // norms, k_norm, e_score_correction_bias
};

enum class TensorRole : uint8_t { kWeight, kNorm, kNormBias, kCorrectionBias };

struct CatalogEntry {
  std::string name;
  Shape shape;
  TensorStorage storage = TensorStorage::kF8Block;
  TensorRole role = TensorRole::kWeight;
  bool indexer = false;      // part of a lightning indexer
  std::string duplicate_of;  // the MTP layer repeats embedding and head: the tensor it must equal
};

struct CatalogOptions {
  bool with_indexer = false;
};

std::vector<CatalogEntry> TensorCatalog(const ModelConfig& config, CatalogOptions options);

// Sizes that pass Validate one by one may still name a model no machine can hold: ConfigError above
// 10^6 tensors or 10^15 parameters. After it the catalog is affordable and every byte count fits
// int64.
absl::Status CheckModelSize(const ModelConfig& config, absl::string_view where);

// "a.weight" -> "a.weight_scale_inv".
std::string ScaleName(absl::string_view weight_name);
// The weight's name for a scale's name, nothing for any other.
std::optional<std::string> WeightOfScale(absl::string_view name);

// Numbers of elements, scales and duplicates left out. `active` is what one token meets, embedding
// and head included, as DeepSeek counts it (671 B total, 37 B active for V3).
struct ParameterCount {
  int64_t main = 0;     // without the MTP layer and the indexers
  int64_t active = 0;   // of main
  int64_t mtp = 0;      // the MTP layer's own, without its indexer
  int64_t indexer = 0;  // all indexers
};
ParameterCount CountParameters(const ModelConfig& config, CatalogOptions options);

}  // namespace baleen
