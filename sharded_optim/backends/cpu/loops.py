"""Write a kernel's loops over all elements of all operands: addresses, loads, random numbers and stores. Used by `kernels.py`.

A kernel's body is written twice, by calling its operations twice: with vectors of `LANES` elements, and with single elements for the
remainder at the end of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice, starmap
from typing import Any, NamedTuple

import torch
from llvmlite import ir

from sharded_optim.backends.cpu import vectors
from sharded_optim.backends.cpu.llvm import (
    BYTE,
    FLOAT,
    INT16,
    INT32,
    INT64,
    POINTER,
    VOID,
    Builder,
    Loop,
    Type,
    Value,
    at,
    call,
    constant,
    counting,
    features,
    integer,
    is_x86,
    load,
    reduced,
    register_bytes,
    splat,
    store,
    with_lanes,
)
from sharded_optim.backends.cpu.threads import SIGNATURE, arguments_of
from sharded_optim.backends.cpu.vectors import Deferred, Vector, uniform
from sharded_optim.backends.rebinding import rebound
from sharded_optim.storage.format import Format

__all__ = ["Arguments", "Writer", "reason_against", "traced"]

LANES = 2 * register_bytes() // 4  # elements per pass: two registers of fp32, each of which hides the other's latency
LINE = 64  # bytes of a cache line


class Arguments(NamedTuple):
    """The arguments of an update or observe kernel: numbers, and addresses of contiguous arrays; each is an int64 in memory."""

    work: int  # int64 (items, 3): operand, first element, number of elements
    items: int
    addresses: int  # int64 (columns, operands): address of the first element of each array of each operand
    operands: int
    coefficients: int  # fp32 (operands, coefficients)
    grad_scale: int  # fp32 ()
    keys: int = 0  # int64 (operands, random numbers per element)
    runs: int = 0  # int64 (operands, 3): start, run and stride of each segment
    limits: int = 0  # fp32 (operands,)
    scales: int = 0  # fp32 (operands,)
    sums: int = 0  # int64 (items, 2), written: the sum, and a flag, 0 if all values are within the limit


@cache
def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a version of a function of `xp` that takes `Vector` arguments and writes its operations as LLVM instructions."""
    return rebound(function, {"xp": vectors}, lambda traced: traced, lambda number: number)


class Total(NamedTuple):
    """A reduction over the elements of a work item.

    Attributes:
        operation: "add" or "or".
        kind: its integer type.
    """

    operation: str
    kind: Type

    def joined(self, builder: Builder, total: Value, terms: Value) -> Value:
        return builder.or_(total, terms) if self.operation == "or" else builder.add(total, terms)


class Run(NamedTuple):
    """Elements [begin, end) of a work item. If order matters, they are consecutive in the whole tensor, from index `index` on."""

    begin: Value
    end: Value
    index: Value


class Writer:
    """Writes a kernel.

    Args:
        formats: storage formats of an element's values; the last is its gradient's.
        coefficients: number of coefficients per operand.
        numbers: names of arrays with one more number per operand, and the type to which the number is converted.
        ahead: prefetch distance in bytes; 0 disables prefetching.
    """

    def __init__(self, formats: Sequence[Format], coefficients: int, numbers: Mapping[str, Type] | None = None, *, ahead: int) -> None:
        self.formats, self.coefficients, self.numbers, self.ahead = formats, coefficients, numbers or {}, ahead
        self.function = ir.Function(ir.Module(), SIGNATURE, "kernel")
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.arguments = arguments_of(self.function, self.builder, Arguments._fields)

    def element(self, array: str, index: Value | int, kind: Type = INT64) -> Value:
        """Load an element of an array among the arguments."""
        return load(self.builder, at(self.builder, self.builder.inttoptr(self.arguments[array], POINTER), index, kind), kind)

    def rows(self, array: str, row: Value, width: int, kind: Type = INT64) -> list[Value]:
        """Load a row of an array with `width` columns."""
        first = self.builder.mul(row, integer(width))
        return [self.element(array, self.builder.add(first, integer(column)), kind) for column in range(width)]

    @contextmanager
    def items(self, totals: Sequence[Total] = ()) -> Iterator[Item]:
        """Write the loop over the work items of a thread's share.

        Args:
            totals: the reductions over the elements of each item.
        """
        builder, (_, share, shares) = self.builder, self.function.args
        begin, end = (builder.sdiv(builder.mul(self.arguments["items"], each), shares) for each in (share, builder.add(share, integer(1))))
        with counting(builder, begin, end, integer(1)) as loop:
            yield Item(self, loop.index, totals)
        builder.ret_void()


