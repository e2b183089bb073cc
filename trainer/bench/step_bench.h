// baleen bench step and layer: a training stage with random weights and tokens, whole optimizer
// steps of it or one block.
#pragma once

#include "configs/schema/run_file.h"
#include "trainer/bench/bench_ids.h"
#include "trainer/bench/measure.h"
#include "trainer/run_device.h"
#include "trainer/training_stage.h"

namespace baleen {

// What a measurement is of, beside its figures.
struct BenchResult {
  std::string what;  // "step", or "layer, moe"
  std::string stage;
  BenchIds ids = BenchIds::kIndexer;
  std::string kernel;                  // the recipe's
  int64_t seq_length = 0, tokens = 0;  // of a step, over all ranks
  int world_size = 1;
  double flops_per_token = 0;  // flops.h
  // What `seconds` of flops_per_token are: the step's median, or the block's share of it.
  double seconds = 0;
  Measured measured;
  double lm_loss = 0, indexer_kl = 0;
  bool skipped = false;  // a gradient was not finite
  // Of `baleen plan` for the same stage and device; 0: not asked (layers).
  double planned_seconds = 0;
  int64_t planned_bytes = 0;
};

struct BenchRequest {
  int64_t seed = 0;
  MeasureOptions measure;
  std::vector<BenchIds> ids;
};

// One result for each of request.ids that applies: a stage without selected keys is measured once.
absl::StatusOr<std::vector<BenchResult>> BenchSteps(const RunSection& run, const StageConfig& stage,
                                                    const ModelConfig& model, RunDevice& device,
                                                    const BenchRequest& request);

// One block: forward, input gradient, weight gradient, between embedding and head; no optimizer.
absl::StatusOr<std::vector<BenchResult>> BenchLayer(const RunSection& run, const StageConfig& stage,
                                                    const ModelConfig& model, bool moe,
                                                    RunDevice& device, const BenchRequest& request);

}  // namespace baleen
