// "did you mean ...?": the nearest word, and what other trainers call our keys.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/field.h"

namespace baleen {

// Edits (insert, delete, replace, swap of neighbours) between two words; letter case and '-'
// against '_' count nothing.
int EditDistance(absl::string_view a, absl::string_view b);

// The candidate nearest to `word` if it is near enough (a third of its letters), else "".
std::string Nearest(absl::string_view word, const std::vector<std::string>& candidates);

// Our key path for a key of Megatron, Hugging Face, torchtitan, nanotron, GPT-NeoX, LLaMA-Factory
// or axolotl, else "". Stage keys are written "stages[].steps".
std::string AliasOf(absl::string_view key);

// The key that is meant by an unknown key of the section at `path` (a key path), or "": as a path
// from the top level, "stages[].steps" for what only stages have. `root` are the fields of the
// whole file, `siblings` those of the section.
std::string MeantKey(absl::string_view key, absl::string_view path,
                     const std::vector<Field>& siblings, const std::vector<Field>& root);

// "did you mean 'lr'?" for such a key, as someone writes it who stands in the section `path`; ""
// for "".
std::string SuggestKey(absl::string_view meant, absl::string_view path);

// "stages[].optimizer.lr" from "stages.0.optimizer.lr"; any other path stays as it is.
std::string AnyStage(absl::string_view path);

// "did you mean 'cuda'?" for a word of a closed set ("gpu" -> "cuda").
std::string SuggestChoice(absl::string_view word, const std::vector<std::string>& choices);

}  // namespace baleen
