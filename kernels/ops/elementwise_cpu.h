// Internal: the CPU definitions behind elementwise.h, for float and double; casts for bf16 too.
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
void AddCpu(int64_t count, const T* a, const T* b, T* sum);
template <typename T>
void ScaleCpu(int64_t count, T factor, T* a);
template <typename From, typename To>
void CastCpu(int64_t count, const From* from, To* to);

// Copies `rows` rows of `row_bytes` bytes between arrays with these distances between rows.
void CopyRowsCpu(int64_t rows, int64_t row_bytes, const void* source, int64_t source_stride_bytes,
                 void* target, int64_t target_stride_bytes);

}  // namespace baleen
