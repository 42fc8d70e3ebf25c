#!/usr/bin/env bash
# Installs the training job into the Python on PATH, from the folder above. What changes seldom is a step of its own, so that an image keeps it:
#
#   docker/install.sh torch                    # torch and what builds wheels; needs constraints.txt alone
#   docker/install.sh package train,deepspeed  # the package, editable, with these extras; needs pyproject.toml and what it names
#   docker/install.sh compile                  # bytecode of the code
set -euo pipefail
cd "$(dirname "$0")/.."

case "$1" in
    torch) pip install --constraint constraints.txt pip setuptools torch ;;
    package) DS_BUILD_OPS=0 pip install --constraint constraints.txt --no-build-isolation --editable ".[$2]" ;;
    compile) python -m compileall -q launch sharded_optim ;;
    *) echo "$1: not torch, package or compile" >&2 && exit 2 ;;
esac
