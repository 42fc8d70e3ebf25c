#!/usr/bin/env bash
# mpirun of Open MPI or MPICH starts the ranks over ssh, which must need no password. The extra `mpi` installs mpi4py.
#
#   launch/jobs/mpirun.sh                                                    # two processes here
#   HOSTS=node1:8,node2:8 launch/jobs/mpirun.sh runs_folder=/shared/runs
#
# What to change: HOSTS, a name and a number of processes for each node, one for each device; runs_folder, which must be on a file system
# that all nodes share, as the repository and its environment; RUN, a folder in it to resume, else a new run begins; CONFIG. Open MPI
# passes only the variables named with -x to other nodes, MPICH all. SIGUSR1 saves a checkpoint and ends the job; at SIGTERM Open MPI kills
# ranks before they have saved.
set -euo pipefail
cd "$(dirname "$0")/../.."

hosts="${HOSTS:-localhost:2}"
processes=0
for host in ${hosts//,/ }; do
    [[ "$host" == *:* ]] || { echo "HOSTS=$hosts: how many processes on $host? Write $host:8" >&2 && exit 2; }
    processes=$((processes + ${host##*:}))
done

# Nodes are filled in the order of HOSTS, so that the processes of a node have its devices 0, 1, 2 and so on. Processes are not bound to
# cores: Open MPI would bind all threads of a process to one.
if [[ "$(mpirun --version)" == *"Open MPI"* ]]; then
    options=(--host "$hosts" --map-by slot --bind-to none -x PATH)
else
    options=(-hosts "$hosts" -bind-to none)
fi
run="${RUN:-$(date +%Y-%m-%d-%H%M%S)-$(basename "${CONFIG:-configs/fsdp2.yaml}" .yaml)}"
exec mpirun -n "$processes" "${options[@]}" \
    python -m launch.train "${CONFIG:-configs/fsdp2.yaml}" processes=auto checkpoint.every=100 resume=auto "run=$run" "$@"
