"""`Plan`, the requirements of a way of sharding, and `Case`, by which `shardings.py` makes a plan.

For B bytes over n ranks, by a ring or directly, each rank sends (n - 1) / n * B in a reduce-scatter or all-gather, and twice that in an
all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from sharded_optim.formulas import Algorithm
from sharded_optim.formulas.verdict import SECTIONS, TAIL
from sharded_optim.tools.plan.matrices import MatrixWork, Span, heaviest, work_on
from sharded_optim.tools.plan.memory import Memory, stepped_itemsize
from sharded_optim.tools.plan.setup import Setup
from sharded_optim.tools.plan.workload import Workload
from sharded_optim.tools.shapes import Model, Shape

__all__ = ["Case", "Collective", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of a step that serve one purpose."""

    operation: str  # "all-gather", "reduce-scatter", "all-reduce" or "all-to-all"
    what: str  # the data
    ranks: int  # number of ranks that take part
    in_shard_group: bool  # whether these are a shard group, rather than ranks across replicas, or all ranks
    sent: int  # bytes that each rank sends in a step; in an all-to-all the mean over ranks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The requirements of one way of sharding, for each rank."""

    sharding: str
    ranks: int
    shards: int  # ranks over which a copy of the model is sharded
    memory: Memory
    collectives: tuple[Collective, ...]
    stepped: int  # bytes that the optimizer's step reads and writes
    matrix_flops: int  # FLOPs of a step with matrices (Muon), on the rank that computes most
    workload: Workload  # forward and backward

    @property
    def name(self) -> str:
        return self.sharding if self.shards in (1, self.ranks) else f"{self.sharding} over {self.shards}"

    @property
    def flops_per_token(self) -> int:
        """Known FLOPs of forward and backward for each token, recomputation included."""
        return self.workload.known_flops

    @property
    def sent(self) -> int:
        """Bytes that each rank sends in a step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a sharding and a setup, and quantities that several shardings use."""

    sharding: str
    model: Model
    setup: Setup
    workload: Workload

    @property
    def ranks(self) -> int:
        return self.setup.world_size

    @property
    def shards(self) -> int:
        return self.setup.shard_size or self.ranks

    @cached_property
    def numel(self) -> int:
        return self.model.numel

    def spans(self, shard_of: Callable[[Shape], int]) -> list[Span]:
        """Return the tensors as spans, each cut into shards of `shard_of(shape)` elements."""
        return [Span(name, shape, 0, shard_of(shape)) for name, shape in self.model.shapes.items()]

    def reduce_scatter(self, what: str, shard_bytes: int) -> Collective:
        return self._of_shards("reduce-scatter", what, shard_bytes)

    def all_gather(self, what: str, shard_bytes: int) -> Collective:
        return self._of_shards("all-gather", what, shard_bytes)

    def _of_shards(self, operation: str, what: str, shard_bytes: int) -> Collective:
        sent, in_shard_group = shard_bytes * (self.shards - 1), self.setup.shard_size is not None
        return Collective(operation=operation, what=what, ranks=self.shards, in_shard_group=in_shard_group, sent=sent)

    def all_to_all(self, what: str, sent: int) -> Collective:
        return Collective(operation="all-to-all", what=what, ranks=self.ranks, in_shard_group=False, sent=sent)

    def all_reduce(self, what: str, size: int, ranks: int) -> Collective:
        sent = -(-2 * (ranks - 1) * size // ranks)
        return Collective(operation="all-reduce", what=what, ranks=ranks, in_shard_group=False, sent=sent)

    def result(
        self,
        *,
        shards: int,
        parameters: int,  # bytes
        gradients: int,  # bytes
        spans: Sequence[Span],  # the tensors that the optimizers of all ranks step
        buckets: int,  # bytes
        collectives: Sequence[Collective],
        steps_parameters: bool = False,  # whether the optimizer steps parameters in fp32 themselves, so that there are no masters
        masters: int | None = None,  # elements of masters; None: those of `spans`
        grad_itemsize: int,  # bytes of an element of the gradients that the optimizer reads
    ) -> Plan:
        setup = self.setup

        def algorithm_of(span: Span) -> Algorithm:
            return setup.algorithm_of(span.name, span.shape)

        master = 0 if steps_parameters and setup.has_masters else setup.master_itemsize
        further = []
        if setup.agrees:
            further.append(self.all_reduce("statistics", 8 * (SECTIONS * len(self.model.shapes) + TAIL), self.ranks))
        work = MatrixWork()
        matrix = setup.algorithms.matrices.matrix
        if matrix is not None:
            of_matrices = [span for span in spans if algorithm_of(span) is setup.algorithms.matrices]
            work = work_on(of_matrices, matrix, shards=shards, replicas=self.ranks // shards)
            further += [
                self.all_to_all("directions of matrices", work.directions),
                self.all_to_all("matrices", work.results),
            ]
        memory = Memory(
            parameters=parameters,
            gradients=gradients,
            moments=heaviest(spans, lambda span: setup.moments_itemsize(algorithm_of(span))),
            masters=(heaviest(spans, lambda span: 1) if masters is None else masters) * master,
            buckets=buckets + work.buffers,
            activations=self.workload.activations,
        )
        return Plan(
            sharding=self.sharding,
            ranks=self.ranks,
            shards=shards,
            memory=memory,
            collectives=tuple(each for each in (*collectives, *further) if each.sent),
            stepped=heaviest(
                spans, lambda span: stepped_itemsize(setup, algorithm_of(span), grad_itemsize, steps_parameters=steps_parameters)
            ),
            matrix_flops=work.flops,
            workload=self.workload,
        )
