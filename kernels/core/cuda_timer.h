// How long a GPU takes, by its own clock.
#pragma once

#include <functional>

#include "kernels/core/context.h"

namespace baleen {

// Seconds from the beginning to the end of what `work` enqueues on the compute stream, its gaps
// included. Waits for it. Only of a CUDA context, in a build with CUDA.
double CudaSeconds(const Context& context, const std::function<void()>& work);

}  // namespace baleen
