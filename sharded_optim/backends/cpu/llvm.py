"""Write LLVM IR with llvmlite, and compile it for the CPU that the process runs on. Used by the kernels of the CPU backend.

Arithmetic is strict IEEE 754: LLVM reorders, contracts or approximates only instructions with a fast-math flag, and none here has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

try:
    import llvmlite
    from llvmlite import binding, ir
except OSError as error:  # llvmlite is installed, but its shared library does not load
    raise ImportError(f"llvmlite cannot be loaded: {error}") from error

OLDEST = (0, 45)
if tuple(map(int, llvmlite.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"llvmlite {llvmlite.__version__} is older than {'.'.join(map(str, OLDEST))}")

__all__ = [
    "BIT",
    "BYTE",
    "DOUBLE",
    "FLOAT",
    "INT16",
    "INT32",
    "INT64",
    "POINTER",
    "VOID",
    "Builder",
    "Loop",
    "Type",
    "Value",
    "at",
    "call",
    "compiled",
    "constant",
    "counting",
    "features",
    "integer",
    "is_x86",
    "is_zen",
    "load",
    "reduced",
    "register_bytes",
    "splat",
    "store",
    "with_lanes",
]

Value = Builder = Type = Any  # classes of `llvmlite.ir`, which has no type annotations
VOID, FLOAT, DOUBLE, POINTER = ir.VoidType(), ir.FloatType(), ir.DoubleType(), ir.PointerType()
BIT, BYTE, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


# ---------------------------------------------------------------------------------------------------------------------------- types


def lanes_of(kind: Type) -> int:
    return kind.count if isinstance(kind, ir.VectorType) else 1


def with_lanes(element: Type, lanes: int) -> Type:
    """Return the vector type with this many lanes, or the scalar type for one lane."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def constant(kind: Type, number: float) -> ir.Constant:
    """Return a constant with the number in every lane."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def integer(number: int) -> ir.Constant:
    return ir.Constant(INT64, number)


def splat(builder: Builder, scalar: Value, lanes: int) -> Value:
    """Return a vector with the scalar in every lane; for one lane, the scalar."""
    if lanes == 1:
        return scalar
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, undefined, constant(ir.VectorType(INT32, lanes), 0))


# --------------------------------------------------------------------------------------------------------------------- instructions


def at(builder: Builder, base: Value, index: Value | int, element: Type = INT64) -> Value:
    """Compute the address of an element of an array."""
    return builder.gep(base, [integer(index) if isinstance(index, int) else index], source_etype=element)


def load(builder: Builder, address: Value, kind: Type = INT64) -> Value:
    """Load from memory that need not be aligned."""
    loaded = builder.load(address, typ=kind)
    loaded.align = 1
    return loaded


def store(builder: Builder, value: Value, address: Value) -> None:
    """Store to memory that need not be aligned."""
    builder.store(value, address).align = 1


def call(builder: Builder, name: str, result: Type, *arguments: Value) -> Value:
    """Call a function that is external to the module, such as an LLVM intrinsic."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [argument.type for argument in arguments]), name)
    return builder.call(function, arguments)


def suffix(kind: Type) -> str:
    """Return the suffix of an intrinsic's name for a type, such as "v16f32" or "i64"."""
    return f"v{kind.count}{suffix(kind.element)}" if isinstance(kind, ir.VectorType) else kind.intrinsic_name


def reduced(builder: Builder, operation: str, vector: Value) -> Value:
    """Reduce the integers in all lanes to their sum ("add") or bitwise or ("or")."""
    if lanes_of(vector.type) == 1:
        return vector
    return call(builder, f"llvm.vector.reduce.{operation}.{suffix(vector.type)}", vector.type.element, vector)


@dataclass
class Loop:
    """The variables of a loop. Its body replaces `values` with those for the next pass."""

    index: Value
    values: list[Value]


@contextmanager
def counting(
    builder: Builder,
    begin: Value,
    end: Value,
    step: Value,
    values: Sequence[Value] = (),  # initial values of the variables that are carried from pass to pass
) -> Iterator[Loop]:
    """Write a loop over index = begin, begin + step, ... < end around the instructions written in the body of the `with`.

    After the loop, the yielded `values` are those of the last pass, or the initial ones if there was none.
    """
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT64)
    index.add_incoming(begin, before)
    carried = [builder.phi(value.type) for value in values]
    builder.cbranch(builder.icmp_signed("<", index, end), body, after)
    builder.position_at_end(body)
    loop = Loop(index, list(carried))
    yield loop
    index.add_incoming(builder.add(index, step), builder.block)
    for phi, first, last in zip(carried, values, loop.values, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, builder.block)
    loop.values = list(carried)
    builder.branch(head)
    builder.position_at_end(after)


# --------------------------------------------------------------------------------------------------------------------- machine code

_engines: list[binding.ExecutionEngine] = []  # engines own the machine code, so they must live until the process ends


def compiled(module: ir.Module) -> binding.ExecutionEngine:
    """Compile a module; the returned engine gives the addresses of its functions."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), _machine())
    _engines.append(engine)  # before the compilation, which may be interrupted
    engine.finalize_object()
    return engine


@cache
def features() -> dict[str, bool]:
    """Return the instruction set extensions of this CPU, by LLVM's names."""
    return dict(binding.get_host_cpu_features())


@cache
def register_bytes() -> int:
    """Return the size of a vector register in bytes."""
    return 64 if features().get("avx512bw") else 32 if features().get("avx2") else 16


def is_x86() -> bool:
    return binding.get_process_triple().startswith("x86_64")


def is_zen() -> bool:
    """Return whether this CPU is an AMD Zen (2017 or later)."""
    return binding.get_host_cpu_name().startswith("znver")


@cache
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


def _machine() -> binding.TargetMachine:
    """Create a target machine. Every engine needs a new one, because it owns and frees its machine."""
    _initialize()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )
