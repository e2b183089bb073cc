#!/usr/bin/env bash
# Runs every test that needs a GPU, on one rank and on several ranks that share a GPU, and prints one summary.
#
#   launch/gpu_tests.sh                      of the bundle this script lies in, else of dist/baleen (launch/bundle.sh)
#   launch/gpu_tests.sh --bundle DIR         of another bundle, or of a build folder
#   launch/gpu_tests.sh --filter 'Cuda*'     only these tests (GoogleTest's patterns)
#   launch/gpu_tests.sh --ranks '1 2 4 8'    numbers of ranks for the tests of several; default 1 2 3 4
#   launch/gpu_tests.sh --sanitize memcheck  the single-rank tests under compute-sanitizer: memcheck, racecheck,
#                                            synccheck or initcheck; only our own kernels are watched
#   launch/gpu_tests.sh --jobs N             under --sanitize: tests at a time; default by cores and free GPU memory
#   launch/gpu_tests.sh --logs DIR           one log a run; default: a folder of /tmp that is named
#
# Exit code 0: all passed; 1: some failed; 3: no GPU or no bundle.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bundle='' filter='*' ranks='1 2 3 4' tool='' jobs='' logs=''
while (($# > 0)); do
  case $1 in
    --bundle | --filter | --ranks | --sanitize | --jobs | --logs)
      if (($# < 2)); then die $kExitUsage "launch/gpu_tests.sh: $1 needs a value"; fi
      case $1 in
        --bundle) bundle=$2 ;;
        --filter) filter=$2 ;;
        --ranks) ranks=$2 ;;
        --sanitize) tool=$2 ;;
        --jobs) jobs=$2 ;;
        --logs) logs=$2 ;;
      esac
      shift
      ;;
    -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die $kExitUsage "launch/gpu_tests.sh: unknown word '$1'; see launch/gpu_tests.sh --help" ;;
  esac
  shift
done
case $tool in
  '' | memcheck | racecheck | synccheck | initcheck) ;;
  *) die $kExitUsage "launch/gpu_tests.sh: --sanitize $tool: expected memcheck, racecheck, synccheck or initcheck" ;;
esac
if [[ -n $jobs && ! $jobs =~ ^[1-9][0-9]*$ ]]; then
  die $kExitUsage "launch/gpu_tests.sh: --jobs $jobs: expected a number of tests at a time"
fi

tests=''
for place in ${bundle:+"$bundle/bin" "$bundle/tests/cuda"} "$root/bin" "$root/dist/baleen/bin"; do
  if [[ -x $place/baleen_gpu_tests ]]; then tests=$place/baleen_gpu_tests && break; fi
done
if [[ -z $tests ]]; then
  die $kExitEnvironment "launch/gpu_tests.sh: no baleen_gpu_tests; make a bundle with launch/bundle.sh where nvcc is"
fi
if ! has_nvidia_gpu; then die $kExitEnvironment "launch/gpu_tests.sh: nvidia-smi shows no GPU"; fi
export GTEST_COLOR=no  # the results are read below
logs=${logs:-$(mktemp -d /tmp/baleen-gpu-tests.XXXXXX)}
mkdir -p "$logs"
cd "$root"

# Where the CUDA libraries came as Python wheels only, their folders.
add_wheel_folders() {
  local folders
  if ldconfig -p 2>/dev/null | grep -q 'libnccl\.so\.2' || ! have python3; then return 0; fi
  folders=$(python3 - <<'PYTHON' 2>/dev/null || true
import glob, site, sys
roots = site.getsitepackages() + [p for p in sys.path if p.endswith("-packages")]
found = {f for r in roots for f in glob.glob(r + "/nvidia/*/lib")}
print(":".join(sorted(found)))
PYTHON
)
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folders
}

passed=0 failed=0 skipped=0 lines=()
# Of GoogleTest's last lines: how many tests passed, failed, were skipped. A run that ends without them has crashed.
count() {  # count LABEL LOG EXIT_CODE SECONDS
  local ok bad out
  ok=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) tests\{0,1\}\..*/\1/p' "$2" | tail -n 1)
  bad=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) tests\{0,1\}, listed below:/\1/p' "$2" | tail -n 1)
  out=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) tests\{0,1\}, listed below:/\1/p' "$2" | tail -n 1)
  if [[ -z $ok ]] || { (($3 != 0)) && ((${bad:-0} == 0)); }; then
    bad=$((${bad:-0} + 1))
    lines+=("  $1: ENDED WITH EXIT CODE $3, see $2")
  else
    lines+=("  $1: $ok passed, ${bad:-0} failed, ${out:-0} skipped, $4 s")
  fi
  passed=$((passed + ${ok:-0})) failed=$((failed + ${bad:-0})) skipped=$((skipped + ${out:-0}))
  if ((${bad:-0} > 0)); then
    grep -E '^\[  FAILED  \] [A-Z]|^\[rank [0-9]+\]|CHECK failed|error' "$2" | sort -u | head -n 40 || true
    tail -n 15 "$2"
  fi
}

run_tests() {  # run_tests LABEL COMMAND...
  local label=$1 code=0 start=$SECONDS log
  log=$logs/${label//[: ]/_}.log
  shift
  say "$label"
  timeout 900 "$@" >"$log" 2>&1 || code=$?
  count "$label" "$log" "$code" $((SECONDS - start))
}

# GoogleTest's patterns: behind `-` what to leave out. It cannot intersect two, so a filter that does not speak of
# ranks leaves the runs on several out.
single="$filter-*OnRanks.*"
several='*OnRanks.*'
if [[ $filter == *OnRanks* ]]; then
  single='' several=$filter
elif [[ $filter != '*' ]]; then
  ranks=''
fi

# Each process of a tool wants a core, and memory of the GPU and of the host for what it records beside the test's own.
kMebibytesPerSanitizer=6144
num_sanitizers() {
  local fitting free host
  fitting=$(num_cores)
  free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | head -n 1)
  host=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo)
  for free in "$free" "$host"; do
    if ((free / kMebibytesPerSanitizer < fitting)); then fitting=$((free / kMebibytesPerSanitizer)); fi
  done
  echo $((fitting < 1 ? 1 : fitting))
}

add_wheel_folders
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
if [[ -n $tool ]]; then
  PATH=$PATH:/usr/local/cuda/bin
  for wanted in compute-sanitizer python3; do
    if ! have "$wanted"; then
      die $kExitEnvironment "launch/gpu_tests.sh --sanitize: no command $wanted; compute-sanitizer is in the bin" \
        "folder of a CUDA toolkit, which PATH must name, python3 a package of the system"
    fi
  done
  say "$tool, logs in $logs"
  exec python3 launch/sanitize.py --tool "$tool" --tests "$tests" --filter "$filter" --logs "$logs" \
    --jobs "${jobs:-$(num_sanitizers)}"
fi

if [[ -n $single ]]; then run_tests "one rank" "$tests" "--gtest_filter=$single"; fi
for count_of_ranks in $ranks; do
  run_tests "ranks: $count_of_ranks" bash launch/mpirun.sh -np "$count_of_ranks" \
    bash launch/one_gpu_rank.sh "$tests" "--gtest_filter=$several"
done

printf '%s\n' "" "GPU tests ($logs):" "${lines[@]}"
printf 'gpu tests: %d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
if ((failed > 0 || passed == 0)); then exit 1; fi
