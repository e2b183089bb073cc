#include "configs/schema/run_fields.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace baleen {
namespace {

// The words of the enums, in the order of their values.
using Words = absl::string_view;
constexpr Words kDevice[] = {"auto", "cpu", "cuda"};
constexpr Words kAttention[] = {"dense", "sparse"};
constexpr Words kTrain[] = {"indexer", "all"};
constexpr Words kCompute[] = {"auto", "fp32", "fp64", "bf16"};
constexpr Words kGemm[] = {"auto", "fp8_block"};
constexpr Words kRecompute[] = {"none", "selective", "full"};
constexpr Words kSchedule[] = {"gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"};
constexpr Words kLrStyle[] = {"constant", "linear", "cosine"};
constexpr Words kMoments[] = {"fp32", "bf16"};
constexpr Words kIndexerDType[] = {"auto", "fp32", "bf16", "fp8"};
constexpr Words kKernel[] = {"auto", "sparse", "masked_dense"};
constexpr Words kSignal[] = {"none", "USR1", "USR2", "TERM"};

// Bounds far above any real run that keep products of two or three keys inside 64 bits.
constexpr double kMostRanks = 1 << 20;
constexpr double kMostSequences = 1 << 24;
constexpr double kMostTokens = 1 << 24;
constexpr double kMostSteps = 1e9;
constexpr double kMostSamples = 1e12;
constexpr double kLargestSeed = 9007199254740992.0;  // 2^53: exact in JSON and in a double

}  // namespace

absl::string_view Name(DeviceChoice value) { return kDevice[static_cast<int>(value)]; }
absl::string_view Name(AttentionMode value) { return kAttention[static_cast<int>(value)]; }
absl::string_view Name(TrainMode value) { return kTrain[static_cast<int>(value)]; }
absl::string_view Name(Compute value) { return kCompute[static_cast<int>(value)]; }
absl::string_view Name(GemmPrecision value) { return kGemm[static_cast<int>(value)]; }
absl::string_view Name(Recompute value) { return kRecompute[static_cast<int>(value)]; }
absl::string_view Name(ScheduleName value) { return kSchedule[static_cast<int>(value)]; }
absl::string_view Name(LrStyle value) { return kLrStyle[static_cast<int>(value)]; }
absl::string_view Name(MomentsDType value) { return kMoments[static_cast<int>(value)]; }
absl::string_view Name(IndexerDType value) { return kIndexerDType[static_cast<int>(value)]; }
absl::string_view Name(AttentionKernel value) { return kKernel[static_cast<int>(value)]; }
absl::string_view Name(CheckpointSignal value) { return kSignal[static_cast<int>(value)]; }

int64_t ParallelismConfig::parts_per_rank() const {
  if (virtual_stages) return *virtual_stages;
  const bool two = schedule == ScheduleName::kInterleaved || schedule == ScheduleName::kZbv ||
                   schedule == ScheduleName::kDualPipeV;
  return two ? 2 : 1;
}

void Visit(RunSection& c, Fields& f) {
  f.Add("name", &c.name).Identifier().Doc("Name of the run: banner, Slurm job, report.");
  f.Add("dir", &c.dir).Doc("Run directory: log, metrics, checkpoints, exports. Made if missing.");
  f.Add("seed", &c.seed)
      .Default("1234")
      .Between(0, kLargestSeed)
      .Doc("Seed of initialisation and of the sample order; the same on every layout.");
  f.Choice("device", &c.device, kDevice)
      .Default("auto")
      .Doc("auto: cuda where this build and machine have it, else cpu.");
}

void Visit(ModelSection& c, Fields& f) {
  f.Add("checkpoint", &c.checkpoint)
      .Doc(
          "Hugging Face directory to start from: config.json and safetensors, V3.1 or V3.2 names.");
  f.Add("config", &c.config).Doc("Model file (configs/model/*.yaml) to start from random weights.");
}

