# Shell functions shared by the scripts of launch/. Source it; it prints nothing and changes no directory.
#
#   root        the repository
#   say, die    a line for people; a line on stderr and an exit code (docs/exit_codes.md)
#   have        is there such a command
#   num_cores   cores this process may use (affinity, cgroup quota)
#   num_jobs    compilers that fit in cores and free memory at once
#   start_bench what scripts that measure begin with
# shellcheck shell=bash

# shellcheck disable=SC2034  # used by the scripts that source this file
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

kExitUsage=2
kExitEnvironment=3
# A heavy translation unit (JSON, gtest) takes about this much.
kMebibytesPerJob=1500

say() { printf 'baleen: %s\n' "$*"; }

die() {  # die EXIT_CODE MESSAGE...
  local code=$1
  shift
  printf 'baleen: error: %s\n' "$*" >&2
  exit "$code"
}

have() { command -v "$1" >/dev/null 2>&1; }

# The help of a script is the comment at its top, behind the first line.
print_help() {  # print_help SCRIPT
  sed -n '2,/^[^#]/{s/^# \{0,1\}//;t print;b;:print p}' "$1"
}

num_cores() {
  local cores quota period
  cores=$(nproc)
  if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
    local allowed=$(((quota + period - 1) / period))
    if ((allowed >= 1 && allowed < cores)); then cores=$allowed; fi
  fi
  echo "$cores"
}

# Free memory in MiB: of the machine, or of the cgroup where that is less.
free_mebibytes() {
  local free limit used
  free=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
  if read -r limit 2>/dev/null </sys/fs/cgroup/memory.max && [[ $limit != max ]] &&
    read -r used 2>/dev/null </sys/fs/cgroup/memory.current; then
    local left=$(((limit - used) / 1048576))
    if ((left < free)); then free=$left; fi
  fi
  echo "${free:-0}"
}

num_jobs() {
  local cores fitting
  cores=$(num_cores)
  fitting=$(($(free_mebibytes) / kMebibytesPerJob))
  if ((fitting < 1)); then fitting=1; fi
  echo $((fitting < cores ? fitting : cores))
}

has_nvidia_gpu() { have nvidia-smi && nvidia-smi -L >/dev/null 2>&1; }

# For `launch/x.sh OUT_DIR ...`: makes the folder and sets `results` to it, sets `binary` to $BALEEN, the bundle's or that of
# dist/baleen, and goes to the root.
start_bench() {  # start_bench "$@"
  local script=${BASH_SOURCE[1]} place
  local name=launch/${script##*/}
  case ${1:-} in
    -h | --help) print_help "$script" && exit 0 ;;
    '' | -*) die $kExitUsage "$name: no OUT_DIR; see $name --help" ;;
  esac
  mkdir -p "$1"
  results=$(cd "$1" && pwd)
  binary=${BALEEN:-}
  for place in "$root/bin/baleen" "$root/dist/baleen/bin/baleen"; do
    if [[ -z $binary && -x $place ]]; then binary=$place; fi
  done
  if [[ -z $binary ]]; then die $kExitEnvironment "$name: no binary; make a bundle, or set BALEEN"; fi
  export OMPI_ALLOW_RUN_AS_ROOT="${OMPI_ALLOW_RUN_AS_ROOT:-1}"
  export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-1}"
  cd "$root" || exit $kExitEnvironment
}
