// Weights of a bench: normal values from the seed, made once as a table and laid over all
// parameters on the device, so that two billion take no time. What a kernel costs depends on
// values being random, not on their being independent from one another.
#pragma once

#include "trainer/training_stage.h"

namespace baleen {

// Fills values and masters: weights normal(0, initializer_range), norms 1, biases 0.
void FillBenchWeights(TrainingStage& stage, int64_t seed);

}  // namespace baleen
