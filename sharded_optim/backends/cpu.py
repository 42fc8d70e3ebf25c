"""The CPU backend: the algorithms' own source, compiled by numba into one pass over all tensors.

A kernel is made for each combination of algorithm, parameter format and dtypes that is met: a page of text (`_update_kernel`,
`_observe_kernel`) that loads, calls the algorithm's function and stores. That function is the one that the eager backend runs, with `xp`
bound to `cpu_scalars.py` (see `rebinding.py`). Kernels are written to a cache folder under a name that changes with any source they are
made of, so that numba's on-disk cache spares later processes the compilation.

A kernel gets a table of addresses, one column per operand, and a table of work, runs of at most `CHUNK` elements, over which threads are
spread. Memory needs no alignment. Tensors of one operand must be equally strided and dense, as wrappers give them; others are copied.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_optim.algorithms import Algorithm, Statistic
from sharded_optim.backends import Column, Operands, cpu_scalars, format_to_compile
from sharded_optim.backends.operand_tables import OperandTables, kind_of
from sharded_optim.backends.rebinding import argument_count, rebound
from sharded_optim.consensus import judge
from sharded_optim.formats import FORMATS, Format, compiled_format, format_of
from sharded_optim.noise import RESOLUTION

__all__ = ["BACKEND"]

CHUNK = 16384  # elements: 64 KiB of fp32, several of which fit a core's second-level cache
WORTH_A_THREAD = 2 * CHUNK  # elements: some 10 us
assert RESOLUTION == 24, "cpu_scalars.uniform draws so many bits"

MOST_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]  # pyright: ignore[reportPrivateImportUsage]
SCALARS = Path(str(cpu_scalars.__file__)).read_text()  # as imported
NUMPY = {"fp32": "float32", "bf16": "uint16", "fp16": "uint16"}  # how the elements of a plain format lie in memory
ITEMSIZE = {kind: np.dtype(name).itemsize for kind, name in NUMPY.items()}


class Cpu:
    """Kernels compiled by numba; see `sharded_optim.backends.Backend`."""

    name = "cpu"
    tabulate = None
    judge = staticmethod(judge)

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[Operands, _Tables] = WeakKeyDictionary()

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype], fmt: Format | None = None) -> str | None:
        if fmt is not None and compiled_format(fmt) is None:
            return f"it does not know the format {fmt.name!r}"
        return None if device.type == "cpu" else f"it runs on the CPU, not on {device}"

    def prepare(self, algorithm: Algorithm, operands: Operands) -> None:
        nothing = np.empty((0, 3), np.int64)
        columns = 2 + len(operands.extra) + len(operands.state)
        coefficients = np.empty((0, argument_count(algorithm.update)), np.float32)
        addresses = np.frombuffer(b"", np.int64).reshape(columns, 0)
        with _threads(self._tables_of(operands).elements) as parallel:
            kernel = _update_kernel_of(algorithm, operands, None, parallel=parallel)
            kernel(nothing, addresses, coefficients, _scale(None), NO_KEYS, nothing)  # is compiled for these types, of those of a step

    def observe(
        self,
        statistic: Statistic | None,
        operands: Operands,
        coefficients: Tensor,
        limits: Tensor,
        scales: Tensor,
        grad_scale: Tensor | None,
    ) -> Tensor:
        columns = [operands.grad, *(operands.state if statistic else ())]
        tables = self._tables_of(operands)
        addresses, copies = tables.addresses(columns)
        items = tables.sums
        with _threads(tables.elements) as parallel:
            kernel = _observe_kernel(statistic, tuple(map(kind_of, columns)), scaled=grad_scale is not None, parallel=parallel)
            kernel(tables.work, addresses, coefficients.numpy(), limits.numpy(), scales.numpy(), _scale(grad_scale), items)
        del copies  # not before the kernel has run
        result = np.zeros((2, len(operands)), np.int64)
        np.add.at(result[0], tables.work[:, 0], items[:, 0])
        np.maximum.at(result[1], tables.work[:, 0], items[:, 1] != 0)
        return torch.from_numpy(result)

    def update(
        self,
        algorithm: Algorithm,
        operands: Operands,
        coefficients: Tensor,
        proceed: Tensor | None,
        grad_scale: Tensor | None,
        noise_keys: Tensor | None,
    ) -> None:
        if proceed is not None and not proceed.numpy():
            return
        written = [operands.param, *operands.extra, *operands.state]
        tables = self._tables_of(operands)
        addresses, copies = tables.addresses([*written, operands.grad])
        keys = NO_KEYS if noise_keys is None else noise_keys.numpy()
        with _threads(tables.elements) as parallel:
            kernel = _update_kernel_of(algorithm, operands, grad_scale, parallel=parallel)
            kernel(tables.work, addresses, coefficients.numpy(), _scale(grad_scale), keys, tables.runs)
        for (column, row), copy in copies.items():
            if column < len(written):
                written[column].tensors[row].copy_(copy)
        increment_version(operands.param.wholes)  # as a torch operation would: autograd looks at it

    def _tables_of(self, operands: Operands) -> _Tables:
        if operands not in self._tables:
            self._tables[operands] = _Tables(operands)
        return self._tables[operands]


# ----------------------------------------------------------------------------------------------------------------------- operands

NO_KEYS = np.zeros(1, np.int64)


class _Tables:
    """NumPy's views of `OperandTables`."""

    def __init__(self, operands: Operands) -> None:
        self._tables = OperandTables(operands, CHUNK)
        self.elements = self._tables.elements
        self.work = self._tables.work.numpy()
        self.runs = self._tables.runs.numpy()
        self.sums = np.empty((len(self.work), 2), np.int64)  # of each item of work, for observe

    def addresses(self, columns: Sequence[Column]) -> tuple[np.ndarray, dict[tuple[int, int], Tensor]]:
        addresses, copies = self._tables.addresses(columns)
        return np.frombuffer(addresses, np.int64).reshape(len(columns), -1), copies


