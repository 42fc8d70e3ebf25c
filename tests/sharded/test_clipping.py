"""so.clip_grad_norm_: one norm of everything, however it is sharded, in one collective; what does not fit is refused on all ranks."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import collectives_of
from sharded_models import ShardedModel
from test_invariance import param_groups, spiky_grads, start_values
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial

import sharded_optim as so
from sharded_optim.sharding import FlatLayout

CLOSE = 1.2e-7  # one unit in the last place of float32
LAYOUTS = {2: ["ddp", "fsdp2", "fsdp1"], 4: ["hsdp", "fsdp2_tp"]}
GATHER = ["gloo:all_gather"]


def norm_of(grads: list[Tensor], norm_type: float = 2.0) -> float:
    """In float64, of all elements at once."""
    return float(torch.linalg.vector_norm(torch.cat([grad.flatten().double() for grad in grads]), norm_type))


def factor_of(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


# ------------------------------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_clips_as_torch_does(dtype: torch.dtype, norm_type: float) -> None:
    ours, theirs = ([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(), (0,), (7, 3), (4099,)]] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape).to(dtype)
        b.grad = a.grad.clone()
    ours.append(nn.Parameter(torch.ones(3)))  # without a gradient
    exact = norm_of([param.grad for param in theirs], norm_type)
    norm = so.clip_grad_norm_(ours, 0.5, norm_type)
    torch.nn.utils.clip_grad_norm_([param for param in theirs if param.numel()], 0.5, norm_type)  # torch has no inf norm of nothing
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert float(norm) == pytest.approx(exact, rel=CLOSE)
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("grad", [torch.full((100_003,), 0.1), torch.full((33,), 3e30), torch.full((70_001,), 1e-30), torch.zeros(5)])
def test_the_norm_is_the_float64_one(grad: Tensor) -> None:
    """Where float32 squares vanish or overflow, and where no rounding error cancels another."""
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    assert float(so.clip_grad_norm_([param], math.inf)) == pytest.approx(norm_of([grad]), rel=CLOSE)
    assert torch.equal(param.grad, grad), "a norm that is small enough changes nothing"


def test_what_it_takes() -> None:
    """A tensor, parameters, named ones, groups, a foreign optimizer, ours, and ours in a framework's wrapper; a parameter given twice
    counts once.
    """
    param = nn.Parameter(torch.zeros(3))
    ours, foreign = so.AdamW([("w", param)], lr=1e-3), torch.optim.SGD([param], lr=1e-3)
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=ours))
    for given in (param, [param, param], iter([param]), [("w", param)], [{"params": [param]}], foreign, ours, wrapped):
        param.grad = torch.tensor([3.0, 0.0, 4.0])
        assert float(so.clip_grad_norm_(given, 1.0)) == 5.0, given
        assert param.grad.tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert float(so.clip_grad_norm_([], 1.0)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "max_norm must not be negative.*got max_norm=-1.0"),
        ((math.nan,), "max_norm must not be negative.*got max_norm=nan"),
        ((1.0, 0.0), "norm_type must be positive.*norm_type=0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        so.clip_grad_norm_([nn.Parameter(torch.ones(1))], *arguments)


def test_a_module_is_refused_and_the_way_out_named() -> None:
    with pytest.raises(TypeError, match=r"pass model.parameters\(\)"):
        so.clip_grad_norm_(nn.Linear(2, 2), 1.0)


def test_a_norm_that_is_not_finite_is_an_error_on_request_and_else_as_in_torch() -> None:
    ours, theirs = ([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))] for _ in range(2))
    for params in (ours, theirs):
        params[0].grad = torch.tensor([1.0, math.inf])
        params[1].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"the norm of the gradients is inf.*not finite: 'w'$"):
        so.clip_grad_norm_([("w", ours[0]), ("b", ours[1])], 1.0, error_if_nonfinite=True)
    assert torch.equal(ours[1].grad, torch.ones(3)), "untouched"
    so.clip_grad_norm_(ours, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_deepspeed_is_refused_naming_gradient_clipping() -> None:
    """By the optimizer that was told its layout, by the parameters of ZeRO, by the wrapper, and through Accelerate's around it."""
    optimizer = so.AdamW([nn.Parameter(torch.ones(2))], lr=1e-3)
    optimizer.layout = FlatLayout(flat={}, whole={}, unknown_param_error="", steps_by_group=True)
    zero_3, zero_2 = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    zero_3.ds_id, zero_2.param_idx_in_group = 0, 0  # type: ignore[attr-defined]
    theirs = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2", "optimizer": None})()
    for given in (optimizer, [zero_3], [zero_2], theirs, SimpleNamespace(optimizer=theirs), SimpleNamespace(optimizer=optimizer)):
        with pytest.raises(ValueError, match=r"DeepSpeed, which.*set 'gradient_clipping'"):
            so.clip_grad_norm_(given, 1.0)


