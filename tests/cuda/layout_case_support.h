// The cases of the layout tests on GPUs.
#pragma once

#include "tests/trainer/layout_cases.h"

namespace baleen::testing {

// Heads of the published models, so that their kernels run; all else small. Weights are small
// enough for the indexers' gradients to have few gates near 0 (in fp64, rounding the weights alone
// to bf16 leaves them a cosine of 0.9995).
RigCase MakeGpuCase(RecipeKind kind, const Layout& layout);

}  // namespace baleen::testing
