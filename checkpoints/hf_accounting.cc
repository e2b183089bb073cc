// Accounting: what becomes of every tensor of a checkpoint when one model is loaded from it
// (hf_checkpoint.h).
#include <algorithm>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "checkpoints/fp8_blocks.h"
#include "checkpoints/hf_checkpoint.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

// Walks the catalog, then whatever of the checkpoint the catalog did not name.
class Accountant {
 public:
  Accountant(const HfCheckpoint& checkpoint, const ModelConfig& model, CatalogOptions options)
      : checkpoint_(checkpoint), model_(model), options_(options) {}

  Accounting Run() {
    const std::vector<CatalogEntry> catalog = TensorCatalog(model_, options_);
    for (const CatalogEntry& entry : catalog) {
      if (entry.indexer) NoteIndexer(entry.name);
    }
    for (const CatalogEntry& entry : catalog) TakeEntry(entry);
    ReportMissing();
    for (const std::string& name : checkpoint_.TensorNames()) {
      if (known_.find(name) == known_.end()) TakeUnknown(name);
    }
    return std::move(result_);
  }

 private:
  static std::string LayerOf(const std::string& indexer_tensor) {
    return indexer_tensor.substr(0, indexer_tensor.find(".self_attn."));
  }
  void NoteIndexer(const std::string& name) {
    if (checkpoint_.Find(name) != nullptr) layers_with_indexer_.insert(LayerOf(name));
  }

  void TakeEntry(const CatalogEntry& entry) {
    known_.insert(entry.name);
    known_.insert(ScaleName(entry.name));
    const CheckpointTensor* found = checkpoint_.Find(entry.name);
    if (found == nullptr) return TakeAbsent(entry);
    CheckFound(entry, *found);
    if (!entry.duplicate_of.empty()) {
      result_.ignored.push_back({entry.name, "duplicate of " + entry.duplicate_of});
    } else {
      result_.loaded.push_back(entry.name);
    }
  }

  void TakeAbsent(const CatalogEntry& entry) {
    if (!entry.duplicate_of.empty()) return;
    // A layer has its whole indexer or none of it; some converters leave out that of the MTP layer.
    const bool mtp = absl::StartsWith(entry.name, MtpPrefix());
    const bool may_be_initialised = !checkpoint_.config().has_indexer || mtp;
    if (entry.indexer && may_be_initialised &&
        layers_with_indexer_.find(LayerOf(entry.name)) == layers_with_indexer_.end()) {
      result_.initialised.push_back(entry.name);
    } else {
      missing_.push_back(entry);
    }
  }

  void CheckFound(const CatalogEntry& entry, const CheckpointTensor& found) {
    const std::string where =
        absl::StrCat(JoinPath(checkpoint_.directory(), found.shard), ": ", entry.name);
    if (found.shape != entry.shape) {
      Error(where, ": found ", ShapeString(found.shape), ", config.json asks for ",
            ShapeString(entry.shape));
      return;
    }
    if (found.dtype == DType::kF8E4M3) {
      CheckScale(entry, found, where);
    } else if (found.dtype != DType::kBF16 && found.dtype != DType::kF32 &&
               found.dtype != DType::kF64) {
      Error(where, ": found dtype ", DTypeName(found.dtype),
            ", expected F8_E4M3, BF16, F32 or F64");
    } else if (checkpoint_.Find(ScaleName(entry.name)) != nullptr) {
      // Half a conversion: was the weight multiplied already, or is it raw?
      Error(where, ": found dtype ", DTypeName(found.dtype), " with a scale ",
            ScaleName(entry.name), ", expected F8_E4M3 or no scale");
    }
  }

