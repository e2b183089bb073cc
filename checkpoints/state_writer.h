// Saving a training state, in two phases around the trainer's exchange (save protocol,
// docs/reliability).
//
//   rank 0:     temp = BeginState(dir, step, id, bytes of all ranks)       -> trainer broadcasts
//   temp every rank: record = WriteRankFile(temp, rank, pieces)                 -> trainer gathers
//   record.ToJson() or the error rank 0:     PublishState(dir, temp, metadata, records), then
//   PruneStates; or DiscardState(temp) if any rank failed
//
// A state exists once PublishState has renamed `step-00000100.tmp.<id>` to `step-00000100`; before
// that every file and the manifest were written, read back, compared with memory and fsynced.
// Nothing is ever overwritten in place, so an interruption at any instant leaves the earlier states
// as they were. A failed save leaves no trace but the error; HDF5 never learns of a failed write
// (hdf5_driver.h), so the next save in the same process may succeed. One thread at a time may be
// inside checkpoints/state_* and hdf5_*: the packaged HDF5 need not be thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoints/state_manifest.h"
#include "checkpoints/state_piece.h"
#include "kernels/core/status.h"

namespace baleen {

// Creates `dir` if needed and the empty temporary directory of this save; `id` (job id and process
// id) makes its name unique. EnvironmentError when step's directory exists already or free space is
// short of `bytes_needed` (all ranks' bytes; 0 skips the check): the message has both numbers.
absl::StatusOr<std::string> BeginState(const std::string& dir, int64_t step, const std::string& id,
                                       int64_t bytes_needed);

// Bytes WriteRankFile will need for these pieces, a little on the high side.
int64_t StateBytes(const std::vector<StatePiece>& pieces);

// Writes rank-XXXXX.h5: one chunked, Fletcher32-checked dataset a piece with its global shape, box
// and range as attributes. Pieces without elements are left out. On failure the file is removed.
absl::StatusOr<RankFileRecord> WriteRankFile(const std::string& temp_dir, int rank,
                                             const std::vector<StatePiece>& pieces);

struct PublishedState {
  std::string directory;
  std::string
      warning;  // not empty when the state is safe but the hint `latest` could not be written
};

// Checks that the pieces of all ranks cover every tensor exactly once, writes the manifest,
// renames, syncs. On failure the temporary directory is removed and nothing else has changed.
absl::StatusOr<PublishedState> PublishState(const std::string& dir, const std::string& temp_dir,
                                            const StateMetadata& metadata,
                                            const std::vector<RankFileRecord>& records);

// Removes the temporary directory of a save that failed; errors are of no consequence (PruneStates
// sweeps).
void DiscardState(const std::string& temp_dir);

// Removes what interrupted saves and removals left (`*.tmp.*`), states never. By the owner of the
// run lock only, with no save in flight: when a run starts, and as part of PruneStates.
// Returns what was removed.
absl::StatusOr<std::vector<std::string>> SweepTemporary(const std::string& dir);

struct PruneResult {
  std::vector<std::string> removed;  // state directories and stale temporary ones
  std::vector<std::string> damaged;  // newer than the ones kept, but they do not verify: left alone
};

// Call it after a commit only, by the owner of the run lock, with no save in flight. Keeps the
// newest max(keep, 2) states that verify (manifest and file sizes), removes what is older and every
// stale temporary directory. A state is renamed before its files go, so an interruption leaves no
// half state behind.
absl::StatusOr<PruneResult> PruneStates(const std::string& dir, int keep);

}  // namespace baleen
