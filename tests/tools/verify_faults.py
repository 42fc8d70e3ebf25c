"""A small model, and faults that a verification must find. Imported by processes of their own."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

import sharded_optim as so

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 29), nn.Linear(29, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(torch.tanh(self.up(self.norm(inputs))))


class Model(nn.Module):
    """Layers, an odd matrix, a row, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.gain * self.head(hidden)


def batch(step: int) -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(step))


# ---------------------------------------------------------------------------------------------------------------------------- faults


class MuonOnLocalShards(torch.optim.Optimizer):
    """Muon as it is without knowledge of DTensors: each rank orthogonalizes its rows."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for param in (param for group in self.param_groups for param in group["params"]):
            whole, grad = (getattr(each, "to_local", lambda each=each: each)() for each in (param.detach(), param.grad))
            if whole.ndim != 2 or not whole.numel():
                whole.add_(grad, alpha=-1e-3)
                continue
            state = self.state[param]
            if "inner" not in state:
                state["inner"] = torch.zeros(())
            local = nn.Parameter(whole)
            local.grad = grad
            torch.optim.Muon([local], lr=1e-2, weight_decay=0.0).step()


class CounterPerGroup(torch.optim.AdamW):
    """All parameters of a group have the bias correction of the group's first step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for param in group["params"]:
                if self.state[param]:
                    self.state[param]["step"].fill_(group["steps"] - 1.0)
                elif group["steps"] > 1 and param.grad is not None:
                    self.state[param] |= {
                        "step": torch.tensor(group["steps"] - 1.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return super().step(closure)


class LosesMoment(torch.optim.AdamW):
    """Loading leaves the first moment out."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"].zero_()


def built_before_fully_shard(model: nn.Module, make: Any) -> tuple[nn.Module, Any]:
    from torch.distributed.fsdp import fully_shard

    optimizer = make(model)
    fully_shard(model)
    return model, optimizer


def model_of_rank() -> nn.Module:
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    return Model()


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return so.Muon(so.muon_param_groups(model), lr=1e-2)


def fails(model: nn.Module) -> torch.optim.Optimizer:
    raise ValueError("no optimizer for this model")


def a_counter_per_group(model: nn.Module) -> torch.optim.Optimizer:
    biases = [param for param in model.parameters() if param.ndim < 2]
    return CounterPerGroup([{"params": [param for param in model.parameters() if param.ndim > 1]}, {"params": biases, "lr": 5e-3}])


def muon_on_local_shards(model: nn.Module) -> torch.optim.Optimizer:
    return MuonOnLocalShards(model.parameters())


def doubled_rate(model: nn.Module, make: Any) -> tuple[nn.Module, Any]:
    """An elementwise optimizer is called wrongly."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] *= 2
    return model, optimizer


class RaisesInForward(Model):
    def forward(self, inputs: Tensor) -> Tensor:
        raise RuntimeError("this model has no forward")


class LosesStateDict(torch.optim.AdamW):
    """The first moment is not saved."""

    def state_dict(self) -> Any:
        content = super().state_dict()
        for state in content["state"].values():
            del state["exp_avg"]
        return content


# --------------------------------------------------------------------------------------------------------- what is right, and unusual


class Unusual(nn.Module):
    """A list of lists, a list of one module twice, a parameter without a gradient, a frozen one, the only child called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Module()
        self.module.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(7, 7), nn.LayerNorm(7)]) for _ in range(2))
        shared = nn.Linear(7, 7)
        self.module.shared = nn.ModuleList([shared, shared])
        self.module.unused, self.module.frozen = nn.Linear(7, 3), nn.Linear(7, 7)
        self.module.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        for linear, norm in self.module.pairs:  # pyright: ignore[reportGeneralTypeIssues]
            inputs = norm(linear(inputs))
        for shared in self.module.shared:  # pyright: ignore[reportGeneralTypeIssues]
            inputs = shared(inputs)
        inputs = self.module.frozen(inputs)
        return inputs, inputs.square().mean()


class WithoutClosure(torch.optim.AdamW):
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step()


def low_precision() -> nn.Module:
    """The gains of norms stay 1.0: a step of 1e-3 rounds to nothing."""
    return Model().bfloat16()


def low_precision_batch(step: int) -> Tensor:
    return batch(step).bfloat16()


def torchs_muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([param for param in model.parameters() if param.ndim == 2], lr=1e-2)


def with_low_moments(model: nn.Module) -> torch.optim.Optimizer:
    return so.StableAdamW(model.parameters(), lr=1e-2, state_dtype="bf16")
