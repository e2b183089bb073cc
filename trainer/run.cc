#include "trainer/run.h"

#include <chrono>
#include <filesystem>

#include "absl/strings/str_format.h"
#include "checkpoints/run_lock.h"
#include "configs/schema/run_file.h"
#include "parallel/agree.h"
#include "trainer/banner.h"
#include "trainer/checkpoint_path.h"
#include "trainer/environment.h"
#include "trainer/flops.h"
#include "trainer/lr_schedule.h"
#include "trainer/metrics.h"
#include "trainer/step.h"
#include "trainer/stop_signal.h"
#include "trainer/train_state.h"

namespace baleen {
namespace {

// A run that gives no finite gradient this many times in a row will not recover by itself.
constexpr int64_t kMostSkippedInARow = 10;
// A disk that refuses this many checkpoints in a row means that the work done since is not safe.
constexpr int kMostFailedSaves = 3;

// True on every rank when any rank got the signal: they all stop at the same step.
bool AnyRankSignalled(Communicator& world) {
  const Tensor flag = Context::Cpu().Zeros(DType::kI32, {1});
  flag.data<int32_t>()[0] = StopSignalled() ? 1 : 0;
  world.AllReduce("signal", flag, ReduceOp::kMax);
  return flag.data<int32_t>()[0] != 0;
}

// Where the run file is itself the run directory's run.yaml, the effective values replace it: its
// text stays beside them.
absl::Status KeepRunFile(const std::string& run_file, const std::string& effective) {
  const std::string kept = absl::StrCat(effective, ".given");
  std::error_code error;
  if (!std::filesystem::equivalent(run_file, effective, error) || FileExists(kept)) {
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(run_file, int64_t{1} << 20));
  return WriteFileDurably(kept, text);
}

class Run {
 public:
  Run(const LoadedRun& loaded, RunDevice& device)
      : loaded_(loaded),
        config_(loaded.config),
        context_(device.context()),
        world_(device.world()),
        log_(world_.rank()),
        checkpoints_(JoinPath(config_.run.dir, "checkpoints")) {}

  absl::Status DryRun();
  absl::Status Train();

 private:
  absl::Status OpenSource();
  int64_t StagesDone();
  absl::Status CheckStages();
  absl::Status LockDirectory();
  absl::Status OpenState();
  void SayWhatChanged();
  absl::Status DescribeRun();
  absl::Status OpenMetrics();
  absl::Status RunStage();
  absl::Status RunSteps(TrainingStage& stage);
  absl::Status Save(TrainingStage& stage);
  absl::Status SaveOrGoOn(TrainingStage& stage);
  absl::Status ValidateAndReport(TrainingStage& stage);
  absl::Status Report(TrainingStage& stage, const StepResult& result, double lr, double seconds);
  const StageConfig& stage_config() const { return config_.stages[position_.stage_index]; }