def _scale(grad_scale: Tensor | None) -> np.float32:
    return np.float32(1.0 if grad_scale is None else grad_scale.numpy())


class _Pool:
    """Numba's pool of threads. One kernel uses it at a time: its workqueue layer ends processes in which two do.

    A forked child has no threads but the one that called fork: OpenMP ends a child that uses its parent's pool, and torch's operations wait
    for threads that are not there. So a child computes on one thread, as torch's data loaders do.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.is_started = False
        self.is_lost = False

    def leave_to_parent(self) -> None:
        self.lock = Lock()  # another thread of the parent may have held it
        if self.is_started:
            self.is_lost = True
            torch.set_num_threads(1)


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.leave_to_parent)


@contextmanager
def _threads(elements: int) -> Iterator[bool]:
    """Run a kernel on as many threads as torch has in this process, which torchrun and OMP_NUM_THREADS decide, and as are worth waking.

    Yields:
        Whether it is to use the pool. On one thread it does not.
    """
    torchs = torch.get_num_threads()
    wanted = min(torchs, MOST_THREADS, elements // WORTH_A_THREAD)
    if wanted <= 1 or _pool.is_lost:
        yield False
        return
    _pool.is_started = True
    with _pool.lock:
        before = numba.get_num_threads()
        if wanted != before:
            numba.set_num_threads(wanted)
        try:
            yield True
        finally:
            if wanted != before:
                numba.set_num_threads(before)
            if torch.get_num_threads() != torchs:  # numba sets OpenMP's when it starts its pool, which torch obeys
                torch.set_num_threads(torchs)


# ------------------------------------------------------------------------------------------------------------------------ kernels


def _compiled(function: Callable[..., Any]) -> Any:
    return rebound(function, {"xp": cpu_scalars}, numba.njit(error_model="numpy"))


def _load(kind: str, name: str) -> str:
    """An element of an array, as fp32."""
    return f"load_{kind}({name}[i])"


def _load_grad(kind: str, scaled: bool) -> str:
    return f"{_load(kind, 'grad')} * scale" if scaled else _load(kind, "grad")


def _update_kernel_of(algorithm: Algorithm, operands: Operands, grad_scale: Tensor | None, *, parallel: bool) -> Any:
    kinds = tuple(map(kind_of, (operands.grad, *operands.state)))
    return _update_kernel(algorithm, format_to_compile(operands.format), kinds, scaled=grad_scale is not None, parallel=parallel)


@cache
def _update_kernel(algorithm: Algorithm, fmt: Format, kinds: tuple[str, ...], *, scaled: bool, parallel: bool) -> Any:
    """The kernel of an algorithm's update: parameters in a format, gradients and state in plain formats of these names."""
    grad_kind, *state_kinds = kinds
    base = format_of(fmt.dtype).name
    states = {f"state{index}": kind for index, kind in enumerate(state_kinds)}
    coefficients = [f"c{index}" for index in range(argument_count(algorithm.update) - 2 - len(states))]
    extra = ["comp"] if fmt.extra else []
    tensors = {"param": base, **dict.fromkeys(extra, base), **states, "grad": grad_kind}
    param = " + ".join(_load(base, name) for name in ("param", *extra))
    arguments = [param, _load_grad(grad_kind, scaled), *(_load(kind, name) for name, kind in states.items()), *coefficients]
    limits = torch.finfo(FORMATS[base].dtype)
    draw = "uniform(keys[row], index_of(segments, row, first + i))"

    def store(kind: str, value: str, *, random: bool) -> str:
        spacing = f"np.float32({limits.eps!r}), np.float32({limits.smallest_normal * limits.eps!r})"
        return f"store_{kind}(stochastic({value}, {draw}, {spacing}))" if random else f"store_{kind}({value})"

    lines = [
        f"new_param, {''.join(f'new_{name}, ' for name in states)} = update({', '.join(arguments)})",
        f"stored = {store(base, 'new_param', random=fmt.is_random and not extra)}",
        "param[i] = stored",
        *(f"{name}[i] = {store(base, f'new_param - load_{base}(stored)', random=fmt.is_random)}" for name in extra),
        *(f"{name}[i] = {store(kind, f'new_{name}', random=False)}" for name, kind in states.items()),
    ]
    signature = "work, addresses, coefficients, scale, keys, segments"
    source = _kernel_source(signature, tensors, coefficients, [], lines, [], parallel=parallel)
    return _make(f"update_{algorithm.name}_{fmt.name}_{'_'.join(kinds)}", source, {"update": _compiled(algorithm.update)})


