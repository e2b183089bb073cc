// Learning rate of a step of a stage: linear warm-up to optimizer.lr, then constant, linear or
// cosine decay to min_lr.
#pragma once

#include "configs/schema/run_config.h"

namespace baleen {

// `stage_step` counts from 0: the rate of the stage's first step is LearningRate(stage, 0).
double LearningRate(const StageConfig& stage, int64_t stage_step);

}  // namespace baleen
