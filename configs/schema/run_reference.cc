// RunConfigJsonSchema and RunConfigReference: the fields of the run and model file, described.
#include <string>

#include "absl/strings/str_cat.h"
#include "configs/schema/describe_fields.h"
#include "configs/schema/model_fields.h"
#include "configs/schema/run_fields.h"
#include "configs/schema/run_file.h"

namespace baleen {

std::string RunConfigJsonSchema() {
  RunConfig config;
  return FieldsJsonSchema("Baleen run file", RunFields(config));
}

std::string RunConfigReference() {
  RunConfig run;
  ModelConfig model;
  return absl::StrCat(
      "# Run file and model file\n\n"
      "Made from the fields in configs/schema; a test holds it to them.\n\n"
      "Integers may have `_` between digits and a suffix: Ki, Mi, Gi (powers of 1024), K, M, B "
      "(powers of\n"
      "1000), so `128Ki` is 131072. Booleans are `true` and `false`. On the command line, "
      "`key.path=value`\n"
      "overrides a key (`stages.0.steps=10`, `optimizer.betas=[0.9,0.99]`); an empty value takes "
      "an\n"
      "optional key back.\n\n"
      "## Run file\n\n",
      FieldsReference(RunFields(run), 3), "## Model file\n\n",
      FieldsReference(ModelFields(model), 3));
}

}  // namespace baleen
