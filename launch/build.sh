#!/usr/bin/env bash
# Configures (where needed) and builds one preset of CMakePresets.json in build/PRESET; says nothing when all is built.
#
#   launch/build.sh                     preset host: Release, CPU backend, tests
#   launch/build.sh host-asan           with address and undefined-behaviour sanitizers
#   launch/build.sh host baleen         only these targets
#
# JOBS=N sets the number of compilers; default: what cores and free memory allow.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
  -*) die $kExitUsage "launch/build.sh: unknown word '$1'; see launch/build.sh --help" ;;
esac
preset=${1:-host}
targets=("${@:2}")
build=$root/build/$preset

configure() {
  local log=$root/build/configure-$preset.log
  mkdir -p "$root/build"
  say "configuring preset $preset in build/$preset"
  if ! (cd "$root" && cmake --preset "$preset") >"$log" 2>&1; then
    cat "$log" >&2
    die $kExitEnvironment "cmake --preset $preset failed (above, and in $log)"
  fi
}

# Of ninja's progress one line in ten per cent; all of its errors and warnings. What ptxas says of a kernel that is
# right is neither (C7519: it put a warpgroup's arrival where it belongs).
condense() {
  awk '
    /^ninja: (no work to do|Entering directory)/ || /Re-checking globbed directories/ { next }
    /^ptxas info .*C7519/ { next }
    /^\[[0-9]+\/[0-9]+\] / {
      split(substr($1, 2, length($1) - 2), count, "/")
      tenth = int(10 * count[1] / count[2])
      if (count[2] >= 10 && tenth == last) next
      last = tenth
      print; fflush(); next
    }
    { print; fflush() }
  '
}

bash "$root/launch/setup.sh"
# A changed preset is a changed configuration; changed CMakeLists and new files are noticed by the build itself.
stamp=$build/configured
if [[ ! -f $build/build.ninja || $root/CMakePresets.json -nt $stamp ]]; then
  configure
  touch "$stamp"
fi
if [[ ! -f $build/.ninja_log ]]; then
  say "a first build takes some minutes (on two cores 8, where nvcc is); a line is printed every tenth"
fi
command=(ninja -C "$build" -j "${JOBS:-$(num_jobs)}" ${targets[@]+"${targets[@]}"})
if ! NINJA_STATUS='[%f/%t] ' "${command[@]}" 2>&1 | condense; then
  die 1 "the build of preset $preset failed (above)"
fi
