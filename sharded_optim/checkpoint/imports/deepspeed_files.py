"""What DeepSpeed's two kinds of checkpoints have in common: where they lie, and their files of model states. Layouts of 0.19."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_optim.checkpoint.held import MODEL, Held
from sharded_optim.checkpoint.imports import safely
from sharded_optim.checkpoint.imports.assembly import encodable
from sharded_optim.sharding.segment import Segment

__all__ = ["ModelStates", "names_of_groups", "pieces_of_equal_parts", "tagged"]

FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
UNKNOWN = re.compile(r"layer_.*|.*expert.*")
OWN = {  # what DeepSpeed itself saves; the rest is the user's client_state
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
    *("lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "dp_world_size", "mp_world_size", "num_experts"),
    *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "autoep_layers"),
}


def tagged(path: Path, latest: str) -> Path:
    """The folder of a checkpoint: the one that is given, or that which the file `latest` in it names."""
    pointer = path / latest
    if not pointer.is_file():
        return path
    tag = pointer.read_text().strip()
    if not tag or not (path / tag).is_dir():
        raise FileNotFoundError(f"{pointer} names {tag!r}, which is no folder there; give the folder of a checkpoint")
    return path / tag


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """The files of model states: one, or in stage 3 one of each rank."""

    folder: Path
    files: Sequence[Path]

    @classmethod
    def of(cls, folder: Path) -> ModelStates:
        """Raises ValueError for a kind of parallelism that is not read here."""
        found = {}
        for path in folder.iterdir():
            if UNKNOWN.fullmatch(path.name):
                raise ValueError(f"{path} is of pipeline or expert parallelism, which is not imported")
            match = FILE.fullmatch(path.name)
            if match is not None:
                if int(match[2]) > 0:
                    raise ValueError(f"{path} is of tensor parallelism; convert the checkpoint with DeepSpeed's ds_to_universal.py")
                found[int(match[1] or 0)] = path
        if not found:
            raise FileNotFoundError(f"{folder} has no *_model_states.pt; give the folder of a checkpoint, such as global_step100")
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"{folder} has model states of ranks {', '.join(map(str, sorted(found)))}; some are lost")
        return cls(folder=folder, files=[found[rank] for rank in sorted(found)])

    @cached_property
    def first(self) -> dict[str, Any]:
        found = safely.load(self.files[0])
        if not isinstance(found, dict) or not isinstance(found.get("module"), Mapping):
            raise ValueError(f"{self.files[0]} is not a file of DeepSpeed's model states")
        return found

    @cached_property
    def module(self) -> dict[str, Tensor]:
        """The model's tensors, which in stage 3 are empty. Shared parameters have the name that the others in the file point to."""
        shared = self.first.get("shared_params") or {}
        return {name: value for name, value in self.first["module"].items() if isinstance(value, Tensor) and name not in shared}

    @cached_property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Of the parameters of each param group, or in stage 3 of each sub-group, in the order in which they lie there."""
        found = self.first.get("param_shapes")
        if not found:
            raise ValueError(f"{self.files[0]} has no param_shapes, which tell what lies where")
        return [{name: tuple(shape) for name, shape in group.items()} for group in found]

    def untrained(self) -> Iterator[Held]:
        """Buffers, and parameters that are frozen."""
        frozen = {name: tuple(shape) for name, shape in (self.first.get("frozen_param_shapes") or {}).items()}
        trained = {name for group in self.shapes for name in group}
        for name, tensor in self.module.items():
            if name not in trained and (name not in frozen or tuple(tensor.shape) == frozen[name]):
                yield Held(kind=MODEL, segment=Segment.whole(name, tensor.shape), local=tensor)
        in_parts = {name: shape for name, shape in frozen.items() if name in self.module and tuple(self.module[name].shape) != shape}
        if in_parts:
            fragments = [safely.load(file)["frozen_param_fragments"] for file in self.files]
            for name, shape in in_parts.items():
                parts = [each[name].flatten() for each in fragments]
                for rank, segment in pieces_of_equal_parts(name, shape, len(parts)):
                    yield Held(kind=MODEL, segment=segment, local=parts[rank][: segment.numel])

    def extra(self) -> dict[str, Any] | None:
        """What the user has given as client_state, DeepSpeed's counters, and the state of the learning rate scheduler."""
        found = {key: value for key, value in self.first.items() if key not in OWN and value is not None}
        if self.first.get("lr_scheduler"):
            found["lr_scheduler"] = self.first["lr_scheduler"]
        return encodable(found, str(self.files[0]))


def pieces_of_equal_parts(name: str, shape: tuple[int, ...], ranks: int) -> Iterator[tuple[int, Segment]]:
    """How stage 3 cuts a tensor: into equal parts, with padding behind the last."""
    numel = Segment.whole(name, shape).numel
    size = -(-numel // ranks)
    for rank in range(ranks):
        start = min(rank * size, numel)
        yield rank, Segment.flat(name, shape, start, min(size, numel - start))


def names_of_groups(groups: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], where: Callable[[], str]) -> list[list[str]]:
    """The names of the parameters of each param group, whose "params" number flat tensors."""
    numbers = [number for group in groups for number in group["params"]]
    if sorted(numbers) != list(range(len(shapes))):
        raise ValueError(f"{where()} has {len(shapes)} flat tensors, and its param groups those of number {numbers}")
    return [[name for number in group["params"] for name in shapes[number]] for group in groups]
