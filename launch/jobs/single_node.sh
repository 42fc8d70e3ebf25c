#!/usr/bin/env bash
# One machine: torchrun starts a process for each of its devices (GPUs; where there are none, cores).
#
#   launch/jobs/single_node.sh                                               # configs/fsdp2.yaml
#   CONFIG=configs/ddp.yaml PROCESSES=2 launch/jobs/single_node.sh steps=100 optimizer.lr=1e-3
#
# What to change: CONFIG and any key=value of it; PROCESSES, of which batch_size is a multiple; RESTARTS, how often ranks may fail and be
# started again, from their newest checkpoint; RUN, a folder in runs/ to go on with, where otherwise a new run begins. CUDA_VISIBLE_DEVICES
# chooses among GPUs. SIGTERM saves a checkpoint and ends the job.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Signals that torchrun hands on, and seconds that ranks then have to save, where its default is 30. torch < 2.10 knows no such option, and
# would refuse it, but not a variable; nor the second one before 2.12.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=100
run="${RUN:-$(date +%Y-%m-%d-%H%M%S)-$(basename "${CONFIG:-configs/fsdp2.yaml}" .yaml)}" # the same when ranks are started again
# exec: signals reach torchrun.
exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-3}" \
    -m launch.train "${CONFIG:-configs/fsdp2.yaml}" processes=auto checkpoint.every=100 resume=auto "run=$run" "$@"
