#!/usr/bin/env bash
# Installs the training job into the Python on PATH, from the folder above. Steps that change seldom are separate layers of an image:
#
#   docker/install.sh torch                    # torch and the tools that build wheels; needs constraints.txt alone
#   docker/install.sh package train,deepspeed  # the package, editable, with these extras; needs pyproject.toml and the files it names
#   docker/install.sh compile                  # compile the code to bytecode
set -euo pipefail
cd "$(dirname "$0")/.."

case "$1" in
    torch) pip install --constraint constraints.txt pip setuptools torch ;;
    package) DS_BUILD_OPS=0 pip install --constraint constraints.txt --no-build-isolation --editable ".[$2]" ;;
    compile) python -m compileall -q launch sharded_optim ;;
    *) echo "$1: not torch, package or compile" >&2 && exit 2 ;;
esac
