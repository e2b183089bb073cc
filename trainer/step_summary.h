// From the sums of a step over all ranks to the means that metrics report.
#pragma once

#include "trainer/step.h"

namespace baleen {

// How much a step counts, over all microbatches and ranks: what sums are divided by.
struct StepCounts {
  int64_t targets = 0, mtp_targets = 0, rows = 0, sequences = 0;
};

// weight / count; 0 where nothing is counted.
double Over(double weight, int64_t count);

StepResult SummariseStep(TrainingStage& stage, const StepCounts& step, const StepStats& stats);
// by_position_2L: sums of the losses by position, then their counts.
ValidationResult SummariseValidation(const ModelConfig& model, const StepCounts& passes,
                                     const StepStats& stats, const Tensor& by_position_2L);

}  // namespace baleen
