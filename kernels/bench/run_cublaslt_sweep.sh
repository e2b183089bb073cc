#!/usr/bin/env bash
# Builds the sweep of cuBLASLt's kernels for sm_90a in a folder of its own ($BUILD) and runs it; with
# no words the products whose kernels matmul_choices_cuda.h names. Needs nvcc and cuBLASLt only.
#   kernels/bench/run_cublaslt_sweep.sh [--seconds=2] [LAYER.PASS[@ROWS] [TILE/CLUSTER/OPTION...]...]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-/tmp/baleen-cublaslt-sweep}
mkdir -p "$build"
words=("$@")
[ ${#words[@]} -gt 0 ] || words=(
  {q_a,kv_a,q_b,o,mlp_gate,mlp_down,shared_gate,shared_down}.wgrad
  {kv_a,q_a,shared_gate,o}.dgrad {kv_b,q_b,index_q,shared_down}.forward)

# The numbers and sizes of the tiles, from the header that is compiled against.
tiles=$(printf '#include <cublasLt.h>\n' | nvcc -x cu -E - |
  grep -oE 'CUBLASLT_MATMUL_TILE_[0-9]+x[0-9]+ *= *[0-9]+' |
  sed -E 's/.*TILE_([0-9]+)x([0-9]+) *= *([0-9]+)/{\3, \1, \2},/')
echo "#define BALEEN_CUBLASLT_TILES ${tiles//$'\n'/ }" >"$build/cublaslt_tiles.h"
nvcc -std=c++20 -I. -include "$build/cublaslt_tiles.h" -gencode=arch=compute_90a,code=sm_90a -O3 \
  kernels/bench/cublaslt_sweep.cu -lcublas -lcublasLt -o "$build/cublaslt_sweep"
timeout "${LIMIT:-100}" "$build/cublaslt_sweep" "${words[@]}"
