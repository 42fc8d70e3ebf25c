"""What a way of sharding takes of a rank: `Plan`, and `Case`, which makes it from what `shardings.py` says of each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from sharded_optim.formulas import Algorithm
from sharded_optim.formulas.verdict import SECTIONS, TAIL
from sharded_optim.tools.plan.communication import Collective, Communication
from sharded_optim.tools.plan.matrices import MatrixWork, Span, heaviest, work_on
from sharded_optim.tools.plan.memory import Memory, stepped_itemsize
from sharded_optim.tools.plan.setup import Setup
from sharded_optim.tools.plan.workload import Workload
from sharded_optim.tools.shapes import Model, Shape

__all__ = ["Case", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The requirements of one way of sharding, for each rank."""

    sharding: str
    ranks: int
    shards: int  # ranks over which a copy of the model is sharded
    memory: Memory
    collectives: tuple[Collective, ...]
    stepped: int  # bytes that the optimizer's step reads and writes
    matrix_flops: int  # of the rank that computes with most matrices in a step (Muon)
    workload: Workload  # forward and backward

    @property
    def name(self) -> str:
        return self.sharding if self.shards in (1, self.ranks) else f"{self.sharding} over {self.shards}"

    @property
    def flops_per_token(self) -> int:
        """All that is known of forward and backward, with what is recomputed."""
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
        """The tensors, each cut into shards of so many elements."""
        return [Span(name, shape, 0, shard_of(shape)) for name, shape in self.model.shapes.items()]

    @property
    def communication(self) -> Communication:
        return Communication(world_size=self.ranks, shards=self.shards, in_shard_group=self.setup.shard_size is not None)

    def result(
        self,
        *,
        shards: int,
        parameters: int,  # bytes, as the gradients and the buckets
        gradients: int,
        spans: Sequence[Span],  # of what this rank's optimizer steps
        buckets: int,
        collectives: Sequence[Collective],
        steps_parameters: bool = False,  # that are fp32 themselves, so that there are no masters
        masters: int | None = None,  # elements of masters, where they are not those that are stepped
        grad_itemsize: int,  # of the gradients that the optimizer reads
    ) -> Plan:
        setup, communication = self.setup, self.communication

        def algorithm_of(span: Span) -> Algorithm:
            return setup.algorithm_of(span.name, span.shape)

        master = 0 if steps_parameters and setup.has_masters else setup.master_itemsize
        further = []
        if setup.agrees:
            further.append(communication.all_reduce("statistics", 8 * (SECTIONS * len(self.model.shapes) + TAIL), self.ranks))
        work = MatrixWork()
        matrix = setup.algorithms.matrices.matrix
        if matrix is not None:
            of_matrices = [span for span in spans if algorithm_of(span) is setup.algorithms.matrices]
            work = work_on(of_matrices, matrix, shards=shards, replicas=self.ranks // shards)
            further += [
                communication.all_to_all("directions of matrices", work.directions),
                communication.all_to_all("matrices", work.results),
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
