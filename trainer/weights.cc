#include "trainer/weights.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "configs/schema/run_file.h"
#include "kernels/core/file.h"
#include "parallel/agree.h"
#include "trainer/recipe.h"

namespace baleen {
namespace {

// Where the first NaN or infinity of the values stands, or `count`. Block by block, so that the
// compiler makes a vector loop of it: far below the price of the conversion before.
template <typename T>
int64_t FirstNotFinite(const T* values, int64_t count) {
  constexpr int64_t kBlock = 4096;
  const auto is_bad = [](T value) { return !(std::abs(value) <= std::numeric_limits<T>::max()); };
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    int bad = 0;
    for (int64_t i = begin; i < end; ++i) bad |= is_bad(values[i]);
    if (bad != 0) return std::find_if(values + begin, values + end, is_bad) - values;
  }
  return count;
}

// Values just read into `box`, row-major. A NaN among the weights would be met as a loss or score
// that is none, many steps of search away from the tensor that holds it.
template <typename T>
absl::Status CheckFinite(const std::string& where, const Box& box, const T* values) {
  const int64_t count = NumElements(box.extent);
  int64_t at = FirstNotFinite(values, count);
  if (at == count) return absl::OkStatus();
  const T found = values[at];
  Shape place = box.offset;
  for (size_t d = place.size(); d-- > 0; at /= box.extent[d]) place[d] += at % box.extent[d];
  return DataError(where, ShapeString(place), " is ", found,
                   ": expected finite weights; baleen inspect --verify counts all that are not");
}

}  // namespace

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

absl::Status WeightSource::HashData(Communicator& world) {
  if (!checkpoint_) return absl::OkStatus();
  const size_t shards = checkpoint_->ShardNames().size();
  std::string mine;  // 32 digits for each of this rank's shards
  absl::Status status;
  for (size_t shard = world.rank(); shard < shards && status.ok(); shard += world.size()) {
    const absl::StatusOr<std::string> hash = checkpoint_->DataHash(shard);
    status = hash.status();
    if (hash.ok()) mine += *hash;
  }
  RETURN_IF_ERROR(Agree(world, status));
  const std::vector<std::string> parts = AllGatherStrings(world, "data hashes", mine);
  std::string all;  // in the order of shards, whatever the number of ranks
  for (size_t shard = 0; shard < shards; ++shard) {
    all += parts[shard % world.size()].substr(32 * (shard / world.size()), 32);
  }
  hash_ = absl::StrCat(checkpoint_->SourceHash(), "+",
                       Hash128({reinterpret_cast<const uint8_t*>(all.data()), all.size()}));
  return absl::OkStatus();
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
  const CheckpointTensor* tensor = checkpoint_ ? checkpoint_->Find(name) : nullptr;
  if (tensor != nullptr) {
    RETURN_IF_ERROR(checkpoint_->Read(name, box, dtype, destination));
    const std::string where = absl::StrCat(JoinPath(path_, tensor->shard), ": ", name);
    return dtype == DType::kF32 ? CheckFinite(where, box, static_cast<const float*>(destination))
                                : CheckFinite(where, box, static_cast<const double*>(destination));
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
