#include "checkpoints/state_reader.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "checkpoints/hdf5_file.h"
#include "checkpoints/state_copy.h"
#include "checkpoints/state_directory.h"
#include "checkpoints/state_io.h"
#include "checkpoints/state_ranges.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

constexpr int64_t kMostManifestBytes = int64_t{1} << 30;
constexpr size_t kMostOpenFiles = 8;
constexpr size_t kMostDifferences = 20;

std::string TypeAndShape(DType dtype, const Shape& shape) {
  return absl::StrCat(std::string(DTypeName(dtype)), ShapeString(shape));
}

// The source that a tensor was frozen from, or null.
const FrozenSource* SourceOf(const StateMetadata& metadata, const std::string& name) {
  for (const FrozenSource& source : metadata.sources) {
    if (std::find(source.tensors.begin(), source.tensors.end(), name) != source.tensors.end())
      return &source;
  }
  return nullptr;
}

std::string FirstDifferences(const std::vector<std::string>& differences) {
  const size_t shown = std::min(differences.size(), kMostDifferences);
  std::string text = absl::StrJoin(differences.begin(), differences.begin() + shown, "\n  ");
  if (shown < differences.size())
    absl::StrAppend(&text, "\n  and ", differences.size() - shown, " more");
  return text;
}

}  // namespace

absl::StatusOr<std::vector<StateDirectory>> ListStates(const std::string& dir) {
  std::vector<StateDirectory> states;
  if (!DirectoryExists(dir)) return states;
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListNames(dir));
  std::vector<std::string> corrupt;
  for (const std::string& name : names) {
    const StateName parsed = ParseStateName(name);
    if (parsed.entry == StateEntry::kState) states.push_back({parsed.step, JoinPath(dir, name)});
    if (parsed.entry == StateEntry::kCorrupt) corrupt.push_back(name);
  }
  if (states.empty() && !corrupt.empty()) {
    return DataError(
        dir, ": every training state was set aside as damaged (", absl::StrJoin(corrupt, ", "),
        "). Restore one under its name step-XXXXXXXX, or move them away to start anew.");
  }
  std::sort(states.begin(), states.end(),
            [](const StateDirectory& a, const StateDirectory& b) { return a.step > b.step; });
  return states;
}

// The manifest, what is known of the files, and the few that are open.
class StateReader::Files {
 public:
  Files(std::string directory, StateManifest manifest)
      : directory_(std::move(directory)),
        manifest_(std::move(manifest)),
        verified_(manifest_.files.size()) {}

  const std::string& directory() const { return directory_; }
  const StateManifest& manifest() const { return manifest_; }
  std::string Path(int file) const { return JoinPath(directory_, manifest_.files[file].name); }

  absl::Status Verify(int file) {
    CHECK(file >= 0 && file < static_cast<int>(verified_.size())) << file;
    if (verified_[file]) return absl::OkStatus();
    const FileRecord& record = manifest_.files[file];
    RETURN_IF_ERROR(VerifyFileHash(Path(file), record.bytes, record.hash));
    verified_[file] = true;
    return absl::OkStatus();
  }
  void MarkVerified(int file) { verified_.at(file) = true; }

  absl::StatusOr<Hdf5Dataset> OpenDataset(const TensorRecord& tensor, const PieceRecord& piece) {
    ASSIGN_OR_RETURN(const Hdf5Reader* file, OpenFile(piece.file));
    ASSIGN_OR_RETURN(Hdf5Dataset dataset, file->OpenDataset(piece.dataset, tensor.dtype));
    if (dataset.count() == piece.flat_count) return dataset;
    return DataError(Path(piece.file), ": dataset ", piece.dataset, " has ", dataset.count(),
                     " elements, the manifest says ", piece.flat_count);
  }

 private:
  struct Open {
    int file;
    std::unique_ptr<Hdf5Reader> reader;
  };

  // The most recently used come last.
  absl::StatusOr<const Hdf5Reader*> OpenFile(int file) {
    const auto found =
        std::find_if(open_.begin(), open_.end(), [&](const Open& o) { return o.file == file; });
    if (found != open_.end()) {
      std::rotate(found, found + 1, open_.end());
      return open_.back().reader.get();
    }
    RETURN_IF_ERROR(Verify(file));
    ASSIGN_OR_RETURN(Hdf5Reader reader, Hdf5Reader::Open(Path(file)));
    if (open_.size() == kMostOpenFiles) open_.erase(open_.begin());
    open_.push_back({file, std::make_unique<Hdf5Reader>(std::move(reader))});
    return open_.back().reader.get();
  }

