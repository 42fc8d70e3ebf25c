"""What only a device can tell about the Triton kernels: their shapes and cache policies side by side, `python -m benchmarks.sweep`.

Each variant changes one argument of `sharded_optim.backends.triton.Triton`. The passes of StableAdamW are timed one by one and together, as
calls of the backend: without the engine, and without waiting for one another. Variants take turns, and each figure is the median of its
rounds, as bytes that a pass has to move by its time. Meant to take a minute or two. Without a GPU, `TRITON_INTERPRET=1` and
--layouts tiny run the same, slowly, to see that it works.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import bandwidth
from benchmarks.cases import LAYOUTS
from benchmarks.devices import CUDA, Device, pick
from benchmarks.report import table
from benchmarks.storage import ORDINARY
from sharded_optim.backends import Operands
from sharded_optim.backends.triton import Triton
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW

__all__ = ["main", "measure"]

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "chunk=2048": {"chunk": 2048},
    "chunk=8192": {"chunk": 8192},
    "threads=64": {"threads": 64},
    "threads=256": {"threads": 256},
    "threads=256, chunk=8192": {"threads": 256, "chunk": 8192},
    "elements=16": {"elements": 16},
    "backward=False": {"backward": False},
    "eviction='evict_first'": {"eviction": "evict_first"},
}
SHAPES = {layout.name: layout.shapes for layout in LAYOUTS} | {"tiny": ((1000,), (7,))}
PASSES = {"observe": 8, "update": 28, "both": 36}  # bytes per element in fp32
GROUP = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01, "decay_form": "coupled", "reference_lr": 1e-3}
LIMIT, SCALE = 100.1, 2.0**24  # of the statistic with this beta2, and for 2**31 elements
CALLS = 10  # in a sample


def measure(shapes: Sequence[tuple[int, ...]], device: Device, *, rounds: int, zeros: float = 0.0) -> dict[str, dict[str, float]]:
    """Seconds of each pass by each variant.

    Args:
        shapes: of the parameters.
        device: where they are.
        rounds: in which all variants take turns.
        zeros: share of the gradients that are zero, whose divisions take a slower path.
    """
    values: list[list[Tensor]] = [[torch.rand(shape, device=device.place) + 0.1 for shape in shapes] for _ in range(4)]
    for grad in values[1] if zeros else ():
        grad *= torch.rand(grad.shape, device=device.place) >= zeros
    operands = Operands.whole(values[0], values[1], values[2:])
    statistic = STABLE_ADAMW.statistic
    assert statistic is not None

    def rows(coefficients: Sequence[Any]) -> Tensor:
        return torch.tensor(coefficients).expand(len(shapes), -1).contiguous().to(device.place)

    of_observe, of_update = rows(statistic.coefficients(GROUP, 3)), rows(STABLE_ADAMW.coefficients(GROUP, 3, 1.0))
    limits, scales = (torch.full((len(shapes),), value, device=device.place) for value in (LIMIT, SCALE))

    def passes(backend: Triton) -> dict[str, Callable[[], object]]:
        def observe() -> object:
            return backend.observe(statistic, operands, of_observe, limits, scales, None)

        def update() -> object:
            return backend.update(STABLE_ADAMW, operands, of_update, None, None, None)

        return {"observe": observe, "update": update, "both": lambda: (observe(), update())}

    steps = {name: passes(Triton(**arguments)) for name, arguments in VARIANTS.items()}
    for each in steps.values():
        each["both"]()  # compiles
    samples: dict[str, dict[str, list[float]]] = {name: {each: [] for each in PASSES} for name in VARIANTS}
    for _ in range(rounds):
        for name, of_variant in samples.items():
            for each, seconds in of_variant.items():
                seconds.append(device.time(steps[name][each], CALLS if device.kind == CUDA else 1).seconds)
    return {name: {each: median(seconds) for each, seconds in of_variant.items()} for name, of_variant in samples.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layouts", nargs="+", choices=SHAPES, default=["256M", "16M", "1M", "GPT-2", "10kx1k"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--zeros", type=float, default=0.0, help="share of the gradients that are zero")
    told = parser.parse_args(arguments)
    device = pick(None)
    refusal = Triton().supports(device.place, frozenset({torch.float32}))
    if refusal:
        parser.error(
            f"the Triton backend does not run here: {refusal}; TRITON_INTERPRET=1 with --layouts tiny shows that this program works"
        )
    gigabytes = bandwidth.reference(bandwidth.measure(ORDINARY, 2**28 if device.kind == CUDA else 2**20, device)[:1], ORDINARY, device.kind)
    print(f"{torch.cuda.get_device_name() if device.kind == CUDA else 'CPU'}, torch {torch.__version__}; copy_: {gigabytes:.0f} GB/s")
    for layout in told.layouts:
        elements = sum(map(math.prod, SHAPES[layout]))
        found = measure(SHAPES[layout], device, rounds=told.rounds, zeros=told.zeros)
        rows = [
            [
                name,
                *(f"{PASSES[each] * elements / seconds / 1e9:.0f}" for each, seconds in of_variant.items()),
                f"{of_variant['both'] * 1e6:.0f}",
            ]
            for name, of_variant in found.items()
        ]
        print(f"\n{layout}, fp32, GB/s\n")
        print(table(("variant", *PASSES, "both, us"), rows), flush=True)


if __name__ == "__main__":
    main()
