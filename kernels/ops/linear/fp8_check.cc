#include "kernels/ops/linear/fp8_check.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/core/status.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/linear/fp8_linear.h"

namespace baleen {
namespace {

uint32_t Mix(uint64_t index) {
  uint64_t z = (index + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>((z ^ (z >> 27)) >> 33);
}

// -4 .. 4 times one of 1, 2, 4 for each tile of `tile_rows` x `tile_columns`, whose first element
// is a 4: so the tile's scale is that power of two times 2^-6.
Tensor WholeNumbers(const Context& host, DType dtype, int64_t rows, int64_t columns,
                    int64_t tile_rows, int64_t tile_columns, uint64_t seed) {
  const Tensor values = host.Empty(dtype, {rows, columns});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const bool first = r % tile_rows == 0 && c % tile_columns == 0;
      const uint64_t tile = seed * 1000003 + r / tile_rows * 4099 + c / tile_columns;
      const int whole = first ? 4 : static_cast<int>(Mix(seed + r * columns + c) % 9) - 4;
      const float value = std::ldexp(static_cast<float>(whole), static_cast<int>(Mix(tile) % 3));
      if (dtype == DType::kBF16) {
        values.data<BFloat16>()[r * columns + c] = BFloat16::FromFloat(value);
      } else {
        values.data<float>()[r * columns + c] = value;
      }
    }
  }
  return values;
}

// The same numbers for the device, in bf16, and for the definition.
struct Pair {
  Tensor device, host;
};

class Checker {
 public:
  explicit Checker(const Context& context) : context_(context) {}

  const Context& host() const { return host_; }
  Pair Make(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns, uint64_t seed) {
    return {CopyToDevice(context_, WholeNumbers(host_, DType::kBF16, rows, columns, tile_rows,
                                                tile_columns, seed)),
            WholeNumbers(host_, DType::kF32, rows, columns, tile_rows, tile_columns, seed)};
  }

  absl::Status Compare(const char* product, const Tensor& device, const Tensor& expected) const {
    const Tensor found = CopyToHost(context_, device);
    for (int64_t i = 0; i < expected.num_elements(); ++i) {
      float want = expected.data<float>()[i], have = 0;
      if (found.dtype() == DType::kBF16) {
        want = BFloat16::FromFloat(want).ToFloat();
        have = found.data<BFloat16>()[i].ToFloat();
      } else {
        have = found.data<float>()[i];
      }
      if (have == want) continue;
      return EnvironmentError(
          "precision.gemm = fp8_block: checking FP8 products on this GPU: ", product, " ",
          expected.DebugString(), " element ", i, " is ", have, ", expected ", want,
          "; leave precision.gemm at auto, and report this with the versions of "
          "driver and cuBLASLt");
    }
    return absl::OkStatus();
  }

  absl::Status Dense() {
    constexpr int64_t kRows = 160, kIn = 656, kOut = 272;  // 656: 6 runs, more than one vector
    const Pair x = Make(kRows, kIn, 1, 128, 1), dy = Make(kRows, kOut, 1, 128, 2),
               w = Make(kOut, kIn, 128, 128, 3);
    RETURN_IF_ERROR(Compare("y = x W^T", Fp8Linear(context_, x.device, w.device),
                            Fp8Linear(host_, x.host, w.host)));
    RETURN_IF_ERROR(Compare("dx = dy W", Fp8LinearBackwardInput(context_, dy.device, w.device),
                            Fp8LinearBackwardInput(host_, dy.host, w.host)));
    const Pair columns_x = Make(kRows, kIn, 128, 1, 4), columns_dy = Make(kRows, kOut, 128, 1, 5);
    const Tensor device = context_.Zeros(DType::kF32, {kOut, kIn}),
                 expected = host_.Zeros(DType::kF32, {kOut, kIn});
    Fp8LinearBackwardWeight(context_, columns_dy.device, columns_x.device, device);
    Fp8LinearBackwardWeight(host_, columns_dy.host, columns_x.host, expected);
    return Compare("dW = dy^T x", device, expected);
  }

  absl::Status Experts(const std::vector<int32_t>& offsets) {
    constexpr int64_t kIn = 272, kOut = 208;
    const int64_t experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
    const Pair x = Make(rows, kIn, 1, 128, 6), dy = Make(rows, kOut, 1, 128, 7),
               w = Make(experts * kOut, kIn, 128, 128, 8);
    const Tensor host_offsets = host_.Empty(DType::kI32, {experts + 1});
    std::copy(offsets.begin(), offsets.end(), host_offsets.data<int32_t>());
    const Tensor device_offsets = CopyToDevice(context_, host_offsets);
    const Shape shape = {experts, kOut, kIn};
    const Pair stacked = {w.device.Reshaped(shape), w.host.Reshaped(shape)};
    RETURN_IF_ERROR(Compare("experts' y = x W^T",
                            Fp8GroupedLinear(context_, x.device, stacked.device, device_offsets),
                            Fp8GroupedLinear(host_, x.host, stacked.host, host_offsets)));
    return Compare(
        "experts' dx = dy W",
        Fp8GroupedLinearBackwardInput(context_, dy.device, stacked.device, device_offsets),
        Fp8GroupedLinearBackwardInput(host_, dy.host, stacked.host, host_offsets));
  }

 private:
  const Context& context_;
  const Context host_ = Context::Cpu();
};

}  // namespace

absl::Status CheckFp8(const Context& context) {
  if (!OnCuda(context)) return absl::OkStatus();
  Checker checker(context);
  RETURN_IF_ERROR(checker.Dense());
  RETURN_IF_ERROR(checker.Experts({0, 40, 40, 160}));
  // Enough rows an expert for two blocks to share its weight.
  return checker.Experts({0, 600, 1100});
}

}  // namespace baleen
