#!/usr/bin/env bash
# Checks Dockerfile.cpu and compose.yaml without a container engine: installs in a scratch folder and a new virtual environment, by the
# script of the images, then runs the image's command, and the services of compose.yaml side by side. `make docker-check`.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
export PATH="$scratch/venv/bin:$PATH"
mkdir "$scratch/image" "$scratch/data"
cd "$scratch/image"
(cd "$root" && sed -n 's/^!//p' .dockerignore | xargs cp -r --parents -t "$scratch/image")
ln -s "$scratch/data" runs

extras="$(sed -n 's/^RUN .*install.sh package \(\S*\)$/\1/p' docker/Dockerfile.cpu)"
docker/install.sh torch
docker/install.sh package "$extras"
docker/install.sh compile

tiny=(steps=3 warmup_steps=1 batch_size=4 sequence_length=32 log_every=1 validation_every=3 validation_batches=2 device=cpu
    model.layers=2 model.heads=2 model.d_model=32)
PROCESSES=2 launch/jobs/single_node.sh "${tiny[@]}"

services=()
for _ in node0 node1; do
    HEAD_NODE=127.0.0.1 NODES=2 PROCESSES=1 PORT="${PORT:-29517}" launch/jobs/multi_node.sh "runs_folder=$scratch/data/runs" "${tiny[@]}" &
    services+=("$!")
done
for service in "${services[@]}"; do wait "$service"; done
python -c 'import json, sys; assert json.load(open(sys.argv[1]))["world_size"] == 2' "$scratch/data/runs/latest/summary.json"
echo "installed, and ran as one node and as two"
