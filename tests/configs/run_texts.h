// Run files for the tests of configs/: one that is right, and ways to make it wrong.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "configs/schema/run_file.h"

namespace baleen::testing {

// Right, and as short as may be: two stages, only required keys and what the tests turn.
inline constexpr char kGoodRun[] = R"(run: {name: test, dir: runs/test}
model: {checkpoint: ckpt}
parallelism: {tensor: 2}
data:
  seq_length: 64
  train: [{path: data/a}]
micro_batch_size: 2
stages:
  - name: warmup
    attention: dense
    train: indexer
    steps: 10
    global_batch_size: 4
    optimizer: {lr: 1e-3}
  - {name: sparse, attention: sparse, train: all, steps: 20, global_batch_size: 8, optimizer: {lr: 1e-4}}
optimizer: {weight_decay: 0.2}
)";

// kGoodRun with one piece replaced; an empty `from` puts `to` at the end.
inline std::string Edited(const std::string& from, const std::string& to) {
  if (from.empty()) return kGoodRun + to;
  const std::string text = absl::StrReplaceAll(kGoodRun, {{from, to}});
  return text == kGoodRun ? "the edit does not apply: " + from : text;
}

// What loading says, "" if it succeeds.
inline std::string RunError(const std::string& text,
                            const std::vector<std::string>& overrides = {}) {
  const auto loaded = ParseRunConfig("run.yaml", text, overrides);
  return loaded.ok() ? "" : std::string(loaded.status().message());
}

}  // namespace baleen::testing
