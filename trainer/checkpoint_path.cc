#include "trainer/checkpoint_path.h"

#include <filesystem>

#include "checkpoints/state_reader.h"
#include "kernels/core/file.h"

namespace baleen {

absl::StatusOr<CheckpointPath> ResolveCheckpointPath(const std::string& path) {
  CheckpointPath resolved;
  resolved.path = path;
  if (FileExists(JoinPath(path, "config.json"))) return resolved;
  if (FileExists(JoinPath(path, kManifestName))) {
    resolved.kind = CheckpointPath::Kind::kState;
    // RUN/checkpoints/step-00000100
    const std::filesystem::path run =
        std::filesystem::path(path).lexically_normal().parent_path().parent_path();
    if (FileExists(run / "run.yaml")) resolved.run_dir = run.string();
    return resolved;
  }
  const std::string checkpoints = JoinPath(path, "checkpoints");
  if (!DirectoryExists(checkpoints)) {
    return DataError(path, ": found neither config.json (a Hugging Face checkpoint), nor ",
                     kManifestName, " (a training state), nor checkpoints/ (a run directory)");
  }
  ASSIGN_OR_RETURN(const std::vector<StateDirectory> states, ListStates(checkpoints));
  if (states.empty()) return DataError(checkpoints, ": this run has written no checkpoint yet");
  resolved.kind = CheckpointPath::Kind::kRun;
  resolved.path = states.front().path;
  resolved.run_dir = path;
  return resolved;
}

}  // namespace baleen
