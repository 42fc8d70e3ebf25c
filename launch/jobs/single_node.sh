#!/usr/bin/env bash
# One machine: torchrun starts a process for each of its devices (GPUs; where there are none, cores).
#
#   launch/jobs/single_node.sh                                               # configs/fsdp2.yaml
#   CONFIG=configs/ddp.yaml PROCESSES=2 launch/jobs/single_node.sh steps=100 optimizer.lr=1e-3
#
# What to change: CONFIG and any key=value of it; PROCESSES, of which batch_size is a multiple; RESTARTS, how often ranks may fail and be
# started again, from their newest checkpoint. CUDA_VISIBLE_DEVICES chooses among GPUs. SIGTERM saves a checkpoint and ends the job.
set -euo pipefail
cd "$(dirname "$0")/../.."

# exec: signals reach torchrun, which hands them on. Ranks then have 100 s to save, where torchrun's default is 30, and that of torch < 2.12
# cannot be changed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m launch.train "${CONFIG:-configs/fsdp2.yaml}" processes=auto checkpoint.every=100 resume=auto "$@"
