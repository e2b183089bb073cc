// Where weights come from before any training: a Hugging Face checkpoint, or the seed. Indexer
// tensors that a V3.1 checkpoint does not have are drawn from the seed too, the same on every
// layout.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "checkpoints/hf_checkpoint.h"
#include "checkpoints/hf_init.h"
#include "checkpoints/state_manifest.h"
#include "configs/schema/run_config.h"
#include "parallel/communicator.h"
#include "trainer/model/parameter_store.h"

namespace baleen {

class WeightSource {
 public:
  // Opens model.checkpoint, or reads model.config. ConfigError / DataError; every tensor of the
  // checkpoint must be accounted for: loaded, initialised or ignored.
  static absl::StatusOr<WeightSource> Open(const ModelSection& model, const DsaConfig& dsa,
                                           int64_t seed);

  // Sizes as the checkpoint or model file has them; index_* from the `dsa` section of the first
  // stage where they lack.
  const ModelConfig& config() const { return config_; }
  const HfCheckpoint* checkpoint() const { return checkpoint_ ? &*checkpoint_ : nullptr; }
  const Accounting& accounting() const { return accounting_; }

  // The FP8 scales of every parts-th tensor: what a rank looks at when all look before the first is
  // used.
  absl::Status CheckScales(int part, int parts) const;
  // A box of a tensor (a checkpoint's name), kF32 or kF64, row-major to `destination`.
  // DataError that names tensor and place where a checkpoint's value is not finite.
  absl::Status Load(const std::string& name, const Box& box, DType dtype, void* destination) const;
  // Adds the data of a checkpoint to the hash, each shard read by one rank. All ranks call it.
  absl::Status HashData(Communicator& world);
  // The name and hash of this source in a training state: after HashData.
  FrozenSource AsFrozenSource() const;

 private:
  WeightSource() = default;
  std::string path_;  // as the run file names it
  std::string hash_;
  ModelConfig config_;
  InitOptions init_;
  std::optional<HfCheckpoint> checkpoint_;
  Accounting accounting_;
  std::map<std::string, CatalogEntry> catalog_;
};

}  // namespace baleen
