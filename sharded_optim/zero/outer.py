"""The base class of ShardedOptimizer: a torch optimizer of whole parameters around an optimizer of this rank's parts; state dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.ranks import raising_together
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import follow_names
from sharded_optim.step.state import asked_by_distributed_checkpoint, called_to_allocate
from sharded_optim.zero import local_state, logical
from sharded_optim.zero.bucket_layout import BucketLayout, Group, without_params
from sharded_optim.zero.params import ShardedParams
from sharded_optim.zero.topology import Topology

__all__ = ["OuterOptimizer", "groups_outside"]


class OuterOptimizer(torch.optim.Optimizer):
    """A torch optimizer of whole parameters around *the optimizer inside*, which steps this rank's parts of them.

    Owns the optimizer inside, which owns the state of this rank, and the whole state that `consolidate_state_dict` has collected, which the
    next step drops. Both optimizers have the same param groups. Before a step this optimizer's hyperparameters are copied to the optimizer
    inside; after the step they are copied back, as the step may have changed them.

    Args:
        params: the param groups of the optimizer inside, but with whole parameters: see `groups_outside`.
        engine: the optimizer inside.
        bucket_layout: the slot of each parameter, with the part that this rank steps.
        sharded_params: the parameters in buckets, which are refreshed before missing state is allocated.
        topology: the ranks.
    """

    def __init__(
        self, params: list[Group], engine: Engine, bucket_layout: BucketLayout, sharded_params: ShardedParams, topology: Topology
    ) -> None:
        self._engine, self._bucket_layout, self._topology = engine, bucket_layout, topology
        self._consolidated: dict[int, dict[str, Tensor]] | None = None  # whole state on the rank that keeps it, until state changes
        self._warned_of_saving: list[bool] = []
        super().__init__(params, engine.defaults)
        self._sharded_params = sharded_params

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group of whole parameters, whose parts the optimizer inside already has."""
        follow_names(param_group, self.param_groups)
        super().add_param_group(param_group)

    @property
    def inside(self) -> Engine:
        """The optimizer that steps this rank's parts."""
        return self._engine

    def _step_inside(self) -> None:
        """Step this rank's parts, with the current hyperparameters and GradScaler's values."""
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            inside |= without_params(outside)
        passed = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        for name, value in passed.items():
            setattr(self._engine, name, value)
        try:
            self._engine.step()
        finally:
            for name in passed:
                delattr(self._engine, name)
        self._follow_inside()

    def _follow_inside(self) -> None:
        """Copy hyperparameters from the optimizer inside, which may have changed them in a step or loaded them."""
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            outside |= without_params(inside)

    # ----------------------------------------------------------------------------------------------------------------------- state

    @property
    def state(self) -> local_state.LocalState:
        """The state of the parts that this rank steps, by parameter: 1-D tensors, and the step counter.

        torch.distributed.checkpoint gets whole tensors, for every parameter that is trainable or has state.
        """
        asked = asked_by_distributed_checkpoint()
        if asked is None:
            return local_state.LocalState(self._engine, self._bucket_layout.slots)
        if called_to_allocate():
            self._complete_state()
        return local_state.LogicalState(self._engine, self._bucket_layout.slots, self.param_groups, template=asked.template)

    @state.setter
    def state(self, _: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Ignore the state that torch's constructor sets."""

    def init_state(self) -> None:
        """Allocate the state of all trainable parts of this rank. The first step allocates only that of parts with a gradient."""
        for slot in self._bucket_layout.slots.values():
            if slot.local is not None:
                slot.local.requires_grad_(slot.param.requires_grad)
        self._engine.init_state()

    def _complete_state(self) -> None:
        """Allocate missing state of trainable parameters, so that a checkpoint has it for parameters without a gradient so far too."""
        self._sharded_params.refresh(self.param_groups)
        self.init_state()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the state, without communication. It loads on the same rank of the same number of ranks.

        After `consolidate_state_dict`, until the next step, rank `to` returns the whole state instead. torch.distributed.checkpoint gets
        whole tensors, of which each rank saves and loads its part, on any number of ranks. That needs no communication either, except with
        StateDictOptions(full_state_dict=True): a collective.
        """
        asked = asked_by_distributed_checkpoint()
        if asked is not None:
            self._complete_state()
            whole = super().state_dict()
            if not asked.flat:  # a flattened state dict must have the same keys when it is loaded
                for group in whole["param_groups"]:
                    group.pop("param_names", None)  # as an optimizer without names saves none
            if asked.full:
                whole["state"] = logical.gathered(
                    whole["state"],
                    self._topology.shard_group,
                    keep=not asked.cpu_offload or not dist.is_initialized() or dist.get_rank() == 0,
                    to_cpu=asked.cpu_offload,
                )
            return whole
        if self._consolidated is not None:
            return super().state_dict() | {"state": self._consolidated}
        self._sharded_params.wait()
        self._bucket_layout.rebind()
        shards = local_state.shards_of(self.param_groups, self._bucket_layout.slots)
        if self._topology.shard_group is not None:
            shards = local_state.ShardTable(shards, self._warned_of_saving)
        return super().state_dict() | {local_state.SHARDS: shards}

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all ranks, so that `state_dict` on one rank returns whole tensors. A collective: every rank must call it.

        As in torch's ZeroRedundancyOptimizer; Lightning calls it by itself. The next step, and loading, drop the collected state. The state
        dict of rank `to` loads on every rank of any number of ranks, and into an optimizer in one process.

        Args:
            to: the rank of the process group that gets the state, in CPU memory. On other ranks `state_dict` still returns their parts.

        Raises:
            ValueError: there is no such rank.
        """
        group = self._topology.all_ranks
        count = 1 if group is None else dist.get_world_size(group)
        if not 0 <= to < count:
            raise ValueError(f"to must be a rank of the optimizer's process group, 0 to {count - 1}, got {to}")
        self._complete_state()
        numbers = {param: number for number, param in enumerate(param for group in self.param_groups for param in group["params"])}
        known = local_state.LogicalState(self._engine, self._bucket_layout.slots, self.param_groups, template=False)
        is_wanted = group is None or dist.get_rank(group) == to
        state = {numbers[param]: values for param, values in known.items()}
        whole = logical.gathered(state, self._topology.shard_group, keep=is_wanted, to_cpu=True)
        self._consolidated = whole if is_wanted else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's state dict, or this rank's part of a whole state dict, as from an optimizer in one process.

        A whole state dict may also come from another library whose state the optimizer inside can load, or from
        torch.distributed.checkpoint. State is loaded on all ranks or on none.

        Raises:
            ValueError: the state dict does not fit on this rank or on another; nothing was changed.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._sharded_params.wait()
        before = self._engine.state_dict()
        # torch.distributed.checkpoint leaves out the state of frozen parameters, as it has loaded it in place.
        keeps_frozen = asked_by_distributed_checkpoint() is not None
        is_loaded = False
        try:
            with raising_together(self._topology.all_ranks):
                inside, values = local_state.convert_for_inside(
                    state_dict, self.param_groups, self._bucket_layout.slots, self._engine, keeps_frozen=keeps_frozen
                )
                self._engine.load_state_dict(inside)
                is_loaded = True
        except Exception:
            if is_loaded:
                self._engine.load_state_dict(before)
            raise
        values.write()
        self._consolidated = None
        self._follow_inside()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise ValueError("a ShardedOptimizer cannot be copied or pickled, as it holds process groups; save its state_dict()")

    # --------------------------------------------------------------------------------------------------------------------- reports

    @property
    def skipped_steps(self) -> int:
        """`skipped_steps` of the optimizer inside."""
        return self._engine.skipped_steps

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step, reduced over all ranks; see the optimizer inside."""
        return self._engine.metrics()

    def non_finite_ranks(self) -> dict[str, list[int]]:
        """Return, for each tensor that was not finite in the last step, its ranks; see the optimizer inside. A collective if any was."""
        return self._engine.non_finite_ranks()

    def performance(self) -> dict[str, float]:
        """Return time and memory of the last step on this rank, without transfers of buckets; see the optimizer inside."""
        return self._engine.performance()

    def report_per_parameter_metrics(self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Add the metrics of this rank's part of a parameter; see the optimizer inside."""
        slot = self._bucket_layout.slots.get(param)
        if slot is None or slot.local is None:
            return optimizer_metrics
        return self._engine.report_per_parameter_metrics(slot.local, name, optimizer_metrics)

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Call the method of the optimizer inside."""
        return self._engine.pre_reduce_metrics(optimizer_metrics)

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Call the method of the optimizer inside. A collective."""
        return self._engine.dist_reduce_metrics(optimizer_metrics)


def groups_outside(groups: Sequence[Group], inside: Sequence[Group]) -> list[Group]:
    """Combine the whole parameters of `groups` with the hyperparameters of the groups of the optimizer inside."""
    return [without_params(own) | {"params": group["params"]} for group, own in zip(groups, inside, strict=True)]