  std::string directory_;
  StateManifest manifest_;
  std::vector<bool> verified_;
  std::vector<Open> open_;
};

StateReader::StateReader(std::unique_ptr<Files> files) : files_(std::move(files)) {}
StateReader::StateReader(StateReader&&) noexcept = default;
StateReader& StateReader::operator=(StateReader&&) noexcept = default;
StateReader::~StateReader() = default;

const std::string& StateReader::directory() const { return files_->directory(); }
const StateManifest& StateReader::manifest() const { return files_->manifest(); }

absl::StatusOr<StateReader> StateReader::Open(const std::string& step_dir) {
  const std::string path = JoinPath(step_dir, kManifestName);
  if (!DirectoryExists(step_dir)) return DataError(step_dir, ": there is no such training state");
  ASSIGN_OR_RETURN(const std::string text, ReadStateText(path, kMostManifestBytes));
  ASSIGN_OR_RETURN(StateManifest manifest, StateManifest::Parse(text, path));
  const StateName name = ParseStateName(Basename(step_dir));
  if (name.entry == StateEntry::kState && name.step != manifest.metadata.step) {
    return DataError(step_dir, ": the manifest is of step ", manifest.metadata.step,
                     "; the directory was renamed or its files come from another state");
  }
  for (const FileRecord& file : manifest.files) {
    const std::string file_path = JoinPath(step_dir, file.name);
    ASSIGN_OR_RETURN(const OpenedFile opened, OpenStateFile(file_path));
    if (opened.bytes != file.bytes) {
      return DataError(file_path, ": found ", opened.bytes, " bytes, the manifest says ",
                       file.bytes);
    }
  }
  return StateReader(std::make_unique<Files>(step_dir, std::move(manifest)));
}

absl::Status StateReader::VerifyFile(int file) { return files_->Verify(file); }
void StateReader::MarkVerified(int file) { files_->MarkVerified(file); }

absl::Status StateReader::VerifyAllFiles() {
  for (int file = 0; file < num_files(); ++file) RETURN_IF_ERROR(VerifyFile(file));
  return absl::OkStatus();
}

absl::Status StateReader::Read(const std::string& name, const Box& box, int64_t flat_begin,
                               int64_t flat_count, DType dtype, void* destination) {
  const std::string where = absl::StrCat(directory(), ": tensor ", name);
  const TensorRecord* tensor = manifest().Find(name);
  if (tensor == nullptr) {
    const FrozenSource* source = SourceOf(metadata(), name);
    return DataError(
        where,
        source == nullptr
            ? ": the state has no such tensor"
            : absl::StrCat(": is not in the state: it was frozen; read it from ", source->path));
  }
  RETURN_IF_ERROR(CheckPiece(where, tensor->shape, box, flat_begin, flat_count));
  if (!ConvertsExactly(tensor->dtype, dtype)) {
    return DataError(where, ": the state has ", std::string(DTypeName(tensor->dtype)),
                     ", asked for ", std::string(DTypeName(dtype)),
                     "; resume with the precision it was saved with");
  }
  const std::vector<Box> wanted = RangeBoxes(box, flat_begin, flat_count);
  int64_t copied = 0;
  for (const PieceRecord& piece : tensor->pieces) {
    if (!Intersect(piece.box, box)) continue;
    std::vector<Box> common;
    for (const Box& stored : RangeBoxes(piece.box, piece.flat_begin, piece.flat_count)) {
      for (const Box& part : wanted) {
        if (auto both = Intersect(stored, part)) common.push_back(std::move(*both));
      }
    }
    if (common.empty()) continue;
    ASSIGN_OR_RETURN(const Hdf5Dataset dataset, files_->OpenDataset(*tensor, piece));
    ChunkCursor cursor(dataset);
    for (const Box& part : common) {
      RETURN_IF_ERROR(
          Annotate(CopyCommon(part, {piece.box, piece.flat_begin}, cursor, {box, flat_begin}, dtype,
                              static_cast<uint8_t*>(destination)),
                   where));
      copied += NumElements(part.extent);
    }
  }
  CHECK_EQ(copied, flat_count) << where << ": the manifest's pieces were found to cover the tensor";
  return absl::OkStatus();
}

