#include "trainer/commands.h"

#include "kernels/core/log.h"
#include "parallel/communicator.h"

namespace baleen {
namespace {

const char kTrainHelp[] = R"(  mpirun -n 4 baleen train configs/run/tiny.yaml
  mpirun -n 4 baleen train configs/run/tiny.yaml stages.0.steps=10 --dry-run

Runs the stages of a run file on all MPI ranks; goes on from the newest checkpoint of run.dir, if there is one.

  KEY=VALUE    overrides a key of the run file: optimizer.lr=1e-4, stages.1.steps=100 (also --optimizer.lr=1e-4)
  --dry-run    parse, open and check everything, print the plan, train nothing, write nothing

checkpoint.signal (default USR1): finish the step, write a checkpoint, exit 75. Exit codes: docs/exit_codes.md.
)";

const char kPlanHelp[] = R"(  baleen plan configs/run/deepseek_v31_671b.yaml --world 2048
  baleen plan configs/run/tiny.yaml parallelism.tensor=2 --world 4 --gpu cpu --schedule

What each training stage of a run file needs on a number of ranks, without any of them: bytes of the first rank of each
pipeline stage by kind, messages of a step, the schedule with its bubble, predicted step time and tokens/s. The model runs
dry: the code that trains allocates, sends and counts, and computes nothing. Where a stage does not fit, the two nearest
layouts that do.

  --world N     ranks (default: the fewest on which every stage can be)
  --gpu G       h100, h200 or cpu (default: h100 where run.device is cuda, else cpu)
  --schedule    print each pipeline rank's actions over time
  --json        one JSON object on stdout
  KEY=VALUE     overrides of the run file
)";

const char kInitHelp[] = R"(  baleen init configs/model/tiny.yaml --to checkpoints/tiny
  baleen init configs/model/deepseek_v31.yaml --to /data/random-v31 --dtype fp8 --seed 7

Writes a random V3.1-format Hugging Face checkpoint of the given configuration. Under mpirun the ranks share the work;
the files are the same for any number of them.

  --to DIR        must not exist, or be empty
  --dtype TYPE    fp8 (block scales, as DeepSeek ships it; default) or bf16
  --seed N        default 0
)";

const char kExportHelp[] = R"(  baleen export runs/tiny --to runs/tiny/hf
  mpirun -n 8 baleen export runs/tiny/checkpoints/step-00000100 --run runs/tiny --to out --dtype bf16

Writes a Hugging Face checkpoint of a run's newest training state, or of the given one: V3.2 with indexers, or V3.1
where no indexer was trained. Tensors that never trained leave with the bytes they came with. Under mpirun the ranks
share the work; the files are the same for any number of them, and for states that any number of ranks saved.

  --to DIR        must not exist, or be empty
  --dtype TYPE    fp8 (default) or bf16
  --format F      v3.2 or v3.1; default: v3.2 where the run has trained indexers, else v3.1
  --run DIR       the run directory, where the state is given by its own path
  --shard-bytes N largest shard, default 4300000000
)";

const char kInspectHelp[] = R"(  baleen inspect checkpoints/tiny-v31
  baleen inspect runs/tiny/checkpoints/step-00000100 --verify

Says what a Hugging Face checkpoint, a training state, a token file or a run directory holds: every tensor accounted
for, sizes, dtypes, documents, the last step.

  --verify        read everything: hashes, NaN and infinity, token ids
  --digest        of training states: a hash of each tensor's values and one of the state, the same under every layout
)";

const char kDataHelp[] = R"(  baleen data build docs/*.txt --to data/tiny --tokenizer bytes
  baleen data build corpus.jsonl --to data/corpus --tokenizer tokenizer.json --append-eod

Tokenises text files, directories and .jsonl into Megatron's PREFIX.bin and PREFIX.idx.

  --to PREFIX          of .bin, .idx and .json, none of which may exist
  --tokenizer T        'bytes' (id = byte + 2, bos 0, eos 1) or a Hugging Face tokenizer.json (needs Python's tokenizers)
  --append-eod         end each document with the tokenizer's eos
  --document-per X     file (default) or directory
  --extensions LIST    of files in directories, comma-separated: .h,.c
  --max-file-bytes N   leave larger files of directories out
  --eod-token TEXT     where tokenizer_config.json does not name eos_token
)";

const char kConfigHelp[] = R"(  baleen config check configs/run/tiny.yaml
  baleen config print configs/run/tiny.yaml optimizer.lr=1e-4

check      reads a run file and reports every fault at once
print      the effective run file, each value with where it comes from
schema     JSON Schema for editors (needs no file)
reference  every key with type, default, range and meaning, as Markdown (needs no file)
)";

