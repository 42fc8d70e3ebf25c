"""Run kernels on the threads of torch's OpenMP runtime, which are still awake in a step right after a backward pass.

Python threads take their place in a forked child, which has none of its parent's OpenMP threads and would wait for them forever, and if
torch's runtime lacks GNU's entry point. Used by the CPU backend.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import NamedTuple

import torch
from llvmlite import binding, ir

from sharded_optim.backends.cpu.llvm import INT32, INT64, POINTER, VOID, Builder, Value, at, call, compiled, counting, load

__all__ = ["SIGNATURE", "Call", "Kernel", "arguments_of", "callable_of", "kernel_of", "run"]

SIGNATURE = ir.FunctionType(VOID, [POINTER, INT64, INT64])  # type of a kernel: (address of its arguments, index of a share, shares)


Call = Callable[[int, int, int], None]  # a compiled function with SIGNATURE; ctypes releases the GIL during the call


class Kernel(NamedTuple):
    """A compiled kernel with `SIGNATURE`."""

    call: Call
    region: int  # address of the function that OpenMP threads call, see `_write_region`; 0 without OpenMP


def arguments_of(function: ir.Function, builder: Builder, names: Sequence[str]) -> dict[str, Value]:
    """Load the arguments of a kernel, keyed by name: one int64 each, in this order in memory."""
    return {name: load(builder, at(builder, function.args[0], index)) for index, name in enumerate(names)}


class _State:
    """Global state of the process, which a forked child inherits."""

    has_forked = False
    has_used_openmp = False
    pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    _State.has_forked, _State.pool = True, None
    if _State.has_used_openmp:
        torch.set_num_threads(
            1
        )  # else torch operations would wait for the parent's threads; the workers of torch's data loaders do the same


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def kernel_of(function: ir.Function, *, parallel: bool = True) -> Kernel:
    """Compile a function with `SIGNATURE`, and its module.

    Args:
        parallel: whether the kernel will be passed to `run`; otherwise it is called on one thread.
    """
    region = _write_region(function) if parallel and _openmp() else None
    engine = compiled(function.module)
    return Kernel(callable_of(engine, function), engine.get_function_address(region.name) if region else 0)


def callable_of(engine: binding.ExecutionEngine, function: ir.Function) -> Call:
    """Return a compiled function with `SIGNATURE` as a Python callable."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address(function.name))


def run(kernel: Kernel, arguments: int, shares: int) -> None:
    """Run a kernel, each share of its work on its own thread.

    Args:
        arguments: address of the kernel's arguments.
        shares: number of shares, at most `torch.get_num_threads()`.
    """
    openmp = None if _State.has_forked else _openmp()
    if shares <= 1:
        kernel.call(arguments, 0, 1)
    elif openmp is None:
        _run_in_pool(kernel, arguments, shares)
    else:
        _State.has_used_openmp = True
        task = array("q", (arguments, shares))
        # Always torch's number of threads: libgomp ends or starts threads whenever the number changes between parallel regions.
        openmp(kernel.region, task.buffer_info()[0], torch.get_num_threads(), 0)


def _run_in_pool(kernel: Kernel, arguments: int, shares: int) -> None:
    if _State.pool is None:
        _State.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sharded_optim")
    others: list[Future[None]] = []
    try:
        for share in range(1, shares):
            try:
                others.append(_State.pool.submit(kernel.call, arguments, share, shares))
            except RuntimeError:  # cannot start another thread
                kernel.call(arguments, share, shares)
        kernel.call(arguments, 0, shares)
    finally:
        _wait_for_all(others)


def _wait_for_all(shares: Sequence[Future[None]]) -> None:
    """Wait for all shares, even if interrupted: they write to memory that is freed afterwards."""
    interrupt: BaseException | None = None
    while not all(share.done() for share in shares):
        try:
            wait(shares)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Return GOMP_parallel(function, its argument, threads, flags) of torch's OpenMP runtime, or None. LLVM's and Intel's have it too."""
    library = ctypes.CDLL(torch._C.__file__)  # also resolves functions of the libraries that it is linked with
    try:
        for name in ("omp_get_thread_num", "omp_get_num_threads"):
            binding.add_symbol(name, ctypes.cast(library[name], ctypes.c_void_p).value)
        parallel = library["GOMP_parallel"]
    except AttributeError:
        return None
    parallel.restype, parallel.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return parallel


def _write_region(kernel: ir.Function) -> ir.Function:
    """Write the function that each thread of a parallel region runs on a task, int64 (2,): the address of the arguments, and shares.

    Thread i takes shares i, i + threads, ..., so that in every step the same elements are in its caches and its NUMA node's memory. There
    may be fewer threads than shares.
    """
    region = ir.Function(kernel.module, ir.FunctionType(VOID, [POINTER]), "region")
    builder = ir.IRBuilder(region.append_basic_block())
    arguments, shares = (load(builder, at(builder, region.args[0], index)) for index in range(2))
    number, threads = (builder.sext(call(builder, name, INT32), INT64) for name in ("omp_get_thread_num", "omp_get_num_threads"))
    with counting(builder, number, shares, threads) as loop:
        builder.call(kernel, [builder.inttoptr(arguments, POINTER), loop.index, shares])
    builder.ret_void()
    return region