absl::Status StateReader::Read(const StatePiece& piece) {
  if (piece.flat_count == 0) return absl::OkStatus();
  CHECK(piece.data.device().kind == DeviceKind::kCpu) << piece.name;
  CHECK_EQ(piece.data.num_elements(), piece.flat_count) << piece.name;
  const TensorRecord* tensor = manifest().Find(piece.name);
  if (tensor != nullptr && tensor->shape != piece.global_shape) {
    return DataError(directory(), ": tensor ", piece.name, ": the state has shape ",
                     ShapeString(tensor->shape), ", the model expects ",
                     ShapeString(piece.global_shape));
  }
  return Read(piece.name, piece.box, piece.flat_begin, piece.flat_count, piece.data.dtype(),
              piece.data.raw());
}

absl::Status StateReader::CheckTensors(const std::vector<ExpectedTensor>& expected) const {
  std::vector<std::string> differences;
  std::set<std::string> names;
  for (const ExpectedTensor& tensor : expected) {
    names.insert(tensor.name);
    const TensorRecord* found = manifest().Find(tensor.name);
    const std::string run = absl::StrCat("this run ", TypeAndShape(tensor.dtype, tensor.shape));
    if (found == nullptr) {
      const FrozenSource* source = SourceOf(metadata(), tensor.name);
      differences.push_back(
          absl::StrCat(tensor.name, ": ", run, ", state has none",
                       source ? absl::StrCat(" (frozen there, from ", source->path, ")") : ""));
    } else if (found->shape != tensor.shape || !ConvertsExactly(found->dtype, tensor.dtype)) {
      differences.push_back(absl::StrCat(tensor.name, ": ", run, ", state ",
                                         TypeAndShape(found->dtype, found->shape)));
    }
  }
  for (const TensorRecord& tensor : manifest().tensors) {
    if (names.contains(tensor.name)) continue;
    differences.push_back(absl::StrCat(tensor.name, ": this run has none, state ",
                                       TypeAndShape(tensor.dtype, tensor.shape)));
  }
  if (differences.empty()) return absl::OkStatus();
  return DataError(directory(), ": the state does not fit this run, ", differences.size(),
                   " tensors differ (wrong model or training stage?):\n  ",
                   FirstDifferences(differences));
}

absl::Status StateReader::CheckSources(
    absl::FunctionRef<absl::StatusOr<std::string>(const std::string& path)> hash_of) const {
  std::vector<std::string> differences;
  for (const FrozenSource& source : metadata().sources) {
    const absl::StatusOr<std::string> found = hash_of(source.path);
    if (!found.ok()) {
      differences.push_back(absl::StrCat(source.path, ": ", found.status().message()));
    } else if (*found != source.hash && !absl::StartsWith(*found, source.hash + "+")) {
      differences.push_back(absl::StrCat(
          source.path, ": changed since the state was saved: found hash ", *found, ", expected ",
          source.hash, " (", source.tensors.size(),
          " frozen tensors come from it); put it back, or start from it in another run.dir"));
    }
  }
  if (differences.empty()) return absl::OkStatus();
  return DataError(
      directory(),
      ": frozen tensors are not in the state and must come from where they came from:\n  ",
      FirstDifferences(differences));
}

absl::StatusOr<UsableState> FindNewestUsable(const std::vector<StateDirectory>& candidates,
                                             StateVerifier verifier, DamagePolicy policy) {
  UsableState usable;
  for (const StateDirectory& candidate : candidates) {
    absl::StatusOr<StateReader> reader = StateReader::Open(candidate.path);
    const absl::Status verdict = verifier(reader.status(), reader.ok() ? &*reader : nullptr);
    if (verdict.ok()) {
      CHECK_OK(reader.status());
      usable.reader = *std::move(reader);
      return usable;
    }
    if (!absl::IsDataLoss(verdict)) return verdict;
    std::string line = absl::StrCat("step ", candidate.step, " is damaged: ", verdict.message());
    if (policy == DamagePolicy::kRename) {
      ASSIGN_OR_RETURN(const std::string aside, SetAsideState(candidate.path));
      absl::StrAppend(&line, "; set aside as ", aside);
    }
    usable.set_aside.push_back(std::move(line));
  }
  if (candidates.empty()) return usable;
  return DataError("none of the ", candidates.size(), " training states is usable:\n  ",
                   absl::StrJoin(usable.set_aside, "\n  "));
}

absl::StatusOr<UsableState> FindNewestUsable(const std::string& dir, DamagePolicy policy) {
  ASSIGN_OR_RETURN(const std::vector<StateDirectory> states, ListStates(dir));
  const auto verify = [](const absl::Status& opened, StateReader* reader) {
    return opened.ok() ? reader->VerifyAllFiles() : opened;
  };
  return FindNewestUsable(states, verify, policy);
}

}  // namespace baleen
