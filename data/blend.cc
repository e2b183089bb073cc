#include "data/blend.h"

#include <cmath>
#include <numeric>

#include "kernels/core/check.h"

namespace baleen {
namespace {

constexpr int64_t kMaxPeriod = int64_t{1} << 20;
constexpr double kExactness = 1e-9;

bool AllWhole(absl::Span<const double> shares, int64_t period) {
  for (const double share : shares) {
    const double parts = share * static_cast<double>(period);
    if (std::round(parts) < 1 || std::abs(parts - std::round(parts)) > kExactness * parts)
      return false;
  }
  return true;
}

// Whole numbers W_i in the proportion of `shares`, which add up to 1.
std::vector<int64_t> WholeParts(absl::Span<const double> shares) {
  int64_t period = 1;
  while (period < kMaxPeriod && !AllWhole(shares, period)) ++period;
  std::vector<int64_t> parts;
  for (const double share : shares) {
    parts.push_back(std::max<int64_t>(1, std::llround(share * static_cast<double>(period))));
  }
  return parts;
}

}  // namespace

absl::StatusOr<Blend> Blend::Create(absl::Span<const double> weights) {
  if (weights.empty())
    return ConfigError("data: no source given, expected at least one path with a weight");
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] > 0) || !std::isfinite(weights[i])) {
      return ConfigError("data: weight of source ", i, ": found ", weights[i],
                         ", expected a positive number");
    }
    sum += weights[i];
  }
  if (!std::isfinite(sum))
    return ConfigError("data: the weights add up to more than a double holds");
  std::vector<double> shares;
  for (const double weight : weights) shares.push_back(weight / sum);

  Blend blend;
  blend.parts_ = WholeParts(shares);
  const int64_t period = std::accumulate(blend.parts_.begin(), blend.parts_.end(), int64_t{0});
  std::vector<int64_t> errors(blend.parts_.size(), 0);  // W times the sampling error
  std::vector<uint32_t> counts(blend.parts_.size(), 0);
  for (int64_t slot = 0; slot < period; ++slot) {
    size_t chosen = 0;
    for (size_t i = 0; i < errors.size(); ++i) {
      errors[i] += blend.parts_[i];
      if (errors[i] > errors[chosen]) chosen = i;
    }
    errors[chosen] -= period;
    blend.source_of_slot_.push_back(static_cast<uint32_t>(chosen));
    blend.earlier_in_period_.push_back(counts[chosen]++);
  }
  for (size_t i = 0; i < errors.size(); ++i) CHECK_EQ(errors[i], 0) << "blend: source " << i;
  return blend;
}

Blend::Pick Blend::At(int64_t sample) const {
  CHECK_GE(sample, 0);
  const int64_t slot = sample % period();
  const int64_t source_idx = source_of_slot_[slot];
  return {source_idx, sample / period() * parts_[source_idx] + earlier_in_period_[slot]};
}

}  // namespace baleen
