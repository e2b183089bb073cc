// What the Hugging Face tests share: a scratch directory, a tiny model, hand-made safetensors
// files.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoints/hf_checkpoint.h"
#include "checkpoints/hf_init.h"
#include "configs/schema/model_config.h"

namespace baleen::testing {

// A new empty directory, removed with everything in it.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  const std::string& path() const { return path_; }
  std::string File(absl::string_view name) const;
  // Names inside, sorted.
  std::vector<std::string> List() const;

 private:
  std::string path_;
};

void WriteText(const std::string& path, absl::string_view text);
std::string ReadText(const std::string& path);

// Length word + `json` + `data_bytes` zero bytes.
std::string SafetensorsText(absl::string_view json, size_t data_bytes);

// 1 dense and 1 MoE layer and an MTP layer; hidden 160 and latent 144 give partial FP8 blocks on
// both sides.
ModelConfig TinyModel();

// A random V3.1 checkpoint of TinyModel() in FP8, several shards, in `directory`.
void MakeCheckpoint(const std::string& directory, ExportDType dtype = ExportDType::kFp8,
                    HfArchitecture architecture = HfArchitecture::kV31);

// Every regular file of a directory, name -> contents.
std::map<std::string, std::string> ReadAll(const std::string& directory);

// The values of a whole tensor.
std::vector<float> ReadFloats(const HfCheckpoint& checkpoint, const std::string& name);

// Replaces the first occurrence; fails the test when there is none.
std::string Replaced(std::string text, absl::string_view from, absl::string_view to);

}  // namespace baleen::testing
