"""Done once by the server from which ranks are forked, so that none of them has to. It must start no thread: a fork would not have it."""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

IMPORTED = (  # what is not installed is passed over
    "deepspeed",
    "hypothesis",
    "llvmlite",
    "optimi",
    "pytest",
    "sharded_optim",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)

for name in IMPORTED:
    with suppress(ImportError):
        import_module(name)

# The garbage collector of a rank would look through all of this, and by that copy the memory that it shares with the server: a quarter of a
# second each time.
gc.collect()
gc.freeze()
