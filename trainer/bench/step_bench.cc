#include "trainer/bench/step_bench.h"

#include "kernels/core/cuda_context.h"
#include "trainer/bench/bench_stage.h"
#include "trainer/flops.h"
#include "trainer/plan.h"
#include "trainer/step.h"

namespace baleen {
namespace {

// What `baleen plan` says of the stage on a GPU like this one.
void AddPlan(const StageConfig& config, const ModelConfig& model, RunDevice& device,
             BenchResult& result) {
  std::string name = "cpu";
  if (device.cuda()) {
    const bool h200 = device.context().cuda().properties().name.find("H200") != std::string::npos;
    name = h200 ? "h200" : "h100";
  }
  const auto spec = FindDevice(name);
  if (!spec.ok()) return;
  const auto plan = PlanStage({config, model, device.world().size(), *spec});
  if (!plan.ok()) return;
  result.planned_seconds = plan->step_seconds;
  result.planned_bytes = plan->ranks[plan->HeaviestRank()].total.peak_bytes;
}

}  // namespace

absl::StatusOr<std::vector<BenchResult>> BenchSteps(const RunSection& run,
                                                    const StageConfig& config,
                                                    const ModelConfig& model, RunDevice& device,
                                                    const BenchRequest& request) {
  ASSIGN_OR_RETURN(const BenchStage bench,
                   MakeBenchStage(run, config, model, device, request.seed));
  TrainingStage& stage = *bench.stage;
  std::vector<BenchResult> results;
  int64_t steps = 0;
  StepResult last;
  Workload workload;
  for (int phase = 0; phase < kNumStepPhases; ++phase)
    workload.phases.emplace_back(Name(static_cast<StepPhase>(phase)));
  workload.run = [&](const Workload::Watch& watch) -> absl::Status {
    const StepWatch on_phase = [&](StepPhase phase) {
      if (watch) watch(static_cast<int>(phase));
    };
    ASSIGN_OR_RETURN(last, TrainStep(stage, {steps, steps * config.global_batch_size},
                                     config.optimizer.lr, false, on_phase));
    ++steps;
    return absl::OkStatus();
  };
  for (const BenchIds ids : IdsOf(stage, request)) {
    UseIds(stage, ids, request.seed);
    BenchResult result = DescribeStage(stage, ids);
    result.what = "step";
    ASSIGN_OR_RETURN(result.measured,
                     Measure(stage.context(), stage.world(), workload, request.measure));
    result.seconds = result.measured.median_seconds;
    result.tokens = config.global_batch_size * config.data.seq_length;
    result.flops_per_token =
        ModelFlopsPerToken(stage.model_config(), stage.recipe(), config.data.seq_length).total;
    result.lm_loss = last.lm_loss.value_or(0);
    result.indexer_kl = last.indexer_kl.value_or(0);
    result.skipped = last.skipped;
    AddPlan(config, model, device, result);
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace baleen
