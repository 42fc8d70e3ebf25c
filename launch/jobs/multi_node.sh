#!/usr/bin/env bash
# Several machines without a scheduler: the same command on each of them. The rendezvous of their torchruns is at HEAD_NODE, one of them.
#
#   HEAD_NODE=10.0.0.1 NODES=2 launch/jobs/multi_node.sh runs_folder=/shared/runs
#   HEAD_NODE=10.0.0.1 NODES=2:4 launch/jobs/multi_node.sh ...               # begins with 2, continues with any number from 2 to 4
#
# What to change: runs_folder, which must be on a file system that all nodes share; HEAD_NODE, a name or an IPv4 address that all nodes
# can reach; RUN, the same name on all nodes, which distinguishes a new run from restarted nodes: without it the newest run of this config
# is resumed, unless all its steps are done; PORT, open on HEAD_NODE (ranks use further ones, which the system chooses: open all between the
# nodes); INTERFACE, the network that ranks use, if a node has several; LOCAL_ADDRESS, if the others reach this node by another address than
# the one it finds itself; JOB, if two jobs use one port; CONFIG, PROCESSES and RESTARTS as in single_node.sh. If NODES is a range,
# batch_size must be a multiple of all numbers of processes. When a node joins or leaves, all ranks restart from their newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."

[[ -z "${INTERFACE:-}" ]] || export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
this_node="$(python launch/jobs/head_node.py "${HEAD_NODE:?is not set: the node of the rendezvous, as HEAD_NODE=10.0.0.1}")"
read -r local_address is_host <<<"$this_node"

# Otherwise torch 2.13 shares a store with the nodes that are running, which restarted nodes do not find, so that they cannot join.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=100
# Nodes may start up to ten minutes apart. The rest, and PET_*, are as in single_node.sh.
exec torchrun --nnodes "${NODES:?is not set: how many nodes, as NODES=2 or NODES=2:4}" --nproc-per-node "${PROCESSES:-auto}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:${PORT:-29500}" --rdzv-id "${JOB:-sharded-optim}" \
    --rdzv-conf "read_timeout=600${is_host:+,is_host=$is_host}" --local-addr "${LOCAL_ADDRESS:-$local_address}" \
    --max-restarts "${RESTARTS:-3}" \
    -m launch.train "${CONFIG:-configs/fsdp2.yaml}" processes=auto checkpoint.every=100 resume=auto ${RUN:+"run=$RUN"} "$@"
