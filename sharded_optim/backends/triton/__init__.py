"""The Triton backend: the algorithms' own source, compiled into one launch over all tensors. For GPUs.

A kernel is generated for each combination of algorithm and formats in use: a page of source text (`_update_kernel`, `_observe_kernel`) that
calls the functions of the formats and the algorithm. They are the functions that the eager backend runs, with `xp` bound to `scalars.py`
(see `rebinding.py`). Triton caches the machine code on disk.

A kernel gets, in device memory, a table of addresses, one column per operand, and a table of work items of at most `CHUNK` elements. Each
program takes one item, and there are more programs than run at once, so that the device balances the load. Operands whose tensors are all
aligned are read and written 16 bytes at a time; the others element by element, in a second launch. Both launches have all items, and a
program of the wrong kind returns at once. The tensors of one operand must be dense with the same strides, as wrappers give them; others are
copied. Nothing is contracted or approximated, so the bits are those of the eager backend. The host never waits, and a CUDA graph can
capture all launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharded_optim.backends import Column, Operands
from sharded_optim.backends.noise import RESOLUTION
from sharded_optim.backends.operands import OperandTables
from sharded_optim.backends.rebinding import argument_count
from sharded_optim.backends.triton import formulas as triton_formulas
from sharded_optim.backends.triton import verdict as triton_verdict
from sharded_optim.backends.triton.compiler import compiled, compiled_scalars, executed, interpreted
from sharded_optim.backends.triton.kernel_text import StoredValue, arrays_of, functions_of, identifier, stored_values
from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.recording import Formulas
from sharded_optim.formulas.scalars import Sums
from sharded_optim.formulas.verdict import Verdict, advance, contribute
from sharded_optim.storage.devices import DeviceCache, capturing, keep, on, send
from sharded_optim.storage.format import Format

__all__ = ["BACKEND", "compile_for", "observe_kernel", "update_kernel"]

CHUNK = 4096  # elements per program
WARP = 32  # threads per warp, for Triton's num_warps
THREADS = 4 * WARP  # threads per program
ELEMENTS = 8  # elements that a thread loads before it computes
ALIGNMENT = 16  # bytes: the longest access of a thread
VECTOR = 8  # elements in ALIGNMENT bytes of the smallest dtype of a parameter or gradient, 2 bytes: no access of a kernel is wider
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
UPDATE = {"BACKWARD": True, "EVICTION": ""}  # compile-time constants of an update kernel with their defaults; see `Triton`
MOST = 2**13  # largest number of elements per program whose sums of limbs fit int32
LOADED, STORED = "loaded_{}", "stored_{}"  # names of an array's loaded element and new element in a kernel's source
assert RESOLUTION == 24, "scalars.uniform draws 24 bits"


class Triton:
    """Runs kernels compiled by Triton; see `sharded_optim.backends.Backend`.

    Args:
        chunk: elements per program, at most `MOST`.
        threads: threads per program.
        elements: elements that a thread loads before it computes, at least `VECTOR`. All three are powers of two.
        backward: whether an update starts with the last item, where the observation ended, whose data may still be in a cache.
        eviction: Triton's cache policy for the loads and stores of an update: "", or "evict_first", which leaves the cache to other data.
    """

    name = "triton"

    def __init__(
        self, chunk: int = CHUNK, threads: int = THREADS, elements: int = ELEMENTS, *, backward: bool = True, eviction: str = ""
    ) -> None:
        assert chunk <= MOST, "sums of limbs would not fit 32 bits"
        self._chunk = chunk
        self._options = _options(threads, elements)
        self._of_update = {"BACKWARD": backward, "EVICTION": eviction}

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        if interpreted():
            return None if device.type == "cpu" else f"Triton's interpreter runs on the CPU, not on {device}"
        if device.type in ("cpu", "meta"):
            return f"it runs on GPUs, not on {device}"
        try:
            active: Any = triton.runtime.driver.active.get_active_torch_device()
        except Exception as error:  # the error type depends on the vendor's driver
            return f"Triton finds no driver for {device} ({error})"
        return None if device.type == active.type else f"Triton's driver is for {active.type}, not for {device}"

    def tabulate(
        self,
        operands: Operands,
        formulas: Formulas,
        formula_of: Tensor | None,
        steps: Tensor,
        sums: Sums | None,
        lr: Tensor,
    ) -> Tensor:
        with on(steps.device):
            return triton_formulas.launch(formulas, formula_of, steps, sums, lr, self._tables_of(operands).constants)

    advance = staticmethod(advance)
    contribute = staticmethod(contribute)

    def judge(self, sums: Tensor, *, skips: bool) -> Verdict:
        with on(sums.device):
            return triton_verdict.judge(sums, skips=skips)

    def prepare(self, algorithm: Algorithm, operands: Operands, formulas: Sequence[Formulas] = ()) -> None:
        self._tables_of(operands)
        _update_kernel_of(algorithm, operands)

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
        sums = torch.zeros(2, len(operands), dtype=torch.int64, device=operands.device)
        scale = tables.one if grad_scale is None else grad_scale
        kernel = observe_kernel(statistic, operands.grad_format, operands.state_formats if statistic else ())
        arguments = [coefficients.contiguous(), limits.contiguous(), scales.contiguous(), sums] if statistic else [sums]
        self._launch(kernel, tables, addresses, scale, *arguments)
        del copies  # they must live until the kernel is launched
        return sums

    def update(
        self,
        algorithm: Algorithm,
        operands: Operands,
        coefficients: Tensor,
        proceed: Tensor | None,
        grad_scale: Tensor | None,
        noise_keys: Tensor | None,
    ) -> None:
        written = operands.written
        tables = self._tables_of(operands)
        addresses, copies = tables.addresses([operands.grad, *written])
        kernel = _update_kernel_of(algorithm, operands)
        scale = tables.one if grad_scale is None else grad_scale
        arguments = [coefficients.contiguous(), tables.true if proceed is None else proceed]
        if noise_keys is not None:
            arguments += [noise_keys.contiguous(), tables.segments]
        self._launch(kernel, tables, addresses, scale, *arguments, **self._of_update)
        for (column, row), copy in copies.items():
            if column:  # the first is the gradient's
                written[column - 1].tensors[row].copy_(copy)
        increment_version(operands.param.wholes)  # as torch operations do: autograd checks versions

    def _tables_of(self, operands: Operands) -> _Tables:
        tables: _Tables = operands.derived.get(self) or _Tables(operands, self._chunk)
        if not capturing(operands.device):
            operands.derived[self] = tables
        return tables

    def _launch(self, kernel: Kernel, tables: _Tables, addresses: _Addresses, *arguments: Tensor, **constants: Any) -> None:
        if not len(tables.work):
            return
        table = addresses.table
        keep(table.device, tables)  # a CUDA graph reads them at every replay
        with on(table.device):
            for aligned in addresses.alignments:
                kernel.function[len(tables.work),](
                    tables.work,
                    table,
                    table.shape[1],
                    *arguments,
                    ALIGNED=aligned,
                    **self._options,
                    **constants,
                )


# ----------------------------------------------------------------------------------------------------------------------- operands


class _Tables:
    """Tables of operands on their device.

    Attributes:
        work, segments: `work` and `runs` of `OperandTables`.
        one, true: the arguments for a grad_scale or a proceed of None.
        constants: cached constants of the coefficient formulas.
    """

    def __init__(self, operands: Operands, chunk: int) -> None:
        self._device = operands.device
        self._tables = OperandTables(operands, chunk)
        work, runs = self._tables.work, self._tables.runs
        # A single copy to the device for both tables.
        flat = send(torch.cat([work.flatten(), runs.flatten()]), self._device)
        self.work, self.segments = flat[: work.numel()].view(work.shape), flat[work.numel() :].view(runs.shape)
        self.one = torch.ones((), dtype=torch.float32, device=self._device)
        self.true = torch.ones((), dtype=torch.bool, device=self._device)
        self.constants = triton_formulas.Constants()
        self._sent: defaultdict[int, DeviceCache[_Addresses]] = defaultdict(DeviceCache)  # keyed by the number of columns

    def addresses(self, columns: Sequence[Column]) -> tuple[_Addresses, dict[tuple[int, int], Tensor]]:
        """Return `OperandTables.addresses` as a table on the device, cached until an address changes, and the copies."""
        values, copies = self._tables.addresses(columns)

        def make() -> _Addresses:
            table = torch.frombuffer(bytearray(values), dtype=torch.int64).view(len(columns), -1)
            unaligned = (table % ALIGNMENT != 0).any(dim=0)
            return _Addresses(
                table=send(table, self._device),
                alignments=[aligned for aligned in (True, False) if (unaligned != aligned).any()],
            )

        return self._sent[len(columns)].of(values, self._device, make), copies


@dataclass(frozen=True, kw_only=True)
class _Addresses:
    """Addresses of columns, on their device.

    Attributes:
        table: int64 (columns, operands).
        alignments: the launches that are needed: True if there is an operand with all tensors aligned, False if there is any other.
    """

    table: Tensor
    alignments: Sequence[bool]


# ------------------------------------------------------------------------------------------------------------------------ kernels


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A generated kernel.

    Attributes:
        function: the jitted function, launched as `function[programs,](*arguments, ALIGNED=..., **_options(...), **constants)`.
        signature: Triton's type of each argument, keyed by name.
        constants: additional compile-time constants with their default values.
        source: its source text.
    """

    function: Any
    signature: dict[str, str]
    constants: Mapping[str, Any]
    source: str


