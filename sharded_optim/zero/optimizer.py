"""ShardedOptimizer: ZeRO-1 and ZeRO-2 around any model.

    backward -> buckets of gradients -> reduce-scatter -> observe      (reduction.py; while backward goes on)
    step     -> agree -> update this rank's shards -> all-gather       (engine.py, gathering.py; all-gather overlaps the next forward)

Every rank keeps whole parameters, end to end in flat buckets (sharding/buckets.py, bucket_layout.py), and a shard of everything else. The
optimizer inside steps, for each parameter, the part in this rank's shard, as a tensor of its own: so a parameter may lack a gradient, has
its own step counter and belongs to any param group. Segments describe these parts, as under every other wrapper.

The class in this file adds gradients and the step to `OuterOptimizer` (outer.py), which has the state and the state dicts. params.py adds
parameters to buckets, gradients.py sets the gradients of the parts that are stepped.

ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from sharded_optim.sharding.buckets import default_bucket_bytes
from sharded_optim.sharding.ddp import JOIN_REFUSED, JoinGuard
from sharded_optim.sharding.ranks import raising_together
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params, ShardedOptions
from sharded_optim.step.state import steps_to_allocate
from sharded_optim.zero.arguments import check_class, check_defaults, check_options, groups_of, tensors_of, unwrapped
from sharded_optim.zero.bucket_layout import BucketLayout, Group, check_params
from sharded_optim.zero.gathering import Gatherer
from sharded_optim.zero.gradients import ShardedGradients
from sharded_optim.zero.outer import OuterOptimizer, groups_outside
from sharded_optim.zero.params import ShardedParams, wait_for_others
from sharded_optim.zero.placeholder import GRAD_SCALER
from sharded_optim.zero.reduction import Reducer
from sharded_optim.zero.topology import Topology
from sharded_optim.zero.transfers import ShardGroup, exchanges

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ShardedOptimizer"]


class ShardedOptimizer(OuterOptimizer):
    """Shards gradients, moments and float32 masters of a replicated model evenly over the ranks (ZeRO-1, ZeRO-2).

    Called like torch's ZeroRedundancyOptimizer, but it averages gradients itself, in backward, by one reduce-scatter per bucket, so the
    model need not be wrapped. Under DistributedDataParallel, which averages gradients, each rank only takes its shards of them. A step ends
    in one all-gather per bucket. Given the same gradients, every number of ranks, both stages and every mesh give the bits of one process.

    After backward a gradient is in its bucket, and `param.grad` is a placeholder, which raises an error in any computation: clip with this
    class's `clip_grad_norm_`. A `param.grad` that you assign yourself counts as the average and must be equal on all ranks.

    Args:
        params: the model; or its parameters, named parameters or param groups, the same on every rank. Parameters must be ordinary tensors.
            They get rank 0's values and are moved into flat, contiguous buckets; they stay the same objects.
        optimizer_class: an optimizer class of this library: so.StableAdamW and so on.
        process_group: the ranks that train the model together; None: all. Or a DeviceMesh: of shards, or 2-D of (replicas, shards), as
            for fully_shard: shards inside a node, replicas across.
        stage: 1 keeps the buckets of full gradients allocated; 2 allocates a few of them at a time.
        bucket_mb: the largest size of a bucket, in MiB; a larger parameter has one of its own. None: 25, and more on more than 400 ranks.
        reduce_dtype: the dtype in which gradients are sent; None: the parameters'.
        transport: how gloo ranks exchange shards: "auto" by shared memory between ranks of one machine that can read each other's memory,
            else by sends; "sends" by sends alone. Other backends use their collectives.
        overlap: whether `step` returns before all parameters have arrived from the other ranks, and the forward pass waits for them, module
            by module. It needs the model, as `params` or as `module`; without it `step` waits. It also waits if all ranks are on one
            machine and read each other's memory (gloo), as no transfer then runs by itself. Code that uses parameters in between, other
            than by the model's forward and its state dicts, must call `wait()` before.
        module: the model, if `params` is something else.
        defaults: hyperparameters and options of `optimizer_class`. bfloat16 and float16 parameters have float32 masters, unless
            kahan_sum=True or stochastic_rounding=True.

    Raises:
        TypeError: `optimizer_class` is not one of this library; an argument that neither class takes.
        ValueError: on all ranks: an option out of range, a parameter that cannot be optimized, ranks that differ.
    """

    _step_supports_amp_scaling = True  # so GradScaler leaves gradients alone; `step` raises if they are in buckets

    def __init__(
        self,
        params: nn.Module | Params,
        optimizer_class: type[Engine],
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        stage: Literal[1, 2] = 2,
        bucket_mb: float | None = None,
        reduce_dtype: torch.dtype | None = None,
        transport: Literal["auto", "sends"] = "auto",
        overlap: bool = True,
        module: nn.Module | None = None,
        **defaults: Unpack[ShardedOptions],
    ) -> None:
        check_class(optimizer_class)
        is_model = isinstance(params, nn.Module)
        if isinstance(params, nn.Module):
            module = params if module is None else module
            params = unwrapped(params).named_parameters()
        options: dict[str, Any] = {**defaults}
        topology = Topology.of(process_group)
        all_ranks = topology.all_ranks
        described = (stage, bucket_mb, reduce_dtype, transport)
        with raising_together(all_ranks, lambda: (*described, device.type, exchanges(topology.shard_group, device))):
            check_options(*described)
            check_defaults(type(self), optimizer_class, options)
            groups = groups_of(params)
            check_params(groups)
            tensors = [tensor for group in groups for tensor in tensors_of(group)]
            if not tensors:
                raise ValueError("params has no parameters, in any group; give the parameters of a model")
            device = tensors[0].device
        with raising_together(all_ranks, lambda: bucket_layout.description()):
            shard_group = ShardGroup(topology.shard_group, device, shares_memory=transport == "auto")
            bucket_bytes = default_bucket_bytes(shard_group.size) if bucket_mb is None else int(bucket_mb * 2**20)
            bucket_layout = BucketLayout(shard_group=shard_group, bucket_bytes=bucket_bytes, defaults=options)
            wait_for_others(tensors)
            bucket_layout.move_in(groups)
            inside = [bucket_layout.group_inside(group, index) for index, group in enumerate(groups)]
            engine = optimizer_class(inside, process_group=topology.given, layout=bucket_layout.layout, **options)
        outside = groups_outside(groups, engine.param_groups)
        if is_model:  # names in errors and metrics, but not in state dicts, so that these fit optimizers of model.parameters()
            outside[0]["params"] = tensors_of(groups[0])
        self.stage = stage
        self._overlaps = overlap and module is not None and shard_group.sends
        self._join_guard = JoinGuard()
        # None of these objects refers to the optimizer, so that it is freed with its last reference.
        self._gatherer = Gatherer(shard_group)
        self._reducer = Reducer(topology, shard_group, keeps_contents=stage == 1, reduce_dtype=reduce_dtype)
        stay_in_params = all_ranks is None or isinstance(module, DistributedDataParallel)
        self._sharded_gradients = ShardedGradients(
            topology, bucket_layout, engine, self._gatherer, self._reducer, stay_in_params=stay_in_params
        )
        model = unwrapped(module) if self._overlaps and module is not None else None
        sharded_params = ShardedParams(all_ranks, bucket_layout, engine, self._gatherer, self._sharded_gradients, model)
        super().__init__(outside, engine, bucket_layout, sharded_params, topology)
        engine.listen(self._gatherer)
        sharded_params.take_up(bucket_layout.buckets)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, as in torch, on every rank. Its parameters get buckets of their own.

        Raises:
            ValueError: as the constructor, on all ranks; nothing was added.
        """
        if hasattr(self, "_sharded_params"):  # else torch's constructor is calling, with groups that are in buckets already
            self._consolidated = None
            self.finish_reduction()
            self.wait()
            group = self._sharded_params.add_group(param_group, self.param_groups)
            (param_group,) = groups_outside([group], self._engine.param_groups[len(self.param_groups) :])
        super().add_param_group(param_group)

    # ------------------------------------------------------------------------------------------------------------------- gradients

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which backward passes leave unreduced gradients in the parameters; the next pass outside of it averages them too.

        For gradient accumulation with less communication. Use it on all ranks or on none.
        """
        before, self._reducer.synchronizes = self._reducer.synchronizes, False
        try:
            yield
        finally:
            self._reducer.synchronizes = before

    def finish_reduction(self) -> None:
        """Wait until the gradients of all backward passes so far are averaged."""
        self._reducer.finish()

    def collect_gradients(self) -> None:
        """Set the averaged gradients of the parts that the optimizer inside steps; reduces those that backward has not. A collective."""
        self._sharded_gradients.collect()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients of this rank, in buckets and in parameters, by `factor`."""
        self._sharded_gradients.scale(factor)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that the norm of all of them together is at most `max_norm`. A collective.

        Use it instead of torch.nn.utils.clip_grad_norm_, which cannot see gradients in buckets. The norm is computed in float64.

        Returns:
            The norm before scaling: float32 (), the same on every rank.

        Raises:
            RuntimeError: on every rank, if the norm is not finite and `error_if_nonfinite`.
        """
        norm = self._sharded_gradients.norm(self._sharded_gradients.collect(), norm_type)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"the norm of the gradients is {float(norm)}; it cannot be clipped")
        self.scale_gradients((max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        self._engine.grad_norm = norm.float()
        return self._engine.grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, in parameters and in buckets, whatever `set_to_none` says."""
        super().zero_grad(set_to_none=True)
        self._sharded_gradients.drop()
        self._engine.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------------------------------------ step

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. A collective: call it on every rank, or on none.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The result of the closure, or None.

        Raises:
            ValueError, FloatingPointError: as the optimizer inside.
            RuntimeError: a rank did not take part in a transfer of gradients or parameters within the process group's timeout.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not len(self.state) and steps_to_allocate(self.param_groups):
            self.init_state()
            return loss
        self._refuse()
        self._consolidated = None
        self._sharded_params.refresh(self.param_groups)
        used = self._sharded_gradients.collect()
        self._gatherer.begin(self._bucket_layout.buckets, {slot.bucket for slot in used})
        try:
            self._step_inside()
        finally:
            self._gatherer.end()
        self._sharded_gradients.end_step(used)
        if not self._overlaps or self._optimizer_step_post_hooks:  # hooks may read parameters
            self.wait()
        return loss

    def wait(self) -> None:
        """Wait until all ranks have the new values of all parameters, which may then be written to. Call it on every rank."""
        self._sharded_params.wait()

    def _refuse(self) -> None:
        """Raise ValueError if a step would be silently wrong, or would wait for ranks that do not take part."""
        if self._sharded_gradients.stay_in_params and self._topology.all_ranks is not None:
            self._join_guard.check(self._bucket_layout.slots, len(self._bucket_layout.slots))
        if self._sharded_params.is_superseded:
            raise ValueError(
                "another ShardedOptimizer has taken over parameters of this one; step the newer one, or build one for all of them"
            )
        if hasattr(self, "found_inf") and not self._sharded_gradients.stay_in_params:
            raise ValueError(GRAD_SCALER)

    def join_hook(self, **_: Any) -> Any:
        """Raise ValueError: `torch.distributed.algorithms.join.Join`, which calls this method of its optimizers, is not supported."""
        raise ValueError(JOIN_REFUSED)

    def __repr__(self) -> str:
        spread = f"stage {self.stage}, {self._bucket_layout.shards} shards, {self._topology.replicas} replicas"
        return super().__repr__().removesuffix(")") + f"inside: {type(self._engine).__name__}, {spread}\n)"
