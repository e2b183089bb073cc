// Tile by tile: 1 x 128 or 128 x 128 elements [outer, depth] that share a scale.
#include "kernels/ops/linear/fp8_quantise_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace baleen {
namespace {

// The smallest 2^e with 448 * 2^e >= amax, e >= -126. amax = m * 2^E with m in [0.5, 1), 448 =
// 0.875 * 2^9.
float ScaleOf(double amax) {
  if (!std::isfinite(amax)) return static_cast<float>(amax);
  if (amax == 0) return 1.0f;
  int exponent = 0;
  const double mantissa = std::frexp(amax, &exponent);
  return std::ldexp(1.0f, std::max(-126, mantissa <= 0.875 ? exponent - 9 : exponent - 8));
}

// NaN has one code.
template <typename T>
uint8_t CodeOf(T value, float scale) {
  if (!std::isfinite(scale) || std::isnan(value)) return 0x7f;
  return Float8E4M3::FromFloat(static_cast<float>(value / static_cast<T>(scale))).bits;
}

struct Extents {
  explicit Extents(const Fp8Operand& operand)
      : runs(operand.scaling == Fp8Scaling::kRuns),
        side(runs ? 1 : kFp8Depth),
        outer_tiles((operand.outer + side - 1) / side),
        depth_tiles(operand.depth_stored() / kFp8Depth),
        scale_stride(operand.scales.dim(1)) {}
  // Of tile (t, d) of matrix b.
  int64_t ScaleAt(int64_t b, int64_t t, int64_t d) const {
    return runs ? d * scale_stride + t : (b * outer_tiles + t) * scale_stride + d;
  }
  bool runs;
  int64_t side, outer_tiles, depth_tiles, scale_stride;
};

}  // namespace

template <typename T>
void Fp8QuantiseCpu(const Tensor& x, Fp8Source source, const Fp8Operand& operand) {
  const Extents extents(operand);
  const bool turned = source == Fp8Source::kTransposed;
  const int64_t outer_step = turned ? 1 : operand.depth, depth_step = turned ? operand.outer : 1;
  uint8_t* const codes = static_cast<uint8_t*>(operand.codes.raw());
  float* const scales = operand.scales.data<float>();
  std::memset(codes, 0, static_cast<size_t>(operand.codes.bytes()));
  std::fill_n(scales, operand.scales.num_elements(), 1.0f);
  for (int64_t b = 0; b < operand.batch; ++b) {
    const T* const values = x.data<T>() + b * operand.outer * operand.depth;
    for (int64_t t = 0; t < extents.outer_tiles; ++t) {
      for (int64_t d = 0; d < extents.depth_tiles; ++d) {
        const int64_t r0 = t * extents.side, c0 = d * kFp8Depth;
        const int64_t r1 = std::min(operand.outer, r0 + extents.side),
                      c1 = std::min(operand.depth, c0 + kFp8Depth);
        double amax = 0;  // std::max passes over NaN
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t c = c0; c < c1; ++c) {
            amax = std::max(amax, std::fabs(double{values[r * outer_step + c * depth_step]}));
          }
        }
        const float scale = ScaleOf(amax);
        scales[extents.ScaleAt(b, t, d)] = scale;
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t c = c0; c < c1; ++c) {
            const T value = values[r * outer_step + c * depth_step];
            codes[(b * operand.outer_stored() + r) * operand.depth_stored() + c] =
                CodeOf(value, scale);
          }
        }
      }
    }
  }
}

template <typename T>
void Fp8DequantiseCpu(const Fp8Operand& operand, const Tensor& values) {
  const Extents extents(operand);
  const auto* const codes = static_cast<const uint8_t*>(operand.codes.raw());
  const float* const scales = operand.scales.data<float>();
  T* out = values.data<T>();
  for (int64_t b = 0; b < operand.batch; ++b) {
    for (int64_t r = 0; r < operand.outer; ++r) {
      const uint8_t* const row = codes + (b * operand.outer_stored() + r) * operand.depth_stored();
      for (int64_t c = 0; c < operand.depth; ++c) {
        const float scale = scales[extents.ScaleAt(b, r / extents.side, c / kFp8Depth)];
        *out++ = static_cast<T>(Float8E4M3{row[c]}.ToFloat()) * static_cast<T>(scale);
      }
    }
  }
}

template void Fp8QuantiseCpu<float>(const Tensor&, Fp8Source, const Fp8Operand&);
template void Fp8QuantiseCpu<double>(const Tensor&, Fp8Source, const Fp8Operand&);
template void Fp8DequantiseCpu<float>(const Fp8Operand&, const Tensor&);
template void Fp8DequantiseCpu<double>(const Fp8Operand&, const Tensor&);

}  // namespace baleen
