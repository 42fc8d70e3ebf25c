"""Import the modules that ranks need in the server that forks them, as imports take longer than the training. Starts no thread."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

import sharded_optim.tools.verify.rank  # noqa: F401

for name in ("deepspeed", "llvmlite", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"):
    with suppress(Exception):  # not installed, or broken: ranks that need it say so
        import_module(name)