@cache
def _observe_kernel(statistic: Statistic | None, kinds: tuple[str, ...], *, scaled: bool, parallel: bool) -> Any:
    """The kernel that sums a statistic, or only counts gradients without a finite square."""
    grad_kind, *state_kinds = kinds
    states = {f"state{index}": kind for index, kind in enumerate(state_kinds)}
    arguments = [_load_grad(grad_kind, scaled), *(_load(kind, name) for name, kind in states.items())]
    coefficients: list[str] = []
    functions: dict[str, Any] = {}
    if statistic is None:
        name = f"finite_{grad_kind}"
        lines = [f"g = {arguments[0]}", "bad = add_int32(bad, np.int32(not (g * g < np.float32(np.inf))))"]
    else:
        coefficients = [f"c{index}" for index in range(argument_count(statistic.observe) - len(kinds))]
        functions["observe"] = _compiled(statistic.observe)
        name = f"observe_{statistic.observe.__module__.rpartition('.')[2]}_{'_'.join(kinds)}"
        lines = [
            f"value = observe({', '.join([*arguments, *coefficients])})",
            "total += fixed_point(value, scale_of_sum)",
            "bad = add_int32(bad, np.int32(not value <= limit))",
        ]
    before = ["limit, scale_of_sum = limits[row], np.float64(scales[row])", "total, bad = np.int64(0), np.int32(0)"]
    after = [f"items[item, 0] = total{' - count * MAGIC_BITS' if statistic else ''}", "items[item, 1] = bad"]
    signature = "work, addresses, coefficients, limits, scales, scale, items"
    source = _kernel_source(signature, {"grad": grad_kind, **states}, coefficients, before, lines, after, parallel=parallel)
    return _make(name, source, functions)


