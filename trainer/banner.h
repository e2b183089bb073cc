// What a run says before its first step, and the record it makes of each step.
#pragma once

#include <string>

#include "trainer/metrics.h"
#include "trainer/step.h"
#include "trainer/train_state.h"

namespace baleen {

// Where the weights come from: loaded, initialised and ignored tensors, counted.
std::string SourceSummaryText(const WeightSource& source);

// Grid, kernel per op, bytes of this rank by use, tokens per step, losses of the stage.
std::string StageBanner(TrainingStage& stage);

StepRecord MakeStepRecord(TrainingStage& stage, const RunPosition& position,
                          const StepResult& result, double lr, double seconds,
                          int64_t memory_peak_bytes);

}  // namespace baleen
