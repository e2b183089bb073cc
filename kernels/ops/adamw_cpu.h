// Internal: the CPU definition behind adamw.h, for float and double; Moment is T or BFloat16.
#pragma once

#include <cstdint>

#include "kernels/ops/adamw.h"

namespace baleen {

template <typename T, typename Moment>
void AdamwCpu(const AdamwParams& params, int64_t count, T* param, const T* grad, Moment* m,
              Moment* v, T clip_scale);
template <typename T>
void ClipControlCpu(double sum_of_squares, double max_norm, T* control);

}  // namespace baleen
