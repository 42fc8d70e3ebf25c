"""ShardedOptimizer: ZeRO-1 and ZeRO-2 around any model.

    backward -> buckets of gradients -> reduce-scatter -> observe      (reduction.py; while backward goes on)
    step     -> agree -> update this rank's shards -> all-gather       (engine.py, gathering.py; the last while the next forward goes on)

Every rank keeps whole parameters, end to end in flat buckets (sharding/buckets.py, bucket_layout.py), and a shard of everything else. The
optimizer inside steps, for each parameter, the part in this rank's shard, as a tensor of its own: so a parameter may lack a gradient, has
its own step counter and belongs to any param group. Segments describe these parts as under every other wrapper.

ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakMethod, WeakSet, finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from sharded_optim.backends.position_hash import position_hashes
from sharded_optim.sharding.buckets import default_bucket_bytes
from sharded_optim.sharding.ddp import JOIN_REFUSED, JoinGuard
from sharded_optim.sharding.ranks import raise_together
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params, ShardedOptions
from sharded_optim.step.param_groups import follow_names
from sharded_optim.step.state import asked_by_distributed_checkpoint, called_to_allocate, steps_to_allocate
from sharded_optim.zero import local_state, logical
from sharded_optim.zero.arguments import check_defaults, check_options, groups_of, tensors_of, unwrapped
from sharded_optim.zero.bucket import Bucket, ParamSlot
from sharded_optim.zero.bucket_layout import BucketLayout, Group, check_params, unit_of, without_params
from sharded_optim.zero.ddp import are_under_ddp
from sharded_optim.zero.forward import ForwardHooks
from sharded_optim.zero.gathering import Gatherer
from sharded_optim.zero.placeholder import GRAD_SCALER
from sharded_optim.zero.reduction import Reducer
from sharded_optim.zero.topology import Topology
from sharded_optim.zero.transfers import ShardGroup, exchanges

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ShardedOptimizer"]

_numbers = count()  # of optimizers, as they are made: on all ranks in one order
_living: WeakSet[ShardedOptimizer] = WeakSet()


class ShardedOptimizer(torch.optim.Optimizer):
    """Spreads gradients, moments and float32 masters of a replicated model evenly over the ranks (ZeRO-1, ZeRO-2).

    Called like torch's ZeroRedundancyOptimizer, but it averages gradients itself, in backward, by one reduce-scatter per bucket, so the
    model need not be wrapped; under DistributedDataParallel, which has averaged them, it only takes its shards. A step ends in one
    all-gather per bucket. Given the same gradients, every number of ranks, both stages and every mesh give the bits of one process.

    After backward a gradient is in its bucket, and `param.grad` is a placeholder that raises an error where it is computed with: clip with
    this class's `clip_grad_norm_`. A `param.grad` that you assign yourself is taken as it is: as the average, equal on all ranks.

    Args:
        params: the model; or parameters, named parameters or param groups of it, the same on every rank. Ordinary tensors. They are given
            rank 0's values and move into flat buckets, contiguous; they stay the same objects.
        optimizer_class: of this library: so.StableAdamW and so on.
        process_group: the ranks that train the model together; None: all. Or a DeviceMesh: of shards, or 2-D of (replicas, shards), as
            for fully_shard: shards inside a node, replicas across.
        stage: 1 keeps the buckets of full gradients allocated; 2 has a few of them at a time.
        bucket_mb: how large a bucket may become, in MiB; a larger parameter has one of its own. None: 25, and more on more than 400 ranks.
        reduce_dtype: in which gradients are sent; None: the parameters'.
        overlap: whether `step` returns before all parameters have come from the other ranks, and the forward pass waits for them, module
            by module. It needs the model, as `params` or as `module`; without it `step` waits, and also where all ranks are on one machine
            and read each other's memory (gloo), as nothing goes on meanwhile. Whoever uses parameters in between, other than by the
            model's forward and its state dicts, calls `wait()` first.
        module: the model, where `params` is something else.
        defaults: hyperparameters and options of `optimizer_class`. bfloat16 and float16 parameters have float32 masters, but with
            kahan_sum=True or stochastic_rounding=True.

    Raises:
        TypeError: `optimizer_class` is not one of this library; an argument that neither takes.
        ValueError: on all ranks: an option out of range, a parameter that cannot be optimized, ranks that differ.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves gradients alone; where it finds none of them, `step` refuses it

    def __init__(
        self,
        params: nn.Module | Params,
        optimizer_class: type[Engine],
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        stage: Literal[1, 2] = 2,
        bucket_mb: float | None = None,
        reduce_dtype: torch.dtype | None = None,
        overlap: bool = True,
        module: nn.Module | None = None,
        **defaults: Unpack[ShardedOptions],
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Engine)):
            raise TypeError(
                f"optimizer_class must be a class of sharded_optim (so.AdamW, so.StableAdamW, ...), whose statistics stay right on shards, "
                f"got {optimizer_class!r}"
            )
        is_model = isinstance(params, nn.Module)
        if isinstance(params, nn.Module):
            module = params if module is None else module
            params = unwrapped(params).named_parameters()
        options: dict[str, Any] = {**defaults}
        topology = Topology.of(process_group)
        self.stage = stage
        self._topology = topology
        self._superseded = False
        self._consolidated: dict[int, dict[str, Tensor]] | None = None  # whole state, until it changes
        self._warned_of_saving: list[bool] = []
        # Whether gradients stay in the parameters, as others average them.
        self._slices = topology.all_ranks is None or isinstance(module, DistributedDataParallel)
        self._looked_for_ddp = self._slices
        self._join_guard = JoinGuard()
        self._late: set[Bucket] = set()  # that no module had waited for when the backward pass began
        self._number = next(_numbers)
        self._used: set[ParamSlot] = set()  # the parameters that have had a gradient, on any rank, since the last step
        self._stepped: set[ParamSlot] = set()  # and that the last step has stepped
        description, device = (), torch.device("cpu")
        try:
            check_options(stage, bucket_mb, reduce_dtype)
            check_defaults(type(self), optimizer_class, options)
            groups = groups_of(params)
            check_params(groups)
            tensors = [tensor for group in groups for tensor in tensors_of(group)]
            if not tensors:
                raise ValueError("params has no parameters, in any group; give the parameters of a model")
            device = tensors[0].device
            description = (stage, bucket_mb, reduce_dtype, device.type, exchanges(topology.shard_group, device))
        except Exception as failure:  # the other ranks must get the error before this one raises
            raise_together(failure, None, topology.all_ranks)
            raise
        raise_together(None, description, topology.all_ranks)
        try:
            shard_group = ShardGroup(topology.shard_group, device)
        except Exception as failure:  # on all ranks of this shard group; those of others must get the error too
            raise_together(failure, None, topology.all_ranks)
            raise
        self._gatherer = Gatherer(shard_group)
        self._reducer = Reducer(topology, shard_group, keeps_contents=stage == 1, reduce_dtype=reduce_dtype)
        self._reducer.listen(WeakMethod(self._arrived))
        try:
            bucket_bytes = default_bucket_bytes(shard_group.size) if bucket_mb is None else int(bucket_mb * 2**20)
            self._bucket_layout = BucketLayout(shard_group=shard_group, bucket_bytes=bucket_bytes, defaults=options)
            _finish_others(groups)
            self._bucket_layout.move_in(groups)
            inside = [self._bucket_layout.group_inside(group, index) for index, group in enumerate(groups)]
            self._engine = optimizer_class(inside, process_group=topology.given, layout=self._bucket_layout.layout, **options)
        except Exception as failure:
            raise_together(failure, None, topology.all_ranks)
            raise
        raise_together(None, self._description(), topology.all_ranks)
        outside = self._outside(groups, self._engine.param_groups)
        if is_model:  # whose names are in errors and metrics, but not in state dicts, so that these fit optimizers of model.parameters()
            outside[0]["params"] = tensors_of(groups[0])
        super().__init__(outside, self._engine.defaults)
        self._engine.listen(self._gatherer)
        self._overlaps = overlap and module is not None and shard_group.sends
        self._gradient_hooks: list[Callable[[], None]] = []  # what removes them, and what they leave
        self._hooks: list[Callable[[], None]] = [partial(_call_and_drop, self._gradient_hooks)]  # likewise, of all
        if self._overlaps and module is not None:
            self._hooks.append(ForwardHooks(unwrapped(module), self._gatherer, self._bucket_layout.slots).release)
        finalize(self, _let_go, self._hooks, self._bucket_layout).atexit = False  # then process groups may be gone, and nobody needs it
        self._take_up(self._bucket_layout.buckets)

    # ------------------------------------------------------------------------------------------------------------------ parameters

    def _outside(self, groups: Sequence[Group], inside: Sequence[Group]) -> list[Group]:
        """Return param groups of the model's parameters with the hyperparameters of the optimizer inside."""
        return [without_params(own) | {"params": group["params"]} for group, own in zip(groups, inside, strict=True)]

    def _description(self) -> list[tuple[object, ...]]:
        """Describe everything that must be equal on every rank."""
        return [(slot.name, tuple(slot.shape), slot.kind.dtype, slot.offset) for slot in self._bucket_layout.slots.values()]

    def _take_up(self, buckets: Sequence[Bucket]) -> None:
        """Start to manage these buckets: broadcast rank 0's values, and take gradients from now on."""
        for other in _owners([slot.param for bucket in buckets for slot in bucket.slots]):
            if other is not self:
                other._supersede()
        _living.add(self)
        self._reducer.buckets += buckets
        for bucket in buckets:
            if self._topology.all_ranks is not None:
                dist.broadcast(bucket.values, group_src=0, group=self._topology.all_ranks)
            if bucket.masters is not None:
                bucket.masters.copy_(bucket.shard)
            for slot in bucket.slots:
                slot.version = slot.param._version
                if not self._slices:
                    hook = slot.param.register_post_accumulate_grad_hook(partial(_ready, ref(self)))
                    slot.identity = slot.param._cdata
                    self._gradient_hooks += [hook.remove, slot.remove_placeholder]

    def _supersede(self) -> None:
        """Stop, as another optimizer has taken over parameters of this one."""
        self._superseded = True
        _living.discard(self)
        _call_and_drop(self._hooks)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group as torch does; on every rank. Its parameters get buckets of their own.

        Raises:
            ValueError: see the class; nothing was added.
        """
        if not hasattr(self, "_gradient_hooks"):  # torch's constructor
            follow_names(param_group, self.param_groups)
            super().add_param_group(param_group)
            return
        self._consolidated = None
        self.finish_reduction()
        self.wait()
        index, buckets = len(self.param_groups), []
        try:
            group, *_ = groups_of([param_group])
            known = [slot for param, slot in self._bucket_layout.slots.items() if any(each is param for each in tensors_of(group))]
            if known:
                raise ValueError(f"parameter {known[0].name!r} appears twice; give each parameter once")
            buckets = self._bucket_layout.move_in([group], first=index)
            self._engine.add_param_group(self._bucket_layout.group_inside(group, index))
        except Exception as failure:
            self._bucket_layout.move_out(buckets)
            raise_together(failure, None, self._topology.all_ranks)
            raise
        try:
            raise_together(None, self._description(), self._topology.all_ranks)
        except ValueError:
            self._bucket_layout.move_out(buckets)
            del self._engine.param_groups[index:]
            raise
        (outside,) = self._outside([group], self._engine.param_groups[index:])
        follow_names(outside, self.param_groups)
        super().add_param_group(outside)
        self._take_up_late(buckets)

    def _take_up_late(self, buckets: Sequence[Bucket]) -> None:
        """Take up parameters that may have gradients already, of backward passes that nobody has averaged, or assigned.

        Those that are equal on all ranks are their own average, to the last bit.
        """
        # Another one, so that all ranks ask anew what the others hold, also those that have nothing of these parameters.
        self._engine.layout = replace(self._bucket_layout.layout)
        self._take_up(buckets)
        if self._slices:
            return
        slots = [slot for bucket in buckets for slot in bucket.slots]
        rows: list[Any] = [None] * dist.get_world_size(self._topology.all_ranks)
        dist.all_gather_object(rows, [_hash(slot.own_grad) for slot in slots], group=self._topology.all_ranks)
        differing = [slot for slot, *hashes in zip(slots, *rows, strict=True) if len(set(hashes)) > 1]
        if differing:
            self._reducer.run_round(differing)

    def _take_up_unfrozen(self) -> None:
        """Create buckets for parameters that have become trainable."""
        groups = self._bucket_layout.unfrozen(self.param_groups)
        if not any(group["params"] for group in groups):
            return
        buckets: list[Bucket] = []
        try:
            buckets = self._bucket_layout.move_in(groups)
        except Exception as failure:
            raise_together(failure, None, self._topology.all_ranks)
            raise
        try:
            raise_together(None, self._description(), self._topology.all_ranks)
        except ValueError:
            self._bucket_layout.move_out(buckets)
            raise
        for index, (group, inside) in enumerate(zip(groups, self._engine.param_groups, strict=True)):
            for name, local in self._bucket_layout.stepped(group, index):
                inside["params"].append(local)
                inside["param_names"].append(name)
        self._take_up_late(buckets)

    # ------------------------------------------------------------------------------------------------------------------- gradients

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here leave their gradients, unreduced, in the parameters; the next one outside averages them with its own.

        For gradient accumulation with less communication. On all ranks or on none.
        """
        before, self._reducer.synchronizes = self._reducer.synchronizes, False
        try:
            yield
        finally:
            self._reducer.synchronizes = before

    def _ready(self, slot: ParamSlot) -> None:
        """Take a parameter's gradient, in backward."""
        if not self._looked_for_ddp:
            self._looked_for_ddp = True
            self._slices = are_under_ddp(self._bucket_layout.slots.values())
        if self._slices:
            _call_and_drop(self._gradient_hooks)
            return
        if self._reducer.synchronizes and not self._reducer.is_open:
            # Other ranks may wait for the answer that this one has their parameters, before they bring gradients.
            self._late = set(self._gatherer.wait_for_all(self._bucket_layout.buckets, settles=False))
        if slot.bucket in self._late:
            raise RuntimeError(
                f"{slot.name!r} was used before its new values had come from the other ranks, other than by the forward pass of the module "
                f"that holds it, or of one that contains that; call optimizer.wait() before, or build with overlap=False"
            )
        self._reducer.ready(slot)

    def _arrived(self, bucket: Bucket) -> None:
        """The averaged gradients of a bucket are there."""
        for slot in bucket.slots:
            if slot.local is not None and slot in self._stepped:
                slot.local.grad = slot.grad
        self._engine.observe_unit(unit_of(bucket))

    def join_hook(self, **_: Any) -> Any:
        """Raise ValueError: `torch.distributed.algorithms.join.Join` asks ZeroRedundancyOptimizer for it."""
        raise ValueError(JOIN_REFUSED)

    def finish_reduction(self) -> None:
        """Wait until the gradients of all backward passes so far are averaged."""
        self._reducer.finish()

    def _gradients(self) -> set[ParamSlot]:
        """Give the stepped parts their gradients.

        Returns:
            Those of all parameters that have a gradient, on whatever rank.
        """
        slots = self._bucket_layout.slots.values()
        if not self._slices:
            self._reducer.finish()
            has_any = self._reducer.rounds or self._used or any(slot.own_grad is not None for slot in slots)
            if self._reducer.has_unreduced or not has_any:  # without any, other ranks may have some
                self._reducer.run_round()
            self._used |= self._reducer.collect()
        for slot in slots:
            if slot.local is not None:
                slot.local.grad = slot.grad if slot in self._used else None
        assigned = [slot for slot in slots if slot.own_grad is not None]
        for slot in assigned:
            if slot in self._used:
                raise ValueError(
                    f"{slot.name!r} has a gradient of its own beside the one that was averaged in backward, assigned later or by another "
                    f"wrapper; assign gradients without a backward pass, or give the wrapped model to ShardedOptimizer"
                )
            if slot.local is not None and slot.own_grad is not None:
                slot.local.grad = slot.of_shard(slot.own_grad).to(slot.local.dtype)
        return self._used.union(assigned)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. `set_to_none` makes no difference: gradients in buckets are gone."""
        super().zero_grad(set_to_none=True)
        self._reducer.forget()
        self._use_up()
        self._engine.zero_grad(set_to_none=True)

    def _use_up(self) -> None:
        """Drop the gradients in the buckets, which `model.zero_grad()` does not reach."""
        self._used = set()
        for slot in self._bucket_layout.slots.values():
            slot.remove_placeholder()
        for bucket in self._bucket_layout.buckets:
            bucket.has_gradient = False

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that the norm of all of them together is at most `max_norm`. A collective.

        As torch.nn.utils.clip_grad_norm_, which finds no gradients. The norm is computed in float64.

        Returns:
            The norm before: float32 (), the same on every rank.

        Raises:
            RuntimeError: it is not finite and `error_if_nonfinite`; on every rank.
        """
        used = self._gradients()
        in_order = [slot for slot in self._bucket_layout.slots.values() if slot in used]  # so that the norm has the same bits in every run
        local = [slot.local.grad for slot in in_order if slot.local is not None and slot.local.grad is not None]
        device = next(iter(self._bucket_layout.slots.values())).kind.device
        norms = [torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64) for grad in local]
        is_max = norm_type == float("inf")
        if is_max:
            total = torch.stack(norms).max() if norms else torch.zeros((), dtype=torch.float64, device=device)
        else:
            total = torch.stack(norms).pow(norm_type).sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
        if self._topology.shard_group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=self._topology.shard_group)
        norm = total if is_max else total.pow(1.0 / norm_type)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"the norm of the gradients is {float(norm)}; it cannot be clipped")
        self.scale_gradients((max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return norm.float()

    @property
    def inside(self) -> Engine:
        """The optimizer that steps this rank's parts."""
        return self._engine

    def collect_gradients(self) -> None:
        """Give this rank's parts, which the optimizer inside steps, their gradients, averaged. A collective, as far as backward was not."""
        self._gradients()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients of this rank, which are those in buckets and those that were assigned."""
        for bucket in self._bucket_layout.buckets:
            if bucket.has_gradient:
                bucket.grads.mul_(factor)
        for slot in self._bucket_layout.slots.values():
            if slot.own_grad is not None:
                slot.own_grad.mul_(factor)

    # ------------------------------------------------------------------------------------------------------------------------ step

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step once: on every rank, or on none.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError, FloatingPointError: as the optimizer inside.
            RuntimeError: other ranks did not take part in what the gradients or parameters of a bucket need, within the process group's
                timeout.
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
        self.wait()
        self._take_up_unfrozen()
        self._bucket_layout.rebind()
        used = self._gradients()
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            inside |= without_params(outside)
        self._gatherer.begin(self._bucket_layout.buckets, {slot.bucket for slot in used})
        try:
            with self._grad_scaler():
                self._engine.step()
        finally:
            self._gatherer.end()
        self._stepped = used
        self._use_up()
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            outside |= without_params(inside)  # what it learns
        if not self._overlaps or self._optimizer_step_post_hooks:  # which may look at parameters
            self.wait()
        return loss

    def wait(self) -> None:
        """Wait until all parameters have their new values on all ranks, and may be written to. Call it on every rank."""
        self._gatherer.wait_for_all(self._bucket_layout.buckets, settles=True)

    def _refuse(self) -> None:
        """Raise ValueError where a step would be silently wrong, or wait for ranks that do not take part."""
        if self._slices and self._topology.all_ranks is not None:
            self._join_guard.check(self._bucket_layout.slots, len(self._bucket_layout.slots))
        if self._superseded:
            raise ValueError(
                "another ShardedOptimizer has taken over parameters of this one; step the newer one, or build one for all of them"
            )
        if hasattr(self, "found_inf") and not self._slices:
            raise ValueError(GRAD_SCALER)

    @contextmanager
    def _grad_scaler(self) -> Iterator[None]:
        """Pass GradScaler's values on to the optimizer inside."""
        told = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        for name, value in told.items():
            setattr(self._engine, name, value)
        try:
            yield
        finally:
            for name in told:
                delattr(self._engine, name)

    # ----------------------------------------------------------------------------------------------------------------------- state

    @property
    def state(self) -> local_state.LocalState:
        """The state of the parts that this rank steps, by parameter: 1-D tensors, and the step counter.

        For torch.distributed.checkpoint of every parameter that is trainable or has state, as whole tensors.
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
        """Allocate the state of all trainable parts of this rank, as the first step does for those with a gradient."""
        for slot in self._bucket_layout.slots.values():
            if slot.local is not None:
                slot.local.requires_grad_(slot.param.requires_grad)
        self._engine.init_state()

    def _complete_state(self) -> None:
        """Allocate the state of all trainable parameters, so that a checkpoint has the same tensors whatever had a gradient so far."""
        self.wait()
        self._take_up_unfrozen()
        self._bucket_layout.rebind()  # masters of parameters that were written to are renewed
        self.init_state()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: local and cheap. Loads on the same rank of as many ranks. Or all of it, after `consolidate_state_dict`.

        torch.distributed.checkpoint is given whole tensors, of which each rank saves and loads its part, on any number of ranks. That too
        is local, but with StateDictOptions(full_state_dict=True) a collective.
        """
        asked = asked_by_distributed_checkpoint()
        if asked is not None:
            self._complete_state()
            whole = super().state_dict()
            if not asked.flat:  # else torch asks for it again when it loads
                for group in whole["param_groups"]:
                    group.pop("param_names", None)  # which an optimizer that was not given names does not save
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
        self.wait()
        self._bucket_layout.rebind()
        shards = local_state.shards_of(self.param_groups, self._bucket_layout.slots)
        if self._topology.shard_group is not None:
            shards = local_state.ShardTable(shards, self._warned_of_saving)
        return super().state_dict() | {local_state.SHARDS: shards}

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all ranks, so that `state_dict` of one of them has whole tensors. A collective: every rank must call it.

        As of torch's ZeroRedundancyOptimizer; Lightning calls it by itself. The next step, and loading, drop what was collected. What rank
        `to` then saves loads on every rank of any number of ranks, and into an optimizer in one process.

        Args:
            to: the rank, of the process group, that is given the state, in the memory of its CPU. The others still have their parts.

        Raises:
            ValueError: there is no such rank.
        """
        group = self._topology.all_ranks
        count = 1 if group is None else dist.get_world_size(group)
        if not 0 <= to < count:
            raise ValueError(f"to must be a rank of the optimizer's process group, 0 to {count - 1}, got {to}")
        self._complete_state()
        numbers = {param: number for number, param in enumerate(param for each in self.param_groups for param in each["params"])}
        known = local_state.LogicalState(self._engine, self._bucket_layout.slots, self.param_groups, template=False)
        is_wanted = group is None or dist.get_rank(group) == to
        state = {numbers[param]: values for param, values in known.items()}
        whole = logical.gathered(state, self._topology.shard_group, keep=is_wanted, to_cpu=True)
        self._consolidated = whole if is_wanted else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this rank has returned, or the state dict of an optimizer in one process, of which it takes its part.

        The latter may be of one of the libraries that the optimizer inside knows, or be what torch.distributed.checkpoint has loaded. All
        or nothing, on all ranks together.

        Raises:
            ValueError: it does not fit, on this rank or on another; nothing was changed.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.wait()
        before = self._engine.state_dict()
        failure: Exception | None = None
        values = local_state.Values()
        try:
            keeps_frozen = asked_by_distributed_checkpoint() is not None  # which leaves their state out, and has loaded it in place
            inside, values = local_state.inside(
                state_dict, self.param_groups, self._bucket_layout.slots, self._engine, keeps_frozen=keeps_frozen
            )
            self._engine.load_state_dict(inside)
        except Exception as error:
            failure = error
        try:
            raise_together(failure, None, self._topology.all_ranks)
        except Exception:
            if failure is None:
                self._engine.load_state_dict(before)
            raise
        values.write()
        self._consolidated = None
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            outside |= without_params(inside)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise ValueError("a ShardedOptimizer cannot be copied or pickled, as it holds process groups; save its state_dict()")

    # --------------------------------------------------------------------------------------------------------------------- reports

    @property
    def skipped_steps(self) -> int:
        """As of the optimizer inside."""
        return self._engine.skipped_steps

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step, reduced over all ranks; see the optimizer inside."""
        return self._engine.metrics()

    def report_per_parameter_metrics(self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As of the optimizer inside, of the part of a parameter that this rank steps."""
        slot = self._bucket_layout.slots.get(param)
        if slot is None or slot.local is None:
            return optimizer_metrics
        return self._engine.report_per_parameter_metrics(slot.local, name, optimizer_metrics)

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As of the optimizer inside."""
        return self._engine.pre_reduce_metrics(optimizer_metrics)

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As of the optimizer inside: a collective."""
        return self._engine.dist_reduce_metrics(optimizer_metrics)

    def __repr__(self) -> str:
        spread = f"stage {self.stage}, {self._bucket_layout.shards} shards, {self._topology.replicas} replicas"
        return super().__repr__().removesuffix(")") + f"inside: {type(self._engine).__name__}, {spread}\n)"


# Hooks and parts hold the optimizer weakly: Python cannot collect a cycle through autograd, and any other only now and then.


def _ready(optimizer: ref[ShardedOptimizer], param: Tensor) -> None:
    """A post-accumulate-grad hook."""
    found = optimizer()
    if found is not None:
        found._ready(found._bucket_layout.slots[param])


def _hash(grad: Tensor | None) -> int | None:
    """Hash the bits of a gradient; 0 of a sparse one, which the reduction refuses."""
    if grad is None:
        return None
    return int(position_hashes([grad])) if grad.layout == torch.strided else 0


def _owners(params: Iterable[Tensor]) -> list[ShardedOptimizer]:
    """Return the optimizers that have any of these parameters in their buckets, in the order of their creation."""
    params = list(params)
    found = [each for each in _living if any(param in each._bucket_layout.slots for param in params)]
    return sorted(found, key=lambda owner: owner._number)


def _finish_others(groups: Sequence[Group]) -> None:
    """Wait for transfers of these parameters that other optimizers have begun, also those that are gone."""
    for owner in _owners(param for group in groups for param in tensors_of(group)):
        owner.wait()
    for hooks in list(ForwardHooks.released):
        hooks.finish()


def _call_and_drop(functions: list[Callable[[], None]]) -> None:
    while functions:
        functions.pop()()


def _let_go(hooks: list[Callable[[], None]], bucket_layout: BucketLayout) -> None:
    """Clean up after an optimizer: remove its hooks, and free its buckets, except those with running transfers."""
    _call_and_drop(hooks)
    for bucket in bucket_layout.buckets:
        if bucket.gathering.has_ended():
            bucket.slots.clear()
