// What a run reports: one StepRecord a step, one ValidationRecord a validation. metrics.jsonl is
// the source of truth; TensorBoard events, the terminal's step line and report.html are made from
// the same records.
//
// A value that does not apply in a stage is absent, in the struct and in the JSON.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/core/log.h"
#include "kernels/core/status.h"

namespace baleen {

// Keys of metrics.jsonl are the names of the fields; "kind": "step".
struct StepRecord {
  int64_t step = 0;         // 1 after the first optimizer step of the run
  std::string stage;        // name in the run file
  int64_t stage_step = 0;   // 1 after the stage's first step
  int64_t stage_steps = 0;  // steps of the stage in all
  int64_t consumed_tokens = 0;
  std::optional<double> lm_loss, mtp_loss, balance_loss, indexer_kl;
  std::optional<double> grad_norm_main, grad_norm_indexer;
  double lr = 0;
  double step_seconds = 0;
  double tokens_per_second = 0;
  double tokens_per_second_per_device = 0;
  std::optional<double> mfu;      // 0..1; absent where the device's peak is unknown (CPU)
  double model_tflops = 0;        // model FLOPs of the step / step_seconds / 1e12, all ranks
  int64_t memory_peak_bytes = 0;  // largest rank's pool peak
  std::optional<double> expert_load_max_over_mean, expert_load_min;
  // Per MoE layer the share over the mean of each expert: in measured steps only, in thousandths.
  // In each step a large model would fill a disk with it.
  std::vector<std::vector<double>> expert_load;
  std::optional<double> topk_mass, topk_mass_of_best, recall_at_k, topk_ties;
  std::optional<std::string> selection_hash;  // of all selected keys; the same on every layout
  std::vector<double> indexer_kl_per_layer, topk_mass_per_layer, topk_mass_of_best_per_layer,
      recall_at_k_per_layer;
  double data_wait_seconds = 0;
  int64_t skipped_steps = 0;  // since the run began
  bool skipped = false;       // this step's update
};

// "kind": "validation".
struct ValidationRecord {
  int64_t step = 0;
  std::string stage;
  double lm_loss = 0;
  std::optional<double> mtp_loss;
};

std::string ToJson(const StepRecord& record);  // one line without the newline
std::string ToJson(const ValidationRecord& record);

class MetricsSink {
 public:
  virtual ~MetricsSink() = default;
  virtual void Step(const StepRecord& record) = 0;
  virtual void Validation(const ValidationRecord& record) = 0;
};

// metrics.jsonl of a run directory. Opening it for a run that resumes after `resume_step` cuts what
// was recorded later, and a torn last line, off its end. Write errors (a full disk) are logged once
// and never stop a run.
absl::StatusOr<std::unique_ptr<MetricsSink>> OpenJsonlSink(const std::string& path,
                                                           int64_t resume_step, const Log& log);
// tensorboard/events.out.tfevents.*; a resumed run opens a new file.
absl::StatusOr<std::unique_ptr<MetricsSink>> OpenTensorBoardSink(const std::string& directory,
                                                                 const Log& log);
// One line every `interval` steps and one per validation.
std::unique_ptr<MetricsSink> MakeConsoleSink(int64_t interval, const Log& log);

}  // namespace baleen