class Item:
    """A work item: consecutive elements of one operand."""

    def __init__(self, writer: Writer, number: Value, totals: Sequence[Total]) -> None:
        self.writer, self.builder, self.number = writer, writer.builder, number
        builder = writer.builder
        self.row, self.first, self.count = writer.rows("work", number, 3)
        self.arrays: list[tuple[Value, torch.dtype]] = []  # (address of the item's first element, dtype) of each array
        for column, array in enumerate(array for fmt in writer.formats for array in fmt.arrays):
            place = builder.add(builder.mul(integer(column), writer.arguments["operands"]), self.row)
            offset = builder.mul(self.first, integer(array.dtype.itemsize))
            address = builder.add(writer.element("addresses", place), offset)
            self.arrays.append((builder.inttoptr(address, POINTER), array.dtype))
        self.numbers = [
            writer.element("grad_scale", 0, FLOAT),
            *writer.rows("coefficients", self.row, writer.coefficients, FLOAT),
            *(builder.fpext(writer.element(name, self.row, FLOAT), kind) for name, kind in writer.numbers.items()),
        ]
        self.accumulated = totals
        self.totals: list[Value] = [constant(total.kind, 0) for total in totals]

    @contextmanager
    def runs(self, *, ordered: bool) -> Iterator[Run]:
        """Write the loop over the parts of the segment's runs that are in this item. If order does not matter, the item is one run."""
        builder, one = self.builder, integer(1)
        if not ordered:
            yield Run(integer(0), self.count, integer(0))
            return
        start, length, stride = self.writer.rows("runs", self.row, 3)
        end = builder.add(self.first, self.count)
        last = builder.sdiv(builder.sub(end, one), length)
        with counting(builder, builder.sdiv(self.first, length), builder.add(last, one), one) as loop:
            run_begin = builder.mul(loop.index, length)
            begin = call(builder, "llvm.smax.i64", INT64, run_begin, self.first)
            run_end = call(builder, "llvm.smin.i64", INT64, builder.add(run_begin, length), end)
            index = builder.add(builder.add(start, builder.mul(loop.index, stride)), builder.sub(begin, run_begin))
            yield Run(builder.sub(begin, self.first), builder.sub(run_end, self.first), index)

    def passes(self, run: Run) -> Iterator[Elements]:
        """Write the loop over the elements of a run, `LANES` at a time, and then the loop over the remainder."""
        builder = self.builder
        whole = builder.add(run.begin, builder.and_(builder.sub(run.end, run.begin), integer(-LANES)))
        for lanes, begin, end in ((LANES, run.begin, whole), (1, whole, run.end)):
            numbers = [Vector(builder, splat(builder, number, lanes)) for number in self.numbers]
            zeros = [constant(with_lanes(total.type, lanes), 0) for total in self.totals]
            with counting(builder, begin, end, integer(lanes), zeros) as loop:
                yield Elements(self, run, lanes, loop, numbers)
            self.totals = [
                how.joined(builder, total, reduced(builder, how.operation, of_lanes))
                for how, total, of_lanes in zip(self.accumulated, self.totals, loop.values, strict=True)
            ]

    def write_totals(self) -> None:
        """Store the totals in the item's row of `sums`."""
        sums = self.builder.inttoptr(self.writer.arguments["sums"], POINTER)
        first = self.builder.mul(self.number, integer(len(self.totals)))
        for index, total in enumerate(self.totals):
            total = self.builder.zext(total, INT64)
            store(self.builder, total, at(self.builder, sums, self.builder.add(first, integer(index))))