void Visit(ParallelismConfig& c, Fields& f) {
  f.Add("tensor", &c.tensor)
      .Default("1")
      .Between(1, kMostRanks)
      .Unit("ranks")
      .Doc("Ranks that share the heads and, outside attention, the sequence.");
  f.Add("pipeline", &c.pipeline)
      .Default("1")
      .Between(1, kMostRanks)
      .Unit("ranks")
      .Doc("Ranks that share the layers.");
  f.Add("expert", &c.expert)
      .Default("1")
      .Between(1, kMostRanks)
      .Unit("ranks")
      .Doc(
          "Ranks that share the routed experts; taken from data x context x tensor of one pipeline "
          "rank.");
  f.Add("context", &c.context)
      .Default("1")
      .Between(1, kMostRanks)
      .Unit("ranks")
      .Doc(
          "Ranks that share the query rows of a sequence. Data parallelism is what is left of the "
          "world.");
  f.Choice("schedule", &c.schedule, kSchedule).Default("1f1b").Doc("Pipeline schedule.");
  f.Add("virtual_stages", &c.virtual_stages)
      .Between(1, 64)
      .Unit("parts")
      .Doc(
          "Pipeline parts on a rank. Absent: 2 for interleaved, zbv and dualpipev, 1 for the "
          "others.");
  f.Add("layer_split", &c.layer_split)
      .Default("[]")
      .Between(0, 4096)
      .Unit("layers")
      .Doc(
          "Layers of each pipeline part in model order; pipeline x virtual_stages numbers. Empty: "
          "the solver balances them.");
  f.Add("expert_node_size", &c.expert_node_size)
      .Between(1, 1024)
      .Unit("ranks")
      .Doc(
          "Ranks of a node: the expert exchange goes in two hops, first between nodes, then "
          "inside. Absent: one hop.");
  f.Add("expert_buffer", &c.expert_buffer)
      .Default("4.0")
      .AtLeast(0)
      .Unit("balanced loads")
      .Doc(
          "Rows that a rank's experts take in at once, as a multiple of its share of an even load; "
          "what is more comes in further rounds, so that a bad routing costs time and not memory. "
          "0: no bound.");
}

void Visit(DataSource& c, Fields& f) {
  f.Add("path", &c.path).Doc("Prefix of PATH.bin and PATH.idx, or an HDF5 token file.");
  f.Add("weight", &c.weight)
      .Default("1.0")
      .Above(0)
      .Doc("Share of the blend; only ratios between the weights matter.");
}

void Visit(DataConfig& c, Fields& f) {
  f.Add("seq_length", &c.seq_length)
      .RequiredInStage()
      .Between(2, kMostTokens)
      .Unit("tokens")
      .Doc("Length of a sequence; a sample is one token longer.");
  f.List("train", &c.train)
      .RequiredInStage()
      .Items(1, 10000)
      .Doc("Token files of the training blend.");
  f.List("validation", &c.validation)
      .Default("[]")
      .Doc("Token files of the validation blend. Empty: no validation.");
  f.Add("document_mask", &c.document_mask)
      .Default("false")
      .Doc("Attention and losses stop at document borders inside a packed sequence.");
  f.Add("first_sample", &c.first_sample)
      .Default("0")
      .Between(0, kMostSamples)
      .Unit("samples")
      .Doc(
          "Samples of the training blend that are passed over before the run's first, as if "
          "another "
          "run had read them: a control begins where the stage that it is compared with does.");
}

void Visit(ClipGradConfig& c, Fields& f) {
  f.Add("main", &c.main)
      .Default("1.0")
      .AtLeast(0)
      .Doc("Largest global gradient norm of everything but the indexers; 0: no clipping.");
  f.Add("indexer", &c.indexer)
      .Default("1.0")
      .AtLeast(0)
      .Doc("Largest global gradient norm of the indexers; 0: no clipping.");
}

void Visit(OptimizerConfig& c, Fields& f) {
  f.Add("lr", &c.lr)
      .RequiredInStage()
      .Above(0)
      .Doc("Learning rate of AdamW; the schedule scales it.");
  f.Add("betas", &c.betas)
      .Default("[0.9, 0.95]")
      .AtLeast(0)
      .Below(1)
      .Doc("Decay of the first and second moment.");
  f.Add("eps", &c.eps).Default("1.0e-8").Above(0).Doc("Added to the root of the second moment.");
  f.Add("weight_decay", &c.weight_decay)
      .Default("0.1")
      .AtLeast(0)
      .Doc("Decoupled; applied to matrices, not to norms and biases.");
  f.Section("clip_grad", &c.clip_grad)
      .Doc(
          "Two groups, so that a large indexer gradient does not shrink the language model's "
          "step.");
  f.Choice("moments", &c.moments, kMoments)
      .Default("fp32")
      .Doc("Type in which Adam's moments are kept.");
}

void Visit(LrScheduleConfig& c, Fields& f) {
  f.Choice("style", &c.style, kLrStyle)
      .Default("constant")
      .Doc("What follows the warm-up: optimizer.lr, or a decay from it to min_lr.");
  f.Add("warmup_steps", &c.warmup_steps)
      .Default("0")
      .Between(0, kMostSteps)
      .Unit("steps")
      .Doc("Linear rise from 0 to optimizer.lr at the start of the stage.");
  f.Add("decay_steps", &c.decay_steps)
      .Between(1, kMostSteps)
      .Unit("steps")
      .Doc("Length of the decay. Absent: all steps of the stage after the warm-up.");
  f.Add("min_lr", &c.min_lr).Default("0.0").AtLeast(0).Doc("Where the decay ends.");
}

