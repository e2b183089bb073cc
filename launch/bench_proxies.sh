#!/usr/bin/env bash
# Measures steps and layers of the 671B proxy on one GPU, from 8K to 128K tokens: what docs/benchmarking.md describes.
#
#   launch/bench_proxies.sh OUT_DIR             all of them, about four minutes on an H100
#   launch/bench_proxies.sh OUT_DIR layer64     only these: step8 step32 step64 layer8 layer32 layer64 layer128; with FP8
#                                               index scores layer32fp8 layer64fp8 layer128fp8
#   BALEEN=path launch/bench_proxies.sh ...     another binary than that of the bundle or of dist/baleen
#
# One process each, so that one that finds no memory leaves the others alone; a log and a JSON file each in OUT_DIR.
# libcupti must be found for kernel times: name its folder in LD_LIBRARY_PATH. Exit code 1: some failed.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_bench "$@"
shift
wanted=${*:-step8 step32 step64 layer8 layer32 layer64 layer128 layer32fp8 layer64fp8 layer128fp8}

failed=0
measure() {  # measure NAME WORDS...
  local name=$1 start=$SECONDS code=0
  shift
  timeout 300 "$binary" bench "$@" --json "$results/$name.json" >"$results/$name.log" 2>&1 || code=$?
  say "$name: exit code $code, $((SECONDS - start)) s, $results/$name.log"
  sed -n '/tokens a sequence/{N;N;p}' "$results/$name.log"
  if ((code != 0)); then failed=1 && tail -n 5 "$results/$name.log"; fi
}

long=(--ids "near,random" --steps 2 --warmup 1)
fp8=("${long[@]}" --stage sparse dsa.indexer_dtype=fp8)
for name in $wanted; do
  case $name in
    step8) measure step8 step configs/run/proxy_8k.yaml --ids near,random --steps 3 ;;
    step32) measure step32 step configs/run/proxy_32k.yaml "${long[@]}" ;;
    step64) measure step64 step configs/run/proxy_32k.yaml "${long[@]}" --stage warmup,sparse data.seq_length=64Ki \
      optimizer.moments=bf16 ;;
    layer8) measure layer8 layer configs/run/proxy_8k.yaml --ids near,random recompute=none ;;
    layer32) measure layer32 layer configs/run/proxy_32k.yaml "${long[@]}" ;;
    layer64) measure layer64 layer configs/run/proxy_32k.yaml "${long[@]}" data.seq_length=64Ki ;;
    layer128) measure layer128 layer configs/run/proxy_128k.yaml "${long[@]}" ;;
    layer32fp8) measure layer32fp8 layer configs/run/proxy_32k.yaml "${fp8[@]}" ;;
    layer64fp8) measure layer64fp8 layer configs/run/proxy_32k.yaml "${fp8[@]}" data.seq_length=64Ki ;;
    layer128fp8) measure layer128fp8 layer configs/run/proxy_128k.yaml "${fp8[@]}" ;;
    *) die $kExitUsage "launch/bench_proxies.sh: unknown measurement '$name'; see launch/bench_proxies.sh --help" ;;
  esac
done
exit $failed
