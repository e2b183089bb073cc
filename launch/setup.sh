#!/usr/bin/env bash
# Installs what Baleen needs to build and test, and nothing when all of it is there.
#
#   launch/setup.sh             look, and install what is missing with apt-get (sudo where not root)
#   launch/setup.sh --check     only look: exit 3 and a list when something is missing
#   launch/setup.sh --optional  also what some tools use: clang-format and clang-tidy, h5dump, strace, clang; and, where
#                               nvcc is, the headers of the cuDNN frontend (fast dense attention) from their Python wheel
#
# Looking means to look for the command or header itself, so libraries built by hand count too: their prefixes in
# CMAKE_PREFIX_PATH, their headers in CPATH.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# package | what shows that it is there (command:NAME or header:PATH) | what it is for
# Names of Debian 12 and Ubuntu 24.04.
kNeeded='
g++                  | command:g++                      | C++20 compiler
cmake                | command:cmake                    | configures the build
ninja-build          | command:ninja                    | runs the build
ccache               | command:ccache                   | a second build takes seconds
pkg-config           | command:pkg-config               | finds libraries
python3              | command:python3                  | architecture test, launch/compare_runs.sh
libabsl-dev          | header:absl/status/statusor.h    | Status, strings
libyaml-cpp-dev      | header:yaml-cpp/yaml.h           | run files
nlohmann-json3-dev   | header:nlohmann/json.hpp         | JSON of checkpoints and metrics
libhdf5-dev          | header:hdf5.h                    | training state
libopenmpi-dev       | header:mpi.h                     | ranks: headers and library
openmpi-bin          | command:mpirun                   | ranks: launcher
libxxhash-dev        | header:xxhash.h                  | hashes of checkpoint files
libgtest-dev         | header:gtest/gtest.h             | tests
libgmock-dev         | header:gmock/gmock.h             | tests
'
kOptional='
clang                | command:clang++                  | fuzz targets (libFuzzer)
clang-format         | command:clang-format             | make format
clang-tidy           | command:clang-tidy               | make tidy
hdf5-tools           | command:h5dump                   | looking into a training state by hand
strace               | command:strace                   | fault injection by hand
'

# No Debian package has them, and a Debian 12 Python lets pip install nothing: the wheel is unpacked beside the builds.
kFrontendWheel=nvidia-cudnn-frontend==1.32.0
kFrontendHeader=header:cudnn_frontend.h
frontend_folder=$root/build/third_party/cudnn_frontend

# Folders in which the build would find a header.
header_folders() {
  local prefix
  tr ':' '\n' <<<"${CPATH:-}:${CPLUS_INCLUDE_PATH:-}"
  printf '%s\n' "$frontend_folder/include"
  python3 -c "import sysconfig; print(sysconfig.get_path('purelib') + '/include')" 2>/dev/null || true
  for prefix in $(tr ':;' '  ' <<<"${CMAKE_PREFIX_PATH:-}") /usr/local /usr; do
    printf '%s\n' "$prefix/include" "$prefix/include/hdf5/serial" "$prefix"/lib/*-linux-gnu/openmpi/include
  done
}

is_there() {  # is_there KIND:NAME
  local name=${1#*:} folder
  case $1 in
    command:*) have "$name" ;;
    header:*)
      for folder in "${folders[@]}"; do
        if [[ -n $folder && -e $folder/$name ]]; then return 0; fi
      done
      return 1
      ;;
    *) die 70 "launch/setup.sh: unknown test $1" ;;
  esac
}

# Fills `missing` (packages) and `reasons` (one line each) from a table.
find_missing() {  # find_missing TABLE
  local package test reason
  missing=()
  reasons=()
  while IFS='|' read -r package test reason; do
    package=${package// /}
    test=${test// /}
    if [[ -z $package ]] || is_there "$test"; then continue; fi
    missing+=("$package")
    reasons+=("$(printf '  %-20s %s (no %s %s)' "$package" "${reason# }" "${test%%:*}" "${test#*:}")")
  done <<<"$1"
}

by_hand() {
  printf 'install these packages by hand, then start again (Debian and Ubuntu names):\n  %s' "${missing[*]}"
}

install() {
  local as_root=() log
  if ! have apt-get; then
    die $kExitEnvironment "no apt-get on this machine; $(by_hand)"
  fi
  if ((EUID != 0)); then
    if ! have sudo; then die $kExitEnvironment "not root and no sudo; $(by_hand)"; fi
    # Without a terminal nobody can type a password.
    if [[ ! -t 0 ]] && ! sudo -n true 2>/dev/null; then
      die $kExitEnvironment "sudo asks for a password and there is no terminal; $(by_hand)"
    fi
    as_root=(sudo)
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive)
  log=$(mktemp)
  local options=(-y -q -o DPkg::Lock::Timeout=300)
  if ! "${as_root[@]}" apt-get "${options[@]}" update >"$log" 2>&1; then
    say "apt-get update failed; trying with the package lists that are here"
    tail -n 3 "$log" >&2
  fi
  if ! "${as_root[@]}" apt-get "${options[@]}" install --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    die $kExitEnvironment "apt-get install failed (its last lines are above); $(by_hand)"
  fi
  rm -f "$log"
  hash -r
}

# The headers of the cuDNN frontend, where a CUDA compiler could use them.
get_frontend() {
  local wheels
  if ! have nvcc && [[ ! -x /usr/local/cuda/bin/nvcc ]]; then return 0; fi
  mapfile -t folders < <(header_folders)
  if is_there "$kFrontendHeader"; then return 0; fi
  if [[ $check_only == yes ]]; then
    die $kExitEnvironment "no ${kFrontendHeader#*:}: launch/setup.sh --optional gets it from the wheel $kFrontendWheel"
  fi
  say "unpacking the headers of $kFrontendWheel into $frontend_folder"
  wheels=$(mktemp -d)
  if ! python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" "$kFrontendWheel" >&2 ||
    ! python3 -m zipfile -e "$wheels"/*.whl "$wheels/unpacked"; then
    rm -rf "$wheels"
    die $kExitEnvironment "pip could not get $kFrontendWheel (is python3-pip there?): put its include/ folder on CPATH \
by hand, or build without: dense attention then runs on general kernels, many times slower"
  fi
  mkdir -p "$frontend_folder"
  rm -rf "$frontend_folder/include"
  mv "$wheels/unpacked/include" "$frontend_folder/include"
  rm -rf "$wheels"
}

table=$kNeeded
check_only=no
optional=no
for word in "$@"; do
  case $word in
    --check) check_only=yes ;;
    --optional) table=$kNeeded$kOptional optional=yes ;;
    -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die $kExitUsage "launch/setup.sh: unknown word '$word'; see launch/setup.sh --help" ;;
  esac
done

mapfile -t folders < <(header_folders)
find_missing "$table"
if ((${#missing[@]} == 0)); then
  if [[ $optional == yes ]]; then get_frontend; fi
  exit 0
fi
say "missing:"
printf '%s\n' "${reasons[@]}"
if [[ $check_only == yes ]]; then die $kExitEnvironment "$(by_hand)"; fi
say "installing ${#missing[@]} packages with apt-get: ${missing[*]}"
install
wanted=("${missing[@]}")
mapfile -t folders < <(header_folders)
find_missing "$table"
if ((${#missing[@]} > 0)); then
  printf '%s\n' "${reasons[@]}" >&2
  die $kExitEnvironment "apt-get succeeded, but the above is still not found; is another copy first on PATH or CPATH?"
fi
say "installed ${#wanted[@]} packages"
if [[ $optional == yes ]]; then get_frontend; fi
