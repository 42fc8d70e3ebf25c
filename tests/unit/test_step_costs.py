"""What a step must not do: allocate with the model, read values from a device, keep memory alive, or miss that memory has moved."""

from __future__ import annotations

import copy
import gc
import io
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import CPU_BACKENDS

import sharded_optim as so
from sharded_optim.backends import cpu
from sharded_optim.step import kernel_calls
from sharded_optim.storage import memory

OPTIMIZERS: dict[str, Callable] = {
    "AdamW": lambda params: so.AdamW(params, lr=1e-2),
    "AdamW-skip": lambda params: so.AdamW(params, lr=1e-2, nonfinite="skip"),
    "AdamW-stochastic": lambda params: so.AdamW(params, lr=1e-2, stochastic_rounding=True),
    "DecoupledSGDW": lambda params: so.DecoupledSGDW(params, lr=1e-2, momentum=0.9),
    "StableAdamW": lambda params: so.StableAdamW(params, lr=1e-2),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Watch(TorchDispatchMode):
    """What torch is asked to do: names of operations, and the bytes of all that they return in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.allocated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.add(func.name())
        result = func(*args, **kwargs or {})
        known = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.allocated += each.untyped_storage().nbytes()
        return result


def parameter(numel: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.linspace(-1.0, 1.0, numel).to(dtype))
    param.grad = torch.linspace(1.0, -2.0, numel).to(dtype)
    return param


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_allocates_does_not_grow_with_the_model(name: str, dtype: torch.dtype) -> None:
    """The second step, of 1,000 and of 4,000,000 elements: torch's memory and Python's (with NumPy's)."""
    costs = []
    for numel in (1000, 4_000_000):
        optimizer = OPTIMIZERS[name]([parameter(numel, dtype)])
        optimizer.step()
        optimizer.step()
        gc.collect()
        tracemalloc.start()
        optimizer.step()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        with Watch() as watch:
            optimizer.step()
        costs.append((peak, watch.allocated))
    (small_python, small_torch), (large_python, large_torch) = costs
    assert large_python < small_python + 4096
    assert large_torch == small_torch


@every_optimizer
def test_a_step_reads_no_value_with_item(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device each would wait for it; also with an lr tensor, several groups and several dtypes."""
    params = [parameter(5), parameter(7), parameter(11, torch.bfloat16)]
    optimizer = OPTIMIZERS[name]([{"params": params[:1]}, {"params": params[1:], "lr": torch.tensor(0.02)}])
    optimizer.step()
    for method in ("item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, lambda self, method=method: pytest.fail(f"Tensor.{method} was called"))
    with Watch() as watch:
        optimizer.step()
    assert watch.operations
    assert not {operation for operation in watch.operations if "item" in operation or "local_scalar" in operation}


@every_optimizer
def test_a_step_keeps_no_gradient_and_no_state_alive(name: str) -> None:
    """Gradients are freed before the next backward, and state may be moved away between steps."""
    params = [parameter(5), parameter(7)]
    optimizer = OPTIMIZERS[name](params)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        grads = [weakref.ref(param.grad) for param in params]
        optimizer.zero_grad()
        assert not any(grad() is not None for grad in grads)
    moments = [key for key in optimizer.state[params[0]] if key != "step"]
    for param in params:
        for key in moments:
            old = weakref.ref(optimizer.state[param][key])
            optimizer.state[param][key] = optimizer.state[param][key].clone()
            assert old() is None


# ------------------------------------------------------------------------------------------------------------- moving memory


def new_objects(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[param]
    optimizer.state[param] = {key: value.clone() for key, value in state.items()}


def new_entries(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for key, value in list(optimizer.state[param].items()):
        optimizer.state[param][key] = value.clone()


def new_memory(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """As offloading does: the same tensors, elsewhere."""
    for tensor in (param, *optimizer.state[param].values()):
        old = tensor.data
        tensor.data = old.clone()
        old.fill_(torch.nan)


def other_strides(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.data = param.data.t().contiguous().t()


def other_dtype_and_back(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.data = param.data.double()
    param.data = param.data.float()


def saved_and_loaded(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@every_optimizer
@pytest.mark.parametrize("move", [new_objects, new_entries, new_memory, other_strides, other_dtype_and_back, saved_and_loaded])
def test_steps_go_on_where_memory_has_moved(name: str, move: Callable) -> None:
    """What is kept from step to step notices it: the trajectory is that of an optimizer whose memory stays."""
    results = []
    for moved in (False, True):
        params = [nn.Parameter(torch.linspace(-1.0, 1.0, 12).view(3, 4)), parameter(5)]
        optimizer = OPTIMIZERS[name](params)
        for step in range(6):
            for param in params:
                param.grad = torch.linspace(-1.0, 2.0 + step, param.numel()).view(param.shape)
            if step in (2, 4) and moved:
                move(params[0], optimizer)
            optimizer.step()
        results.append([torch.cat([param.flatten(), *(value.flatten() for value in optimizer.state[param].values())]) for param in params])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@every_optimizer
def test_gradients_may_change_their_strides_their_memory_and_their_presence(name: str) -> None:
    results = []
    for awkward in (False, True):
        params = [nn.Parameter(torch.linspace(-1.0, 1.0, 12).view(3, 4)), parameter(5)]
        optimizer = OPTIMIZERS[name](params)
        buffer = torch.empty(4, 3)
        for step in range(8):
            values = torch.linspace(-1.0, 2.0 + step, 12).view(3, 4)
            params[0].grad = buffer.t().copy_(values) if awkward and step % 3 == 1 else values
            if awkward and step % 3 == 2:
                params[0].grad = buffer.view(3, 4).copy_(values)  # the same memory, in another order
            params[1].grad = None if step in (2, 5) else torch.linspace(0.0, 1.0 + step, 5)
            optimizer.step()
        results.append(params)
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_step_counters_are_seen_to_move_by_whoever_holds_them() -> None:
    """A state dict taken before a step shows the state after it, its counters like its moments, as torch's do."""
    param = parameter(5)
    optimizer = so.AdamW([param], lr=1e-2)
    optimizer.init_state()
    taken = optimizer.state_dict()["state"][0]
    for _ in range(3):
        optimizer.step()
    assert float(taken["step"]) == 3.0
    assert torch.equal(taken["exp_avg"], optimizer.state[param]["exp_avg"])
    optimizer.state[param]["step"].fill_(100.0)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 101.0


def test_state_whose_memory_moves_between_steps_is_stepped_where_it_is() -> None:
    """As when a state dict is sent to another process, which moves its tensors into shared memory: under them, as they stay the same."""
    moved, kept = [[parameter(5), parameter(3)] for _ in range(2)]
    optimizers = [so.AdamW(params, lr=1e-2) for params in (moved, kept)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.step()
        if step == 1:
            for state in optimizers[0].state.values():
                for value in state.values():
                    value.share_memory_()
    assert [float(state["step"]) for state in optimizers[0].state.values()] == [4.0, 4.0]
    for a, e in zip(moved, kept, strict=True):
        assert torch.equal(a, e)


def test_counters_of_parameters_with_and_without_gradients_stay_apart() -> None:
    params = [parameter(5), parameter(7)]
    optimizer = so.StableAdamW(params, lr=1e-2)
    for step in range(6):
        params[1].grad = torch.ones(7) if step % 2 else None
        optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [6.0, 3.0]


def test_a_step_that_fails_lets_go_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    param = parameter(5)
    optimizer = so.StableAdamW([param], lr=1e-2)
    optimizer.step()
    monkeypatch.setattr(kernel_calls.KernelCall, "observe", lambda *_: 1 / 0)
    grad = weakref.ref(param.grad)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        optimizer.step()
    param.grad = None
    gc.collect()
    assert grad() is None


@pytest.mark.parametrize("cls", [so.AdamW, so.StableAdamW])
def test_what_cannot_be_compiled_fails_before_anything_is_written(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before ranks agree on the step, so that none goes on alone."""

    def fail(self, algorithm, operands, formulas) -> None:
        if operands.format.dtype == torch.bfloat16:
            raise OSError("no space left on device")

    monkeypatch.setattr(type(cpu.BACKEND), "prepare", fail)
    params = [parameter(5), parameter(7, torch.bfloat16)]
    before = [param.detach().clone() for param in params]
    optimizer = cls(params, lr=1e-2)
    with pytest.raises((OSError, ValueError), match="no space left on device"):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(params, before, strict=True))
    assert all(float(optimizer.state[param]["step"]) == 0.0 for param in params)


def views_of_an_arena(dtype: torch.dtype) -> Callable:
    """State that lies where it lay, in another dtype, as an arena of memory may give it."""

    def move(param: nn.Parameter, state: dict[str, Tensor]) -> None:
        state["exp_avg"] = state["exp_avg"].view(dtype).flatten()[: param.numel()].view(param.shape).zero_()

    return move


def transposed_state(param: nn.Parameter, state: dict[str, Tensor]) -> None:
    state["exp_avg"] = state["exp_avg"].t()


def transposed_param(param: nn.Parameter, state: dict[str, Tensor]) -> None:
    param.data = param.data.t()


@pytest.mark.parametrize("move", [views_of_an_arena(torch.bfloat16), transposed_state, transposed_param])
def test_another_view_of_the_same_memory_is_seen(move: Callable) -> None:
    """The address alone does not tell; the eager backend, which is given the tensors anew in each step, has the same trajectory."""
    results = []
    for backend in CPU_BACKENDS:
        param = nn.Parameter(torch.linspace(-1.0, 1.0, 16).view(4, 4))
        optimizer = so.AdamW([param], lr=1e-2, backend=backend)
        for step in range(4):
            param.grad = torch.linspace(-1.0, 2.0 + step, 16).view(4, 4)
            if step == 2:
                move(param, optimizer.state[param])
            optimizer.step()
        results.append(torch.cat([param.detach().flatten(), *(value.flatten() for value in optimizer.state[param].values())]))
    assert torch.equal(*results)


def test_memory_that_is_gone_or_negated_is_refused() -> None:
    param = parameter(5)
    optimizer = so.AdamW([("w", param)], lr=1e-2)
    optimizer.step()
    param.grad = torch._efficientzerotensor(5)
    with pytest.raises(ValueError, match="gradient of 'w' has no memory"):
        optimizer.step()
    param.grad = grad = torch.ones(5)
    optimizer.step()
    param.grad = torch._neg_view(grad)  # at the address of the one before
    with pytest.raises(ValueError, match="gradient of 'w' is a view that is negated"):
        optimizer.step()
    param.grad = torch.ones(5)
    optimizer.state[param]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="state 'exp_avg' of 'w' has no memory"):
        optimizer.step()


def test_a_compensation_of_another_dtype_is_refused() -> None:
    param = parameter(5, torch.bfloat16)
    optimizer = so.AdamW([("w", param)], lr=1e-2)
    optimizer.step()
    optimizer.state[param]["kahan_comp"] = optimizer.state[param]["kahan_comp"].float()
    with pytest.raises(
        ValueError, match=r"'kahan_comp' of 'w' has dtype torch\.float32, but the format 'bf16_kahan' of a torch\.bfloat16 parameter"
    ):
        optimizer.step()


# --------------------------------------------------------------------------------------------------------------- large pages


def resident(name: str, address: int) -> int:
    """Bytes that /proc/self/smaps counts under a name in the mapping of an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(each, 16) for each in first.split("-"))
            found = begin <= address < end
        elif found and first == f"{name}:":
            return int(rest[0]) * 1024
    return 0


def resident_in_all() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="the system gives no large pages")
def test_large_state_lies_on_large_pages_and_takes_no_more_memory_than_it_needs() -> None:
    """What does not fill a large page takes small ones, and small state is not spread over pages at all."""
    numel = 5 * memory.LARGE_PAGE // 8  # 2.5 large pages
    params = [nn.Parameter(torch.ones(numel)), nn.Parameter(torch.ones(3, 5))]
    optimizer = so.AdamW(params, lr=1e-2)
    optimizer.init_state()
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    address = optimizer.state[params[0]]["exp_avg"].data_ptr()
    assert address % memory.LARGE_PAGE == 0
    large = resident("AnonHugePages", address)
    assert large >= 2 * memory.LARGE_PAGE or not resident("Rss", address)
    assert optimizer.state[params[1]]["exp_avg"].untyped_storage().nbytes() == 60
    before = resident_in_all()
    held = [memory.zeros(9 * memory.LARGE_PAGE // 32).fill_(1.0) for _ in range(40)]  # of 1.125 pages
    assert resident_in_all() - before < 1.2 * sum(tensor.nbytes for tensor in held)


def test_memory_on_large_pages_is_ordinary_to_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        zeros = memory.zeros(2**21 + 5, dtype)
        assert zeros.shape == (2**21 + 5,)
        assert zeros.dtype == dtype
        assert not zeros.any()
        zeros += 1
        assert torch.equal(copy.deepcopy(zeros), torch.ones(2**21 + 5, dtype=dtype))
        buffer = io.BytesIO()
        torch.save(zeros, buffer)
        assert buffer.tell() < zeros.nbytes + 4096
        buffer.seek(0)
        assert torch.equal(torch.load(buffer), zeros)


@every_optimizer
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_defaults_of_torch_change_nothing(name: str, backend: str) -> None:
    """Neither another dtype nor another device: tables lie where they are used."""
    results = []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta"), (torch.bfloat16, "meta")):
        params = [parameter(5), parameter(70), parameter(3)]
        optimizer = OPTIMIZERS[name](params)
        groups = [{**optimizer.param_groups[0], "params": params[:1]}, {**optimizer.param_groups[0], "params": params[1:], "lr": 3e-2}]
        optimizer = type(optimizer)(groups, lr=1e-2, nonfinite=optimizer.nonfinite, backend=backend)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                for _ in range(3):
                    optimizer.step()
        finally:
            torch.set_default_dtype(before)
        results.append(params)
    for others in results[1:]:
        assert all(torch.equal(param, other) for param, other in zip(results[0], others, strict=True))
