// A training stage to measure: random weights, random tokens, selected keys as asked.
#pragma once

#include <memory>
#include <vector>

#include "trainer/bench/bench_tokens.h"
#include "trainer/bench/step_bench.h"

namespace baleen {

struct BenchStage {
  BenchTokens tokens;  // what the stage's loader reads
  std::unique_ptr<TrainingStage> stage;
};

// The sizes that a run file names: weights are random in any case.
absl::StatusOr<ModelConfig> ReadBenchModel(const ModelSection& model);

// Every rank calls it.
absl::StatusOr<BenchStage> MakeBenchStage(const RunSection& run, StageConfig config,
                                          const ModelConfig& model, RunDevice& device,
                                          int64_t seed);

// The asked ones where the stage selects keys; otherwise kIndexer alone, which changes nothing.
std::vector<BenchIds> IdsOf(const TrainingStage& stage, const BenchRequest& request);
void UseIds(TrainingStage& stage, BenchIds ids, int64_t seed);

// A result without figures.
BenchResult DescribeStage(const TrainingStage& stage, BenchIds ids);

}  // namespace baleen
