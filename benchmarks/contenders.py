"""Who is compared: each contender makes its optimizer of a list of parameters. A new contender is one new entry of `CONTENDERS`.

All get the same hyperparameters. A library that cannot be had raises when the optimizer is made, and its reason goes into the report.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from benchmarks.devices import CPU, CUDA
from benchmarks.storage import FLOAT32, HUGE_PAGES, ORDINARY

__all__ = ["BASELINE", "CONTENDERS", "GRAPH", "OURS", "Contender", "by_name", "find"]

Params = list[nn.Parameter]
OURS = "sharded_optim"
BASELINE = "torch AdamW fused"
GRAPH = ", graph"  # ends the name of who replays a CUDA graph of its step
# Gradients do not change, so a step moves a parameter by about lr: small enough for thousands of steps.
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-2}
# Elements beyond which a contender is left out on a CPU: what takes several times the baseline's time, and what takes a hundred times that.
SLOW, SLOWEST = 200 * 2**20, 20 * 2**20


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer, and where and on what it runs."""

    name: str
    library: str
    algorithm: str  # "AdamW" or "StableAdamW", which reads gradient and second moment once more
    make: Callable[[Params], torch.optim.Optimizer]
    devices: tuple[str, ...] = (CPU, CUDA)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    storage: str = ORDINARY  # of parameters and gradients; a key of `storage.KINDS`
    most_elements: int | None = None  # on a CPU
    few: bool = False  # also measured in the cases that few take part in

    @property
    def graphed(self) -> bool:
        """Whether its step is captured in a CUDA graph, which is replayed."""
        return self.name.endswith(GRAPH)


def _torch(params: Params, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **HYPERPARAMETERS, **options)


def _deepspeed(params: Params) -> torch.optim.Optimizer:
    """DeepSpeed's optimizer for offloading. Its extension is compiled when first used, which takes a C++ compiler and a minute.

    Imported by name: it is not among the development packages, and its import prints.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, where no environment is activated
    adam = import_module("deepspeed.ops.adam")
    return adam.DeepSpeedCPUAdam(params, adamw_mode=True, **HYPERPARAMETERS)


def _optimi(params: Params, *, algorithm: str, **options: Any) -> torch.optim.Optimizer:
    return getattr(import_module("optimi"), algorithm)(params, **HYPERPARAMETERS, **options)


def _ours(params: Params, *, algorithm: str, backend: str, **options: Any) -> torch.optim.Optimizer:
    return getattr(import_module(OURS), algorithm)(params, backend=backend, **HYPERPARAMETERS, **options)


def _of_optimi(algorithm: str) -> list[Contender]:
    foreach = partial(_optimi, algorithm=algorithm, foreach=True, triton=False)
    loop = partial(_optimi, algorithm=algorithm, foreach=False, triton=False)
    triton = partial(_optimi, algorithm=algorithm, triton=True)
    common: dict[str, Any] = {"library": "optimi", "algorithm": algorithm}
    return [
        Contender(name=f"optimi {algorithm} foreach", make=foreach, devices=(CPU,), most_elements=SLOW, **common),
        Contender(name=f"optimi {algorithm} loop", make=loop, devices=(CPU,), most_elements=SLOW, **common),
        Contender(name=f"optimi {algorithm} triton", make=triton, devices=(CUDA,), **common),
    ]


def _of_ours(algorithm: str) -> list[Contender]:
    common: dict[str, Any] = {"library": OURS, "algorithm": algorithm}
    cpu, triton, eager = (partial(_ours, algorithm=algorithm, backend=backend) for backend in ("cpu", "triton", "eager"))
    on_gpu: dict[str, Any] = {"devices": (CUDA,), **common}
    bf16: dict[str, Any] = {"dtypes": ("bf16",), **on_gpu}
    on_cpu: dict[str, Any] = {"devices": (CPU,), "dtypes": ("bf16",), **common}
    name, small = f"ours {algorithm} triton", {"state_dtype": torch.bfloat16}
    return [
        Contender(name=f"ours {algorithm} cpu", make=cpu, devices=(CPU,), few=True, **common),
        Contender(name=f"ours {algorithm} cpu, huge pages", make=cpu, devices=(CPU,), storage=HUGE_PAGES, few=True, **common),
        # In bf16 those two have fp32 moments and Kahan compensation.
        Contender(name=f"ours {algorithm} cpu, no Kahan", make=partial(cpu, kahan_sum=False), **on_cpu),
        Contender(name=f"ours {algorithm} cpu, stochastic rounding", make=partial(cpu, stochastic_rounding=True), **on_cpu),
        Contender(name=name, make=triton, few=True, **on_gpu),
        Contender(name=name + GRAPH, make=triton, **on_gpu),
        # In bf16 those two have fp32 moments and Kahan compensation.
        Contender(name=f"{name}, no Kahan", make=partial(triton, kahan_sum=False), **bf16),
        Contender(name=f"{name}, stochastic rounding", make=partial(triton, stochastic_rounding=True), **bf16),
        Contender(name=f"{name}, bf16 moments", make=partial(triton, **small), **bf16),
        Contender(name=f"{name}, bf16 moments, no Kahan", make=partial(triton, kahan_sum=False, **small), **bf16),
        Contender(name=f"ours {algorithm} eager", make=eager, devices=(CPU,), most_elements=SLOWEST, **common),
    ]


FUSED = partial(_torch, fused=True)
COMMON: dict[str, Any] = {"library": "torch", "algorithm": "AdamW"}
CONTENDERS = (
    Contender(name=BASELINE, make=FUSED, few=True, **COMMON),  # in bf16 its moments are bf16
    Contender(name=BASELINE + GRAPH, make=partial(FUSED, capturable=True), devices=(CUDA,), **COMMON),
    Contender(name="torch AdamW fused, fp32 copy", make=FUSED, dtypes=("bf16",), storage=FLOAT32, **COMMON),
    Contender(name="torch AdamW foreach", make=partial(_torch, foreach=True), most_elements=SLOW, **COMMON),
    Contender(name="DeepSpeedCPUAdam", library="deepspeed", algorithm="AdamW", make=_deepspeed, devices=(CPU,)),
    *_of_optimi("AdamW"),
    *_of_ours("AdamW"),
    *_of_optimi("StableAdamW"),
    *_of_ours("StableAdamW"),
)


class Named(Protocol):
    """What is found by its name."""

    @property
    def name(self) -> str: ...


Found = TypeVar("Found", bound=Named)


def find(name: str, among: Sequence[Found]) -> Found:
    """The contender of that name.

    Raises:
        ValueError: there is none.
    """
    for contender in among:
        if contender.name == name:
            return contender
    raise ValueError(f"unknown contender {name!r}; there are {', '.join(each.name for each in among)}")


def by_name(name: str) -> Contender:
    """As `find`, of those that step in one process."""
    return find(name, CONTENDERS)
