"""Shard a model over ranks, and read its whole gradients and parameters.

A way to shard is a function (model, make_optimizer) -> (model to call, optimizer), as training scripts do it: an entry of `SHARDINGS`, or
the user's own. The types that it returns decide which subclass of `Sharded` reads the model.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_optim import checkpoint
from sharded_optim import deepspeed as own_deepspeed
from sharded_optim.step.engine import Engine
from sharded_optim.tools.verify.making import MakeOptimizer, named
from sharded_optim.zero import ShardedOptimizer

__all__ = ["SHARDINGS", "GradientCapture", "Shard", "Sharded", "installed", "read"]

Shard = Callable[[nn.Module, MakeOptimizer], "tuple[Any, Any]"]
Whole = dict[str, Tensor]
FLATTENED = "flattened with others, and cut anywhere"


class GradientCapture:
    """Copies the gradients that backward computes on this rank, before a wrapper reduces them.

    Every rank has the same batch, so the copies also equal the average over ranks, bit for bit, if the world size is a power of two.
    """

    def __init__(self, model: nn.Module) -> None:
        self.grads: Whole = {}
        for name, param in named(model).items():
            param.register_hook(partial(self._take, name))

    def _take(self, name: str, grad: Tensor) -> None:
        self.grads[name] = grad.detach() + self.grads[name] if name in self.grads else grad.detach().clone()


class Sharded:
    """A sharded model with its optimizer. This base class reads ordinary tensors and DTensors, whose gradients are in `param.grad`.

    Args:
        model: the sharded model, as it is called.
        optimizer: the optimizer whose `step` is called.
        capture: the capture of gradients, made before the model was sharded.
    """

    zeroes_missing_gradients = False  # whether a parameter without a gradient is stepped with a gradient of zeros

    def __init__(self, model: Any, optimizer: Any, capture: GradientCapture) -> None:
        self.model, self.optimizer, self.capture = model, optimizer, capture
        if isinstance(optimizer, torch.optim.Optimizer) and "closure" not in inspect.signature(optimizer.step).parameters:
            step = optimizer.step  # torch.distributed.checkpoint passes a closure
            optimizer.step = lambda closure=None: step()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def base(self) -> Any:
        """The optimizer that the user's class made."""
        return self.optimizer

    def named(self) -> dict[str, Tensor]:
        """Return the trainable parameters by the names that they had before wrapping."""
        from torch.nn.parallel import DistributedDataParallel

        return dict(named(self.model.module if isinstance(self.model, DistributedDataParallel) else self.model))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> Whole:
        """Copy the whole gradients of the parameters that have one. A collective."""
        return {name: _whole(param.grad) for name, param in self.named().items() if param.grad is not None}

    def params(self) -> Whole:
        """Copy the whole parameters. A collective."""
        return {name: _whole(param) for name, param in self.named().items()}

    def storage(self) -> dict[str, str]:
        """Describe how parameters are cut, by name, without those that are whole on every rank."""
        cut = {}
        for name, param in self.named().items():
            shards = [f"dim {each.dim}" for each in getattr(param, "placements", ()) if each.is_shard()]
            if shards:
                cut[name] = f"sharded along {', '.join(shards)}"
        return cut

    def unknown_to_model(self) -> int:
        """Count the optimizer's parameters that are not the model's."""
        own = {id(param) for param in self.model.parameters()}
        return sum(id(param) not in own for group in self.base.param_groups for param in group["params"])

    def save(self, folder: str) -> None:
        """Save model and optimizer. A collective."""
        if not self._saves_shards:
            if dist.get_rank() == 0:
                torch.save([self.model.state_dict(), self.optimizer.state_dict()], folder)
            dist.barrier()
            return
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        model, optimizer = get_state_dict(self.model, self.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        """Load the state that `save` has saved. A collective."""
        if not self._saves_shards:
            for each, state in zip((self.model, self.optimizer), torch.load(folder, weights_only=False), strict=True):
                each.load_state_dict(state)
            return
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        model, optimizer = get_state_dict(self.model, self.optimizer)
        loaded = {"model": model, "optimizer": optimizer}
        # For a parameter without a gradient the checkpoint has no state, but torch makes some here.
        load(loaded, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
        set_state_dict(self.model, self.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])

    @property
    def _saves_shards(self) -> bool:
        """Whether a rank has only a part of the state, so that torch.distributed.checkpoint must save it."""
        return any(hasattr(param, "placements") for param in self.model.parameters())

    def close(self) -> None:
        """Release resources that outlive the objects."""


class ShardedByFsdp1(Sharded):
    """A model in FullyShardedDataParallel. It is saved whole, or by `so.checkpoint` where torch cannot gather its state: without a device
    mesh, torch's sharded checkpoints lose their param groups.
    """

    def gradients(self) -> Whole:
        with self._whole(with_grads=True):
            return super().gradients()

    def params(self) -> Whole:
        with self._whole():
            return super().params()

    def storage(self) -> dict[str, str]:
        return dict.fromkeys(self.named(), FLATTENED)

    def save(self, folder: str) -> None:
        if self._has_different_state:
            checkpoint.save(folder, 0, model=self.model, optimizer=self.optimizer)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        state = get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            torch.save(state, folder)
        dist.barrier()

    def load(self, folder: str) -> None:
        if self._has_different_state:
            checkpoint.load(folder, model=self.model, optimizer=self.optimizer)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        model, optimizer = torch.load(folder, weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)

    @property
    def _has_different_state(self) -> bool:
        """Whether parameters of one unit may have different state, as under Muon, which torch cannot gather."""
        return isinstance(self.base, Engine) and len({group.get("algorithm") for group in self.base.param_groups}) > 1

    @contextmanager
    def _whole(self, **options: bool) -> Iterator[None]:
        with type(self.model).summon_full_params(self.model, writeback=False, **options):
            yield


class ShardedByZero(Sharded):
    """A model with a ShardedOptimizer."""

    def gradients(self) -> Whole:
        return dict(self.capture.grads)

    def params(self) -> Whole:
        self.optimizer.wait()
        return super().params()

    def storage(self) -> dict[str, str]:
        return dict.fromkeys(self.named(), FLATTENED)

    @property
    def _saves_shards(self) -> bool:
        return True


class ShardedByDeepSpeed(Sharded):
    """A model in a DeepSpeedEngine, which is `model`."""

    zeroes_missing_gradients = True

    @property
    def base(self) -> Any:
        return self.model.basic_optimizer

    def named(self) -> dict[str, Tensor]:
        return dict(named(self.model.module))

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def gradients(self) -> Whole:
        return dict(self.capture.grads)

    def params(self) -> Whole:
        import deepspeed

        named = self.named()
        if self.model.zero_optimization_stage() < 3:
            return super().params()
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: param.detach().clone() for name, param in named.items()}

    def storage(self) -> dict[str, str]:
        if self.model.zero_optimization_stage() == 0:
            return {}
        return dict.fromkeys(self.named(), FLATTENED)

    def unknown_to_model(self) -> int:
        return 0  # DeepSpeed's partitions stand for the model's parameters

    def save(self, folder: str) -> None:
        self.model.save_checkpoint(folder)

    def load(self, folder: str) -> None:
        self.model.load_checkpoint(folder)

    def close(self) -> None:
        self.model.destroy()


