"""Exchange which parameters had a gradient in a backward pass. A parameter is stepped if it had one on any rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.storage.devices import known_on_host
from sharded_optim.zero import transfers
from sharded_optim.zero.bucket import ParamSlot
from sharded_optim.zero.transfers import Transfer

__all__ = ["GradientCounts"]


class GradientCounts:
    """Counts, round by round, the ranks on which each parameter had a gradient.

    Owns the running exchanges, and the results of earlier ones.

    Args:
        all_ranks: the ranks that take part; None: this process is alone.
        serial: the optimizer's number, the same on all ranks. If the ranks of an exchange send different numbers, they have run backward
            for different optimizers.
    """

    def __init__(self, all_ranks: dist.ProcessGroup | None, serial: int) -> None:
        self._all_ranks = all_ranks
        self._ranks = 1 if all_ranks is None else dist.get_world_size(all_ranks)
        self._serial = serial
        self._running: list[_Exchange] = []
        self._with_gradient: set[ParamSlot] = set()  # parameters with a gradient on any rank, from the exchanges that have been read

    def exchange(self, slots: Sequence[ParamSlot], used: Collection[ParamSlot], *, repeats: bool, what: str) -> None:
        """Start the exchange of a round.

        Args:
            slots: the slots of all parameters, in the same order on every rank.
            used: the slots with a gradient on this rank.
            repeats: whether a parameter has a further gradient on this rank, which needs another round.
            what: a description of the exchange, for error messages.
        """
        row = torch.tensor([slot in used for slot in slots] + [self._serial, repeats], dtype=torch.int32)
        counts = row.to(slots[0].param.device, non_blocking=True)
        transfer = transfers.all_reduce(counts, self._all_ranks, what)
        is_known = len(used) == len(slots) and not repeats
        self._running.append(_Exchange(transfer=transfer, counts=counts, slots=slots, is_known=is_known))

    def finish(self, repeated: Collection[ParamSlot]) -> bool:
        """Wait for all exchanges.

        Args:
            repeated: parameters that have a further gradient on this rank.

        Returns:
            Whether any rank has a further gradient; all ranks must then run another round.

        Raises:
            RuntimeError: ranks have run backward for different optimizers; or, on an accelerator, only some ranks have further gradients.
        """
        repeating = 0
        for exchange in self._running:
            repeating = self._read(exchange, repeated)  # only the last counts: each round reduces the further gradients of the round before
        self._running.clear()
        return repeating > 0

    def take(self) -> set[ParamSlot]:
        """Return the parameters that had a gradient on any rank since the last call, and reset."""
        with_gradient, self._with_gradient = self._with_gradient, set()
        return with_gradient

    def _read(self, exchange: _Exchange, repeated: Collection[ParamSlot]) -> int:
        """Read one exchange; return the number of ranks with a further gradient."""
        exchange.transfer.wait()
        if exchange.is_known and not known_on_host(exchange.counts):  # every count is positive: no need to wait for the device
            self._with_gradient.update(exchange.slots)
            return 0
        *counts, serials, repeating = exchange.counts.tolist()
        if serials != self._serial * self._ranks:
            raise RuntimeError(
                "ranks have run backward passes for several ShardedOptimizers in different orders; run them in one order, with a "
                "gradient for each optimizer on every rank"
            )
        # On an accelerator a rank with all gradients has not read the counts, so would not run the further round.
        if repeating not in (0, self._ranks) and not known_on_host(exchange.counts):
            here = "".join(f", here {slot.name!r}" for slot in repeated)
            raise RuntimeError(
                f"parameters got several gradients in one backward pass on {repeating} of {self._ranks} ranks{here}, from several "
                f"reentrant checkpoints; let all ranks do so or none, or checkpoint with use_reentrant=False"
            )
        self._with_gradient.update(compress(exchange.slots, counts))
        return repeating


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """The running exchange of one round."""

    transfer: Transfer
    # int32 (parameters + 2,), complete after the transfer: for each parameter the number of ranks with a gradient, then the sum of the
    # ranks' serials, and the number of ranks with a further gradient of any parameter.
    counts: Tensor
    slots: Sequence[ParamSlot]
    is_known: bool  # whether every parameter had a gradient on this rank, and none a further one, which needs another round