  void CheckScale(const CatalogEntry& entry, const CheckpointTensor& found,
                  const std::string& where) {
    if (!checkpoint_.hf_config().fp8) {
      Error(where, ": found F8_E4M3, but config.json has no quantization_config");
      return;
    }
    if (entry.storage != TensorStorage::kF8Block) {
      Error(where, ": found F8_E4M3, expected a type that is not quantised (BF16 or F32)");
      return;
    }
    const CheckpointTensor* scale = checkpoint_.Find(ScaleName(entry.name));
    const Shape expected = Fp8ScaleShape(found.shape);
    if (scale == nullptr) {
      Error(where, ": found F8_E4M3 without its scale ", ScaleName(entry.name), ", expected F32",
            ShapeString(expected));
    } else if (scale->dtype != DType::kF32 || scale->shape != expected) {
      Error(JoinPath(checkpoint_.directory(), scale->shard), ": ", ScaleName(entry.name),
            ": found ", DTypeName(scale->dtype), ShapeString(scale->shape), ", expected F32",
            ShapeString(expected));
    }
  }

  // One line for a missing MTP layer, which transformers drops when it saves; else one line a
  // tensor.
  void ReportMissing() {
    bool any_mtp = false;
    for (const std::string& name : result_.loaded) {
      any_mtp = any_mtp || absl::StartsWith(name, MtpPrefix());
    }
    bool told = false;
    for (const CatalogEntry& entry : missing_) {
      if (!any_mtp && absl::StartsWith(entry.name, MtpPrefix())) {
        if (!told) {
          Error(checkpoint_.directory(), ": no tensor of the MTP layer ", MtpPrefix(),
                "*, but num_nextn_predict_layers is ", model_.num_nextn_predict_layers,
                "; set it to 0 if the checkpoint has no MTP layer");
        }
        told = true;
        continue;
      }
      Error(checkpoint_.directory(), ": ", entry.name, " ", ShapeString(entry.shape),
            " is missing");
    }
  }

  // An unknown tensor is an error, not a remark: a bias or a 257th expert would change the model
  // silently.
  void TakeUnknown(const std::string& name) {
    const std::string shown = EscapeControl(name);
    if (absl::EndsWith(name, ".rotary_emb.inv_freq")) {
      result_.ignored.push_back({shown, "RoPE frequencies are computed"});
    } else if (model_.num_nextn_predict_layers == 0 && absl::StartsWith(name, MtpPrefix())) {
      result_.ignored.push_back({shown, "MTP layer; num_nextn_predict_layers is 0"});
    } else if (!options_.with_indexer && absl::StrContains(name, ".self_attn.indexer.")) {
      result_.ignored.push_back({shown, "indexer; the model is used without one"});
    } else {
      Error(JoinPath(checkpoint_.directory(), checkpoint_.Find(name)->shard), ": ", shown,
            " is no tensor of the model config.json describes");
    }
  }

  std::string MtpPrefix() const {
    return absl::StrCat("model.layers.", model_.num_hidden_layers, ".");
  }
  template <typename... Args>
  void Error(const Args&... args) {
    result_.errors.push_back(absl::StrCat(args...));
  }

  const HfCheckpoint& checkpoint_;
  const ModelConfig& model_;
  CatalogOptions options_;
  Accounting result_;
  std::set<std::string> known_;
  std::set<std::string> layers_with_indexer_;
  std::vector<CatalogEntry> missing_;
};

}  // namespace

absl::Status Accounting::ToStatus(absl::string_view where) const {
  if (errors.empty()) return absl::OkStatus();
  constexpr size_t kShown = 20;
  std::vector<std::string> lines(errors.begin(), errors.begin() + std::min(errors.size(), kShown));
  if (errors.size() > kShown) {
    lines.push_back(absl::StrCat("and ", errors.size() - kShown, " more"));
  }
  return DataError(where, ": ", errors.size(), " tensor(s) do not fit the model:\n  ",
                   absl::StrJoin(lines, "\n  "));
}

Accounting HfCheckpoint::Account(const ModelConfig& model, CatalogOptions options) const {
  return Accountant(*this, model, options).Run();
}

}  // namespace baleen
