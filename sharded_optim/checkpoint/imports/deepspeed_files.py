"""The common parts of DeepSpeed's two formats: the folder of a checkpoint, and the files of model states. As of DeepSpeed 0.19.

Used by `deepspeed_zero.py` and `deepspeed_universal.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_optim.checkpoint.imports import unpickling
from sharded_optim.checkpoint.imports.state_dicts import encodable
from sharded_optim.checkpoint.local_tensor import MODEL, LocalTensor
from sharded_optim.sharding.segment import Segment

__all__ = ["ModelStates", "equal_parts", "group_names", "tagged_folder"]

FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
UNSUPPORTED = re.compile(r"layer_.*|.*expert.*")
DEEPSPEED_KEYS = {  # keys of DeepSpeed itself; the rest is the user's client_state
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
    *("lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "dp_world_size", "mp_world_size", "num_experts"),
    *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "autoep_layers"),
}


def tagged_folder(path: Path, latest: str) -> Path:
    """Return the folder of a checkpoint: the folder in `path` that its file `latest` names; without this file, `path`."""
    pointer = path / latest
    if not pointer.is_file():
        return path
    tag = pointer.read_text().strip()
    if not tag or not (path / tag).is_dir():
        raise FileNotFoundError(f"{pointer} names {tag!r}, which is not a folder there; give the folder of a checkpoint")
    return path / tag


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """The files of model states: one file, or in stage 3 one for each rank."""

    folder: Path
    files: Sequence[Path]

    @classmethod
    def of(cls, folder: Path) -> ModelStates:
        """Find the files. Raises ValueError for kinds of parallelism that are not supported."""
        files = {}
        for path in folder.iterdir():
            if UNSUPPORTED.fullmatch(path.name):
                raise ValueError(f"{path} is of pipeline or expert parallelism, which is not imported")
            match = FILE.fullmatch(path.name)
            if match is not None:
                if int(match[2]) > 0:
                    raise ValueError(f"{path} is of tensor parallelism; convert the checkpoint with DeepSpeed's ds_to_universal.py")
                files[int(match[1] or 0)] = path
        if not files:
            raise FileNotFoundError(f"{folder} has no *_model_states.pt; give the folder of a checkpoint, such as global_step100")
        if sorted(files) != list(range(len(files))):
            raise ValueError(f"{folder} has model states of ranks {', '.join(map(str, sorted(files)))}; some are lost")
        return cls(folder=folder, files=[files[rank] for rank in sorted(files)])

    @cached_property
    def first(self) -> dict[str, Any]:
        content = unpickling.load(self.files[0])
        if not isinstance(content, dict) or not isinstance(content.get("module"), Mapping):
            raise ValueError(f"{self.files[0]} is not a file of DeepSpeed's model states")
        return content

    @cached_property
    def module(self) -> dict[str, Tensor]:
        """The model's tensors by name, empty in stage 3. A shared parameter appears once, under the name that its other names refer to."""
        shared = self.first.get("shared_params") or {}
        return {name: value for name, value in self.first["module"].items() if isinstance(value, Tensor) and name not in shared}

    @cached_property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the parameters of each param group (stage 3: sub-group) by name, in the order of the group's flat tensor."""
        shapes = self.first.get("param_shapes")
        if not shapes:
            raise ValueError(f"{self.files[0]} has no param_shapes, which describe the flat tensors")
        return [{name: tuple(shape) for name, shape in group.items()} for group in shapes]

    def untrained(self) -> Iterator[LocalTensor]:
        """List the buffers and frozen parameters."""
        frozen = {name: tuple(shape) for name, shape in (self.first.get("frozen_param_shapes") or {}).items()}
        trained = {name for group in self.shapes for name in group}
        for name, tensor in self.module.items():
            if name not in trained and (name not in frozen or tuple(tensor.shape) == frozen[name]):
                yield LocalTensor(kind=MODEL, segment=Segment.whole(name, tensor.shape), local=tensor)
        in_parts = {name: shape for name, shape in frozen.items() if name in self.module and tuple(self.module[name].shape) != shape}
        if in_parts:
            fragments = [unpickling.load(file)["frozen_param_fragments"] for file in self.files]
            for name, shape in in_parts.items():
                parts = [fragment[name].flatten() for fragment in fragments]
                for rank, segment in equal_parts(name, shape, len(parts)):
                    yield LocalTensor(kind=MODEL, segment=segment, local=parts[rank][: segment.numel])

    def extra(self) -> dict[str, Any] | None:
        """Return the user's client_state, DeepSpeed's counters, and the state of the learning rate scheduler."""
        extra = {key: value for key, value in self.first.items() if key not in DEEPSPEED_KEYS and value is not None}
        if self.first.get("lr_scheduler"):
            extra["lr_scheduler"] = self.first["lr_scheduler"]
        return encodable(extra, str(self.files[0]))


def equal_parts(name: str, shape: tuple[int, ...], ranks: int) -> Iterator[tuple[int, Segment]]:
    """Yield each rank and its segment of a tensor in stage 3. Segments are equal, except at the end, where DeepSpeed pads."""
    numel = Segment.whole(name, shape).numel
    size = -(-numel // ranks)
    for rank in range(ranks):
        start = min(rank * size, numel)
        yield rank, Segment.flat(name, shape, start, min(size, numel - start))


def group_names(groups: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], where: str) -> list[list[str]]:
    """List the names of the parameters of each param group. A group's "params" are indices of flat tensors, and so of `shapes`."""
    numbers = [number for group in groups for number in group["params"]]
    if sorted(numbers) != list(range(len(shapes))):
        raise ValueError(f"{where} has {len(shapes)} flat tensors, and its param groups those with the numbers {numbers}")
    return [[name for number in group["params"] for name in shapes[number]] for group in groups]
