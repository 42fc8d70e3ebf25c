"""torchtitan's OptimizersContainer with FSDP2: saved by the container's own state dict, with torch.distributed.checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import common
import sharded_optim as so


class Container(OptimizersContainer):
    """torchtitan resolves names of optimizers here."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return getattr(so, name)


def train(folder: Path, stop: int) -> common.Run:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = common.make_net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    group = ParamGroupConfig(pattern=".*", optimizer_name="StableAdamW", optimizer_kwargs={"lr": common.LR})
    optimizers = Container(Container.Config(param_groups=[group], implementation="foreach"), model_parts=[model])
    start, losses = 0, []
    if folder.exists():
        state = {"model": get_model_state_dict(model), "optimizer": optimizers.state_dict(), "step": 0}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        optimizers.load_state_dict(state["optimizer"])
        start = state["step"]
    for batch in common.make_net_batches()[start:stop]:
        loss = model(**batch)
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    if stop < common.STEPS:
        dcp.save({"model": get_model_state_dict(model), "optimizer": optimizers.state_dict(), "step": stop}, checkpoint_id=folder)
    return common.Run(losses, common.whole_params(model, FSDPModule))


if __name__ == "__main__":
    common.main(train)
