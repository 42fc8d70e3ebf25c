"""What a step asks of a GPU, seen without one: tensors of the device "meta", which compute nothing, and kernels that are not launched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharded_optim as so
from sharded_optim.step import agreement, kernel_call, param_set
from sharded_optim.storage import devices

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from sharded_optim.backends import triton as backend  # noqa: E402

META = torch.device("meta")
SHAPES = [(7, 3), (), (64,), (5, 4, 3), (1,)]
# Views and allocations; a GPU hears nothing of them.
FREE = {"view", "select", "slice", "unbind", "expand", "detach", "alias", "as_strided", "empty", "empty_like", "lift_fresh", "squeeze"}


class Gpu(TorchDispatchMode):
    """Counts what would be launched, and refuses what the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.kernels: list[str] = []
        self.copies = 0  # between host and device
        self.read: set[int] = set()  # storages of what operations and kernels are given
        self.made: set[int] = set()  # and of what operations give

    @property
    def launches(self) -> int:
        return self.operations.total() + len(self.kernels)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name == "_to_copy" and args[0].device == META and str(kwargs.get("device", META)) == "cpu":
            self.copied(name, kwargs)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # all is well
        result = func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.read |= {storage(each) for each in given if each.device == META}
        self.made |= {storage(each) for each in made} - {storage(each) for each in given}
        if name not in FREE and any(each.device == META for each in given + made):
            # A number that torch wraps, or a copy: nothing else may have operands on both.
            foreign = [each for each in given if each.device != META and (each.ndim or name in ("_to_copy", "copy_"))]
            if name in ("_to_copy", "copy_") and foreign:
                self.copied(name, kwargs)
            else:
                assert not foreign, f"{name} of tensors on both the host and the device"
                self.operations[name] += 1
        return result

    def copied(self, name: str, kwargs: dict[str, Any]) -> None:
        assert kwargs.get("non_blocking"), f"{name} between host and device, for which the host waits"
        self.operations[name] += 1
        self.copies += 1