  const LoadedRun& loaded_;
  const RunConfig& config_;
  Context& context_;
  Communicator& world_;
  Log log_;
  std::string checkpoints_;
  std::optional<RunLock> lock_;
  std::optional<WeightSource> source_;
  Identity identity_;
  std::optional<StateReader> state_;  // what the next stage is filled from
  ChangedParameters changed_;
  RunPosition position_;
  int64_t skipped_in_a_row_ = 0;
  int failed_saves_ = 0;
  std::vector<std::unique_ptr<MetricsSink>> sinks_;  // rank 0
};

absl::Status Run::OpenSource() {
  auto source = WeightSource::Open(config_.model, config_.stages[0].dsa, config_.run.seed);
  RETURN_IF_ERROR(Agree(world_, source.status()));
  source_.emplace(std::move(source).value());
  RETURN_IF_ERROR(source_->HashData(world_));
  identity_ = IdentityOf(config_, *source_);
  return Agree(world_, source_->CheckScales(world_.rank(), world_.size()));
}

// Stages that the state to resume from has behind it: their layouts need not fit the ranks of this
// job. A hint: should an earlier state be used in the end, its stage is checked when it begins.
int64_t Run::StagesDone() {
  const Tensor done = Context::Cpu().Zeros(DType::kI64, {1});
  if (world_.rank() == 0) {
    const ResumeConfig& resume = config_.stages[0].checkpoint.resume;
    std::string path = resume.mode == ResumeMode::kPath ? resume.path : "";
    if (resume.mode == ResumeMode::kAuto) {
      const auto states = ListStates(checkpoints_);
      if (states.ok() && !states->empty()) path = states->front().path;
    }
    const auto state = path.empty() ? absl::NotFoundError("no state") : StateReader::Open(path);
    if (state.ok()) {
      const RunPosition position = PositionOf(state->metadata());
      const auto index = static_cast<size_t>(position.stage_index);
      const bool whole =
          index < config_.stages.size() && position.stage_step >= config_.stages[index].steps;
      done.data<int64_t>()[0] = position.stage_index + (whole ? 1 : 0);
    }
  }
  world_.Broadcast("stages done", done, 0);
  return done.data<int64_t>()[0];
}

// What a run cannot do is found before anything is written: layouts, sizes, recipes and token files
// of every stage.
absl::Status Run::CheckStages() {
  const int64_t done = StagesDone();
  int64_t behind = done;
  for (const StageConfig& stage : config_.stages) {
    if (behind-- > 0) continue;
    RETURN_IF_ERROR(TrainingStage::Check(config_.run, stage, source_->config(), world_, context_));
  }
  return AddDataContents(config_, done, world_, identity_);
}

absl::Status Run::DryRun() {
  RETURN_IF_ERROR(OpenSource());
  RETURN_IF_ERROR(CheckStages());
  log_.Info(SourceSummaryText(*source_));
  for (const StageConfig& stage_config : config_.stages) {
    ASSIGN_OR_RETURN(const auto stage, TrainingStage::Make(config_.run, stage_config,
                                                           source_->config(), world_, context_));
    RETURN_IF_ERROR(Agree(world_, stage->train_data().CheckVocabulary()));
    log_.Info(StageBanner(*stage));
  }
  log_.Info("dry run: everything needed was found; nothing was trained or written");
  return absl::OkStatus();
}

absl::Status Run::LockDirectory() {
  absl::Status status;
  if (world_.rank() == 0) {
    status = MakeDirectories(checkpoints_);
    if (status.ok()) {
      const char* id = std::getenv("SLURM_JOB_ID");
      const char* restart = std::getenv("SLURM_RESTART_COUNT");
      const std::string job =
          id == nullptr ? "" : absl::StrCat(id, " restart ", restart == nullptr ? "0" : restart);
      auto lock = RunLock::Acquire(config_.run.dir, job);
      status = lock.status();
      if (lock.ok()) lock_.emplace(std::move(lock).value());
    }
  }
  return Agree(world_, status);
}

// Not before the state is known to be this run's: run.yaml says what the states beside it are of.
absl::Status Run::DescribeRun() {
  const std::string environment = GatherEnvironmentJson(context_, world_);
  absl::Status status;
  if (world_.rank() == 0) {
    const std::string effective = JoinPath(config_.run.dir, "run.yaml");
    status = KeepRunFile(loaded_.path, effective);
    if (status.ok()) status = WriteFileDurably(effective, PrintRunConfig(loaded_));
    if (status.ok()) {
      status = WriteFileDurably(JoinPath(config_.run.dir, "environment.json"), environment);
    }
  }
  return Agree(world_, status);
}

absl::Status Run::OpenMetrics() {
  if (world_.rank() != 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(auto jsonl,
                   OpenJsonlSink(JoinPath(config_.run.dir, "metrics.jsonl"), position_.step, log_));
  sinks_.push_back(std::move(jsonl));
  if (stage_config().metrics.tensorboard) {
    ASSIGN_OR_RETURN(auto tensorboard,
                     OpenTensorBoardSink(JoinPath(config_.run.dir, "tensorboard"), log_));
    sinks_.push_back(std::move(tensorboard));
  }
  sinks_.push_back(MakeConsoleSink(stage_config().metrics.console, log_));
  return absl::OkStatus();
}

absl::Status Run::OpenState() {
  ASSIGN_OR_RETURN(state_,
                   FindState(checkpoints_, config_.stages[0].checkpoint.resume, world_, log_));
  if (!state_) return absl::OkStatus();
  RETURN_IF_ERROR(CheckIdentity(state_->metadata(), state_->directory(), identity_));
  RETURN_IF_ERROR(CheckFrozenSources(*state_, *source_, world_));
  position_ = PositionOf(state_->metadata());
  if (world_.rank() == 0) SayWhatChanged();
  return absl::OkStatus();
}

// Keys that may differ between a state and the run that goes on from it, against the run.yaml that
// lies over the state: what the last start of that run had in effect.
void Run::SayWhatChanged() {
  const auto path = ResolveCheckpointPath(state_->directory());
  if (!path.ok() || path->run_dir.empty()) return;
  const std::string file = JoinPath(path->run_dir, "run.yaml");
  const absl::StatusOr<LoadedRun> before = LoadRunConfig(file);
  if (!before.ok()) {
    log_.Warning(file, " is not understood: what changed since the last start is not known");
    return;
  }
  for (const std::string& change : ChangedKeys(before->config, config_)) {
    log_.Info("changed since the last start: ", change);
  }
}

absl::Status Run::Train() {
  ListenFor(config_.stages[0].checkpoint.signal);
  RETURN_IF_ERROR(OpenSource());
  RETURN_IF_ERROR(CheckStages());
  // A state that the run file names is read before a directory is made; the newest one of the
  // directory is looked for by its owner only.
  const bool named_state = config_.stages[0].checkpoint.resume.mode == ResumeMode::kPath;
  if (named_state) RETURN_IF_ERROR(OpenState());
  RETURN_IF_ERROR(LockDirectory());
  if (!named_state) RETURN_IF_ERROR(OpenState());
  RETURN_IF_ERROR(DescribeRun());
  // A run that was killed while it saved or removed a state left that half done.
  const bool owner = world_.rank() == 0;
  RETURN_IF_ERROR(Agree(world_, owner ? SweepTemporary(checkpoints_).status() : absl::OkStatus()));
  log_.Info(SourceSummaryText(*source_));
  if (state_) log_.Info("resuming after step ", position_.step, " from ", state_->directory());
  RETURN_IF_ERROR(Agree(world_, OpenMetrics()));
  const int64_t first_step = position_.step;
  const auto num_stages = static_cast<int64_t>(config_.stages.size());
  while (position_.stage_index < num_stages) {
    if (position_.stage_step < stage_config().steps) RETURN_IF_ERROR(RunStage());
    if (position_.stage_index + 1 == num_stages) break;
    ++position_.stage_index;
    position_.stage_step = 0;
  }
  log_.Info("done: ", position_.step, " steps, ", position_.consumed_tokens,
            " tokens; checkpoints in ", checkpoints_);
  if (position_.step == first_step) {
    log_.Info(
        "nothing was left to train: the state is at the end of the last stage. More steps go ",
        "to that stage's steps, another run to another run.dir");
  }
  return absl::OkStatus();
}

absl::Status Run::RunStage() {
  ListenFor(stage_config().checkpoint.signal);
  ASSIGN_OR_RETURN(const auto stage, TrainingStage::Make(config_.run, stage_config(),
                                                         source_->config(), world_, context_));
  const bool same_stage = state_ && state_->metadata().stage_index == position_.stage_index;
  changed_.clear();
  RETURN_IF_ERROR(Agree(
      world_, LoadStage(*stage, *source_, state_ ? &*state_ : nullptr, same_stage, changed_)));
  state_.reset();
  log_.Info(StageBanner(*stage));
  RETURN_IF_ERROR(RunSteps(*stage));
  // The hand-over: the next stage is filled from this state through the path of any resume.
  ASSIGN_OR_RETURN(
      StateReader state,
      baleen::OpenState(JoinPath(checkpoints_, absl::StrFormat("step-%08d", position_.step)),
                        world_));
  state_.emplace(std::move(state));
  return absl::OkStatus();
}

absl::Status Run::RunSteps(TrainingStage& stage) {
  const StageConfig& config = stage.config();
  while (position_.stage_step < config.steps) {
    const auto start = std::chrono::steady_clock::now();
    const double lr = LearningRate(config, position_.stage_step);
    const bool measure = config.metrics.indexer_interval > 0 &&
                         (position_.stage_step == 0 || position_.stage_step + 1 == config.steps ||
                          (position_.stage_step + 1) % config.metrics.indexer_interval == 0);
    absl::StatusOr<StepResult> step =
        TrainStep(stage, {position_.stage_step, position_.consumed_samples}, lr, measure);
    if (!step.ok()) {
      return Annotate(step.status(),
                      absl::StrCat("step ", position_.step + 1, " (stage '", config.name, "')"));
    }
    const StepResult result = *std::move(step);
    ++position_.step;
    ++position_.stage_step;
    position_.consumed_samples += config.global_batch_size;
    position_.consumed_tokens += config.global_batch_size * config.data.seq_length;
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    RETURN_IF_ERROR(Report(stage, result, lr, elapsed.count()));

    const bool last = position_.stage_step == config.steps;
    if (config.validation.interval > 0 && stage.validation_data() != nullptr &&
        (position_.stage_step % config.validation.interval == 0 || last)) {
      RETURN_IF_ERROR(ValidateAndReport(stage));
    }
    if (AnyRankSignalled(world_)) {
      RETURN_IF_ERROR(Save(stage));
      return absl::CancelledError(
          absl::StrCat("preempted after step ", position_.step,
                       "; the checkpoint is written: start the same command again to go on"));
    }
    if (last) {
      RETURN_IF_ERROR(Save(stage));
    } else if (config.checkpoint.interval > 0 &&
               position_.stage_step % config.checkpoint.interval == 0) {
      RETURN_IF_ERROR(SaveOrGoOn(stage));
    }
  }
  return absl::OkStatus();
}

absl::Status Run::Save(TrainingStage& stage) {
  SaveRequest request;
  request.directory = checkpoints_;
  request.keep = stage.config().checkpoint.keep;
  request.stage_name = stage.config().name;
  request.position = position_;
  request.seed = config_.run.seed;
  request.identity = identity_;
  ASSIGN_OR_RETURN(const std::string directory, SaveTrainState(stage, *source_, changed_, request));
  log_.Info("checkpoint ", directory);
  failed_saves_ = 0;
  return absl::OkStatus();
}

// A failed save in the middle of a stage is loud but not the end: the next one may find room again.
absl::Status Run::SaveOrGoOn(TrainingStage& stage) {
  const absl::Status status = Save(stage);
  if (status.ok()) return status;
  if (++failed_saves_ >= kMostFailedSaves) {
    return Annotate(status,
                    absl::StrCat(failed_saves_, " checkpoints in a row failed, the last with"));
  }
  log_.Error("checkpoint after step ", position_.step,
             " failed, training goes on: ", status.message());
  return absl::OkStatus();
}

absl::Status Run::ValidateAndReport(TrainingStage& stage) {
  ModelOptions options = stage.recipe().options;
  options.indexer_loss = IndexerLossKind::kNone;
  ASSIGN_OR_RETURN(const ValidationResult result,
                   Validate(stage, {options, stage.config().validation.steps}));
  const ValidationRecord record{position_.step, stage.config().name, result.lm_loss,
                                result.mtp_loss};
  for (const auto& sink : sinks_) sink->Validation(record);
  return absl::OkStatus();
}

absl::Status Run::Report(TrainingStage& stage, const StepResult& result, double lr,
                         double seconds) {
  skipped_in_a_row_ = result.skipped ? skipped_in_a_row_ + 1 : 0;
  position_.skipped_steps += result.skipped ? 1 : 0;
  const Tensor peak = stage.host_context().Zeros(DType::kI64, {1});
  peak.data<int64_t>()[0] = stage.context().pool().Total().peak_bytes;
  world_.AllReduce("memory peak", peak, ReduceOp::kMax);
  if (world_.rank() == 0) {
    const StepRecord record =
        MakeStepRecord(stage, position_, result, lr, seconds, peak.data<int64_t>()[0]);
    for (const auto& sink : sinks_) sink->Step(record);
  }
  if (skipped_in_a_row_ < kMostSkippedInARow) return absl::OkStatus();
  return NumericsError(
      skipped_in_a_row_, " steps in a row had gradients that are not finite (last: step ",
      position_.step,
      "). Resume from an earlier checkpoint with a lower learning rate, or look at the "
      "data of these steps");
}

}  // namespace

absl::Status RunTraining(const LoadedRun& loaded, const RunOptions& options, RunDevice& device) {
  Run run(loaded, device);
  return options.dry_run ? run.DryRun() : run.Train();
}

}  // namespace baleen
