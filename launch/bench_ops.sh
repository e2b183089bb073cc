#!/usr/bin/env bash
# Times the ops of the 671B proxy on one GPU beside published figures and goals: what docs/benchmarking.md describes.
#
#   launch/bench_ops.sh OUT_DIR            all tables, about a minute on an H100
#   launch/bench_ops.sh OUT_DIR sparse     only these: sparse heads indexer dense products memory
#   BALEEN=path launch/bench_ops.sh ...    another binary than that of the bundle or of dist/baleen
#
# One process each, with a .txt and a .json in OUT_DIR. Exit code 1: some failed.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_bench "$@"
shift
wanted=${*:-sparse heads indexer dense products memory}

failed=0
table() {  # table NAME PATTERNS WORDS...
  local name=$1 patterns=$2 start=$SECONDS code=0
  shift 2
  timeout 120 "$binary" bench ops configs/run/proxy_8k.yaml --ops "$patterns" "$@" --json "$results/$name.json" \
    >"$results/$name.txt" 2>&1 || code=$?
  say "$name: exit code $code, $((SECONDS - start)) s, $results/$name.txt"
  tail -n 3 "$results/$name.txt"
  if ((code != 0)); then failed=1; fi
}

lengths=4Ki,8Ki,16Ki,32Ki,64Ki,128Ki
for name in $wanted; do
  case $name in
    sparse) table sparse 'sparse_attention.*' --heads 128,64 --tokens $lengths --no-trace ;;
    heads) table heads 'sparse_attention.*' --heads 32,16 --tokens 8Ki,32Ki,128Ki --no-trace ;;
    indexer) table indexer 'indexer.*' --tokens $lengths --no-trace ;;
    dense) table dense 'attention.*,masked_attention.*,warmup.*' --tokens 4Ki,8Ki,16Ki,32Ki --steps 5 ;;
    products) table products 'gemm.*,grouped.*,fp8.*,grouped_fp8.*' ;;
    memory) table memory \
      'rms_norm*,layer_norm*,rope*,swiglu*,add*,copy*,cast*,router*,permute*,fp8_quantise*,cross*,embed*,sum*,adamw' ;;
    *) die $kExitUsage "launch/bench_ops.sh: unknown table '$name'; see launch/bench_ops.sh --help" ;;
  esac
done
exit $failed
