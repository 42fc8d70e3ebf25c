"""The CPU backend: the algorithms' own source, compiled by numba into one pass over all tensors.

A kernel is made for each combination of algorithm and formats that is met: a page of text (`_update_kernel`, `_observe_kernel`) that calls
the formats' functions and the algorithm's. These are the ones that the eager backend runs, with `xp` bound to `scalars.py` (see
`rebinding.py`). Kernels are written to a cache folder under a name that changes with any source they are made of, so that numba's on-disk
cache spares later processes the compilation.

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
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_optim.backends import Column, Operands
from sharded_optim.backends.cpu import scalars as cpu_scalars
from sharded_optim.backends.kernel_text import StoredValue, arrays_of, functions_of, identifier, stored_values
from sharded_optim.backends.noise import RESOLUTION
from sharded_optim.backends.operands import OperandTables
from sharded_optim.backends.rebinding import argument_count, rebound
from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.verdict import judge
from sharded_optim.storage.formats import Format

__all__ = ["BACKEND"]

CHUNK = 16384  # elements: 64 KiB of fp32, several of which fit a core's second-level cache
WORTH_A_THREAD = 2 * CHUNK  # elements: some 10 us
assert RESOLUTION == 24, "scalars.uniform draws so many bits"

MOST_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]  # pyright: ignore[reportPrivateImportUsage]
SCALARS = Path(str(cpu_scalars.__file__)).read_text()  # as imported
ELEMENT = "{}[i]"  # of an array, in the text of a kernel
AS_BITS = {torch.bfloat16: "uint16", torch.float16: "uint16"}  # how kernels see elements that have no type of their own there


class Cpu:
    """Kernels compiled by numba; see `sharded_optim.backends.Backend`."""

    name = "cpu"
    tabulate = None
    judge = staticmethod(judge)

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[Operands, _Tables] = WeakKeyDictionary()

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        return None if device.type == "cpu" else f"it runs on the CPU, not on {device}"

    def prepare(self, algorithm: Algorithm, operands: Operands) -> None:
        nothing = np.empty((0, 3), np.int64)
        columns = len(operands.written) + 1
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
            formats = operands.state_formats if statistic else ()
            kernel = _observe_kernel(statistic, operands.grad_format, formats, scaled=grad_scale is not None, parallel=parallel)
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
        written = operands.written
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

NO_KEYS = np.zeros((1, 1), np.int64)


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


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return rebound(function, {"xp": cpu_scalars}, _jit, _number)


def _jit(function: FunctionType) -> Any:
    code = function.__code__
    function.__code__ = code.replace(co_consts=tuple(map(_number, code.co_consts)))
    return numba.njit(error_model="numpy")(function)


def _number(constant: Any) -> Any:
    """Numbers in a formula are fp32 beside fp32 tensors; for numba they would be float64."""
    return np.float32(constant) if isinstance(constant, float) else constant


def _update_kernel_of(algorithm: Algorithm, operands: Operands, grad_scale: Tensor | None, *, parallel: bool) -> Any:
    return _update_kernel(algorithm, operands.formats, operands.grad_format, scaled=grad_scale is not None, parallel=parallel)


@cache
def _update_kernel(algorithm: Algorithm, formats: tuple[Format, ...], grad_format: Format, *, scaled: bool, parallel: bool) -> Any:
    """The kernel of an algorithm's update.

    Args:
        formats: of the parameters and of each of their moments.
    """
    written, grad = stored_values(formats), StoredValue("grad", grad_format)
    coefficients = [f"c{index}" for index in range(argument_count(algorithm.update) - 1 - len(written))]
    param, *state = (value.loaded(ELEMENT) for value in written)
    arguments = [param, _loaded_grad(grad, scaled), *state, *coefficients]
    random = [value.name for value in written if value.format.is_random]
    draws = {name: f"uniform(keys[row, {column}], index)" for column, name in enumerate(random)}
    lines = [
        *(["index = index_of(segments, row, first + i)"] if random else []),
        f"{''.join(f'new_{value.name}, ' for value in written)} = update({', '.join(arguments)})",
        *(value.stored(ELEMENT, draws.get(value.name, "")) for value in written),
    ]
    signature = "work, addresses, coefficients, scale, keys, segments"
    source = _kernel_source(signature, arrays_of([*written, grad]), coefficients, [], lines, [], parallel=parallel)
    functions = {"update": algorithm.update, **functions_of([*written, grad], written)}
    return _make(identifier(f"update_{algorithm.name}", [*formats, grad_format]), source, functions)


@cache
def _observe_kernel(
    statistic: Statistic | None, grad_format: Format, state_formats: tuple[Format, ...], *, scaled: bool, parallel: bool
) -> Any:
    """The kernel that sums a statistic, or only counts gradients without a finite square."""
    state, grad = stored_values(state_formats), StoredValue("grad", grad_format)
    arguments = [_loaded_grad(grad, scaled), *(value.loaded(ELEMENT) for value in state)]
    coefficients: list[str] = []
    functions = functions_of([grad, *state])
    if statistic is None:
        title = "finite"
        lines = [f"g = {arguments[0]}", "bad = add_int32(bad, np.int32(not (g * g < np.float32(np.inf))))"]
    else:
        title = f"observe_{statistic.observe.__module__.rpartition('.')[2]}"
        coefficients = [f"c{index}" for index in range(argument_count(statistic.observe) - len(arguments))]
        functions["observe"] = statistic.observe
        lines = [
            f"value = observe({', '.join([*arguments, *coefficients])})",
            "total += fixed_point(value, scale_of_sum)",
            "bad = add_int32(bad, np.int32(not value <= limit))",
        ]
    before = ["limit, scale_of_sum = limits[row], np.float64(scales[row])", "total, bad = np.int64(0), np.int32(0)"]
    after = [f"items[item, 0] = total{' - count * MAGIC_BITS' if statistic else ''}", "items[item, 1] = bad"]
    signature = "work, addresses, coefficients, limits, scales, scale, items"
    source = _kernel_source(signature, arrays_of([grad, *state]), coefficients, before, lines, after, parallel=parallel)
    return _make(identifier(title, [grad_format, *state_formats]), source, functions)


def _loaded_grad(grad: StoredValue, scaled: bool) -> str:
    return f"{grad.loaded(ELEMENT)} * scale" if scaled else grad.loaded(ELEMENT)


def _kernel_source(
    signature: str,
    tensors: dict[str, torch.dtype],  # in the order of a row of addresses
    coefficients: Sequence[str],
    before: Sequence[str],  # each run of elements
    lines: Sequence[str],  # for each element
    after: Sequence[str],
    *,
    parallel: bool,  # on threads of the pool
) -> str:
    indent = "\n        "
    arrays = [
        f"{name} = carray(pointer(addresses[{column}, row] + {dtype.itemsize} * first, np.{_numpy(dtype)}), (count,))"
        for column, (name, dtype) in enumerate(tensors.items())
    ]
    constants = [f"{name} = coefficients[row, {index}]" for index, name in enumerate(coefficients)]
    return f'''"""Made by sharded_optim/backends/cpu.py."""
import numpy as np
from numba import carray, njit, prange
from sharded_optim.backends.cpu.scalars import *

@njit(parallel={parallel}, cache=True, error_model="numpy")
def kernel({signature}):
    for item in prange(len(work)):
        row, first, count = work[item, 0], work[item, 1], work[item, 2]
        {indent.join([*arrays, *constants, *before])}
        for i in range(count):
            {(indent + "    ").join(lines)}
        {indent.join(after)}
'''


def _numpy(dtype: torch.dtype) -> str:
    """The NumPy type of elements as kernels see them."""
    return AS_BITS.get(dtype, str(dtype).removeprefix("torch."))


def _make(name: str, source: str, functions: dict[str, Callable[..., Any]]) -> Any:
    """Import a kernel's source from the cache folder, with the functions of algorithms and formats, compiled, in its globals."""
    compiled = {called: _compiled(function) for called, function in functions.items()}
    parts = [source, numba.__version__, get_host_cpu_name(), *map(_fingerprint, compiled.values()), SCALARS]
    name = f"{name}_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    try:
        path = _written(_cache_folder(), name, source)
    except OSError:  # the disk is full, or somebody else's
        path = _written(Path(_own_folder().name), name, source)
    spec = importlib.util.spec_from_file_location(f"sharded_optim_kernels.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(compiled)
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
    called = [
        _fingerprint(each) if hasattr(each, "py_func") else each if isinstance(each, int | float | np.generic) else None for each in meant
    ]
    return code.co_code, constants, code.co_names, called


BACKEND = Cpu()
