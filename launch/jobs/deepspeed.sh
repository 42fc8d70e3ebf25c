#!/usr/bin/env bash
# DeepSpeed's launcher: starts ranks on this machine, or on the machines of a hostfile over ssh, which must need no password.
#
#   PROCESSES=2 launch/jobs/deepspeed.sh                                     # configs/deepspeed.yaml
#   HOSTFILE=hostfile HEAD_NODE=10.0.0.1 launch/jobs/deepspeed.sh runs_folder=/shared/runs
#
# What to change: HOSTFILE, with a line for each node, as `node1 slots=8`; HEAD_NODE, a name or an address of the first node that the
# others can reach, and PORT, open on it; without a hostfile PROCESSES, where -1 is all devices; runs_folder, which must be on a file system
# that all nodes share, as the repository and its environment; RUN, a folder in it to resume, else a new run begins; CONFIG. Environment
# variables for other nodes go into the file .deepspeed_env, as NAME=value. This launcher does not restart ranks, and kills them at SIGTERM.
# torchrun does better with the same config:
#   CONFIG=configs/deepspeed.yaml launch/jobs/single_node.sh, or multi_node.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

run="${RUN:-$(date +%Y-%m-%d-%H%M%S)-$(basename "${CONFIG:-configs/deepspeed.yaml}" .yaml)}"
exec deepspeed --hostfile "${HOSTFILE:-/job/hostfile}" --master_addr "${HEAD_NODE:-}" --master_port "${PORT:-29500}" \
    --num_accelerators "${PROCESSES:--1}" \
    --module launch.train "${CONFIG:-configs/deepspeed.yaml}" processes=auto checkpoint.every=100 resume=auto "run=$run" "$@"