def test_parameters_are_not_kept_alive() -> None:
    from weakref import ref

    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    so.clip_grad_norm_([param], 1.0)
    known = ref(param)
    del param
    assert known() is None


# ------------------------------------------------------------------------------------------------------------------------------ ranks


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "wrapper"), [(size, wrapper) for size, wrappers in LAYOUTS.items() for wrapper in wrappers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sharding_has_the_norm_of_whole_tensors_in_one_collective(world_size: int, wrapper: str, dtype: torch.dtype) -> None:
    """Of an optimizer and of parameters, under DDP, FSDP1, FSDP2, HSDP and FSDP2 + TP."""
    model = ShardedModel(wrapper, start_values(dtype))
    optimizer = so.AdamW(param_groups(model.params), lr=1e-3, layout=model.layout)
    by_params = partial(so.clip_grad_norm_, list(model.params.items()), layout=model.layout)
    for step, clip in enumerate([partial(so.clip_grad_norm_, optimizer), by_params] * 2):
        for norm_type in (2.0, math.inf):
            grads = spiky_grads(step, dtype)
            model.set_grads({name: grad.clone() for name, grad in grads.items()})
            found: list[Tensor] = []
            collectives = collectives_of(lambda clip=clip, kind=norm_type, found=found: found.append(clip(0.5, kind)))
            where = f"{step} {norm_type}"
            assert step < 2 or collectives == GATHER, where
            assert float(found[0]) == pytest.approx(norm_of(list(grads.values()), norm_type), rel=CLOSE), where
            for name, grad in grads.items():
                clipped = grad.clone()
                torch._foreach_mul_([clipped], factor_of(found[0], 0.5))
                assert torch.equal(model.local(model.params[name].grad), model.slice_of(name, clipped)), f"{where} {name}"


@pytest.mark.ranks(2)
def test_one_call_takes_ordinary_tensors_dtensors_on_two_meshes_and_a_sharded_optimizer() -> None:
    """One of the meshes has this rank alone."""
    rank = dist.get_rank()
    world = init_device_mesh("cpu", (2,))
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("each", "one"))["one"]
    whole = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(7)) for name, shape in {"plain": (3, 5), "shard": (7, 3)}.items()
    }
    expert = torch.randn(11, generator=torch.Generator().manual_seed(rank))  # another one on each rank
    plain = nn.Parameter(torch.zeros(3, 5))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(7, 3), world, [Shard(0)]))
    replicated = nn.Parameter(distribute_tensor(torch.zeros(7, 3), world, [Replicate()]))
    own = nn.Parameter(distribute_tensor(torch.zeros(11), alone, [Shard(0)]))
    block = nn.Linear(5, 3)
    zero = so.ShardedOptimizer(block, so.StableAdamW, lr=1e-3)
    rest = so.AdamW([("plain", plain), ("shard", sharded), ("replica", replicated), (f"expert{rank}", own)], lr=1e-3)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    twin = nn.Linear(5, 3)
    for step in range(2):
        zero.wait()
        twin.load_state_dict(block.state_dict())
        twin.zero_grad()
        twin(inputs).square().sum().backward()
        block(inputs).square().sum().backward()
        plain.grad = whole["plain"].clone()
        sharded.grad = distribute_tensor(whole["shard"].clone(), world, [Shard(0)])
        replicated.grad = distribute_tensor(whole["shard"].clone(), world, [Replicate()])
        own.grad = distribute_tensor(expert.clone(), alone, [Shard(0)])
        experts = [torch.empty(11) for _ in range(2)]
        dist.all_gather(experts, expert)
        exact = norm_of([*whole.values(), whole["shard"], *experts, *[param.grad for param in twin.parameters()]])
        found: list[Tensor] = []
        collectives = collectives_of(lambda found=found: found.append(so.clip_grad_norm_(Both(zero, rest), 0.1)))
        assert float(found[0]) == pytest.approx(exact, rel=1e-6), step  # the gradients of the block are averaged
        assert step == 0 or collectives.count("gloo:all_gather") == 1
        factor = factor_of(found[0], 0.1)
        torch.testing.assert_close(plain.grad, whole["plain"] * factor)
        assert isinstance(sharded.grad, DTensor)
        assert isinstance(own.grad, DTensor)
        torch.testing.assert_close(own.grad.to_local(), expert * factor)
        torch.testing.assert_close(sharded.grad.full_tensor(), whole["shard"] * factor)
        again = so.clip_grad_norm_(Both(zero, rest), math.inf)
        assert float(again) == pytest.approx(0.1, rel=1e-4), "what is in buckets was scaled too"
        zero.step()