void Visit(DsaConfig& c, Fields& f) {
  f.Add("index_topk", &c.index_topk)
      .Between(1, kMostTokens)
      .Unit("keys")
      .Doc("Keys selected for a query. Absent: the checkpoint's config.json, or 2048.");
  f.Add("index_n_heads", &c.index_n_heads)
      .Between(1, 4096)
      .Unit("heads")
      .Doc("Heads of the lightning indexer. Absent: the checkpoint's config.json, or 64.");
  f.Add("index_head_dim", &c.index_head_dim)
      .Between(2, 4096)
      .Doc("Width of an indexer head. Absent: the checkpoint's config.json, or 128.");
  f.Add("indexer_loss_coeff", &c.indexer_loss_coeff)
      .Default("1.0")
      .AtLeast(0)
      .Doc("Weight of the indexer's KL loss. It shares no parameter with the other losses.");
  f.Choice("indexer_dtype", &c.indexer_dtype, kIndexerDType)
      .Default("auto")
      .Doc("Type of the indexer's queries and keys; scores are fp32. auto: precision.compute.");
  f.Add("hadamard", &c.hadamard)
      .Default("false")
      .Doc(
          "Rotate indexer queries and keys before they are scored, as the FP8 inference code "
          "does.");
  f.Choice("kernel", &c.kernel, kKernel)
      .Default("auto")
      .Doc(
          "Sparse attention by gathered latents (sparse) or by the dense kernel with the selection "
          "as mask (masked_dense). auto: the cost rule, printed at the start.");
}

void Visit(PrecisionConfig& c, Fields& f) {
  f.Choice("compute", &c.compute, kCompute)
      .Default("auto")
      .Doc(
          "Type of activations and working weights. auto: bf16 on cuda, fp32 on cpu. fp64 (cpu "
          "only): weights, moments and reductions too.");
  f.Choice("gemm", &c.gemm, kGemm)
      .Default("auto")
      .Doc(
          "Matrix products in the compute type (auto) or in FP8 with 1x128 and 128x128 scales "
          "(fp8_block).");
}

void Visit(LossesConfig& c, Fields& f) {
  f.Add("mtp", &c.mtp)
      .Default("0.1")
      .AtLeast(0)
      .Doc("Weight lambda of the multi-token-prediction loss.");
  f.Add("balance", &c.balance)
      .Default("1.0e-4")
      .AtLeast(0)
      .Doc("Weight alpha of the sequence-wise expert balance loss.");
}

void Visit(RouterConfig& c, Fields& f) {
  f.Add("bias_update_speed", &c.bias_update_speed)
      .Default("0.0")
      .Between(0, 1)
      .Doc("Step gamma by which an expert's selection bias follows its load; 0: the bias stays.");
}

void Visit(CheckpointConfig& c, Fields& f) {
  f.Add("interval", &c.interval)
      .Default("100")
      .Between(0, kMostSteps)
      .Unit("steps")
      .Doc(
          "Steps between two saved training states; 0: only at the end of a stage and on the "
          "signal.");
  f.Add("keep", &c.keep).Default("3").Between(0, 1e6).Doc("Newest states that are kept; 0: all.");
  f.AddText(
       "resume",
       [&c](const std::string& word) {
         c.resume.mode = word == "auto"    ? ResumeMode::kAuto
                         : word == "never" ? ResumeMode::kNever
                                           : ResumeMode::kPath;
         c.resume.path = c.resume.mode == ResumeMode::kPath ? word : "";
       },
       [&c]() -> std::string {
         if (c.resume.mode == ResumeMode::kPath) return c.resume.path;
         return c.resume.mode == ResumeMode::kAuto ? "auto" : "never";
       })
      .Default("auto")
      .Doc(
          "auto: the newest valid state of the run directory, else from the start. never: from the "
          "start, an error if there is a state. Anything else: the path of a state.");
  f.Choice("signal", &c.signal, kSignal)
      .Default("USR1")
      .Doc(
          "On this signal the step is finished, the state saved, and the exit code is 75 (requeue "
          "me).");
  f.Add("async", &c.async)
      .Default("false")
      .Doc("false is the only value: a state is written in the foreground, between two steps.");
}

void Visit(ValidationConfig& c, Fields& f) {
  f.Add("interval", &c.interval)
      .Default("50")
      .Between(0, kMostSteps)
      .Unit("steps")
      .Doc("Steps between two validations; 0: never.");
  f.Add("steps", &c.steps)
      .Default("4")
      .Between(1, kMostSteps)
      .Unit("steps")
      .Doc("Global batches of one validation; the same ones each time.");
}