const char kEvalHelp[] = R"(  mpirun -n 4 baleen eval configs/run/tiny.yaml --checkpoint runs/tiny
  baleen eval configs/run/tiny.yaml --checkpoint runs/tiny/checkpoints/step-00000100 --json

Validation loss of a training state or Hugging Face checkpoint: dense, sparse with its own indexer, and with keys
chosen at random or the last ones (what the indexer is worth); loss by position; mass and recall of the selection.

  --checkpoint PATH   run directory, training state, or Hugging Face directory (default: the run file's model)
  --steps N           global batches (default: validation.steps)
  --json              one JSON object on stdout
  KEY=VALUE           overrides of the run file
)";

const char kBenchHelp[] =
    R"(  baleen bench step configs/run/proxy_8k.yaml --stage sparse --ids near --json step.json
  mpirun -n 2 baleen bench layer configs/run/proxy_8k.yaml --block dense parallelism.tensor=2
  baleen bench ops configs/run/proxy_8k.yaml --ops 'sparse_attention.*' --tokens 8Ki,32Ki --heads 128,64

How fast the stages of a run file are here, and where the time goes: step time, tokens/s, MFU, share of the matmul measured
in the same call, peak memory by use, time of each phase and, on GPUs, of each kind of kernel (by CUPTI) and of the gaps;
beside it what `baleen plan` says. Random weights and tokens; no checkpoint and no run directory is read or written.

step    whole optimizer steps, as baleen train takes them
layer   one block, forward and backward, phase by phase, without embedding, head and optimizer
ops     each op alone, at the sizes of one rank of the run file's layout: time, FLOP/s and bytes/s as shares of the matmul
        and of the copy measured in the same call; on GPUs beside published figures and goals. One process, no mpirun

  --stage A,B      only these stages (default: all)
  --block KIND     of layer: moe (default) or dense
  --ids LIST       keys of sparse stages: indexer (default: what its random weights choose), near (neighbouring rows share
                   most, as a trained indexer has it), random; each of the list is measured
  --steps N        timed, the median counts (default 5)
  --warmup N       before them (default 2)
  --json FILE      all figures (ops too)
  --trace FILE     a timeline of the last measurement for chrome://tracing or Perfetto
  --no-trace       without kernel times (ops: without their names)
  KEY=VALUE        overrides of the run file: data.seq_length=64Ki, recompute=full

of ops alone (beside --json, --no-trace and --steps, default 10):
  --ops A,B        patterns of names (default '*')
  --ids LIST       near and random (default both)
  --heads LIST     of attention (default: a rank's)
  --tokens LIST    keys of attention and indexer (default: data.seq_length)
  --rows N         query rows of a call (default 4Ki; dense forms take whole sequences up to 32Ki)
  --stage NAME     whose sizes are taken (default: the last)
)";

const char kReportHelp[] = R"(  baleen report runs/tiny
  baleen report runs/tiny --to tiny.html --compare runs/control

Writes RUN_DIR/report.html: curves, expert load, indexer mass and recall, in one file without outside references.

  --to FILE         default RUN_DIR/report.html
  --compare DIR     draws another run's losses beside it
)";

}  // namespace

const std::vector<Command>& AllCommands() {
  static const auto* const commands = new std::vector<Command>{
      {"train", "run the stages of a run file (start with mpirun or srun)", kTrainHelp,
       TrainCommand},
      {"plan", "bytes, messages, schedule and speed of a run, without ranks", kPlanHelp,
       PlanCommand},
      {"eval", "validation loss: dense, sparse, and control selections", kEvalHelp, EvalCommand},
      {"export", "write a Hugging Face checkpoint of a run", kExportHelp, ExportCommand},
      {"init", "write a random V3.1-format checkpoint", kInitHelp, InitCommand},
      {"inspect", "say what a checkpoint, state, token file or run holds", kInspectHelp,
       InspectCommand},
      {"data", "build token files from text", kDataHelp, DataCommand},
      {"config", "check, print or describe run files", kConfigHelp, ConfigCommand},
      {"bench", "step time and where it goes, on this machine", kBenchHelp, BenchCommand},
      {"report", "write report.html of a run", kReportHelp, ReportCommand},
  };
  return *commands;
}

void PrintOutcome(const absl::Status& status) {
  if (status.ok() || status.message().empty()) return;
  const bool preempted = status.code() == absl::StatusCode::kCancelled;
  WriteLog(preempted ? Severity::kInfo : Severity::kError, "", status.message());
}

absl::Status PrintOnce(const absl::Status& status, Communicator& world) {
  if (world.rank() == 0) PrintOutcome(status);
  world.Barrier("end of the command");
  return absl::Status(status.code(), "");
}

}  // namespace baleen
