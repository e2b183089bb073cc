#!/usr/bin/env bash
# Builds the indexer bench for sm_90a in a folder of its own ($BUILD) and runs the given words.
#   kernels/bench/run_indexer_bench.sh [check gemm topk scores backward]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-/tmp/baleen-indexer-bench}
mkdir -p "$build"
words=("$@")
[ ${#words[@]} -gt 0 ] || words=(check topk backward scores gemm)

objects=() pids=()
for source in kernels/bench/indexer_bench.cu kernels/ops/indexer/topk_select_cuda.cu \
              kernels/ops/indexer/indexer_*_cuda.cu; do
  objects+=("$build/$(basename "$source" .cu).o")
  nvcc -std=c++20 -I. -gencode=arch=compute_90a,code=sm_90a -O3 -c "$source" -o "${objects[-1]}" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
nvcc "${objects[@]}" -lcublas -o "$build/indexer_bench"
timeout "${LIMIT:-120}" "$build/indexer_bench" "${words[@]}"
