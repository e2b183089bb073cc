#!/usr/bin/env bash
# The whole job in small, on this machine: text -> a tiny V3-shaped model trained dense -> V3.1 FP8 checkpoint -> indexer
# warm-up -> sparse training on 4 MPI ranks -> V3.2 FP8 checkpoint -> report.html, with a dense control beside it.
#
#   launch/demo.sh                 everything, in runs/demo (about ten minutes on two cores after the build)
#   launch/demo.sh --dir DIR       somewhere else; what is there already is removed
#   launch/demo.sh --quick         a few steps of each part: does it run, not does it learn
#
# With a binary built for GPUs it runs on four of them, or as one rank on one; else on the CPU.
# BALEEN=PATH takes a ready binary and builds nothing; in a bundle (launch/bundle.sh) its own is taken.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dir=runs/demo
dense_steps=900 warm_steps=120 sparse_steps=120
while (($# > 0)); do
  case $1 in
    -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
    --quick) dense_steps=6 warm_steps=4 sparse_steps=4 ;;
    --dir)
      (($# > 1)) || die $kExitUsage "launch/demo.sh: --dir needs a folder"
      dir=$2 && shift
      ;;
    *) die $kExitUsage "launch/demo.sh: unknown word '$1'; see launch/demo.sh --help" ;;
  esac
  shift
done
cd "$root"

if [[ -z ${BALEEN:-} && -x $root/bin/baleen ]]; then BALEEN=$root/bin/baleen; fi
baleen=${BALEEN:-$root/build/host/trainer/baleen}
if [[ -z ${BALEEN:-} ]]; then bash launch/build.sh host baleen; fi
# Four ranks; with GPUs, but fewer than four, one rank on one of them, so tiny.yaml's layouts do not apply.
ranks=4 layout=()
if has_nvidia_gpu && (($(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l) < ranks)); then
  ranks=1
  layout=(stages.0.parallelism.context=1 stages.1.parallelism.{tensor,pipeline,expert,context}=1)
fi
run() { bash launch/mpirun.sh -np "$ranks" "$baleen" "$@"; }

# Real text: the kernel's C headers, which come with the C library. Every twelfth file is kept for validation.
text() { find /usr/include/linux -name '*.h' -size +2k | LC_ALL=C sort; }
(($(text | wc -l) >= 100)) ||
  die $kExitEnvironment "launch/demo.sh: expected 100 or more headers in /usr/include/linux (package linux-libc-dev)"

if [[ -e $dir ]]; then
  [[ -e $dir/.baleen-demo ]] || die $kExitUsage "launch/demo.sh: $dir exists and is no demo of before: remove it, or name another with --dir"
  rm -rf "$dir"
fi
mkdir -p "$dir/data" && touch "$dir/.baleen-demo"
start=$SECONDS
part() { say "[$((SECONDS - start)) s] $*"; }

part "text to tokens"
text | awk 'NR % 12 != 0' | xargs "$baleen" data build --to "$dir/data/train" --tokenizer bytes --append-eod
text | awk 'NR % 12 == 0' | xargs "$baleen" data build --to "$dir/data/validation" --tokenizer bytes --append-eod

# The run files of configs/run, with this folder's paths.
data=("data.train=[{path: $dir/data/train}]" "data.validation=[{path: $dir/data/validation}]")

part "dense training of a tiny V3-shaped model: something to select from"
run train configs/run/tiny_dense.yaml "run.dir=$dir/dense" "${data[@]}" "stages.0.steps=$dense_steps"
"$baleen" export "$dir/dense" --to "$dir/tiny-v31" --format v3.1 --dtype fp8

part "V3.1 checkpoint -> indexer warm-up -> sparse training, one run file"
run train configs/run/tiny.yaml "run.dir=$dir/sparse" "model.checkpoint=$dir/tiny-v31" "${data[@]}" "${layout[@]}" \
  "stages.0.steps=$warm_steps" "stages.1.steps=$sparse_steps"
"$baleen" export "$dir/sparse" --to "$dir/tiny-v32" --dtype fp8
"$baleen" inspect "$dir/tiny-v32" >"$dir/tiny-v32.txt"

part "the control: dense training on the same batches"
run train configs/run/tiny_control.yaml "run.dir=$dir/control" "model.checkpoint=$dir/tiny-v31" "${data[@]}" \
  "stages.0.steps=$sparse_steps" "data.first_sample=$((warm_steps * 4))" # a warm-up step takes 4 samples

part "what the indexer is worth at the hand-over"
handover=$(printf '%s/sparse/checkpoints/step-%08d' "$dir" "$warm_steps")
run eval configs/run/tiny.yaml "run.dir=$dir/sparse" "model.checkpoint=$dir/tiny-v31" "${data[@]}" "${layout[@]}" \
  --checkpoint "$handover" --json >"$dir/handover.json"
run eval configs/run/tiny.yaml "run.dir=$dir/sparse" "model.checkpoint=$dir/tiny-v31" "${data[@]}" "${layout[@]}" \
  --checkpoint "$dir/sparse" --json >"$dir/end.json"
"$baleen" report "$dir/sparse" --compare "$dir/control"

part "done"
python3 launch/demo_summary.py "$dir"
