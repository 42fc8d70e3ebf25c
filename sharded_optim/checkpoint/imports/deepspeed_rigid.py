"""DeepSpeed's ordinary checkpoints, of as many files as there were ranks: stages 0 to 3.

With ZeRO each rank's file has its partitions of flat float32 tensors: in stages 1 and 2 one for each param group, in which the parameters
lie one after the other; in stage 3 one for each sub-group, which has an equal part of each parameter. Only the order of the parameters and
their shapes say what is what; so what is read is compared, where the files have both, with the model's own parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.held import LOW_PRECISION, MASTER, MODEL, Held
from sharded_optim.checkpoint.imports import safely
from sharded_optim.checkpoint.imports.assembly import assemble
from sharded_optim.checkpoint.imports.deepspeed_files import ModelStates, names_of_groups, pieces_of_equal_parts, tagged
from sharded_optim.checkpoint.imports.optimizer_state import Choices, Translated, translated
from sharded_optim.checkpoint.imports.safely import Inert
from sharded_optim.checkpoint.manifest import Parameters
from sharded_optim.checkpoint.saving import Content
from sharded_optim.sharding.segment import Segment

__all__ = ["content", "looks_like"]

OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
LATEST = "latest"

Piece = tuple[int, int, Segment]  # a rank, the first element in its partition, and which elements of which tensor
Shapes = Mapping[str, tuple[int, ...]]


def looks_like(path: Path) -> bool:
    return (path / LATEST).is_file() or any(path.glob("*_model_states.pt"))


def content(path: Path, choices: Choices) -> Content:
    """What a folder holds. Tensors stay in its files until they are written, but for stage 3's rounded parameters."""
    folder = tagged(path, LATEST)
    states = ModelStates.of(folder)
    files = _optimizer_files(folder)
    if not files:
        return _stage_0(states, choices)
    ranks = [_of_rank(file) for file in files]
    is_stage_3 = "fp32_flat_groups" in ranks[0]
    base = [_base_of(rank, is_stage_3, file) for rank, file in zip(ranks, files, strict=True)]
    _check_count(folder, ranks)
    told = [translated(each, choices) for each in base]
    flats = [rank["fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"] for rank in ranks]
    if len(states.shapes) != len(flats[0]):
        raise ValueError(f"{folder} tells the shapes of {len(states.shapes)} flat tensors, and has {len(flats[0])}")
    held = list(states.untrained())
    steps: dict[str, float] = {}
    for number, group in enumerate(states.shapes):
        partitions = [flat[number] for flat in flats]
        if is_stage_3:
            pieces = list(_of_sub_group(group, partitions, f"{folder}: sub-group {number}"))
        else:
            pieces = list(_of_group(group, partitions, _paddings(ranks[0], number), f"{folder}: param group {number}"))
        held += _values(pieces, partitions, states, f"{folder}: param group {number}")
        held += _state(pieces, told, number)
        steps |= {name: told[0].steps[number] for name in group if number in told[0].steps}
    groups = names_of_groups(base[0]["param_groups"], states.shapes, lambda: str(folder))
    group_of = {name: index for index, names in enumerate(groups) for name in names}
    parameters = Parameters(optimizer=told[0].optimizer, groups=told[0].groups, group_of=group_of, steps=steps)
    return Content(held=held, parameters=parameters, extra=states.extra())


def _optimizer_files(folder: Path) -> list[Path]:
    found = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise FileNotFoundError(f"{folder} has optimizer states of {len(found)} ranks, and not those of rank {missing[0]}; files are lost")
    return [found[rank] for rank in sorted(found)]


def _of_rank(file: Path) -> dict[str, Any]:
    found = safely.load(file)
    if not isinstance(found, dict) or not isinstance(found.get("optimizer_state_dict"), dict):
        raise ValueError(f"{file} is not a file of DeepSpeed's optimizer states")
    return found["optimizer_state_dict"]


def _base_of(rank: Mapping[str, Any], is_stage_3: bool, file: Path) -> Mapping[str, Any]:
    """The state dict of the optimizer that DeepSpeed wraps."""
    found = rank.get("optimizer_state_dict" if is_stage_3 else "base_optimizer_state")
    if not isinstance(found, Mapping) or "param_groups" not in found:
        raise ValueError(f"{file} has the state of an elastic checkpoint, which is not read here; convert it to a Universal one")
    return found


