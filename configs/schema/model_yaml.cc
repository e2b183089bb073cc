// LoadModelYaml: a model file (configs/model/*.yaml) into a ModelConfig.
#include <string>
#include <vector>

#include "configs/schema/field.h"
#include "configs/schema/model_fields.h"
#include "configs/schema/problems.h"
#include "configs/schema/read_fields.h"
#include "configs/schema/run_file.h"
#include "configs/schema/yaml_document.h"
#include "kernels/core/file.h"

namespace baleen {

absl::StatusOr<ModelConfig> ParseModelYaml(const std::string& name, absl::string_view text) {
  Problems problems;
  YamlNode root;
  if (!ParseYaml(name, text, root, problems)) return problems.ToStatus();
  ModelConfig config;
  std::vector<Field> fields = ModelFields(config);
  const ReadResult read = ReadFields(root, fields, problems);
  RETURN_IF_ERROR(problems.ToStatus());
  // Naming an indexer size makes it a V3.2 model: its checkpoint holds indexer tensors.
  for (const char* key : {"index_n_heads", "index_head_dim", "index_topk"}) {
    config.has_indexer |= read.origins.at(key).kind != Origin::Kind::kDefault;
  }
  RETURN_IF_ERROR(config.Validate(name));
  return config;
}

absl::StatusOr<ModelConfig> LoadModelYaml(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMostYamlBytes);
  if (!text.ok()) return ConfigError("model file: ", text.status().message());
  return ParseModelYaml(path, *text);
}

}  // namespace baleen
