#!/usr/bin/env bash
# Builds the kernel benches of this folder for sm_90a, checks the kernels against their references and
# times them on GPU 0. Needs nvcc and cuBLAS only. A bench with a run_NAME.sh of its own is run by it.
#
#   kernels/bench/run_kernel_benches.sh [OUT_DIR] [bench name ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:-build/kernel_benches}
shift || true
mkdir -p "$results"
benches=("$@")
if [ ${#benches[@]} -eq 0 ]; then
  for source in kernels/bench/*_bench.cu; do benches+=("$(basename "$source" .cu)"); done
fi

# Compiles a bench and the kernels it includes (x_cuda.h has its kernel in x_cuda.cu), side by side.
build() {
  local objects=() pids=()
  for source in "kernels/bench/$1.cu" \
                $(sed -n 's|^#include "\(kernels/ops/.*_cuda\)\.h"|\1.cu|p' "kernels/bench/$1.cu"); do
    if [[ ! -e $source ]]; then continue; fi  # a header of host functions only
    objects+=("$results/$(basename "$source" .cu).o")
    nvcc -I. -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -c "$source" \
         -o "${objects[-1]}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  nvcc "${objects[@]}" -o "$results/$1" -lcublas
}

for bench in "${benches[@]}"; do
  echo "== $bench"
  if [ -x "kernels/bench/run_$bench.sh" ]; then
    "kernels/bench/run_$bench.sh"
  else
    build "$bench"
    timeout 300 "$results/$bench" --check --json="$results/$bench.json"
  fi
done