void Visit(MetricsConfig& c, Fields& f) {
  f.Add("console", &c.console)
      .Default("1")
      .Between(0, kMostSteps)
      .Unit("steps")
      .Doc("Steps between two lines on the terminal; 0: none. metrics.jsonl has every step.");
  f.Add("tensorboard", &c.tensorboard).Default("true").Doc("Write TensorBoard events.");
  f.Add("indexer_interval", &c.indexer_interval)
      .Default("20")
      .Between(0, kMostSteps)
      .Unit("steps")
      .Doc(
          "Steps between two measurements of top-k mass and recall on sampled rows, and between "
          "two records of each expert's load; a stage's first and last step have them too. 0: "
          "never.");
}

namespace {

// The sections that a stage may override, in the order in which both levels print them.
template <typename T>
void VisitSections(T& c, Fields& f) {
  f.Section("parallelism", &c.parallelism).Doc("How the ranks share the model and the batch.");
  f.Section("data", &c.data).Doc("What is read.");
  f.Add("micro_batch_size", &c.micro_batch_size)
      .Default("1")
      .Between(1, kMostSequences)
      .Unit("sequences")
      .Doc("Sequences of one forward pass on one data-parallel rank.");
  f.Section("optimizer", &c.optimizer).Doc("AdamW.");
  f.Section("lr_schedule", &c.lr_schedule).Doc("Learning rate over the steps of a stage.");
  f.Section("dsa", &c.dsa).Doc("Sparse attention and its lightning indexer.");
  f.Section("precision", &c.precision).Doc("Number formats.");
  f.Section("losses", &c.losses).Doc("Weights of the losses beside the language model's own.");
  f.Section("router", &c.router).Doc("Load balancing without a loss.");
  f.Add("deterministic", &c.deterministic)
      .Default("true")
      .Doc("true is the only value: same run, same layout, same bits.");
  f.Choice("recompute", &c.recompute, kRecompute)
      .Default("selective")
      .Doc(
          "Activations computed again in the backward pass: none, the cheap ones, or whole "
          "blocks.");
  f.Section("checkpoint", &c.checkpoint).Doc("Training states: when, how many, from which.");
  f.Section("validation", &c.validation).Doc("Validation loss during training.");
  f.Section("metrics", &c.metrics).Doc("What is reported, and how often.");
}

StageConfig Inherit(const RunConfig& run) {
  StageConfig stage;
  stage.parallelism = run.parallelism;
  stage.data = run.data;
  stage.micro_batch_size = run.micro_batch_size;
  stage.optimizer = run.optimizer;
  stage.lr_schedule = run.lr_schedule;
  stage.dsa = run.dsa;
  stage.precision = run.precision;
  stage.losses = run.losses;
  stage.router = run.router;
  stage.deterministic = run.deterministic;
  stage.recompute = run.recompute;
  stage.checkpoint = run.checkpoint;
  stage.validation = run.validation;
  stage.metrics = run.metrics;
  return stage;
}

}  // namespace

void Visit(StageConfig& c, Fields& f) {
  f.Add("name", &c.name).Identifier().Doc("Name of the stage; no two are equal.");
  f.Choice("attention", &c.attention, kAttention)
      .Doc("dense, or sparse on the keys the indexer selects.");
  f.Choice("train", &c.train, kTrain)
      .Doc(
          "indexer: everything else is frozen. all: the model by its losses, the indexer by its "
          "own.");
  f.Add("steps", &c.steps)
      .Between(1, kMostSteps)
      .Unit("steps")
      .Doc("Optimizer steps of the stage.");
  f.Add("global_batch_size", &c.global_batch_size)
      .Between(1, kMostSequences)
      .Unit("sequences")
      .Doc("Sequences of one optimizer step, over all ranks.");
  VisitSections(c, f);
}

void Visit(RunConfig& c, Fields& f) {
  f.Section("run", &c.run).Doc("The run itself.");
  f.Section("model", &c.model).ExactlyOne().Doc("Where the weights come from.");
  VisitSections(c, f);
  f.List<StageConfig>("stages", &c.stages, [&c] { return Inherit(c); })
      .Items(1, 100)
      .Doc(
          "Training stages in their order, in one job. A stage may override any key of the "
          "sections from parallelism to metrics.");
}

std::vector<Field> RunFields(RunConfig& config) { return Fields::Of(config); }
std::vector<Field> StageFields(StageConfig& stage) { return Fields::Of(stage); }

}  // namespace baleen
