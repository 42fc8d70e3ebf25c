"""What the Triton backend's kernels ask of a GPU, read from their machine code: `python -m benchmarks.machine_code`.

The kernels are compiled for an NVIDIA GPU that need not be there, and taken apart with the tools of Triton's wheel. Counted is what a
thread executes where nothing is out of the ordinary, per element:

    block     an iteration of the loop over a program's blocks. Calls are left out, with what does nothing but call: the slow paths of
              division and square root, for operands that are zero, denormal or huge. Where the code branches otherwise, the longer way.
    program   the shortest way to that loop and from it to the end, shared by the elements of a full program. What only tensors have
              whose length is odd is not in it.

A multiprocessor issues an instruction for 128 threads in a clock, and some units take fewer (`PIPES`). With the bandwidth of a copy
follows what share of its clocks a kernel needs if memory is to be all that it waits for. How long loads take is not known here: that there
are more bytes in flight than bandwidth * latency says no more than that loads can follow each other closely enough.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.report import table
from sharded_optim.backends import triton as backend
from sharded_optim.optimizers.adam import ADAM
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.storage.formats import FORMATS

__all__ = ["Code", "Figures", "disassembled", "figures_of", "main"]

ISSUED = 128  # threads for which a multiprocessor issues an instruction in a clock
PIPES = {  # threads in a clock, as NVIDIA's programming guide has it for 8.0 to 10.0, and which instructions
    "special": (16, r"MUFU|FCHK|F2I|I2F|F2F|FRND|POPC|REDUX"),  # and conversions; that FCHK, of divisions, is one of them is a guess
    "fp64": (64, r"D(ADD|MUL|FMA|SETP)"),
    "integer": (64, r"V?IADD|V?IMNMX|ISETP|LEA|LOP|PLOP|SHF|F?SEL|FSETP|FMNMX|PRMT|IABS"),  # and comparisons
    "multiply": (64, r"IMAD"),  # also moves
    "shared": (32, r"SHFL|LDS|STS"),
}
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor, 8.0 and 9.0 and 10.0
WIDTHS = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}  # bytes, by a suffix of a load or store; 4 without
LINE = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/)\s*(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?:\s+(?P<condition>!?U?P\d),)?(?P<operands>[^;]*);"
)
JUMPS = ("BRA", "CALL")  # a call of a label within the kernel is a jump that does not come back
LABEL = re.compile(r"^(\.L\w+|\$\w+):")


def disassembled(cubin: bytes) -> str:
    """The instructions of machine code, as `nvdisasm` writes them.

    Raises:
        FileNotFoundError: it is not there.
    """
    return _told("nvdisasm", "-c", cubin)


def _told(program: str, option: str, cubin: bytes) -> str:
    """What a program of Triton's wheel or of CUDA tells of machine code."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = shutil.which(program, path=str(own)) or shutil.which(program)
    if found is None:
        raise FileNotFoundError(f"{program} is neither in {own} nor on PATH; Triton's wheels for x86 and Arm have it, and so has CUDA")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([found, option, path], capture_output=True, text=True, check=True, timeout=60).stdout


# --------------------------------------------------------------------------------------------------------------------------- code


@dataclass(frozen=True)
class Instruction:
    """One line."""

    opcode: str  # with its suffixes
    predicate: str | None
    target: str | None  # label, of a branch

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    def bytes_of(self, *names: str) -> int:
        """That a thread loads (LDG) from device memory, or stores (STG) there."""
        if self.name not in names:
            return 0
        return next((WIDTHS[suffix] for suffix in self.opcode.split(".") if suffix in WIDTHS), 4)


@dataclass
class Block:
    """Instructions that are executed one after the other."""

    instructions: list[Instruction]
    following: list[int]  # blocks, by index

    @property
    def calls(self) -> bool:
        return any(each.name == "CALL" and not each.target for each in self.instructions)


