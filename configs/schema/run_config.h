// RunConfig: the run file as plain structs, every field named as its key (configs/reference.md
// describes them).
//
// The file has sections; a training stage may override any of them. Reading resolves that: each
// StageConfig holds the complete, effective sections of its stage, so a trainer reads `run`,
// `model` and one StageConfig and nothing else. Keys, defaults, ranges, units and doc lines stand
// in run_fields.cc alone; a struct made here by hand is all zeros, DefaultStageConfig() is the
// documented default of every section. Counts are global unless a comment says otherwise.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace baleen {

enum class DeviceChoice { kAuto, kCpu, kCuda };
enum class AttentionMode { kDense, kSparse };
enum class TrainMode { kIndexer, kAll };
enum class Compute { kAuto, kFp32, kFp64, kBf16 };
enum class GemmPrecision { kAuto, kFp8Block };
enum class Recompute { kNone, kSelective, kFull };
enum class ScheduleName { kGpipe, k1F1B, kInterleaved, kZbH1, kZbv, kDualPipeV };
enum class LrStyle { kConstant, kLinear, kCosine };
enum class MomentsDType { kFp32, kBf16 };
enum class IndexerDType { kAuto, kFp32, kBf16, kFp8 };
enum class AttentionKernel { kAuto, kSparse, kMaskedDense };
enum class ResumeMode { kAuto, kNever, kPath };
enum class CheckpointSignal { kNone, kUsr1, kUsr2, kTerm };

// The word of the run file: "cuda", "1f1b", "masked_dense", ...
absl::string_view Name(DeviceChoice value);
absl::string_view Name(AttentionMode value);
absl::string_view Name(TrainMode value);
absl::string_view Name(Compute value);
absl::string_view Name(GemmPrecision value);
absl::string_view Name(Recompute value);
absl::string_view Name(ScheduleName value);
absl::string_view Name(LrStyle value);
absl::string_view Name(MomentsDType value);
absl::string_view Name(IndexerDType value);
absl::string_view Name(AttentionKernel value);
absl::string_view Name(CheckpointSignal value);

struct RunSection {
  std::string name;
  std::string dir;
  int64_t seed{};
  DeviceChoice device{};
  bool operator==(const RunSection&) const = default;
};

// Exactly one of the two is set.
struct ModelSection {
  std::optional<std::string> checkpoint;  // Hugging Face directory
  std::optional<std::string> config;      // configs/model/*.yaml: random initialisation
  bool operator==(const ModelSection&) const = default;
};

struct ParallelismConfig {
  int64_t tensor{};
  int64_t pipeline{};
  int64_t expert{};
  int64_t context{};
  ScheduleName schedule{};
  std::optional<int64_t> virtual_stages;  // absent: what the schedule needs, see parts_per_rank()
  std::vector<int64_t>
      layer_split;  // layers of each pipeline part in order; empty: the solver decides
  std::optional<int64_t>
      expert_node_size;    // ranks of a node, for the 2-hop expert exchange; absent: 1 hop
  double expert_buffer{};  // rows at a rank's experts at once, over the balanced number; 0: all

  // Pipeline parts that one rank holds: virtual_stages, or 1, or 2 for interleaved, zbv and
  // dualpipev.
  int64_t parts_per_rank() const;
  bool operator==(const ParallelismConfig&) const = default;
};

struct DataSource {
  std::string path;  // prefix of PATH.bin and PATH.idx, or an HDF5 token file
  double weight{};   // share of the blend; weights are normalised by the reader
  bool operator==(const DataSource&) const = default;
};

struct DataConfig {
  int64_t seq_length{};  // tokens of a sequence; a sample has one token more
  std::vector<DataSource> train;
  std::vector<DataSource> validation;  // may be empty
  bool document_mask{};
  int64_t first_sample{};  // of the training blend; what lies before it is passed over
  bool operator==(const DataConfig&) const = default;
};

struct ClipGradConfig {
  double main{};     // 0: no clipping
  double indexer{};  // 0: no clipping
  bool operator==(const ClipGradConfig&) const = default;
};

struct OptimizerConfig {
  double lr{};
  std::array<double, 2> betas{};
  double eps{};
  double weight_decay{};
  ClipGradConfig clip_grad;
  MomentsDType moments{};
  bool operator==(const OptimizerConfig&) const = default;
};

// Steps are counted from the start of the stage.
struct LrScheduleConfig {
  LrStyle style{};
  int64_t warmup_steps{};              // linear from 0 to optimizer.lr
  std::optional<int64_t> decay_steps;  // absent: all steps of the stage after the warm-up
  double min_lr{};                     // where the decay ends, and what holds after it
  bool operator==(const LrScheduleConfig&) const = default;
};

// Sizes are overrides: absent, they come from the checkpoint's config.json, or else are V3.2's.
struct DsaConfig {
  std::optional<int64_t> index_topk;
  std::optional<int64_t> index_n_heads;
  std::optional<int64_t> index_head_dim;
  double indexer_loss_coeff{};
  IndexerDType indexer_dtype{};
  bool hadamard{};
  AttentionKernel kernel{};
  bool operator==(const DsaConfig&) const = default;
};

struct PrecisionConfig {
  Compute compute{};
  GemmPrecision gemm{};
  bool operator==(const PrecisionConfig&) const = default;
};

struct LossesConfig {
  double mtp{};      // lambda
  double balance{};  // alpha
  bool operator==(const LossesConfig&) const = default;
};

struct RouterConfig {
  double bias_update_speed{};  // gamma
  bool operator==(const RouterConfig&) const = default;
};

struct ResumeConfig {
  ResumeMode mode{};
  std::string path;  // with kPath: a directory checkpoints/step-XXXXXXXX
  bool operator==(const ResumeConfig&) const = default;
};

struct CheckpointConfig {
  int64_t interval{};  // steps; 0: only at the end of a stage and on the signal
  int64_t keep{};      // newest ones that are kept; 0: all
  ResumeConfig resume;
  CheckpointSignal signal{};
  bool async{};
  bool operator==(const CheckpointConfig&) const = default;
};

struct ValidationConfig {
  int64_t interval{};  // steps; 0: never
  int64_t steps{};     // global batches of one validation
  bool operator==(const ValidationConfig&) const = default;
};

struct MetricsConfig {
  int64_t console{};  // steps between two lines; 0: none
  bool tensorboard{};
  int64_t indexer_interval{};  // steps between two measurements of recall and mass; 0: never
  bool operator==(const MetricsConfig&) const = default;
};

// One training stage with every section that is in effect for it.
struct StageConfig {
  std::string name;
  AttentionMode attention{};
  TrainMode train{};
  int64_t steps{};
  int64_t global_batch_size{};  // sequences of one optimizer step, over all ranks

  ParallelismConfig parallelism;
  DataConfig data;
  int64_t micro_batch_size{};  // sequences of one forward pass on one data-parallel rank
  OptimizerConfig optimizer;
  LrScheduleConfig lr_schedule;
  DsaConfig dsa;
  PrecisionConfig precision;
  LossesConfig losses;
  RouterConfig router;
  bool deterministic{};
  Recompute recompute{};
  CheckpointConfig checkpoint;
  ValidationConfig validation;
  MetricsConfig metrics;
  bool operator==(const StageConfig&) const = default;
};

// The whole file. The sections beside `stages` are what the top level says, before any stage
// overrides them: a value that only the stages give (usually optimizer.lr) is zero here.
struct RunConfig {
  RunSection run;
  ModelSection model;
  std::vector<StageConfig> stages;  // in the order they run; at least one

  ParallelismConfig parallelism;
  DataConfig data;
  int64_t micro_batch_size{};
  OptimizerConfig optimizer;
  LrScheduleConfig lr_schedule;
  DsaConfig dsa;
  PrecisionConfig precision;
  LossesConfig losses;
  RouterConfig router;
  bool deterministic{};
  Recompute recompute{};
  CheckpointConfig checkpoint;
  ValidationConfig validation;
  MetricsConfig metrics;
  bool operator==(const RunConfig&) const = default;
};

// A stage with the default of every key that has one, for tests and tools. Without a default, and
// therefore empty or zero: name, attention, train, steps, global_batch_size, data.seq_length,
// data.train, optimizer.lr.
StageConfig DefaultStageConfig();

}  // namespace baleen
