#!/usr/bin/env bash
# One machine: torchrun starts a process for each of its devices (GPUs; where there are none, cores).
#
#   launch/jobs/single_node.sh                                               # configs/fsdp2.yaml
#   CONFIG=configs/ddp.yaml PROCESSES=2 launch/jobs/single_node.sh steps=100 optimizer.lr=1e-3
#
# What to change: CONFIG and any key=value of it; PROCESSES, of which batch_size must be a multiple; RESTARTS, how often ranks may fail and
# restart from their newest checkpoint; RUN, a folder in runs/ to resume, else a new run begins. CUDA_VISIBLE_DEVICES chooses among GPUs.
# SIGTERM saves a checkpoint and ends the job.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Signals that torchrun forwards, and seconds that ranks then have to save; the default is 30. They are not given as options, as
# torch < 2.10 would refuse the first and torch < 2.12 the second; unknown variables are ignored.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=100
run="${RUN:-$(date +%Y-%m-%d-%H%M%S)-$(basename "${CONFIG:-configs/fsdp2.yaml}" .yaml)}" # the same when ranks restart
# exec: signals reach torchrun.
exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-3}" \
    -m launch.train "${CONFIG:-configs/fsdp2.yaml}" processes=auto checkpoint.every=100 resume=auto "run=$run" "$@"
