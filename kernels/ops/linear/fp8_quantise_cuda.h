// Internal: the quantisers behind fp8_quantise.h on the GPU, from bf16.
//
// Bytes: 3 an element (read 2, write 1) and 4 for each scale. Every element is read once.
#pragma once

#include <cstdint>

namespace baleen {

// Layouts and padding: Fp8Operand.
struct Fp8QuantiseCudaArgs {
  int64_t batch = 1, rows = 0, columns = 0;  // of the values; columns a multiple of 8
  const void* values = nullptr;              // bf16, 16-byte aligned
  int64_t outer_stored = 0, depth_stored = 0;
  int64_t scale_stride = 0;  // floats from one row of scales to the next
  void* codes = nullptr;
  float* scales = nullptr;
};

void Fp8QuantiseRowsCuda(const Fp8QuantiseCudaArgs& args, void* stream);
void Fp8QuantiseColumnsCuda(const Fp8QuantiseCudaArgs& args, void* stream);
// Both of them from the same values, which are read once.
void Fp8QuantiseBothCuda(const Fp8QuantiseCudaArgs& by_rows, const Fp8QuantiseCudaArgs& by_columns,
                         void* stream);
// `transposed`: the depth are the rows.
void Fp8QuantiseBlocksCuda(const Fp8QuantiseCudaArgs& args, bool transposed, void* stream);

}  // namespace baleen
