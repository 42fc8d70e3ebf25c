"""DeepSpeed's ordinary checkpoints, with files for each rank: ZeRO stages 0 to 3.

Each rank's file has the rank's partitions of flat float32 tensors: in stages 1 and 2 one for each param group, with the parameters one
after the other; in stage 3 one for each sub-group, with an equal part of each parameter. Only the order and shapes of the parameters
determine which elements belong to which parameter; so elements are compared with the model's own parameters if the files have these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.imports import unpickling
from sharded_optim.checkpoint.imports.assembly import assemble
from sharded_optim.checkpoint.imports.deepspeed_files import ModelStates, equal_parts, group_names, tagged_folder
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions, TranslatedState, translate
from sharded_optim.checkpoint.imports.unpickling import StandIn
from sharded_optim.checkpoint.local_tensor import LOW_PRECISION, MASTER, MODEL, LocalTensor
from sharded_optim.sharding.segment import Segment

__all__ = ["LATEST", "matches", "read"]

OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
LATEST = "latest"
MOMENTUM = "momentum_buffer"

Piece = tuple[int, int, Segment]  # a rank, an offset in its partition, and the elements of a tensor that begin there
Shapes = Mapping[str, tuple[int, ...]]


def matches(path: Path) -> bool:
    return (path / LATEST).is_file() or any(path.glob("*_model_states.pt"))


def read(path: Path, options: ImportOptions) -> Content:
    """Read a folder. Tensors stay in the mapped files until they are saved, except rounded parameters of stage 3, which are computed."""
    folder = tagged_folder(path, LATEST)
    states = ModelStates.of(folder)
    files = _optimizer_files(folder)
    if not files:
        return _stage_0(states, options)
    ranks = [_load_rank(file) for file in files]
    is_stage_3 = "fp32_flat_groups" in ranks[0]
    base = [_base_optimizer(rank, is_stage_3, file) for rank, file in zip(ranks, files, strict=True)]
    _check_count(folder, ranks)
    translated = [translate(state_dict, options) for state_dict in base]
    flat = [rank["fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"] for rank in ranks]
    if len(states.shapes) != len(flat[0]):
        raise ValueError(f"{folder} has the shapes of {len(states.shapes)} flat tensors, and {len(flat[0])} flat tensors")
    tensors = list(states.untrained())
    steps: dict[str, float] = {}
    for number, group in enumerate(states.shapes):
        partitions = [partition[number] for partition in flat]
        where = f"{folder}: {'sub-group' if is_stage_3 else 'param group'} {number}"
        if is_stage_3:
            pieces = list(_pieces_of_sub_group(group, partitions, where))
        else:
            paddings = ranks[0].get("param_alignment_paddings")  # the number of padding elements after each parameter, by group
            pieces = list(_pieces_of_group(group, partitions, paddings[number] if paddings is not None else [0] * len(group), where))
        tensors += _values(pieces, partitions, states, where)
        if not is_stage_3 and base[0]["param_groups"][number].get("use_muon", False):
            tensors += _muon_state(pieces, partitions, translated, number, where)
        else:
            tensors += _state(pieces, translated, number)
        steps |= {name: translated[0].steps[number] for name in group if number in translated[0].steps}
    parameters = translated[0].parameters(group_names(base[0]["param_groups"], states.shapes, str(folder)), steps)
    return Content(tensors=tensors, parameters=parameters, extra=states.extra())


def _optimizer_files(folder: Path) -> list[Path]:
    files = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    missing = sorted(set(range(max(files, default=-1) + 1)) - files.keys())
    if missing:
        raise FileNotFoundError(f"{folder} has optimizer states of {len(files)} ranks, and not those of rank {missing[0]}; files are lost")
    return [files[rank] for rank in sorted(files)]


def _load_rank(file: Path) -> dict[str, Any]:
    content = unpickling.load(file)
    if not isinstance(content, dict) or not isinstance(content.get("optimizer_state_dict"), dict):
        raise ValueError(f"{file} is not a file of DeepSpeed's optimizer states")
    return content["optimizer_state_dict"]


def _base_optimizer(rank: Mapping[str, Any], is_stage_3: bool, file: Path) -> Mapping[str, Any]:
    """Return the state dict of the optimizer that DeepSpeed wraps."""
    state_dict = rank.get("optimizer_state_dict" if is_stage_3 else "base_optimizer_state")
    if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
        raise ValueError(f"{file} has the state of an elastic checkpoint, which is not supported; convert it to a Universal one")
    return state_dict


def _check_count(folder: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
    counts = ranks[0].get("partition_count", len(ranks))
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if count != len(ranks):
            raise ValueError(f"{folder} was saved on {count} ranks and has the optimizer states of {len(ranks)}; files are lost")


def _pieces_of_group(group: Shapes, partitions: Sequence[Tensor], paddings: Sequence[int], where: str) -> Iterator[Piece]:
    """List the pieces of the parameters of a group, in stages 1 and 2."""
    size = partitions[0].numel()
    total = sum(partition.numel() for partition in partitions)
    # The last partition is saved without its padding.
    if any(partition.numel() != size for partition in partitions[:-1]) or partitions[-1].numel() > size:
        raise ValueError(f"{where} has partitions of different sizes")
    offset = 0
    for number, (name, shape) in enumerate(group.items()):
        end = offset + Segment.whole(name, shape).numel
        if end > total:
            raise ValueError(f"{where} has {total} elements, and {name!r} would end beyond")
        for rank in range(len(partitions)):
            first, last = max(offset, rank * size), min(end, (rank + 1) * size)
            if first < last:
                yield rank, first - rank * size, Segment.flat(name, shape, first - offset, last - first)
        offset = end + paddings[number]


def _pieces_of_sub_group(group: Shapes, partitions: Sequence[Tensor], where: str) -> Iterator[Piece]:
    """List the pieces of the parameters of a sub-group, in stage 3."""
    offset = 0
    for name, shape in group.items():
        for rank, segment in equal_parts(name, shape, len(partitions)):
            yield rank, offset, segment
        offset += -(-Segment.whole(name, shape).numel // len(partitions))
    if any(partition.numel() != offset for partition in partitions):
        raise ValueError(f"{where} has {partitions[0].numel()} elements on a rank, its parameters {offset}")


def _values(pieces: Sequence[Piece], partitions: Sequence[Tensor], states: ModelStates, where: str) -> Iterator[LocalTensor]:
    """List the masters and the model's own parameters.

    Raises:
        ValueError: the model's own parameters in the files are not the rounded masters.
    """
    for rank, offset, segment in pieces:
        own = states.module.get(segment.name)
        if own is None:
            raise ValueError(f"{where} has {segment.name!r}, which is not in {states.files[0]}")
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
        yield LocalTensor(kind=MODEL, segment=segment, local=value)
        if own.dtype in LOW_PRECISION:
            yield LocalTensor(kind=MASTER, segment=segment, local=master)


def _state(pieces: Sequence[Piece], translated: Sequence[TranslatedState], number: int) -> Iterator[LocalTensor]:
    for rank, offset, segment in pieces:
        for kind, flat in translated[rank].state.get(number, {}).items():
            if flat.numel() < offset + segment.numel:
                raise ValueError(f"{kind} of {segment.name!r} is lost: rank {rank} has {flat.numel()} elements of its flat tensor")
            yield LocalTensor(kind=kind, segment=segment, local=flat[offset : offset + segment.numel])


def _muon_state(
    pieces: Sequence[Piece], partitions: Sequence[Tensor], translated: Sequence[TranslatedState], number: int, where: str
) -> Iterator[LocalTensor]:
    """List the momentum of a group that DeepSpeed's own Muon steps in stages 1 and 2.

    With offload and in BF16_Optimizer the momentum has the layout of the partition. Otherwise each rank has the whole momentum of each
    tensor of which it has a piece, one after the other; its file lacks as many elements at the end as the partition has padding.

    Raises:
        ValueError: the sizes fit both layouts, or momentum is lost.
    """
    flat = {rank: state.state[number][MOMENTUM] for rank, state in enumerate(translated) if MOMENTUM in state.state.get(number, {})}
    held = [[segment for owner, _, segment in pieces if owner == rank] for rank in range(len(partitions))]
    cut = [rank for rank, segments in enumerate(held) if any(segment.numel < segment.tensor_numel for segment in segments)]
    sizes = {rank: momentum.numel() for rank, momentum in flat.items()}
    if all(sizes.get(rank) == partitions[rank].numel() for rank in cut):
        if any(sizes[rank] == sum(segment.tensor_numel for segment in held[rank]) for rank in cut):
            raise ValueError(f"{where}: the sizes of DeepSpeed's momentum do not tell how it is laid out")
        yield from _state(pieces, translated, number)
        return
    momenta: dict[str, LocalTensor] = {}
    for rank, segments in enumerate(held):
        end = 0
        for segment in segments:
            start, end = end, end + segment.tensor_numel
            if end <= sizes.get(rank, 0):
                whole = Segment.whole(segment.name, segment.shape)
                momenta.setdefault(segment.name, LocalTensor(kind=MOMENTUM, segment=whole, local=flat[rank][start:end]))
    if sizes and (lost := [segment.name for _, _, segment in pieces if segment.name not in momenta]):
        raise ValueError(f"{where}: DeepSpeed has not saved all of the momentum of {lost[0]!r}; convert the checkpoint where it was saved")
    yield from momenta.values()


def _stage_0(states: ModelStates, options: ImportOptions) -> Content:
    """Read a checkpoint of stage 0: whole tensors, from the file of model states."""
    where = str(states.files[0])
    optimizer = states.first.get("optimizer")
    masters: list[Tensor] = []
    if isinstance(optimizer, Mapping) and "optimizer_state_dict" in optimizer:  # for 16-bit parameters
        if "fp32_groups" not in optimizer:
            raise ValueError(f"{where} has the float32 values in flat tensors without the order of the parameters; train with ZeRO stage 1")
        masters = [master for group in optimizer["fp32_groups"] for master in group]
        optimizer = optimizer["optimizer_state_dict"]
    if isinstance(optimizer, StandIn) or not isinstance(optimizer, Mapping | None):
        raise ValueError(f"{where} has an optimizer state of an unknown kind")
    return assemble(states.module, optimizer, options, where, masters=masters, extra=states.extra())
