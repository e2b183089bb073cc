// The training state of a run on this rank: which pieces it saves, how all ranks save together, and
// how a stage is filled from the weight source and a state of any layout.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoints/state_reader.h"
#include "checkpoints/state_writer.h"
#include "kernels/core/log.h"
#include "trainer/training_stage.h"
#include "trainer/weights.h"

namespace baleen {

// Where a run stands. What a checkpoint remembers beside tensors.
struct RunPosition {
  int64_t step = 0;  // optimizer steps of the whole run
  int64_t stage_index = 0;
  int64_t stage_step = 0;        // of this stage
  int64_t consumed_samples = 0;  // of the whole run
  int64_t consumed_tokens = 0;
  int64_t skipped_steps = 0;  // updates left out because a gradient was not finite
};

// Names of parameters that no longer have the source's values: trained in this run before.
using ChangedParameters = std::set<std::string>;

// Fills every parameter (from the state where it holds it, else from the source) and, where the
// state is of this very stage, the optimizer's moments. Adds to `changed`.
absl::Status LoadStage(TrainingStage& stage, const WeightSource& source, StateReader* state,
                       bool with_moments, ChangedParameters& changed);

// What the state took from a checkpoint must come from `source` (after its HashData): the same
// path, not changed since. All ranks return the same status.
absl::Status CheckFrozenSources(const StateReader& state, const WeightSource& source,
                                Communicator& world);

// What must be the same in the run file for a state to fit: key -> value. Learning rates, steps,
// intervals, layouts and the like may differ between a state and the run that resumes it.
using Identity = std::map<std::string, std::string>;
Identity IdentityOf(const RunConfig& run, const WeightSource& source);
// Adds what the training files of the stages from `first_stage` on hold (those of earlier ones may
// be gone). Rank 0 looks, for all.
absl::Status AddDataContents(const RunConfig& run, int64_t first_stage, Communicator& world,
                             Identity& identity);
// DataError with a table of the keys that differ. Adds to `identity` what only the state knows.
absl::Status CheckIdentity(const StateMetadata& state, const std::string& directory,
                           Identity& identity);

struct SaveRequest {
  std::string directory;  // the run's checkpoints folder
  int64_t keep = 0;       // 0: all
  std::string stage_name;
  RunPosition position;
  int64_t seed = 0;
  Identity identity;
};
// Saves on all ranks together; every rank returns the same status. A failure leaves earlier states
// as they were. Returns the directory of the state.
absl::StatusOr<std::string> SaveTrainState(TrainingStage& stage, const WeightSource& source,
                                           const ChangedParameters& changed,
                                           const SaveRequest& request);

// The state to resume from: by `resume` the newest usable one, a given one, or none. All ranks
// agree; files are hashed once each, shared between the ranks.
absl::StatusOr<std::optional<StateReader>> FindState(const std::string& directory,
                                                     const ResumeConfig& resume,
                                                     Communicator& world, const Log& log);

// Opens and verifies one state on all ranks.
absl::StatusOr<StateReader> OpenState(const std::string& path, Communicator& world);

RunPosition PositionOf(const StateMetadata& metadata);

}  // namespace baleen