def _check_count(folder: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
    counts = ranks[0].get("partition_count", len(ranks))
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if count != len(ranks):
            raise ValueError(f"{folder} was saved on {count} ranks and has the optimizer states of {len(ranks)}; files are lost")


def _paddings(rank: Mapping[str, Any], number: int) -> Sequence[int] | None:
    """Elements of no parameter behind each one of a group."""
    found = rank.get("param_alignment_paddings")
    return None if found is None else found[number]


def _of_group(group: Shapes, partitions: Sequence[Tensor], paddings: Sequence[int] | None, where: str) -> Iterator[Piece]:
    """Stages 1 and 2."""
    size = partitions[0].numel()
    total = sum(each.numel() for each in partitions)
    if any(each.numel() != size for each in partitions[:-1]) or partitions[-1].numel() > size:  # the last is saved without its padding
        raise ValueError(f"{where} is cut into partitions of different sizes")
    offset = 0
    for number, (name, shape) in enumerate(group.items()):
        numel = Segment.whole(name, shape).numel
        if offset + numel > total:
            raise ValueError(f"{where} has {total} elements, and {name!r} would reach beyond")
        yield from _cut(name, shape, offset, size, len(partitions))
        offset += numel + (0 if paddings is None else paddings[number])


def _cut(name: str, shape: tuple[int, ...], offset: int, size: int, ranks: int) -> Iterator[Piece]:
    end = offset + Segment.whole(name, shape).numel
    for rank in range(ranks):
        first, last = max(offset, rank * size), min(end, (rank + 1) * size)
        if first < last:
            yield rank, first - rank * size, Segment.flat(name, shape, first - offset, last - first)


def _of_sub_group(group: Shapes, partitions: Sequence[Tensor], where: str) -> Iterator[Piece]:
    """Stage 3."""
    offset = 0
    for name, shape in group.items():
        for rank, segment in pieces_of_equal_parts(name, shape, len(partitions)):
            yield rank, offset, segment
        offset += -(-Segment.whole(name, shape).numel // len(partitions))
    if any(each.numel() != offset for each in partitions):
        raise ValueError(f"{where} has {partitions[0].numel()} elements on a rank, its parameters {offset}")


def _values(pieces: Sequence[Piece], partitions: Sequence[Tensor], states: ModelStates, where: str) -> Iterator[Held]:
    """Masters, and the model's own parameters."""
    for name in dict.fromkeys(segment.name for _, _, segment in pieces):
        if name not in states.module:
            raise ValueError(f"{where} has {name!r}, which is not in {states.files[0]}")
    for rank, offset, segment in pieces:
        own = states.module[segment.name]
        master = partitions[rank][offset : offset + segment.numel]
        value = master.to(own.dtype)
        if own.shape == segment.shape:
            part = own.flatten()[segment.start : segment.start + segment.numel]
            if not torch.equal(part, value):
                raise ValueError(
                    f"{where}: what should be the float32 values of {segment.name!r} are not those of which the model has the rounded "
                    f"ones; these files are not laid out as expected: convert them to a Universal checkpoint, and import that"
                )
            value = part
        yield Held(kind=MODEL, segment=segment, local=value)
        if own.dtype in LOW_PRECISION:
            yield Held(kind=MASTER, segment=segment, local=master)


def _state(pieces: Sequence[Piece], told: Sequence[Translated], number: int) -> Iterator[Held]:
    for rank, offset, segment in pieces:
        for kind, flat in told[rank].state.get(number, {}).items():
            if flat.numel() < offset + segment.numel:
                raise ValueError(f"{kind} of {segment.name!r} is lost: rank {rank} has {flat.numel()} elements of its flat tensor")
            yield Held(kind=kind, segment=segment, local=flat[offset : offset + segment.numel])


def _stage_0(states: ModelStates, choices: Choices) -> Content:
    """Whole tensors in the file of model states."""
    where = str(states.files[0])
    optimizer = states.first.get("optimizer")
    masters: list[Tensor] = []
    if isinstance(optimizer, Mapping) and "optimizer_state_dict" in optimizer:  # of 16-bit parameters
        if "fp32_groups" not in optimizer:
            raise ValueError(f"{where} has the float32 values in flat tensors that do not tell what is what; train with ZeRO stage 1")
        masters = [master for group in optimizer["fp32_groups"] for master in group]
        optimizer = optimizer["optimizer_state_dict"]
    if isinstance(optimizer, Inert) or not isinstance(optimizer, Mapping | None):
        raise ValueError(f"{where} has an optimizer state of an unknown kind")
    return assemble(states.module, optimizer, choices, where, masters=masters, extra=states.extra())
