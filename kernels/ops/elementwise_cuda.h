// Internal: the kernels behind elementwise.h. Arrays of fp32 or bf16 in device memory; enqueued on
// `stream` (a cudaStream_t). Arithmetic in fp32, one rounding.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// sum = a + b; sum may be a.
void AddCuda(CudaElement element, int64_t count, const void* a, const void* b, void* sum,
             void* stream);
void ScaleCuda(CudaElement element, int64_t count, double factor, void* a, void* stream);
void CastCuda(CudaElement from_element, CudaElement to_element, int64_t count, const void* from,
              void* to, void* stream);
void FillZeroCuda(int64_t bytes, void* a, void* stream);
void FillIntCuda(int64_t count, int32_t value, int32_t* a, void* stream);
void CopyCuda(int64_t bytes, const void* from, void* to, void* stream);

}  // namespace baleen