class Elements:
    """The elements of a work item in one pass, one per lane.

    Attributes:
        numbers: the operand's coefficients and the numbers of `Writer.numbers`, in all lanes.
    """

    def __init__(self, item: Item, run: Run, lanes: int, loop: Loop, numbers: Sequence[Vector]) -> None:
        self.item, self.builder, self.run, self.lanes, self.loop = item, item.builder, run, lanes, loop
        self.grad_scale, *self.numbers = numbers

    def loaded(self) -> list[Vector]:
        """Return the values of parameters and moments, and the scaled gradients. Values that no operation uses are not loaded."""
        arrays = iter(self._arrays())

        def value(fmt: Format) -> Vector:
            own = list(islice(arrays, len(fmt.arrays)))
            return Deferred(self.builder, lambda: traced(fmt.load)(*starmap(self._load, own)))

        *values, grad = map(value, self.item.writer.formats)
        return [*values, Deferred(self.builder, lambda: grad * self.grad_scale)]

    def store(self, arrays: Sequence[Any]) -> None:
        """Store new elements to the arrays of parameters and moments."""
        for (address, dtype), new in zip(self._arrays(), arrays, strict=False):
            value = new if isinstance(new, Vector) else self.grad_scale.like(new)
            store(self.builder, _as_stored(value, dtype).value, address)

    def draws(self, is_random: Sequence[bool]) -> Iterator[Vector | float]:
        """Draw a random number in [0, 1) per element for each stochastically rounded value; 0 for other values."""
        item, columns = self.item, sum(is_random)
        index = self.builder.add(self.run.index, self.builder.sub(self.loop.index, self.run.begin))
        keys = iter(item.writer.rows("keys", item.row, columns))
        for each in is_random:
            yield uniform(self.builder, next(keys), index, self.lanes) if each else 0.0

    def add(self, number: int, terms: Vector) -> None:
        """Add a vector of terms to one of the totals of this item of work.

        Args:
            number: index of the total.
            terms: integers of the total's type.
        """
        how = self.item.accumulated[number]
        self.loop.values[number] = how.joined(self.builder, self.loop.values[number], terms.value)

    def _arrays(self) -> list[tuple[Value, torch.dtype]]:
        """Return (address of the first of these elements, dtype) of each array."""
        return [(at(self.builder, base, self.loop.index, _stored_type(dtype)), dtype) for base, dtype in self.item.arrays]

    def _load(self, address: Value, dtype: torch.dtype) -> Vector:
        """Load elements of an array: 16-bit floats as their bits, integers converted to fp32."""
        if self.lanes > 1 and self.item.writer.ahead:
            self._prefetch(address, self.lanes * dtype.itemsize)
        loaded = Vector(self.builder, load(self.builder, address, with_lanes(_stored_type(dtype), self.lanes)))
        return loaded if dtype in AS_THEY_ARE else loaded.converted("sitofp" if dtype.is_signed else "uitofp", FLOAT)

    def _prefetch(self, address: Value, size: int) -> None:
        """Prefetch `size` bytes for a later pass, at the prefetch distance from the address."""
        for offset in range(0, size, LINE):
            read, keep, data = (ir.Constant(INT32, number) for number in (0, 3, 1))
            call(self.builder, "llvm.prefetch.p0", VOID, at(self.builder, address, self.item.writer.ahead + offset, BYTE), read, keep, data)


AS_THEY_ARE = {torch.float32: FLOAT, torch.bfloat16: INT16, torch.float16: INT16}
INTEGERS = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}


def reason_against(dtype: torch.dtype) -> str | None:
    """Return None, or the reason why kernels cannot read and write arrays of a dtype on this CPU."""
    if dtype == torch.float16 and is_x86() and not features().get("f16c"):
        return "this CPU has no instruction that rounds to float16"
    return None if dtype in AS_THEY_ARE or dtype in INTEGERS else f"it has no arrays of {dtype}"


def _stored_type(dtype: torch.dtype) -> Type:
    return AS_THEY_ARE.get(dtype) or ir.IntType(8 * dtype.itemsize)


def _as_stored(value: Vector, dtype: torch.dtype) -> Vector:
    """Convert the result of a format's `store` to elements of an array. For an array of integers it consists of whole fp32 numbers."""
    if dtype in AS_THEY_ARE:
        return value
    return value.converted("fptosi" if dtype.is_signed else "fptoui", ir.IntType(8 * dtype.itemsize))
