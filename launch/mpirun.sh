#!/usr/bin/env bash
# mpirun with what one host needs: root in containers, more ranks than cores, no fabric search, no busy spinning.
# Usage: launch/mpirun.sh -np N PROGRAM ARGS...
set -euo pipefail
export OMPI_ALLOW_RUN_AS_ROOT="${OMPI_ALLOW_RUN_AS_ROOT:-1}"
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-1}"
export OMPI_MCA_btl_vader_single_copy_mechanism="${OMPI_MCA_btl_vader_single_copy_mechanism:-none}"
exec mpirun --oversubscribe --bind-to none --mca pml ob1 --mca btl self,vader,tcp \
  --mca mpi_yield_when_idle 1 "$@"