def update_kernel(algorithm: Algorithm, formats: tuple[Format, ...], grad_format: Format) -> Kernel:
    """Return the kernel of an algorithm's update.

    Args:
        formats: storage formats of the parameter and of each moment.
    """
    return _update_kernel(algorithm, formats, grad_format, interpreted=interpreted())


def _update_kernel_of(algorithm: Algorithm, operands: Operands) -> Kernel:
    return update_kernel(algorithm, operands.formats, operands.grad_format)


def observe_kernel(statistic: Statistic | None, grad_format: Format, state_formats: tuple[Format, ...]) -> Kernel:
    """Return the kernel that sums a statistic; without a statistic, one that only checks that squared gradients are finite."""
    return _observe_kernel(statistic, grad_format, state_formats, interpreted=interpreted())


def compile_for(kernel: Kernel, target: GPUTarget, *, aligned: bool = True, threads: int = THREADS, elements: int = ELEMENTS) -> Any:
    """Compile a kernel ahead of time, on a machine that need not have the target device.

    Returns:
        Triton's compiled kernel; its `asm` has "ptx" and "cubin" for NVIDIA, "amdgcn" and "hsaco" for AMD.
    """
    options = _options(threads, elements)
    constants = {"ALIGNED": aligned, "BLOCK": options.pop("BLOCK"), **kernel.constants}
    source = ASTSource(kernel.function, kernel.signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    return triton.compile(source, target=target, options=options)


def _options(threads: int, elements: int) -> dict[str, Any]:
    return {"BLOCK": threads * elements, "num_warps": max(threads // WARP, 1), **OPTIONS}


@cache
def _update_kernel(algorithm: Algorithm, formats: tuple[Format, ...], grad_format: Format, *, interpreted: bool) -> Kernel:
    written, grad = stored_values(formats), StoredValue("grad", grad_format)
    param, *state = written
    coefficients = [f"c{index}" for index in range(argument_count(algorithm.update) - 1 - len(written))]
    arguments = [param.loaded(LOADED), f"{grad.loaded(LOADED)} * scale", *(value.loaded(LOADED) for value in state), *coefficients]
    random = [value.name for value in written if value.format.is_random]
    draws = {name: f"uniform(key{column}, indices)" for column, name in enumerate(random)}
    access = "mask=inside, eviction_policy=EVICTION"
    lines = [
        *(["indices = index_of(index, left, length, gap, count, element)"] if random else []),
        f"{''.join(f'new_{value.name}, ' for value in written)} = update({', '.join(arguments)})",
        *(value.stored(STORED, draws.get(value.name, "")) for value in written),
        *(f"tl.store(at_{name} + element, {STORED.format(name)}, {access})" for name in arrays_of(written)),
    ]
    keys = [f"key{column} = tl.load(keys + {len(random)} * row + {column})" for column in range(len(random))]
    return _kernel(
        identifier(f"update_{algorithm.name}", [*formats, grad_format]),
        {"coefficients": "*fp32", "proceed": "*i1"} | ({"keys": "*i64", "segments": "*i64"} if random else {}),
        arrays_of([grad, *written]),
        coefficients,
        item="tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARD else tl.program_id(0)",
        access=access,
        constants=UPDATE,
        count="tl.where(tl.load(proceed), tl.load(work + 3 * item + 2), 0)",
        before=[*keys, "index, left, length, gap = run_of(segments, row, first, count)"] if random else [],
        lines=lines,
        functions={"update": algorithm.update, **functions_of([grad, *written], written)},
        interpreted=interpreted,
    )


@cache
def _observe_kernel(statistic: Statistic | None, grad_format: Format, state_formats: tuple[Format, ...], *, interpreted: bool) -> Kernel:
    state, grad = stored_values(state_formats), StoredValue("grad", grad_format)
    functions = functions_of([grad, *state])
    arguments = {"sums": "*i64"}
    coefficients: list[str] = []
    if statistic is None:
        title = "finite"
        before = ["limit = 3.4028234663852886e38"]
        lines = [f"g = {grad.loaded(LOADED)} * scale", "value = g * g"]
    else:
        title = f"observe_{statistic.observe.__module__.rpartition('.')[2]}"
        functions["observe"] = statistic.observe
        arguments = {"coefficients": "*fp32", "limits": "*fp32", "scales": "*fp32", **arguments}
        coefficients = [f"c{index}" for index in range(argument_count(statistic.observe) - 1 - len(state))]
        before = ["limit = tl.load(limits + row)", "unit = inverse_of_power(tl.load(scales + row))"]
        values = [f"{grad.loaded(LOADED)} * scale", *(value.loaded(LOADED) for value in state), *coefficients]
        lines = [f"value = observe({', '.join(values)})"]
    # Elements beyond the end are loaded as zeros, and the statistic of zero gradients and state is zero.
    folded = {"largest": ("0.0, tl.float32", "value", "larger")}
    after = ["set_flag(~({largest} <= limit), sums + operands + row)"]
    if statistic is not None:
        lines.append("low, middle, high = fixed_point(value, unit)")
        folded |= {limb: ("0, tl.int32", f"bits_of({limb})", "add") for limb in ("low", "middle", "high")}
        after.append("add_up({low}, {middle}, {high}, {lanes}, unit, sums + row)")
    return _kernel(
        identifier(title, [grad_format, *state_formats]),
        arguments,
        arrays_of([grad, *state]),
        coefficients,
        before=before,
        lines=lines,
        folded=folded,
        after=after,
        functions=functions,
        interpreted=interpreted,
    )


def _kernel(
    name: str,
    arguments: dict[str, str],  # Triton's types of the arguments that only some kernels have
    tensors: dict[str, torch.dtype],  # dtype of each array, in the order of the addresses
    coefficients: Sequence[str],  # names of the coefficients
    *,
    before: Sequence[str],  # statements before all blocks
    lines: Sequence[str],  # statements for each block of elements
    folded: Mapping[str, tuple[str, str, str]] = MappingProxyType({}),  # reductions over elements: initial value and type, term, function
    after: Sequence[str] = (),  # statements after all blocks, with {} for the names of `folded` and for {lanes}, their number of terms
    functions: Mapping[str, Callable[..., Any]],  # functions of algorithms and formats that the source calls
    interpreted: bool,
    item: str = "tl.program_id(0)",  # expression of the program's row in the table of work
    count: str = "tl.load(work + 3 * item + 2)",  # expression of its number of elements
    access: str = "mask=inside",  # arguments of all loads and stores
    constants: Mapping[str, Any] = MappingProxyType({}),  # compile-time constants with their defaults, see `Kernel`
) -> Kernel:
    """Generate the source of a kernel, and execute it."""
    signature = {"work": "*i64", "addresses": "*i64", "operands": "i32", "grad_scale": "*fp32", **arguments}
    addresses = [f"{name} = tl.load(addresses + {column} * operands + row)" for column, name in enumerate(tensors)]
    of_program = [
        *(f"{name} = tl.load(coefficients + {len(coefficients)} * row + {index})" for index, name in enumerate(coefficients)),
        *before,
        *(f"at_{name} = pointer({name} + {dtype.itemsize} * first, {_type(dtype)}, ALIGNED)" for name, dtype in tensors.items()),
    ]
    block = [
        *(f"{LOADED.format(name)} = tl.load(at_{name} + element, {access}, other=0.0)" for name in tensors),
        *lines,
    ]
    width = ALIGNMENT // max(dtype.itemsize for dtype in tensors.values())
    start = [f"{name}_of_blocks = tl.full((BLOCK // {width},), {zero})" for name, (zero, _, _) in folded.items()]
    of_block = [f"{name}_of_blocks = {fold}({name}_of_blocks, tl.reduce({term}, 1, {fold}))" for name, (_, term, fold) in folded.items()]
    of_rest = [f"{name}_of_rest = tl.reduce({term}, 1, {fold})" for name, (_, term, fold) in folded.items()]
    after_blocks, after_rest = (
        [line.format(lanes=lanes, **{name: f"{name}_of_{part}" for name in folded}) for line in after]
        for part, lanes in (("blocks", "(whole + BLOCK - 1) // BLOCK * BLOCK"), ("rest", VECTOR))
    )
    own = {each: compiled(function, interpreted=interpreted) for each, function in functions.items()}
    names = compiled_scalars(interpreted=interpreted) | own
    constexprs = "".join(f", {name}: tl.constexpr" for name in constants)
    source = f'''"""Generated by sharded_optim/backends/triton/__init__.py."""

@triton.jit(do_not_specialize=ARGUMENTS)
def {name}({", ".join(signature)}, ALIGNED: tl.constexpr, BLOCK: tl.constexpr{constexprs}):
    item = ({item}).to(tl.int64)
    row = tl.load(work + 3 * item)
    first = tl.load(work + 3 * item + 1)
    count = ({count}).to(tl.int32)
    {_lines(4, addresses)}
    if (({" | ".join(tensors)}) % {ALIGNMENT} == 0) == ALIGNED:
        scale = tl.load(grad_scale)
        {_lines(8, of_program, start)}
        whole = count // {VECTOR} * {VECTOR} if ALIGNED else count
        for start in range(0, whole, BLOCK):
            element = start + elements(BLOCK, {width})
            inside = element < whole
            {_lines(12, block, of_block)}
        {_lines(8, after_blocks)}
        if whole < count:  # the remainder, less than {VECTOR} elements
            element = whole + elements({VECTOR}, {width})
            inside = element < count
            {_lines(12, block, of_rest, after_rest)}
'''
    return Kernel(
        # ARGUMENTS are not specialized: Triton would otherwise recompile for special values, such as addresses that happen to be aligned.
        function=executed(name, source, {"triton": triton, "tl": tl, "ARGUMENTS": list(signature), **names}),
        signature=signature,
        constants=constants,
        source=source,
    )


def _type(dtype: torch.dtype) -> str:
    return f"tl.{str(dtype).removeprefix('torch.')}"


def _lines(indent: int, *lines: Sequence[str]) -> str:
    return f"\n{' ' * indent}".join(line for each in lines for line in each)


BACKEND = Triton()
