"""Present this rank's shards of optimizer state as parts of whole tensors, for torch.distributed.checkpoint.

A rank has a range of a tensor's elements in row-major order, which is at most 2 ndim - 1 boxes. `LogicalTensor` describes these boxes to
torch.distributed.checkpoint, so a checkpoint has tensors that are shaped like the parameters, as under every other wrapper, and loads on
any number of ranks and under any wrapper. `ShardedOptimizer` uses it when torch.distributed.checkpoint reads its state.

Relies on private names of torch: `Tensor._make_wrapper_subclass` and the three methods of `_Checkpointable`. Tried with torch 2.11 and
2.13, and guarded by tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.ranks import gather_objects

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["Box", "LogicalTensor", "boxes", "gathered"]

WAY_OUT = (
    "save it with torch.distributed.checkpoint.save; for whole tensors ask get_optimizer_state_dict with "
    "StateDictOptions(full_state_dict=True), for this rank's part call optimizer.state_dict()"
)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a tensor: `sizes` elements along each dimension, from `offsets` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def boxes(shape: Sequence[int], start: int, numel: int) -> list[Box]:
    """Cut the elements [start, start + numel) of a row-major tensor into boxes, in the order of their elements.

    >>> [(box.offsets, box.sizes) for box in boxes((4, 3), 2, 8)]
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if numel == 0:
        return []
    if not shape:
        return [Box(offsets=(), sizes=())]
    row = math.prod(shape[1:])
    end = start + numel
    first_whole, end_whole = -(-start // row), end // row
    if first_whole > end_whole:  # inside one row
        return _in_row(shape, end_whole, start - end_whole * row, numel)
    cut = _in_row(shape, first_whole - 1, start - (first_whole - 1) * row, first_whole * row - start)
    if first_whole < end_whole:
        inner = tuple(shape[1:])
        cut.append(Box(offsets=(first_whole, *(0 for _ in inner)), sizes=(end_whole - first_whole, *inner)))
    return cut + _in_row(shape, end_whole, 0, end - end_whole * row)


def _in_row(shape: Sequence[int], index: int, start: int, numel: int) -> list[Box]:
    return [Box(offsets=(index, *box.offsets), sizes=(1, *box.sizes)) for box in boxes(shape[1:], start, numel)]


class LogicalTensor(Tensor):
    """A tensor with the shape of the whole tensor and the memory of this rank's part. Can only be copied, moved, saved and loaded.

    Attributes:
        local: this rank's elements: (n,). Loading writes to it.
        start: position of the first local element in the flattened tensor.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], start: int) -> LogicalTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=local.dtype, device=local.device)  # pyright: ignore
        made.local, made.start = local.detach(), start
        return made

    def boxes(self) -> list[tuple[Box, Tensor]]:
        """Return this rank's boxes, each with its elements: a view of `local`, in the shape of the box."""
        own = boxes(self.shape, self.start, self.local.numel())
        parts = self.local.split([box.numel for box in own]) if own else ()
        return [(box, part.view(box.sizes)) for box, part in zip(own, parts, strict=True)]

    # ------------------------------------------------------------------------------------------------ torch.distributed.checkpoint

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes)) for box, _ in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, part in self.boxes():
            if index.offset is not None and box.offsets == tuple(index.offset):
                return part
        raise ValueError(f"{index.fqn!r}: this rank has no part of it that begins at {index.offset}; it has {self!r}")

    # ---------------------------------------------------------------------------------------------------------------- as a tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        options = {key: value for key, value in (kwargs or {}).items() if key != "memory_format"}
        self = args[0]
        if isinstance(self, LogicalTensor):
            if function in COPIES:
                return LogicalTensor(function(self.local, **options), self.shape, self.start)
            if function is torch.ops.aten.new_empty.default and tuple(args[1]) == self.shape:
                return LogicalTensor(function(self.local, self.local.shape, **options), self.shape, self.start)
            if function is torch.ops.aten.copy_.default and self.is_like(args[1]):
                self.local.copy_(args[1].local, *args[2:], **options)
                return self
        raise ValueError(f"{function} cannot be computed of one rank's part of a tensor; {WAY_OUT}")

    def is_like(self, other: object) -> bool:
        """Return whether `other` is a LogicalTensor with the same shape and the same part."""
        if not isinstance(other, LogicalTensor):
            return False
        return (self.shape, self.start, self.local.shape) == (other.shape, other.start, other.local.shape)

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise ValueError(f"{self!r} cannot be pickled, as it is one rank's part of a tensor; {WAY_OUT}")

    def __repr__(self, **_: object) -> str:
        end = self.start + self.local.numel()
        return f"LogicalTensor(elements [{self.start}, {end}) of shape {tuple(self.shape)}, {self.dtype}, {self.device})"


COPIES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.zeros_like.default,
}


@torch.no_grad()
def gathered(
    state: Mapping[int, Mapping[str, Tensor]], process_group: dist.ProcessGroup | None, *, keep: bool, to_cpu: bool
) -> dict[int, dict[str, Tensor]]:
    """Gather the state of a `LogicalState` into ordinary whole tensors. A collective.

    Args:
        state: this rank's state, by the parameter's number.
        process_group: the ranks over which the tensors are sharded; None: this process is alone.
        keep: whether to return the state on this rank; else the result is empty.
        to_cpu: whether to return tensors on the CPU.
    """
    known = {
        number: {name: (value.dtype, tuple(value.shape), value.item() if value.ndim == 0 else None) for name, value in values.items()}
        for number, values in state.items()
    }
    of_ranks = gather_objects(known, process_group)
    device = next((value.device for values in state.values() for value in values.values()), torch.device("cpu"))
    gathered_state: dict[int, dict[str, Tensor]] = {}
    for number in sorted({number for of_rank in of_ranks for number in of_rank}):  # a rank may lack some parameters
        values = state.get(number, {})
        names = {name: about for of_rank in of_ranks for name, about in of_rank.get(number, {}).items()}
        whole = {}
        for name, (dtype, shape, number_itself) in names.items():
            if number_itself is None:
                value = _gathered(values.get(name), dtype, shape, device, process_group)
            else:
                value = torch.tensor(number_itself, dtype=dtype, device=device)
            if keep:
                whole[name] = value.cpu() if to_cpu else value
        if keep:
            gathered_state[number] = whole
    return gathered_state


def _gathered(
    part: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Gather a tensor by summing bytes: for each byte at most one rank has other than 0, so every bit is kept."""
    whole = torch.zeros(math.prod(shape), dtype=dtype, device=device)
    if isinstance(part, LogicalTensor):
        whole[part.start : part.start + part.local.numel()] = part.local
    elif part is not None:
        whole.copy_(part.reshape(-1))
    if process_group is not None and whole.numel():
        dist.all_reduce(whole.view(torch.uint8), group=process_group)
    return whole.view(shape)