def _kernel_source(
    signature: str,
    tensors: dict[str, str],  # the plain format of each, in the order of a row of addresses
    coefficients: Sequence[str],
    before: Sequence[str],  # each run of elements
    lines: Sequence[str],  # for each element
    after: Sequence[str],
    *,
    parallel: bool,  # on threads of the pool
) -> str:
    indent = "\n        "
    arrays = [
        f"{name} = carray(pointer(addresses[{column}, row] + {ITEMSIZE[kind]} * first, np.{NUMPY[kind]}), (count,))"
        for column, (name, kind) in enumerate(tensors.items())
    ]
    constants = [f"{name} = coefficients[row, {index}]" for index, name in enumerate(coefficients)]
    return f'''"""Made by sharded_optim/backends/cpu.py."""
import numpy as np
from numba import carray, njit, prange
from sharded_optim.backends.cpu_scalars import *

@njit(parallel={parallel}, cache=True, error_model="numpy")
def kernel({signature}):
    for item in prange(len(work)):
        row, first, count = work[item, 0], work[item, 1], work[item, 2]
        {indent.join([*arrays, *constants, *before])}
        for i in range(count):
            {(indent + "    ").join(lines)}
        {indent.join(after)}
'''


def _make(name: str, source: str, functions: dict[str, Any]) -> Any:
    """Import a kernel's source from the cache folder, with the algorithm's functions in its globals."""
    parts = [source, numba.__version__, get_host_cpu_name(), *map(_fingerprint, functions.values()), SCALARS]
    name = f"{name}_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    try:
        path = _written(_cache_folder(), name, source)
    except OSError:  # the disk is full, or somebody else's
        path = _written(Path(_own_folder().name), name, source)
    spec = importlib.util.spec_from_file_location(f"sharded_optim_kernels.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(functions)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    save = module.kernel._cache.save_overload

    def save_if_possible(*arguments: Any) -> None:
        with suppress(OSError):  # a step does not fail for want of a cache
            save(*arguments)

    module.kernel._cache.save_overload = save_if_possible
    return module.kernel


def _written(folder: Path, name: str, source: str) -> Path:
    path = folder / f"{name}.py"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            (Path(own) / path.name).write_text(source)
            (Path(own) / path.name).replace(path)  # whole or not at all: other processes write it too
    return path


@cache
def _cache_folder() -> Path:
    """The user's own, or where there is none, one that ends with this process: what is in it is executed."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharded_optim"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sharded_optim")


def _fingerprint(function: Any) -> str:
    """Of the code of a compiled function and of all that it calls: the code in this process, not in files, which may have changed since.

    And of the module that it is from, which numba imports when it loads a kernel.
    """
    python = function.py_func
    return repr((python.__module__, _facts(python.__code__, python.__globals__)))


def _facts(code: CodeType, names: dict[str, Any]) -> tuple[Any, ...]:
    constants = [_facts(each, names) if isinstance(each, CodeType) else each for each in code.co_consts]
    meant = [names.get(name) for name in code.co_names]
    called = [_fingerprint(each) if hasattr(each, "py_func") else each if isinstance(each, int | float) else None for each in meant]
    return code.co_code, constants, code.co_names, called


BACKEND = Cpu()