class Code:
    """The machine code of a kernel.

    Args:
        text: what `nvdisasm` wrote.

    Attributes:
        blocks: in the order of addresses; the functions that are called are left out.
    """

    def __init__(self, text: str) -> None:
        starts: dict[str, int] = {}
        self.blocks: list[Block] = []
        fresh = True
        for line in text.splitlines():
            label = LABEL.match(line)
            if label:
                if label[1].startswith("$"):
                    break
                starts[label[1]], fresh = len(self.blocks), True
            found = LINE.match(line)
            if not found:
                continue
            if fresh:
                self.blocks.append(Block([], []))
            target = re.search(r"`\((\.L\w+)\)", found["operands"]) if found["opcode"].startswith(JUMPS) else None
            predicate = found["predicate"] or found["condition"]
            self.blocks[-1].instructions.append(Instruction(found["opcode"], predicate, target[1] if target else None))
            fresh = target is not None or found["opcode"].startswith("EXIT")
        for index, block in enumerate(self.blocks):
            last = block.instructions[-1]
            if last.target and starts[last.target] < len(self.blocks):
                block.following.append(starts[last.target])
            if (last.predicate or last.name not in (*JUMPS, "EXIT")) and index + 1 < len(self.blocks):
                block.following.append(index + 1)

    @cached_property
    def loop(self) -> tuple[int, int]:
        """First and last block of the loop that loads most in an iteration."""
        loops = [(first, last) for last, block in enumerate(self.blocks) for first in block.following if first <= last]
        loops = [(first, last) for first, last in loops if first < last or len(self.blocks[first].instructions) > 1]  # the end of the code
        assert loops, "a kernel has a loop over the blocks of its program"
        return max(loops, key=lambda loop: sum(each.bytes_of("LDG") for each in self._between(*loop)))

    @cached_property
    def of_block(self) -> list[Instruction]:
        """What an iteration of `loop` executes."""
        first, last = self.loop
        inside = {index for index in range(first, last + 1) if not self.blocks[index].calls}
        return self._path(first, last, inside, longest=True)

    @cached_property
    def of_program(self) -> list[Instruction]:
        """What is executed before and after."""
        first, last = self.loop
        outside = {index for index, block in enumerate(self.blocks) if not first <= index <= last and not block.calls}
        entered = [index for index in outside if first in self.blocks[index].following]
        left = [index for block in range(first, last + 1) for index in self.blocks[block].following if index in outside]
        ends = [index for index in sorted(outside) if self.blocks[index].instructions[-1].name == "EXIT"]
        before = min((self._path(0, index, outside) for index in entered), key=len)
        after = min((path for start in left for end in ends if (path := self._path(start, end, outside))), key=len)
        return before + after

    def all(self) -> Iterable[Instruction]:
        return (each for block in self.blocks for each in block.instructions)

    def _between(self, first: int, last: int) -> Iterable[Instruction]:
        return (each for block in self.blocks[first : last + 1] for each in block.instructions)

    def _path(self, first: int, last: int, allowed: set[int], *, longest: bool = False) -> list[Instruction]:
        """Of all ways over allowed blocks in ascending order, the shortest or longest; none: empty."""
        better = max if longest else min
        paths: dict[int, list[Instruction]] = {first: self.blocks[first].instructions}
        for index in sorted(allowed):
            if index not in paths:
                continue
            for following in self.blocks[index].following:
                if following in allowed and following > index:
                    candidate = paths[index] + self.blocks[following].instructions
                    paths[following] = better(paths.get(following, candidate), candidate, key=len)
        return paths.get(last, [])


# ------------------------------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of a kernel whose operands are all aligned."""

    name: str
    registers: int
    shared: int  # bytes of a program
    spills: int  # instructions that move registers to memory or back
    warps: int  # resident on a multiprocessor, by registers
    block: float  # instructions per element
    program: float
    pipes: dict[str, float]  # clocks per element, of a multiprocessor
    bytes: float  # that an element loads and stores
    in_flight: int  # bytes that the resident warps load before the first of them computes

    @property
    def instructions(self) -> float:
        """Per element."""
        return self.block + self.program

    def share(self, elements: float) -> float:
        """Of the issue slots, for so many elements in a clock of a multiprocessor."""
        return elements * self.instructions / ISSUED

    def slowest(self, elements: float) -> tuple[float, str]:
        """Share of the clocks of the unit that is asked most, for so many elements in a clock."""
        clocks, name = max((clocks, name) for name, clocks in self.pipes.items())
        return elements * clocks, name


