#!/usr/bin/env bash
# Sets up, builds and runs the test suite; ends with ctest's summary.
#
#   launch/test.sh                     all tests but those labelled slow
#   launch/test.sh --all               all tests (what .ci/run does)
#   launch/test.sh --label mpi         tests of one label: unit, mpi, gpu, slow, end_to_end
#   launch/test.sh --preset host-asan  with sanitizers
#   launch/test.sh -R includes         other words go to ctest
#
# JOBS=N sets how many processors tests may take at once; default: all cores.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

preset=host
label=
excluded=(slow)
rest=()
while (($# > 0)); do
  case $1 in
    --all) excluded=() ;;
    --label | --preset)
      if (($# < 2)); then die $kExitUsage "launch/test.sh: $1 needs a value"; fi
      if [[ $1 == --label ]]; then label=$2; else preset=$2; fi
      shift
      ;;
    -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
    *) rest+=("$1") ;;
  esac
  shift
done
case $label in
  '' | unit | mpi | gpu | end_to_end) ;;
  slow) excluded=() ;;
  *) die $kExitUsage "launch/test.sh: --label $label: expected unit, mpi, gpu, slow or end_to_end" ;;
esac

bash "$root/launch/build.sh" "$preset"

if [[ $label != gpu ]] && ! has_nvidia_gpu; then excluded+=(gpu); fi
choice=()
if [[ -n $label ]]; then choice+=(-L "^$label\$"); fi
if ((${#excluded[@]} > 0)); then
  choice+=(-LE "^($(IFS='|' && echo "${excluded[*]}"))\$")
  say "left out: tests labelled ${excluded[*]}"
fi
cd "$root"
ctest --preset "$preset" -j "${JOBS:-$(num_cores)}" ${choice[@]+"${choice[@]}"} ${rest[@]+"${rest[@]}"}
