// Reading a training state under any layout: intersects what a rank wants with the pieces that
// exist.
//
//   states = ListStates(dir)                                              rank 0, broadcast
//   FindNewestUsable(states, verifier, policy)                            every rank, newest first
//   reader.CheckTensors(expected), reader.CheckSources(hash_of)           differences as one table,
//   before any read reader.Read(piece) for every piece of the rank
//
// No byte reaches HDF5 before its file's hash was checked: by VerifyFile here, or by another rank
// (MarkVerified). A wrong hash, size or missing file is a DataError (exit 4) that names state,
// file, expected and found.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "checkpoints/state_manifest.h"
#include "checkpoints/state_piece.h"
#include "kernels/core/status.h"

namespace baleen {

struct StateDirectory {
  int64_t step = 0;
  std::string path;
};

// The published states of a run's `checkpoints` folder, newest (highest step) first; empty when
// there are none. DataError when there is none but some were set aside as damaged: a run must not
// start over unnoticed.
absl::StatusOr<std::vector<StateDirectory>> ListStates(const std::string& dir);

struct ExpectedTensor {
  std::string name;
  Shape shape;
  DType dtype;
};

class StateReader {
 public:
  // Reads the manifest and compares the files' sizes. Opens no HDF5 file.
  static absl::StatusOr<StateReader> Open(const std::string& step_dir);
  StateReader(StateReader&&) noexcept;
  StateReader& operator=(StateReader&&) noexcept;
  ~StateReader();

  const std::string& directory() const;
  const StateManifest& manifest() const;
  const StateMetadata& metadata() const { return manifest().metadata; }
  int num_files() const { return static_cast<int>(manifest().files.size()); }

  // Hashes one file and remembers the verdict; ranks share the work (file i by rank i % ranks) and
  // the verdicts.
  absl::Status VerifyFile(int file);
  absl::Status VerifyAllFiles();
  // Another rank has found the file whole.
  void MarkVerified(int file);

  // Elements [flat_begin, flat_begin + flat_count) of `box` of the tensor, converted to `dtype`
  // where that is exact (same type, or wider of the same kind), to `destination`. Verifies each
  // file it is the first to open.
  absl::Status Read(const std::string& name, const Box& box, int64_t flat_begin, int64_t flat_count,
                    DType dtype, void* destination);
  // The same into piece.data, which is allocated; the tensor must have piece.global_shape.
  absl::Status Read(const StatePiece& piece);

  // One DataError listing every difference: missing, unexpected, other shape, other dtype. Frozen
  // tensors of the state are not in `expected`.
  absl::Status CheckTensors(const std::vector<ExpectedTensor>& expected) const;
  // Compares each frozen source with `hash_of(path)`; one DataError tells which are gone or
  // changed.
  absl::Status CheckSources(
      absl::FunctionRef<absl::StatusOr<std::string>(const std::string& path)> hash_of) const;

 private:
  class Files;
  explicit StateReader(std::unique_ptr<Files> files);
  std::unique_ptr<Files> files_;
};

enum class DamagePolicy {
  kRename,  // rank 0 (and tools): a damaged state becomes `step-XXXXXXXX.corrupt`
  kReport,  // other ranks: the same decisions, no renaming
};

// Judges one candidate, the same on every rank: `opened` is this rank's Open status, `reader` is
// null unless it is ok. The trainer's verifier shares the hashing and agrees on the outcome.
using StateVerifier =
    absl::FunctionRef<absl::Status(const absl::Status& opened, StateReader* reader)>;

struct UsableState {
  std::optional<StateReader> reader;  // nothing when there is no state at all
  std::vector<std::string>
      set_aside;  // one line for each damaged state that was passed over: say it loudly
};

// The first candidate that the verifier accepts. A DataError sets the candidate aside and goes on
// with the next; any other error (unreadable disk, newer format) stops the search, as does running
// out of candidates (DataError).
absl::StatusOr<UsableState> FindNewestUsable(const std::vector<StateDirectory>& candidates,
                                             StateVerifier verifier, DamagePolicy policy);
// For a single process: lists, hashes every file itself.
absl::StatusOr<UsableState> FindNewestUsable(const std::string& dir, DamagePolicy policy);

}  // namespace baleen