class Both:
    """As torchtitan's container."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = list(optimizers)


@pytest.mark.ranks(2)
def test_a_gradient_that_tensor_parallelism_has_left_as_a_sum_over_the_ranks_counts_as_the_sum() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Replicate()]))
    part = torch.arange(6.0) * (1 + dist.get_rank())
    for _ in range(2):
        param.grad = DTensor.from_local(part.clone(), mesh, [Partial()], run_check=False)
        norm = so.clip_grad_norm_([param], 1.0)
        assert float(norm) == pytest.approx(norm_of([torch.arange(6.0) * 3]), rel=CLOSE)
        torch.testing.assert_close(param.grad.full_tensor(), torch.arange(6.0) * 3 / norm)


@pytest.mark.ranks(2)
def test_what_one_rank_alone_has_wrong_is_raised_on_all_by_name() -> None:
    """And the next call is right."""
    rank = dist.get_rank()
    params = {name: nn.Parameter(torch.zeros(5)) for name in ("w", "b")}

    def set_grads() -> None:
        for param in params.values():
            param.grad = torch.ones(5)

    for _ in range(2):
        set_grads()
        assert float(so.clip_grad_norm_(params.items(), 1.0)) == pytest.approx(math.sqrt(10), rel=CLOSE)
        set_grads()
        if rank == 1:
            params["w"].grad = torch.ones(5).to_sparse()
        with pytest.raises(ValueError, match=r"rank 1: gradient of 'w' is.*sparse"):
            so.clip_grad_norm_(params.items(), 1.0)
        assert params["b"].grad is not None
        assert torch.equal(params["b"].grad, torch.ones(5)), "untouched"
        set_grads()
        params["b"].grad = torch.full((5,), math.nan)
        with pytest.raises(RuntimeError, match=r"the norm of the gradients is nan.*all ranks: not finite: 'b'"):
            so.clip_grad_norm_(params.items(), 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match=r"rank 0: .*float64"):
        so.clip_grad_norm_([("w", nn.Parameter(torch.zeros(5, dtype=torch.float64 if rank == 0 else torch.float32)))], 1.0)


@pytest.mark.ranks(2)
def test_parameters_that_are_replaced_on_one_rank_or_on_all_are_described_anew() -> None:
    """Several models take turns."""
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]
    other = nn.Parameter(torch.zeros(9))
    for turn in range(6):
        if turn == 2 and dist.get_rank() == 1:
            params[1] = nn.Parameter(torch.zeros(2))
        if turn == 4:
            params[0] = nn.Parameter(torch.zeros(4))
        for param in [*params, other]:
            param.grad = torch.ones_like(param)
        assert float(so.clip_grad_norm_(params, 9.0)) == pytest.approx(math.sqrt(6), rel=CLOSE), turn
        assert float(so.clip_grad_norm_([other], 9.0)) == 3.0, turn
        stage = {0: params, 1: []}[dist.get_rank()]  # a rank that holds nothing
        assert float(so.clip_grad_norm_(stage, 9.0)) == pytest.approx(math.sqrt(6), rel=CLOSE), turn
