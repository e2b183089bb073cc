#include "tests/checkpoints/hf_support.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/support/status_matchers.h"

namespace baleen::testing {

ScratchDirectory::ScratchDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "baleen-hf-XXXXXX").string();
  CHECK(::mkdtemp(name.data()) != nullptr) << name;
  path_ = name;
}

ScratchDirectory::~ScratchDirectory() { std::filesystem::remove_all(path_); }

std::string ScratchDirectory::File(absl::string_view name) const { return JoinPath(path_, name); }

std::vector<std::string> ScratchDirectory::List() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path_)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void WriteText(const std::string& path, absl::string_view text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  CHECK(out.good()) << path;
}

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  CHECK(in.good()) << path;
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string SafetensorsText(absl::string_view json, size_t data_bytes) {
  std::string text;
  for (int i = 0; i < 8; ++i) {
    text.push_back(static_cast<char>(uint64_t{json.size()} >> (8 * i) & 0xff));
  }
  return absl::StrCat(text, json, std::string(data_bytes, '\0'));
}

ModelConfig TinyModel() {
  ModelConfig model;
  model.vocab_size = 96;
  model.hidden_size = 160;
  model.num_hidden_layers = 2;
  model.first_k_dense_replace = 1;
  model.num_nextn_predict_layers = 1;
  model.intermediate_size = 192;
  model.moe_intermediate_size = 32;
  model.n_routed_experts = 4;
  model.n_shared_experts = 1;
  model.num_experts_per_tok = 2;
  model.n_group = 2;
  model.topk_group = 1;
  model.num_attention_heads = 2;
  model.q_lora_rank = 48;
  model.kv_lora_rank = 128;
  model.qk_nope_head_dim = 32;
  model.qk_rope_head_dim = 16;
  model.v_head_dim = 32;
  model.max_position_embeddings = 2560;
  model.rope_scaling = YarnConfig{.original_max_position_embeddings = 64};
  model.index_n_heads = 4;
  model.index_head_dim = 32;
  model.index_topk = 16;
  return model;
}

void MakeCheckpoint(const std::string& directory, ExportDType dtype, HfArchitecture architecture) {
  const absl::Status status = InitHfCheckpoint({.model = TinyModel(),
                                                .architecture = architecture,
                                                .dtype = dtype,
                                                .init = {.seed = 7},
                                                .max_shard_bytes = 100'000},
                                               directory);
  ASSERT_THAT(status, IsOk());
}

std::map<std::string, std::string> ReadAll(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    files[entry.path().filename().string()] = ReadText(entry.path().string());
  }
  return files;
}

std::vector<float> ReadFloats(const HfCheckpoint& checkpoint, const std::string& name) {
  const CheckpointTensor* tensor = checkpoint.Find(name);
  CHECK(tensor != nullptr) << name;
  std::vector<float> values(static_cast<size_t>(NumElements(tensor->shape)));
  CHECK_OK(checkpoint.Read(name, WholeBox(tensor->shape), DType::kF32, values.data()));
  return values;
}

std::string Replaced(std::string text, absl::string_view from, absl::string_view to) {
  const size_t at = text.find(std::string(from));
  EXPECT_NE(at, std::string::npos) << "no " << std::string(from) << " in " << text.substr(0, 400);
  if (at != std::string::npos) text.replace(at, from.size(), std::string(to));
  return text;
}

}  // namespace baleen::testing
