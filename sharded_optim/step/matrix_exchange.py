"""Gather whole matrices, compute with each on its owner, and scatter the results: the phase of a step between directions and updates.

    gather 0, gather 1, compute 0, scatter 0, gather 2, compute 1, scatter 1, ...

The next gather and the last scatter run while a rank computes. Every rank takes part in every round, with the same number of elements in
every step, whichever gradients are missing: on an accelerator the host does not know which. For a matrix without a gradient the ranks send
uninitialized memory, which no rank computes with and whose result no rank reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding import Layout
from sharded_optim.sharding.matrices import AllToAll, MatrixPlan, OwnedMatrix
from sharded_optim.sharding.ranks import naming_missing_ranks
from sharded_optim.storage.devices import capturing

__all__ = ["Compute", "MatrixExchange"]

Compute = Callable[[Tensor], Tensor]  # direction of a whole matrix (rows, columns) -> result


class MatrixExchange:
    """Carries out an exchange plan once per step.

    Args:
        layout: the layout for which the plan was made.
        plan: this rank's part of the plan.

    Attributes:
        buffer: directions of this rank's pieces before the exchange, results after it: (plan.numel,) during a step, (0,) between steps.
    """

    def __init__(self, layout: Layout, plan: MatrixPlan) -> None:
        self._layout = layout
        self._plan = plan
        self._slots: list[_Slot] = []
        self.buffer = torch.empty(0, dtype=plan.dtype, device=layout.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._plan.dtype

    def allocate(self) -> None:
        """Allocate the memory of a step. Called before the ranks agree: a rank that ran out of memory later would block the others.

        Raises:
            ValueError: a CUDA graph is being captured.
        """
        device = self._layout.device
        if capturing(device):
            raise ValueError("a CUDA graph cannot record a step of Muon, in which ranks send each other matrices; step outside the graph")
        self.buffer = torch.empty(self._plan.numel, dtype=self.dtype, device=device)
        if self._plan.travels:
            rounds = self._plan.rounds
            sizes = [
                max(sum(getattr(transfer, way)) for transfer in transfers)
                for transfers in ([each.gather for each in rounds], [each.scatter for each in rounds])
                for way in ("sent", "received")
            ]
            # Two slots: a round is gathered while the previous one is computed, and scattered while the next one is.
            self._slots = [_Slot(*(torch.empty(size, dtype=self.dtype, device=device) for size in sizes)) for _ in rounds[:2]]

    @property
    def travels(self) -> bool:
        """Whether any matrix is cut or has replicas, so that ranks send each other parts of it."""
        return self._plan.travels

    def piece(self, index: int) -> Tensor:
        """Return the elements of one of this rank's pieces: (numel,), a view of the buffer."""
        return self.buffer[self._plan.places[index]]

    def run(self, computes: Mapping[int, Compute]) -> None:
        """Replace the directions in the buffer by results. A collective if any matrix is cut or has replicas.

        Args:
            computes: the function to apply to a matrix, keyed by the index of any of its pieces; no entry for pieces without a gradient.

        Raises:
            RuntimeError: other ranks did not take part.
        """
        process_group = self._layout.process_group
        if not self._plan.travels or process_group is None:
            for each in self._plan.rounds:
                for matrix in each.matrices:
                    self._compute(matrix, computes, None)
            return
        with naming_missing_ranks(process_group, f"the exchange of whole matrices in a step of {self._layout.described_by_name}"):
            self._run_rounds(computes, process_group)

    def _run_rounds(self, computes: Mapping[int, Compute], process_group: dist.ProcessGroup) -> None:
        rounds = self._plan.rounds
        gathering = self._gather(0, process_group)
        scattering: dist.Work | None = None
        for number, current in enumerate(rounds):
            _wait(gathering)
            if number + 1 < len(rounds):
                gathering = self._gather(number + 1, process_group)
            slot = self._slots[number % 2]
            for matrix in current.matrices:
                self._compute(matrix, computes, slot)
            started = _start(current.scatter, slot.results, slot.scattered, process_group)
            if number:
                self._finish_scatter(number - 1, scattering)
            scattering = started
        self._finish_scatter(len(rounds) - 1, scattering)

    def _gather(self, number: int, process_group: dist.ProcessGroup) -> dist.Work | None:
        current, slot = self._plan.rounds[number], self._slots[number % 2]
        if current.gathered_from:
            torch.cat([self.buffer[each] for each in current.gathered_from], out=slot.directions[: sum(current.gather.sent)])
        return _start(current.gather, slot.directions, slot.gathered, process_group)

    def _finish_scatter(self, number: int, work: dist.Work | None) -> None:
        _wait(work)
        begin = 0
        for each in self._plan.rounds[number].scattered_to:
            end = begin + each.stop - each.start
            self.buffer[each] = self._slots[number % 2].scattered[begin:end]
            begin = end

    def _compute(self, matrix: OwnedMatrix, computes: Mapping[int, Compute], slot: _Slot | None) -> None:
        """Compute with one matrix, and write the result to the buffer and to the send buffer of the scatter."""
        compute = computes.get(matrix.piece)
        if compute is None:
            return
        if matrix.lies_whole:
            whole = self.buffer[matrix.own[0].begin : matrix.own[0].end]
        else:
            whole = torch.empty(matrix.rows * matrix.columns, dtype=self.dtype, device=self.buffer.device)
            sources = [(self.buffer, part) for part in matrix.own]
            if slot is not None:
                sources += [(slot.gathered, part) for part in matrix.gathered]
            for source, part in sources:
                for overlap in part.overlaps:
                    overlap.copy(source[part.begin : part.end], whole)
        result = compute(whole.view(matrix.rows, matrix.columns)).contiguous().view(-1)
        targets = [(self.buffer, part) for part in matrix.own]
        if slot is not None:
            targets += [(slot.results, part) for part in matrix.results]
        for target, part in targets:
            for overlap in part.overlaps:
                overlap.reversed().copy(result, target[part.begin : part.end])

    def release(self) -> None:
        """Free the buffers until the next step."""
        self._slots = []
        self.buffer = self.buffer.new_empty(0)


class _Slot:
    """The buffers of a round: send and receive buffers of its gather, then of its scatter."""

    def __init__(self, directions: Tensor, gathered: Tensor, results: Tensor, scattered: Tensor) -> None:
        self.directions, self.gathered, self.results, self.scattered = directions, gathered, results, scattered


def _start(transfer: AllToAll, sent: Tensor, received: Tensor, process_group: dist.ProcessGroup) -> dist.Work | None:
    """Start an all-to-all with the first elements of both buffers, as many as the transfer has."""
    output, source = received[: sum(transfer.received)], sent[: sum(transfer.sent)]
    return dist.all_to_all_single(output, source, transfer.received, transfer.sent, process_group, async_op=True)


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