class Event:
    """Of a device; nothing is ever late."""

    def __init__(self, device: torch.device) -> None:
        assert device == META

    def record(self) -> None:
        assert not kernel_call.capturing(META), "a graph would record it"

    def synchronize(self) -> None:
        assert not kernel_call.capturing(META), "a capture would end with an error"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with Gpu() as mode:

        def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            mode.kernels.append(self.fn.__name__)
            mode.read |= {storage(each) for each in arguments if isinstance(each, Tensor)}

        monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
        monkeypatch.setattr(backend.Triton, "supports", lambda self, device, dtypes: None)
        monkeypatch.setattr(backend, "on", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch, "Event", Event)
        yield mode


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(shape, device=META, dtype=dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.empty_like(param)
    return params


OPTIMIZERS: dict[str, tuple[Callable, int]] = {  # how many launches a step may take
    "AdamW": (so.AdamW, 4),
    "Adam": (partial(so.Adam, weight_decay=0.1), 4),
    "DecoupledAdamW-amsgrad": (partial(so.DecoupledAdamW, amsgrad=True), 4),
    "DecoupledSGDW": (partial(so.DecoupledSGDW, momentum=0.9, dampening=0.1, weight_decay=1e-5), 4),
    "AdamW-skip": (partial(so.AdamW, nonfinite="skip"), 13),
    "AdamW-stochastic": (partial(so.AdamW, stochastic_rounding=True), 19),
    "StableAdamW": (so.StableAdamW, 14),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("capture", [False, True])
def test_a_step_waits_for_nothing_and_launches_little(name: str, capture: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a schedule changes the learning rate. While a CUDA graph records the step, nothing is even copied."""
    make, most = OPTIMIZERS[name]
    optimizer = make(parameters(torch.bfloat16 if "stochastic" in name else torch.float32), lr=1e-2)
    for _ in range(2):  # state is made, kernels are
        optimizer.step()
    if capture:
        begin_capture(monkeypatch)
    else:
        optimizer.param_groups[0]["lr"] = 5e-3
    gpu.operations.clear()
    gpu.kernels.clear()
    gpu.copies = 0
    optimizer.step()
    assert gpu.launches <= most, (gpu.operations, gpu.kernels)
    assert not (capture and gpu.copies)
    if not capture:
        optimizer.step()  # which looks at the verdict on the last


@pytest.mark.parametrize(("name", "most"), [("AdamW", 14), ("StableAdamW", 28)])
def test_neither_groups_nor_tensors_are_launched_one_by_one(name: str, most: int, gpu: Gpu) -> None:
    """Two param groups with other hyperparameters, one of them with a learning rate on the device, and GradScaler's tensors."""
    make, _ = OPTIMIZERS[name]
    params = parameters()
    optimizer = make([{"params": params[:2], "betas": (0.8, 0.95)}, {"params": params[2:]}], lr=1e-2)
    optimizer.param_groups[1]["lr"] = torch.empty((), device=META)
    optimizer.grad_scale, optimizer.found_inf = torch.empty((), device=META), torch.empty((), device=META)
    for _ in range(2):
        optimizer.step()
    gpu.operations.clear()
    gpu.kernels.clear()
    optimizer.step()
    assert gpu.launches <= most, (gpu.operations, gpu.kernels)


@pytest.mark.parametrize("replaced", ["grad", "state", "counter", "skipped"])
def test_a_graph_does_not_record_what_is_set_up_anew(replaced: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would set it up again and again."""
    params = parameters()
    optimizer = so.StableAdamW(params, lr=1e-2)
    optimizer.step()
    if replaced == "grad":
        params[0].grad = None
    elif replaced == "state":
        del optimizer.state[params[0]]["exp_avg"]
    elif replaced == "counter":
        optimizer.state[params[0]]["step"] = torch.empty((), device=META)
    else:
        optimizer = so.StableAdamW(params, lr=1e-2)
    begin_capture(monkeypatch)
    with pytest.raises(ValueError, match="take such a step before the capture"):
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_graph_reads_stays(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when later steps have other hyperparameters. Parameters, gradients and state are the user's, and are not kept."""
    make, _ = OPTIMIZERS[name]
    params = parameters(torch.bfloat16 if "stochastic" in name else torch.float32)
    optimizer = make(params, lr=1e-2)
    for _ in range(3):
        optimizer.step()
    with monkeypatch.context() as capture:
        kept = begin_capture(capture)
        gpu.read.clear()
        gpu.made.clear()
        optimizer.step()
    read, made = set(gpu.read), set(gpu.made)
    for group in optimizer.param_groups:
        group |= {"lr": 1e-3, "rounding_seed": 5} | ({"betas": (0.8, 0.9)} if "betas" in group else {})
    optimizer.step()
    users = [*params, *(param.grad for param in params), *(value for state in optimizer.state.values() for value in state.values())]
    users.append(optimizer._skipped)
    known = {storage(each) for each in users if isinstance(each, Tensor)}
    kept_storages = {storage(each) for each in tensors_in(kept)}
    assert read - made - known <= kept_storages
    counters = {storage(state["step"]) for state in optimizer.state.values()}
    assert kept_storages & known <= counters, "a graph would keep the model"


def test_what_was_observed_before_is_observed_in_every_replay(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = so.StableAdamW(params, lr=1e-2)
    for _ in range(2):
        optimizer.step()
    optimizer.observe_unit(0)
    gpu.kernels.clear()
    optimizer.step()
    assert not any(kernel.startswith("observe") for kernel in gpu.kernels)
    optimizer.observe_unit(0)
    begin_capture(monkeypatch)
    gpu.kernels.clear()
    optimizer.step()
    assert any(kernel.startswith("observe") for kernel in gpu.kernels)


def test_a_graph_does_not_record_what_must_wait(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = so.AdamW(parameters(), lr=1e-2, nonfinite="raise")
    for _ in range(2):
        optimizer.step()
    begin_capture(monkeypatch)
    with pytest.raises(ValueError, match="use nonfinite='skip'"):
        optimizer.step()


def begin_capture(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on a CUDA graph records; gives what is kept for its replays."""
    for module in (agreement, kernel_call, param_set, devices, backend):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    kept: list[Any] = []
    monkeypatch.setattr(devices, "_replayed", kept)
    return kept


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples, dicts and objects of this library."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for each in found:
            yield from tensors_in(each)
    elif isinstance(found, dict):
        yield from tensors_in(list(found.values()))
    elif type(found).__module__.startswith("sharded_optim"):
        yield from tensors_in(vars(found))
