#include "trainer/weights.h"

#include "configs/schema/run_file.h"
#include "kernels/core/file.h"
#include "trainer/recipe.h"

namespace baleen {

absl::StatusOr<WeightSource> WeightSource::Open(const ModelSection& model, const DsaConfig& dsa,
                                                int64_t seed) {
  WeightSource source;
  source.init_.seed = static_cast<uint64_t>(seed);
  if (model.checkpoint) {
    source.path_ = *model.checkpoint;
    ASSIGN_OR_RETURN(HfCheckpoint checkpoint, HfCheckpoint::Open(source.path_));
    source.checkpoint_.emplace(std::move(checkpoint));
    source.config_ = EffectiveModel(source.checkpoint_->config(), dsa);
    source.hash_ = source.checkpoint_->SourceHash();
    source.accounting_ = source.checkpoint_->Account(source.config_, {.with_indexer = true});
    RETURN_IF_ERROR(source.accounting_.ToStatus(source.path_));
  } else {
    source.path_ = *model.config;
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelYaml(source.path_));
    source.config_ = EffectiveModel(config, dsa);
    ASSIGN_OR_RETURN(source.hash_, HashFile(source.path_));
    source.hash_ += absl::StrCat("-seed", seed);
  }
  RETURN_IF_ERROR(source.config_.Validate(source.path_));
  source.init_.standard_deviation = source.config_.initializer_range;
  for (CatalogEntry& entry : TensorCatalog(source.config_, {.with_indexer = true})) {
    const std::string name = entry.name;
    source.catalog_.emplace(name, std::move(entry));
  }
  return source;
}

absl::Status WeightSource::CheckScales(int part, int parts) const {
  if (!checkpoint_) return absl::OkStatus();
  for (size_t i = part; i < accounting_.loaded.size(); i += parts) {
    const std::string& name = accounting_.loaded[i];
    if (checkpoint_->Find(name)->dtype == DType::kF8E4M3)
      RETURN_IF_ERROR(checkpoint_->Scales(name).status());
  }
  return absl::OkStatus();
}

absl::Status WeightSource::Load(const std::string& name, const Box& box, DType dtype,
                                void* destination) const {
  if (checkpoint_ && checkpoint_->Find(name) != nullptr) {
    return checkpoint_->Read(name, box, dtype, destination);
  }
  const auto entry = catalog_.find(name);
  CHECK(entry != catalog_.end()) << name << " is not in the catalog of " << path_;
  FillInitial(entry->second, init_, box, dtype, destination);
  return absl::OkStatus();
}

FrozenSource WeightSource::AsFrozenSource() const {
  return {.path = path_, .hash = hash_, .tensors = {}};
}

}  // namespace baleen
