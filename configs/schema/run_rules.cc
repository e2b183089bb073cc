#include "configs/schema/run_rules.h"

#include <map>

#include "absl/strings/str_cat.h"

namespace baleen {
namespace {

// Collects the broken rules of one stage; keys are given without the stage.
class StageRules {
 public:
  StageRules(size_t index, std::vector<BrokenRule>& broken)
      : prefix_(absl::StrCat("stages.", index, ".")), broken_(broken) {}

  void Require(bool holds, const std::vector<std::string>& keys, std::string message) {
    if (holds) return;
    BrokenRule rule{{}, std::move(message)};
    for (const std::string& key : keys) rule.keys.push_back(prefix_ + key);
    broken_.push_back(std::move(rule));
  }

 private:
  std::string prefix_;
  std::vector<BrokenRule>& broken_;
};

void CheckPipeline(const ParallelismConfig& p, StageRules& rules) {
  const int64_t parts = p.parts_per_rank();
  const absl::string_view schedule = Name(p.schedule);
  const std::vector<std::string> keys = {"parallelism.virtual_stages", "parallelism.schedule"};
  switch (p.schedule) {
    case ScheduleName::kGpipe:
    case ScheduleName::k1F1B:
    case ScheduleName::kZbH1:
      rules.Require(
          parts == 1, keys,
          absl::StrCat("parallelism.virtual_stages = ", parts, ", but schedule ", schedule,
                       " has 1 part on a rank; use interleaved, zbv or dualpipev"));
      break;
    case ScheduleName::kInterleaved:
      rules.Require(parts >= 2, keys,
                    absl::StrCat("parallelism.virtual_stages = ", parts,
                                 ", but schedule interleaved "
                                 "needs 2 or more parts on a rank; use 1f1b for one"));
      break;
    case ScheduleName::kZbv:
    case ScheduleName::kDualPipeV:
      rules.Require(parts == 2, keys,
                    absl::StrCat("parallelism.virtual_stages = ", parts, ", but schedule ",
                                 schedule, " is a V of exactly 2 parts on a rank"));
      break;
  }
  const int64_t split = static_cast<int64_t>(p.layer_split.size());
  rules.Require(
      split == 0 || split == p.pipeline * parts,
      {"parallelism.layer_split", "parallelism.pipeline", "parallelism.virtual_stages",
       "parallelism.schedule"},
      absl::StrCat("parallelism.layer_split has ", split, " numbers, expected ", p.pipeline * parts,
                   " (pipeline ", p.pipeline, " x ", parts, " parts on a rank)"));
  // A key that could not be read is zero here, and what is said about it is not shown.
  const int64_t node = p.expert_node_size.value_or(1);
  rules.Require(
      p.expert < 1 || node < 1 || p.expert % node == 0 || node % p.expert == 0,
      {"parallelism.expert_node_size", "parallelism.expert"},
      absl::StrCat("parallelism.expert_node_size = ", node, " and parallelism.expert = ", p.expert,
                   ": one must divide the other, so that every node holds as many ranks"));
}

void CheckPrecision(const StageConfig& stage, DeviceChoice device, StageRules& rules) {
  const PrecisionConfig& p = stage.precision;
  const bool wide = p.compute == Compute::kFp32 || p.compute == Compute::kFp64;
  rules.Require(!wide || p.gemm == GemmPrecision::kAuto, {"precision.gemm", "precision.compute"},
                absl::StrCat("precision.gemm = fp8_block does not go with precision.compute = ",
                             Name(p.compute), "; use bf16 or auto"));
  rules.Require(p.compute != Compute::kFp64 || device != DeviceChoice::kCuda, {"precision.compute"},
                "precision.compute = fp64 runs on the cpu only, but run.device is cuda");
  // On either device: the indexer computes in the model's dtype, or in fp8 codes of it.
  const IndexerDType indexer = stage.dsa.indexer_dtype;
  rules.Require(!(wide && indexer == IndexerDType::kBf16) &&
                    !(p.compute == Compute::kBf16 && indexer == IndexerDType::kFp32),
                {"dsa.indexer_dtype", "precision.compute"},
                absl::StrCat("dsa.indexer_dtype = ", Name(indexer),
                             " beside precision.compute = ", Name(p.compute),
                             ": the indexer computes in the model's dtype; use auto or fp8"));
}

// Words that the schema knows and nothing honours: said with their line by `config check` and
// `plan` too, not only where a run starts.
void CheckHonoured(const StageConfig& stage, StageRules& rules) {
  rules.Require(stage.deterministic, {"deterministic"},
                "deterministic = false: there is no faster variant to allow; leave it true");
  rules.Require(!stage.checkpoint.async, {"checkpoint.async"},
                "checkpoint.async = true: checkpoints are written in the foreground, between two "
                "steps; leave it false");
  rules.Require(stage.attention != AttentionMode::kSparse || stage.train == TrainMode::kAll,
                {"train", "attention"},
                absl::StrCat("attention: sparse with train: indexer (stage ", stage.name,
                             ") is not a recipe; the indexer alone learns under dense attention "
                             "(attention: dense, train: indexer), and together with the model "
                             "under sparse attention (attention: sparse, train: all)"));
}

bool HasIndexers(const StageConfig& stage) {
  return stage.attention == AttentionMode::kSparse || stage.train == TrainMode::kIndexer;
}

void CheckLearningRate(const StageConfig& stage, StageRules& rules) {
  const LrScheduleConfig& schedule = stage.lr_schedule;
  rules.Require(schedule.warmup_steps <= stage.steps, {"lr_schedule.warmup_steps", "steps"},
                absl::StrCat("lr_schedule.warmup_steps = ", schedule.warmup_steps,
                             " is more than the ", stage.steps, " steps of stage ", stage.name));
  rules.Require(
      schedule.style == LrStyle::kConstant || schedule.min_lr <= stage.optimizer.lr,
      {"lr_schedule.min_lr", "lr_schedule.style", "optimizer.lr"},
      absl::StrCat("lr_schedule.min_lr = ", schedule.min_lr,
                   " is more than optimizer.lr = ", stage.optimizer.lr, " of stage ", stage.name));
}

// What a stage needs of those before it: `before` is the last of them that trains indexers.
void CheckOrder(const StageConfig& stage, const StageConfig& first, const StageConfig* before,
                StageRules& rules) {
  rules.Require(
      before == nullptr || HasIndexers(stage), {"train", "attention"},
      absl::StrCat("stage ", stage.name, " has no indexers (attention: dense, train: all)",
                   " and follows stage ", before == nullptr ? "" : before->name,
                   ", which trains them: its states could not keep them. Put it first, ",
                   "or train it in a run of its own"));
  rules.Require(stage.checkpoint.resume == first.checkpoint.resume, {"checkpoint.resume"},
                absl::StrCat("checkpoint.resume of stage ", stage.name,
                             ": it is asked once, when the run starts; set it at the top level, ",
                             "not in a stage"));
}

}  // namespace

std::vector<BrokenRule> CheckRules(const RunConfig& config) {
  std::vector<BrokenRule> broken;
  std::map<std::string, size_t> names;
  const StageConfig* trains_indexers = nullptr;
  for (size_t i = 0; i < config.stages.size(); ++i) {
    const StageConfig& stage = config.stages[i];
    StageRules rules(i, broken);
    const auto [first, is_new] = names.emplace(stage.name, i);
    rules.Require(
        is_new || stage.name.empty(), {"name"},
        absl::StrCat("stages[", i, "] is called '", stage.name, "' as stages[", first->second,
                     "] is; names tell stages apart in metrics and checkpoints"));
    rules.Require(
        stage.micro_batch_size < 1 || stage.global_batch_size % stage.micro_batch_size == 0,
        {"global_batch_size", "micro_batch_size"},
        absl::StrCat("global_batch_size = ", stage.global_batch_size,
                     " is not a multiple of micro_batch_size = ", stage.micro_batch_size));
    CheckPipeline(stage.parallelism, rules);
    CheckPrecision(stage, config.run.device, rules);
    CheckHonoured(stage, rules);
    CheckLearningRate(stage, rules);
    CheckOrder(stage, config.stages[0], trains_indexers, rules);
    if (HasIndexers(stage)) trains_indexers = &stage;
  }
  return broken;
}

}  // namespace baleen
