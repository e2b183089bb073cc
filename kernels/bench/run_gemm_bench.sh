#!/usr/bin/env bash
# Builds the bench of the matrix products for sm_90a in a folder of its own ($BUILD), checks and
# times. Needs nvcc, cuBLAS and cuBLASLt only.
#   kernels/bench/run_gemm_bench.sh [--cluster=1|2] [--json=FILE] [check grouped dense]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-/tmp/baleen-gemm-bench}
mkdir -p "$build"
words=("$@")
[ ${#words[@]} -gt 0 ] || words=(check grouped dense)  # in this order: dense warms the card most

objects=() pids=()
for source in kernels/bench/gemm_bench.cu kernels/ops/linear/matmul_cuda.cu kernels/ops/linear/grouped_matmul_cuda.cu; do
  objects+=("$build/$(basename "$source" .cu).o")
  nvcc -std=c++20 -I. -gencode=arch=compute_90a,code=sm_90a -O3 -c "$source" -o "${objects[-1]}" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
nvcc "${objects[@]}" -lcublas -lcublasLt -o "$build/gemm_bench"
timeout "${LIMIT:-100}" "$build/gemm_bench" "${words[@]}"
