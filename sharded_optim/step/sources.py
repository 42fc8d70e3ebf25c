"""Look up the tensors of a kernel call in every step, and compare them with those of the last step.

Wrappers and users replace gradients, state and memory at any time. Besides arithmetic, the cost of a step per tensor is the check that
nothing has moved, so it compares columns (one property of all tensors at once), not one tensor after another. Used by kernel calls.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends.operands import Column, addresses_of
from sharded_optim.sharding import GRADIENT, PARAMETER, LocalParam, Piece, check_memory
from sharded_optim.step.state import STEP, local_of
from sharded_optim.step.stateful import StatefulOptimizer

__all__ = ["Cut", "Source", "StepCounters"]

_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")
_bytes: Callable[[Tensor], int] = attrgetter("nbytes")
_shape: Callable[[Tensor], torch.Size] = attrgetter("shape")
_device: Callable[[Tensor], torch.device] = attrgetter("device")


class Cut:
    """Cuts the local tensors of parameters into operands, for wrappers that flatten several tensors into one.

    Args:
        owners: index of the local tensor that contains each operand.
        pieces: the piece of each operand.
    """

    def __init__(self, owners: Sequence[int], pieces: Sequence[Piece]) -> None:
        self._owners = torch.tensor(owners, dtype=torch.int64, device="cpu")
        self._offsets = torch.tensor([piece.offset or 0 for piece in pieces], dtype=torch.int64, device="cpu")
        self._pieces = list(zip(owners, pieces, strict=True))

    def tensors(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        return [piece.of(wholes[owner]) for owner, piece in self._pieces]

    def addresses(self, wholes: array[int], itemsize: int) -> array[int]:
        return array("q", (torch.tensor(wholes, device="cpu")[self._owners] + self._offsets * itemsize).tolist())


class CutColumn(Column):
    """A column of views, which are created only on demand, because kernels need only their addresses."""

    def __init__(self, wholes: Sequence[Tensor], cut: Cut) -> None:
        self._cut = cut
        self._addresses_of_wholes: array[int] | None = None  # addresses of `wholes`, from which `addresses` was computed
        super().__init__(wholes)

    @property
    def tensors(self) -> Sequence[Tensor]:
        if self._tensors is None:
            self._tensors = self._cut.tensors(self.wholes)
        return self._tensors

    def renew(self, wholes: Sequence[Tensor], addresses: array[int]) -> None:
        self.wholes = wholes
        if addresses is not self._addresses_of_wholes:
            self._addresses_of_wholes, self.addresses = addresses, self._cut.addresses(addresses, wholes[0].element_size())
        self._tensors = None

    def release(self) -> None:
        super().release()
        self._tensors = None


class Source:
    """Provides one column of operands: one tensor of each parameter, in the form that its wrapper gives it.

    The tensors of the last step are not kept for comparison, as their memory may be needed. A tensor with the same address, dtype and
    layout is taken to be the same one; any other is checked by the wrapper's rules.
    """

    def __init__(self, entries: Sequence[LocalParam], role: str, tensors: Sequence[Any], cut: Cut | None) -> None:
        self._entries = entries
        self._role = role
        self._wrapped = not set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}
        local = [self._local(row, tensor) for row, tensor in enumerate(tensors)]
        self.column = Column(local) if cut is None else CutColumn(local, cut)
        self._addresses = addresses_of(local)
        self._described = _descriptions(local)
        self._contiguous = all(map(Tensor.is_contiguous, local))
        self._bytes = list(map(_bytes, local))
        self._dtypes = set(map(_dtype, local))

    def renew(self, tensors: Sequence[Any]) -> bool:
        """Take the tensors of this step; return False if they are not laid out like those of the last step.

        Raises:
            ValueError: a tensor is not laid out like its parameter.
        """
        local = list(map(local_of, tensors)) if self._wrapped else tensors
        addresses = self._addresses_if_alike(local)
        if addresses is None or (addresses != self._addresses and not self._differ_in_address_alone(local, addresses)):
            local = list(local)
            for row, tensor in enumerate(tensors):
                if addresses is None or addresses[row] != self._addresses[row]:
                    local[row] = self._local(row, tensor)
                    if any(now != known[row] for (now,), known in zip(_descriptions([local[row]]), self._described, strict=True)):
                        return False
            addresses = addresses_of(local)
        self._addresses = addresses
        self.column.renew(local, self._addresses)
        return True

    def _differ_in_address_alone(self, local: Sequence[Tensor], addresses: array[int]) -> bool:
        """Return whether tensors differ from those of the last step only in their addresses, as newly allocated gradients do."""
        return (
            not self._wrapped
            and set(map(type, local)) <= {Tensor, torch.nn.Parameter}
            and 0 not in addresses  # a tensor without memory: `check_memory` must see it
            and _shapes_dtypes_devices(local) == self._described[:3]
            and not any(map(Tensor.is_neg, local))  # a negative view: its memory has the opposite sign
        )

    def _local(self, row: int, tensor: Any) -> Tensor:
        entry = self._entries[row]
        return check_memory(entry.local(tensor, self._role), self._role, entry.name, entry.param.device)

    def _addresses_if_alike(self, local: Sequence[Tensor]) -> array[int] | None:
        """Return the addresses if sizes, dtypes and strides are those of the last step; None if the quick checks cannot establish it."""
        if not self._contiguous or (self._role == GRADIENT and (self._wrapped or set(map(type, local)) != {Tensor})):
            return None  # only the wrapper's rules can tell how a gradient is sharded
        try:
            if not all(map(Tensor.is_contiguous, local)):
                return None
        except RuntimeError:  # a sparse tensor has no strides
            return None
        if self._role == GRADIENT and any(map(Tensor.is_neg, local)):
            return None
        if self._role == PARAMETER and not self._wrapped:
            return addresses_of(local)  # `Layout.describes` has already compared parameters
        if set(map(_dtype, local)) != self._dtypes or list(map(_bytes, local)) != self._bytes:
            return None
        return addresses_of(local)


def _shapes_dtypes_devices(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(_shape, tensors)), list(map(_dtype, tensors)), list(map(_device, tensors))]


def _descriptions(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [*_shapes_dtypes_devices(tensors), list(map(Tensor.stride, tensors))]


class StepCounters:
    """The step counters of parameters: one tensor, read and written in one operation. The optimizer's state has views of it.

    Attributes:
        steps: number of steps taken so far by each parameter: fp32 (parameters,).
    """

    def __init__(self, optimizer: StatefulOptimizer, params: Sequence[Tensor], device: torch.device) -> None:
        state = [optimizer.state[param] for param in params]
        counters = [
            values[STEP] if isinstance(values[STEP], Tensor) else torch.tensor(values[STEP], dtype=torch.float32, device="cpu")
            for values in state
        ]
        users: Counter[int] = Counter()
        if optimizer.layout is not None and optimizer.layout.steps_by_group:
            # A Universal checkpoint of ZeRO-3 loads with one counter tensor for all parameters, each of which would advance it.
            users.update(id(values.get(STEP)) for values in optimizer.state.values())
        for counter, param in zip(counters, params, strict=True):
            if counter.is_meta and not param.is_meta:
                raise ValueError(f"the step counter of a parameter on {param.device} is on {counter.device}, where it has no value")
        are_alike = [counter.device == device and counter.dtype == torch.float32 and counter.ndim == 0 for counter in counters]
        self.steps = torch.stack(
            [
                counter if alike else counter.to(device, torch.float32).reshape(())
                for counter, alike in zip(counters, are_alike, strict=True)
            ]
        )
        for values, counter, view, alike in zip(state, counters, self.steps.unbind(), are_alike, strict=True):
            if counter is values[STEP] and alike and users[id(counter)] <= 1:
                counter.data = view  # existing references to the counter see later steps
            else:
                users[id(counter)] -= 1
                values[STEP] = view.detach()
        self._views = [values[STEP] for values in state]

    def are(self, counters: Sequence[Any]) -> bool:
        """Return whether these are the views, and still share the memory of `steps`: users and wrappers replace both."""
        if not all(map(is_, counters, self._views)):
            return False
        first, size = self.steps.data_ptr(), self.steps.element_size()
        return addresses_of(self._views).tolist() == list(range(first, first + size * len(self._views), size))
