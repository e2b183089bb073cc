#!/usr/bin/env bash
# Makes a bundle: the binary and the GPU tests with launch/ and configs/, for machines without a compiler.
#
#   launch/bundle.sh             in dist/baleen
#   launch/bundle.sh DIR         in DIR; what is there is removed
#
# On the other machine: DIR/launch/gpu_tests.sh, DIR/bin/baleen. It needs the driver, libmpi.so.40 (Open MPI 4), and for
# the GPU cuBLASLt, cuDNN and NCCL of CUDA 13; without those it trains on the CPU.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
kMostMebibytes=40

case ${1:-} in
  -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
  -*) die $kExitUsage "launch/bundle.sh: unknown word '$1'; see launch/bundle.sh --help" ;;
esac
bundle=${1:-$root/dist/baleen}
if [[ -e $bundle && ! -e $bundle/bin/baleen ]]; then
  die $kExitUsage "launch/bundle.sh: $bundle exists and is no bundle of before: remove it, or name another"
fi

bash "$root/launch/build.sh" bundle baleen
if ninja -C "$root/build/bundle" -t query baleen_gpu_tests >/dev/null 2>&1; then
  bash "$root/launch/build.sh" bundle baleen_gpu_tests
  # Reads all of it: under pipefail a ninja that is cut off counts as a miss.
  if ! ninja -C "$root/build/bundle" -t commands baleen | grep BALEEN_HAVE_CUDNN_FRONTEND >/dev/null; then
    say "without the cuDNN frontend: dense attention will run on general kernels, many times slower; first run" \
      "launch/setup.sh --optional to have it in the bundle"
  fi
else
  say "no CUDA backend in this build: a bundle for the CPU, without GPU tests"
fi
rm -rf "$bundle"
cmake --install "$root/build/bundle" --prefix "$bundle" --strip >/dev/null

size=$(du -sm "$bundle" | cut -f1)
say "$bundle: $size MiB"
if ((size > kMostMebibytes)); then die 70 "launch/bundle.sh: more than $kMostMebibytes MiB: what grew?"; fi
