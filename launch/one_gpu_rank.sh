#!/usr/bin/env bash
# Starts a rank of a test of several on one machine, which may have fewer GPUs than ranks: for the parallel axes with
# NCCL on one GPU.
#
#   launch/mpirun.sh -np 4 launch/one_gpu_rank.sh PROGRAM ARGS...
#
# NCCL refuses two ranks of one host on one GPU. With a host id of its own each rank counts as a host, and they talk
# through sockets on the loopback: right, but slow. Where there is a GPU for every rank they stay one host.
set -euo pipefail
rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${SLURM_LOCALID:-${MPI_LOCALRANKID:-0}}}
ranks=${OMPI_COMM_WORLD_LOCAL_SIZE:-${SLURM_NTASKS_PER_NODE:-${MPI_LOCALNRANKS:-0}}}
gpus=()
if command -v nvidia-smi >/dev/null 2>&1; then
  # Rank r takes GPU r modulo their number, and sees no other. CUDA_VISIBLE_DEVICES narrows the choice.
  IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
  if ((${#gpus[@]} > 0)); then export CUDA_VISIBLE_DEVICES=${gpus[$((rank % ${#gpus[@]}))]}; fi
fi
if ((ranks == 0 || ${#gpus[@]} < ranks)); then
  export NCCL_HOSTID=baleen-rank-$rank
  export NCCL_SOCKET_IFNAME=lo
fi
exec "$@"
