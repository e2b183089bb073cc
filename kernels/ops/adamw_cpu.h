// Internal: the CPU definition behind adamw.h, for float and double.
#pragma once

#include <cstdint>

#include "kernels/ops/adamw.h"

namespace baleen {

template <typename T>
void AdamwCpu(const AdamwParams& params, int64_t count, T* param, const T* grad, T* m, T* v,
              T clip_scale);
template <typename T>
void ClipControlCpu(double sum_of_squares, double max_norm, T* control);

}  // namespace baleen
