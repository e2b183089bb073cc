// Weights of a bench: normal values from the seed, of one table laid over all parameters
// (random_table.h).
#pragma once

#include "trainer/training_stage.h"

namespace baleen {

// Fills values and masters: weights normal(0, initializer_range), norms 1, biases 0.
void FillBenchWeights(TrainingStage& stage, int64_t seed);

}  // namespace baleen
