#!/usr/bin/env bash
# Builds the bench of block FP8 for sm_90a in a folder of its own ($BUILD), checks and times.
# Needs nvcc, cuBLAS and cuBLASLt only.
#   kernels/bench/run_fp8_bench.sh [--json=FILE]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-/tmp/baleen-fp8-bench}
mkdir -p "$build"

objects=() pids=()
for source in kernels/bench/fp8_bench.cu kernels/ops/linear/{fp8_quantise,fp8_linear,fp8_grouped,matmul,grouped_matmul}_cuda.cu; do
  objects+=("$build/$(basename "$source" .cu).o")
  nvcc -std=c++20 -I. -gencode=arch=compute_90a,code=sm_90a -O3 -c "$source" -o "${objects[-1]}" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
nvcc "${objects[@]}" -lcublas -lcublasLt -o "$build/fp8_bench"
timeout "${LIMIT:-100}" "$build/fp8_bench" --check "$@"
