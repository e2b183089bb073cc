// Internal: the CPU definition behind swiglu.h, for float and double.
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
void SwigluCpu(int64_t count, const T* gate, const T* up, T* y);
template <typename T>
void SwigluBackwardCpu(int64_t count, const T* dy, const T* gate, const T* up, T* dgate, T* dup);

}  // namespace baleen
