"""The CPU backend: the algorithms' own source, compiled by numba into one pass over all tensors.

A kernel is made for each combination of algorithm, parameter format and dtypes that is met: a page of text (`_update_source`,
`_observe_source`) that loads, calls the algorithm's function and stores. That function is the one that the eager backend runs, with `xp`
bound to `cpu_scalars.py` (`_compiled`). Kernels are written to a cache folder under a name that changes with any source they are made of, so that
numba's on-disk cache spares later processes the compilation.

A kernel gets a table of addresses, one row per operand, and a table of work, runs of at most `CHUNK` elements, over which threads are
spread. Memory needs no alignment. Tensors of one operand must be equally strided and dense, as wrappers give them; others are copied.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from sharded_optim import algorithms
from sharded_optim.algorithms import Algorithm, Statistic, operations
from sharded_optim.backends import Operand, cpu_scalars
from sharded_optim.formats import format_of
from sharded_optim.noise import RESOLUTION

__all__ = ["BACKEND"]

CHUNK = 16384  # elements: 64 KiB of fp32, several of which fit a core's second-level cache
assert RESOLUTION == 24, "cpu_scalars.uniform draws so many bits"

NUMPY = {"fp32": "float32", "bf16": "uint16", "fp16": "uint16"}  # how the elements of a plain format lie in memory


class Cpu:
    """Kernels compiled by numba; see `sharded_optim.backends.Backend`."""

    name = "cpu"

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        return None if device.type == "cpu" else f"it runs on the CPU, not on {device}"

    def observe(
        self,
        statistic: Statistic | None,
        operands: Sequence[Operand],
        coefficients: Tensor,
        limits: Sequence[float],
        bits: Sequence[int],
        grad_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sums, non_finite = np.zeros(len(operands), np.int64), np.zeros(len(operands), np.int64)
        table, scale = coefficients.numpy(), _scale(grad_scale)
        for kinds, rows in _alike(operands, lambda each: (each.grad, *(each.state if statistic else ()))):
            addresses, work, _kept = _tables([_flat(operands[row].grad, *(operands[row].state if statistic else ())) for row in rows])
            kernel = _observe_kernel(statistic, kinds)
            scales = np.ldexp(1.0, np.asarray([bits[row] for row in rows]))
            items = np.empty((len(work), 2), np.int64)
            with _threads():
                kernel(work, addresses, np.ascontiguousarray(table[rows]), np.float32([limits[row] for row in rows]), scales, scale, items)
            np.add.at(sums, np.asarray(rows)[work[:, 0]], items[:, 0])
            np.add.at(non_finite, np.asarray(rows)[work[:, 0]], items[:, 1])
        return torch.from_numpy(sums), torch.from_numpy(non_finite)

    def update(
        self,
        algorithm: Algorithm,
        operands: Sequence[Operand],
        coefficients: Tensor,
        proceed: Tensor | None,
        grad_scale: Tensor | None,
        noise_keys: Tensor | None,
    ) -> None:
        if proceed is not None and not proceed:
            return
        table, scale = coefficients.numpy(), _scale(grad_scale)
        for (name, *kinds), rows in _alike(operands, lambda each: (each.grad, *each.state), lambda each: each.format.name):
            written = [(operands[row].param, *operands[row].extra, *operands[row].state) for row in rows]
            flats = [_flat(*tensors, operands[row].grad, ordered=operands[row].format.is_random) for tensors, row in zip(written, rows, strict=True)]
            addresses, work, kept = _tables(flats)
            random = operands[rows[0]].format.is_random
            keys = noise_keys.numpy()[rows] if random and noise_keys is not None else np.zeros(1, np.int64)
            segments = np.asarray([_runs(operands[row]) for row in rows] if random else [(0, 1, 1)], np.int64)
            kernel = _update_kernel(algorithm, name, tuple(kinds))
            with _threads():
                kernel(work, addresses, np.ascontiguousarray(table[rows]), scale, keys, segments)
            for tensors, copies in zip(written, kept, strict=True):
                for tensor, copy in zip(tensors, copies, strict=False):
                    if copy is not tensor:
                        tensor.copy_(copy.view(tensor.dtype).view(tensor.shape) if copy.dtype != tensor.dtype else copy)


# ----------------------------------------------------------------------------------------------------------------------- operands


def _scale(grad_scale: Tensor | None) -> np.float32:
    return np.float32(1.0 if grad_scale is None else grad_scale.numpy())


def _runs(operand: Operand) -> tuple[int, int, int]:
    segment = operand.segment
    return segment.start, max(segment.run, 1), segment.stride


def _alike(operands: Sequence[Operand], tensors: Callable[[Operand], tuple[Tensor, ...]], name: Callable[[Operand], str] | None = None):
    """(names of formats, rows) of the operands that one kernel can step."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, operand in enumerate(operands):
        kinds = tuple(format_of(tensor.dtype).name for tensor in tensors(operand))
        groups.setdefault((name(operand), *kinds) if name else kinds, []).append(row)
    return groups.items()


