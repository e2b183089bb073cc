// The run file on disk: read strictly, checked as a whole, printed with the origin of each value,
// described.
//
// Every fault of the file and of the command line is reported at once, sorted by place, in the form
//   configs/run/tiny.yaml:23:7: error: unknown key 'optimiser' in stages[1]
//      23 |       optimiser: {lr: 7.3e-6}
//         |       ^~~~~~~~~  did you mean 'optimizer'?
// Nothing here knows the checkpoint, the data or the number of ranks; who does, reports through
// ConfigErrorAt().
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/model_config.h"
#include "configs/schema/origin.h"
#include "configs/schema/run_config.h"
#include "kernels/core/status.h"

namespace baleen {

// A run file that is valid as far as it can be told without looking at anything else.
struct LoadedRun {
  RunConfig config;
  std::string path;
  // Key path ("optimizer.lr", "stages.0.optimizer.lr", "data.train.0.path") -> where its value
  // comes from. A stage's path is there only when the stage itself gives the key. Sections and
  // lists have entries too, unless defaulted.
  std::map<std::string, Origin> origins;
};

// Reads the file, then applies overrides "a.b=value" (or "--a.b=value"; '-' is '_';
// "stages.0.steps=10") in order. ConfigError with all faults, or when the file cannot be read.
absl::StatusOr<LoadedRun> LoadRunConfig(const std::string& path,
                                        const std::vector<std::string>& overrides = {});
// The same from memory; `name` stands for the path in messages and origins.
absl::StatusOr<LoadedRun> ParseRunConfig(const std::string& name, absl::string_view text,
                                         const std::vector<std::string>& overrides = {});

// Rules between values of the run file (batch sizes, schedules, names, exactly one model source).
// LoadRunConfig has already asked this.
absl::Status ValidateRunConfig(const LoadedRun& loaded);

// A ConfigError about the value of `key`, in the form above. A stage's key
// ("stages.1.parallelism.expert") that the stage does not give is pointed at where the top level
// gives it; a default is named as such.
absl::Status ConfigErrorAt(const LoadedRun& loaded, absl::string_view key,
                           absl::string_view message);
// Several at once, sorted by place; ok when there are none.
struct KeyError {
  std::string key;
  std::string message;
};
absl::Status ConfigErrorsAt(const LoadedRun& loaded, const std::vector<KeyError>& errors);

// The effective values as a run file that reads back to the same RunConfig; each line ends with its
// origin.
std::string PrintRunConfig(const LoadedRun& loaded);

// Keys whose effective values differ: "losses.mtp 0.1 -> 0.5", or "stages.1.losses.mtp ..." where
// not every stage has the same change. Stages that only one of the two has are passed over.
std::vector<std::string> ChangedKeys(const RunConfig& before, const RunConfig& after);

// JSON Schema (draft 2020-12) of the run file, for editors.
std::string RunConfigJsonSchema();

// Reference of every key as Markdown: type, default, range, unit, meaning.
std::string RunConfigReference();

// A model file (configs/model/*.yaml): the keys of config.json, all sizes given, as strict as a run
// file.
absl::StatusOr<ModelConfig> LoadModelYaml(const std::string& path);
absl::StatusOr<ModelConfig> ParseModelYaml(const std::string& name, absl::string_view text);

}  // namespace baleen
