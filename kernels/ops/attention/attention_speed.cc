#include "kernels/ops/attention/attention_speed.h"

#include <iterator>

#include "kernels/ops/attention/masked_attention_gpu.h"
#include "kernels/ops/attention/sparse_attention_gpu.h"

namespace baleen {
namespace {

// The tensor-core kernels with a selection of 2048 keys, at random; the backward with its target.
struct MeasuredSpeed {
  double num_keys;
  AttentionSpeed speed;
};
constexpr MeasuredSpeed kMasked[] = {
    {4096, {621, 424}}, {8192, {673, 452}}, {16384, {635, 459}}, {32768, {650, 448}}};

}  // namespace

AttentionSpeed SparseAttentionSpeed(DType dtype, int64_t num_heads, int64_t width,
                                    int64_t value_dim, int64_t num_selected) {
  if (!SparseAttentionOnTensorCores(dtype, num_heads, width, value_dim, num_selected)) {
    return {.forward = 8.3, .backward = 7.3};
  }
  // The kernels work on tiles of 64 heads, one or two, or on 2 or 4 neighbouring queries packed.
  if (num_heads == 16) return {.forward = 403, .backward = 236};
  if (num_heads == 32) return {.forward = 455, .backward = 275};
  if (num_heads <= 64) {
    const double share = static_cast<double>(num_heads) / 64;
    return {.forward = 650 * share, .backward = 395 * share};
  }
  const double share = static_cast<double>(num_heads) / 128;
  return {.forward = 655 * share, .backward = 470 * share};
}

AttentionSpeed MaskedAttentionSpeed(DType dtype, int64_t q_dim, int64_t v_dim, int64_t num_keys) {
  if (!MaskedAttentionOnTensorCores(dtype, q_dim, v_dim)) return {.forward = 29, .backward = 18};
  const double length = static_cast<double>(num_keys);
  if (length <= kMasked[0].num_keys) return kMasked[0].speed;
  for (size_t i = 1; i < std::size(kMasked); ++i) {
    const auto& [to, high] = kMasked[i];
    if (length > to) continue;
    const auto& [from, low] = kMasked[i - 1];
    const double share = (length - from) / (to - from);
    return {.forward = low.forward + share * (high.forward - low.forward),
            .backward = low.backward + share * (high.backward - low.backward)};
  }
  return std::rbegin(kMasked)->speed;
}

}  // namespace baleen
