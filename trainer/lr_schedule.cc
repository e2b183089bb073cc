#include "trainer/lr_schedule.h"

#include <algorithm>
#include <cmath>

namespace baleen {

double LearningRate(const StageConfig& stage, int64_t stage_step) {
  const LrScheduleConfig& schedule = stage.lr_schedule;
  const double peak = stage.optimizer.lr;
  // The first warm-up step already moves: step s of w uses (s + 1) / w of the peak.
  if (stage_step < schedule.warmup_steps) {
    return peak * static_cast<double>(stage_step + 1) / static_cast<double>(schedule.warmup_steps);
  }
  if (schedule.style == LrStyle::kConstant) return peak;
  const int64_t steps =
      std::max<int64_t>(1, schedule.decay_steps.value_or(stage.steps - schedule.warmup_steps));
  const double done = std::min(
      1.0, static_cast<double>(stage_step - schedule.warmup_steps) / static_cast<double>(steps));
  const double left =
      schedule.style == LrStyle::kLinear ? 1 - done : 0.5 * (1 + std::cos(M_PI * done));
  return schedule.min_lr + (peak - schedule.min_lr) * left;
}

}  // namespace baleen
