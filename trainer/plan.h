// The plan of a training stage on a number of ranks that need not exist: what the first rank of
// each pipeline stage holds, what crosses ranks, how long a step takes on a device of the table.
//
// Bytes, messages and operations are counted by running the model dry (dry_rank.h); times are those
// counts over the device's ceilings (device_table.h), put in order by the pipeline schedule.
#pragma once

#include <string>
#include <vector>

#include "parallel/pipeline_engine.h"
#include "trainer/device_table.h"
#include "trainer/dry_rank.h"

namespace baleen {

struct PlanRequest {
  StageConfig stage;
  ModelConfig model;  // the checkpoint's; the stage's dsa section is applied here
  int world_size = 1;
  DeviceSpec device;
};

struct StagePlan {
  PlanRequest request;
  Recipe recipe;
  StageLayout layout;
  DType dtype = DType::kF32;
  std::vector<RankPlan> ranks;  // the first rank of each pipeline stage
  Timeline timeline;            // seconds
  double bubble = 0;            // idle share of the pipeline's rank time
  // After the pipeline, of the slowest stage: reduction, norms, AdamW, and what of the values'
  // gathers neither AdamW nor the next step's first forward hides.
  double update_seconds = 0;
  double step_seconds = 0;
  double tokens_per_second = 0;
  double mfu = 0;  // model FLOPs (flops.h) over those of all devices at their matmul ceiling

  // Peak of a step and what the device keeps for itself, on pipeline rank `index`.
  int64_t NeededBytes(size_t index) const;
  size_t HeaviestRank() const;
  bool Fits() const;
};

// ConfigError: a layout, size or recipe that cannot be, as baleen train would say it.
absl::StatusOr<StagePlan> PlanStage(const PlanRequest& request);

// Seconds of counted work on the device: ops one after the other, then the messages; with both at
// once the longer of the two.
enum class Overlap { kNone, kMessages };
double Seconds(const CountedWork& work, const std::map<std::string, int>& spans,
               const DeviceSpec& device, Overlap overlap);

// The layouts nearest to the asked one (parallelism, then recompute, on the same ranks) whose every
// rank fits, at most `count`; each with one line that names its changes. Empty if the search, which
// is bounded, found none.
struct FittingLayout {
  std::string changes;  // "parallelism.pipeline=16 recompute=full"
  int64_t needed_bytes = 0;
};
std::vector<FittingLayout> NearestFittingLayouts(const PlanRequest& request, size_t count);

struct ReportOptions {
  bool schedule_grid = false;
};
std::string PlanText(const StagePlan& plan, const ReportOptions& options);
std::string PlanJson(const std::vector<StagePlan>& plans);  // one object

}  // namespace baleen
