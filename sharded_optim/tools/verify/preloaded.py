"""Imported by the server from which ranks are forked: what they need, and takes longer to import than they train. Starts no thread."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

import sharded_optim.tools.verify.rank  # noqa: F401

for name in ("deepspeed", "llvmlite", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"):
    with suppress(Exception):  # not installed, or broken: ranks that need it say so
        import_module(name)