def figures_of(
    name: str,
    kernel: backend.Kernel,
    *,
    capability: int = 90,
    chunk: int = backend.CHUNK,
    threads: int = backend.THREADS,
    elements: int = backend.ELEMENTS,
) -> Figures:
    """Compile a kernel for an NVIDIA GPU and look at it.

    Raises:
        FileNotFoundError: the tools that look at it are not there.
    """
    compiled = backend.compile_for(kernel, GPUTarget("cuda", capability, 32), threads=threads, elements=elements)
    code = Code(disassembled(compiled.asm["cubin"]))
    found = re.search(r"REG:(\d+)", _told("cuobjdump", "-res-usage", compiled.asm["cubin"]))
    assert found, "cuobjdump tells registers"
    registers = int(found[1])
    warps = threads // 32
    programs = min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), WARPS // warps, PROGRAMS)
    per_element = [(code.of_block, elements), (code.of_program, chunk / threads)]
    return Figures(
        name=name,
        registers=registers,
        shared=compiled.metadata.shared,
        spills=sum(each.name in ("LDL", "STL") for each in code.all()),
        warps=programs * warps,
        block=len(code.of_block) / elements,
        program=len(code.of_program) * threads / chunk,
        pipes={
            pipe: sum(sum(bool(re.match(names, each.name)) for each in part) / count for part, count in per_element) / threads_in_a_clock
            for pipe, (threads_in_a_clock, names) in PIPES.items()
        },
        bytes=sum(each.bytes_of("LDG", "STG") for each in code.of_block) / elements,
        in_flight=sum(each.bytes_of("LDG") for each in code.of_block) * 32 * warps * programs,
    )


def kernels() -> dict[str, backend.Kernel]:
    """Those that are looked at."""
    assert STABLE_ADAMW.statistic is not None
    found = {}
    for title, fmt, kinds in (
        ("fp32", "fp32", ("fp32", "fp32", "fp32")),
        ("bf16 Kahan, fp32 moments", "bf16_kahan", ("bf16", "fp32", "fp32")),
        ("bf16 Kahan, bf16 moments", "bf16_kahan", ("bf16", "bf16", "bf16")),
    ):
        grad_format, *state_formats = (FORMATS[kind] for kind in kinds)
        found[f"AdamW update, {title}"] = backend.update_kernel(ADAM, (FORMATS[fmt], *state_formats), grad_format)
        found[f"StableAdamW observe, {title}"] = backend.observe_kernel(STABLE_ADAMW.statistic, grad_format, tuple(state_formats))
    return found


HEAD = (
    "kernel",
    "registers",
    "warps",
    "shared",
    "spills",
    "bytes",
    "block",
    "program",
    "issue",
    "slowest unit",
    "in flight, KB",
    "limit, GB/s",
)


def row_of(figures: Figures, *, bandwidth: float, clock: float, multiprocessors: int) -> list[str]:
    """A line of the table."""
    elements = bandwidth / figures.bytes / clock / multiprocessors
    used, unit = figures.slowest(elements)
    return [
        figures.name,
        str(figures.registers),
        str(figures.warps),
        str(figures.shared),
        str(figures.spills),
        f"{figures.bytes:g}",
        f"{figures.block:.1f}",
        f"{figures.program:.1f}",
        f"{figures.share(elements):.0%}",
        f"{unit} {used:.0%}",
        f"{figures.in_flight / 1000:.0f}",
        f"{bandwidth / 1e9 / max(figures.share(elements), used):.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 80, 90, 100")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="of a copy, bytes read and written in a second")
    parser.add_argument("--clock", type=float, default=1.9e9, help="of a multiprocessor, in a second")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--latency", type=float, default=1e-6, help="of a load from a busy memory, in seconds")
    parser.add_argument("--chunk", type=int, default=backend.CHUNK, help="elements of a program")
    parser.add_argument("--threads", type=int, default=backend.THREADS, help="of a program")
    parser.add_argument("--elements", type=int, default=backend.ELEMENTS, help="that a thread loads before it computes")
    told = parser.parse_args(arguments)
    device = {"bandwidth": told.bandwidth, "clock": told.clock, "multiprocessors": told.multiprocessors}
    shape = {"capability": told.capability, "chunk": told.chunk, "threads": told.threads, "elements": told.elements}
    print(f"Triton {triton.__version__}, sm_{told.capability}, programs of {told.chunk} elements and {told.threads} threads")
    print(f"{told.multiprocessors} multiprocessors at {told.clock / 1e9:g} GHz, {told.bandwidth / 1e12:g} TB/s; for that, each must have")
    print(f"{told.bandwidth * told.latency / told.multiprocessors / 1000:.0f} KB in flight")
    print()
    print(table(HEAD, [row_of(figures_of(name, kernel, **shape), **device) for name, kernel in kernels().items()]))
    print()
    print("bytes, block and program are per element; issue and slowest unit are shares of a multiprocessor's clocks at that bandwidth, and")
    print("the limit is the bandwidth at which the larger of the two would be all of them.")


if __name__ == "__main__":
    main()