def read(model: Any, optimizer: Any, capture: GradientCapture) -> Sharded:
    """Return the subclass of `Sharded` that fits the types that a way to shard has returned, constructed with them."""
    if isinstance(optimizer, ShardedOptimizer):
        return ShardedByZero(model, optimizer, capture)
    if "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine):
        return ShardedByDeepSpeed(model, optimizer, capture)
    fsdp1 = sys.modules.get("torch.distributed.fsdp")
    if fsdp1 is not None and isinstance(model, fsdp1.FullyShardedDataParallel):
        return ShardedByFsdp1(model, optimizer, capture)
    return Sharded(model, optimizer, capture)


def _whole(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


# ------------------------------------------------------------------------------------------------------------------- ways to shard


def _ddp(model: nn.Module, make: MakeOptimizer) -> tuple[nn.Module, Optimizer]:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, find_unused_parameters=True), make(model)


def _fsdp2(model: nn.Module, make: MakeOptimizer) -> tuple[nn.Module, Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, make(model)


def _fsdp1(model: nn.Module, make: MakeOptimizer) -> tuple[nn.Module, Optimizer]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    blocks = {id(block) for block in _blocks(model)}
    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda module: id(module) in blocks)
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    return wrapped, make(wrapped)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the largest nn.ModuleList whose modules are distinct, have parameters and define `forward`; [] without one."""
    lists = [
        [*each]
        for each in model.modules()
        if isinstance(each, nn.ModuleList)
        and len({*each}) == len(each)
        and all(type(block).forward is not nn.Module.forward and next(block.parameters(), None) is not None for block in each)
    ]
    return max(lists, key=lambda blocks: sum(param.numel() for block in blocks for param in block.parameters()), default=[])


def _zero(model: nn.Module, make: MakeOptimizer, *, stage: Any) -> tuple[nn.Module, Optimizer]:
    if make.constructor is not None and issubclass(make.constructor, Engine):
        return model, ShardedOptimizer(model, make.constructor, stage=stage, **make.keywords)
    made = None if make.constructor is not None else make(model)
    if not isinstance(made, Engine):
        raise ValueError(
            f"zero{stage} is so.ShardedOptimizer, which takes an optimizer of sharded_optim, got {make.name}; give one, or use "
            f"deepspeed{stage}"
        )
    # Other options do not change the bits.
    options = {name: getattr(made, name) for name in ("state_dtype", "nonfinite", "max_skipped_steps")}
    return model, ShardedOptimizer(made.param_groups, type(made), stage=stage, module=model, **options)


def _deepspeed(model: nn.Module, make: MakeOptimizer, *, stage: int) -> tuple[Any, Any]:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    optimizer = make(model)
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    initialize = own_deepspeed.initialize if isinstance(optimizer, Engine) else deepspeed.initialize
    engine, wrapped, *_ = initialize(model=model, optimizer=optimizer, config=config)
    return engine, wrapped


SHARDINGS: dict[str, Shard] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "fsdp1": _fsdp1,
    "zero1": partial(_zero, stage=1),
    "zero2": partial(_zero, stage=2),
    "deepspeed1": partial(_deepspeed, stage=1),
    "deepspeed2": partial(_deepspeed, stage=2),
    "deepspeed3": partial(_deepspeed, stage=3),
}


def installed(make: MakeOptimizer) -> list[str]:
    """Return the entries of `SHARDINGS` that can run an optimizer here: DeepSpeed's if it is installed, ZeRO's for one of this library."""
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    kind = getattr(make.given, "optimizer_class", make.constructor)  # a function of the model may have `optimizer_class`
    is_own = kind is not None and issubclass(kind, Engine)
    return [name for name in SHARDINGS if (has_deepspeed or "deepspeed" not in name) and (is_own or "zero" not in name)]