def _flat(*tensors: Tensor, ordered: bool = False) -> tuple[Tensor, ...]:
    """The tensors, or contiguous copies of them where they do not all lie alike and without gaps, or not in order where they must."""
    first = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        return tensors
    strides = first.stride()
    span = sum((size - 1) * stride for size, stride in zip(first.shape, strides, strict=True)) + 1
    if not ordered and span == first.numel() and all(tensor.stride() == strides for tensor in tensors) and min(strides) > 0:
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def _tables(flats: Sequence[tuple[Tensor, ...]]) -> tuple[np.ndarray, np.ndarray, Sequence[tuple[Tensor, ...]]]:
    """(addresses int64 (operands, tensors), work int64 (items, 3): operand, first element, elements; what must stay alive)"""
    addresses = np.asarray([[tensor.data_ptr() for tensor in tensors] for tensors in flats], np.int64)
    counts = np.asarray([tensors[0].numel() for tensors in flats], np.int64)
    items = -(-counts // CHUNK)
    rows = np.repeat(np.arange(len(counts)), items)
    first = (np.arange(len(rows)) - np.repeat(np.cumsum(items) - items, items)) * CHUNK
    work = np.stack([rows, first, np.minimum(CHUNK, counts[rows] - first)], axis=1)
    return addresses, work, flats


class _threads:
    """As many threads as torch has in this process, which torchrun and OMP_NUM_THREADS decide."""

    def __enter__(self) -> None:
        self._before = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # pyright: ignore

    def __exit__(self, *_: object) -> None:
        numba.set_num_threads(self._before)


# ------------------------------------------------------------------------------------------------------------------------ kernels


def _compiled(function: Callable[..., Any]) -> Any:
    """An algorithm's function for numba: the same code, in a copy of its globals in which `xp`, and what it calls, are compiled."""
    names = function.__globals__ | {"xp": cpu_scalars}
    for name in function.__code__.co_names:
        if isinstance(names.get(name), FunctionType):
            names[name] = _compiled(names[name])
    return numba.njit(error_model="numpy")(FunctionType(function.__code__, names, function.__name__))


def _load(kind: str, name: str) -> str:
    return f"load_{kind}({name}[i])"


@lru_cache(maxsize=None)
def _update_kernel(algorithm: Algorithm, format_name: str, kinds: tuple[str, ...]) -> Any:
    grad_kind, *state_kinds = kinds
    base, _, suffix = format_name.partition("_")
    coefficients = [f"c{index}" for index in range(_count(algorithm.update) - 2 - len(state_kinds))]
    states = [f"s{index}" for index in range(len(state_kinds))]
    extra = ["comp"] if "kahan" in suffix else []
    tensors = {"param": base, **dict.fromkeys(extra, base), **dict(zip(states, state_kinds, strict=True)), "grad": grad_kind}
    value = _load(base, "param") + "".join(f" + {_load(base, name)}" for name in extra)
    limits = torch.finfo({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[base])
    rounding = f"np.float32({limits.eps!r}), np.float32({limits.smallest_normal * limits.eps!r})"
    draw = "uniform(keys[row], index_of(segments, row, first + i))"
    lines = [
        f"value, {''.join(f'{name}, ' for name in states)} = update({value}, {_load(grad_kind, 'grad')} * scale, "
        f"{''.join(f'{_load(kind, name)}, ' for name, kind in zip([f'{s}_' for s in states], state_kinds, strict=True))}{', '.join(coefficients)})"
    ]
    if suffix == "stochastic":
        lines.append(f"param[i] = store_{base}(stochastic(value, {draw}, {rounding}))")
    else:
        lines.append(f"stored = store_{base}(value)")
        lines.append("param[i] = stored")
    if extra:
        rest = f"value - load_{base}(stored)"
        lines.append(f"comp[i] = store_{base}({f'stochastic({rest}, {draw}, {rounding})' if 'stochastic' in suffix else rest})")
    lines += [f"{name}_[i] = store_{kind}({name})" for name, kind in zip(states, state_kinds, strict=True)]
    source = _kernel_source("work, addresses, coefficients, scale, keys, segments", tensors, coefficients, [], lines, [])
    return _make(f"update_{algorithm.name}_{format_name}_{'_'.join(kinds)}", source, {"update": _compiled(algorithm.update)})


@lru_cache(maxsize=None)
def _observe_kernel(statistic: Statistic | None, kinds: tuple[str, ...]) -> Any:
    grad_kind, *state_kinds = kinds
    states = [f"s{index}" for index in range(len(state_kinds))]
    tensors = {"grad": grad_kind, **dict(zip(states, state_kinds, strict=True))}
    loads = ", ".join([f"{_load(grad_kind, 'grad')} * scale", *(_load(kind, f"{name}_") for name, kind in zip(states, state_kinds, strict=True))])
    if statistic is None:
        coefficients, functions = [], {}
        lines = [f"g = {loads}", "bad += np.int64(not (g * g < np.float32(np.inf)))"]
        name = f"finite_{grad_kind}"
    else:
        coefficients = [f"c{index}" for index in range(_count(statistic.observe) - len(kinds))]
        functions = {"observe": _compiled(statistic.observe)}
        name = f"observe_{statistic.observe.__module__.rpartition('.')[2]}_{'_'.join(kinds)}"
        lines = [
            f"value = observe({loads}, {', '.join(coefficients)})",
            "finite = value <= limits[row]",
            "total += fixed_point(value if finite else np.float32(0.0), scales[row])",
            "bad += np.int64(not finite)",
        ]
    start, end = ["total = np.int64(0)", "bad = np.int64(0)"], ["items[item, 0] = total", "items[item, 1] = bad"]
    source = _kernel_source("work, addresses, coefficients, limits, scales, scale, items", tensors, coefficients, start, lines, end)
    return _make(name, source, functions)


def _count(function: Callable[..., Any]) -> int:
    return function.__code__.co_argcount


def _kernel_source(
    arguments: str, tensors: dict[str, str], coefficients: Sequence[str], before: Sequence[str], lines: Sequence[str], after: Sequence[str]
) -> str:
    indent = "\n        "
    arrays = []
    for column, (name, kind) in enumerate(tensors.items()):
        dtype, size = NUMPY[kind], np.dtype(NUMPY[kind]).itemsize
        array = name if name in ("param", "comp", "grad") else f"{name}_"
        arrays.append(f"{array} = carray(pointer(addresses[row, {column}] + {size} * first, np.{dtype}), (count,))")
    constants = [f"{name} = coefficients[row, {index}]" for index, name in enumerate(coefficients)]
    return f'''"""Made by sharded_optim/backends/cpu.py."""
import numpy as np
from numba import carray, njit, prange
from sharded_optim.backends.cpu_scalars import *

@njit(parallel=True, cache=True, error_model="numpy")
def kernel({arguments}):
    for item in prange(len(work)):
        row, first, count = work[item, 0], work[item, 1], work[item, 2]
        {indent.join([*arrays, *constants, *before])}
        for i in range(count):
            {(indent + "    ").join(lines)}
        {indent.join(after) or "pass"}
'''


def _make(name: str, source: str, functions: dict[str, Any]) -> Any:
    """Import a kernel's source from the cache folder, with the algorithm's functions in its globals."""
    folder = _cache_folder()
    digest = hashlib.sha256(f"{_sources()}{source}".encode()).hexdigest()[:16]
    path = folder / f"{name}_{digest}.py"
    if not path.exists():
        partial = path.with_suffix(f".{id(source)}.tmp")
        partial.write_text(source)
        partial.replace(path)  # whole or not at all: ranks write it together
    spec = importlib.util.spec_from_file_location(f"sharded_optim_kernels.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(functions)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.kernel


@lru_cache(maxsize=None)
def _cache_folder() -> Path:
    folder = Path.home() / ".cache" / "sharded_optim"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@lru_cache(maxsize=None)
def _sources() -> str:
    """Everything that a kernel's machine code depends on besides its own text."""
    modules: list[ModuleType] = [cpu_scalars]
    paths = [Path(str(module.__file__)) for module in modules] + sorted(Path(algorithms.__path__[0]).glob("*.py"))
    assert operations.__file__ is not None
    return "".join(path.read_text() for path in paths)


BACKEND = Cpu()
