"""Muon on every sharding: the bits of one process, the bytes that must travel and no more, and a step on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import AwkwardModel, ShardedModel
from test_invariance import spiky_grads, start_values
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import sharded_optim as so

STEPS = 20
SMALL = 256  # bytes in a round, so that there are several
OPTIMIZERS: dict[str, Callable[..., so.Muon]] = {
    "adamw": partial(so.Muon, lr=2e-2),
    "stable_adamw-polar-fp32": partial(so.Muon, lr=2e-2, ns_coefficients="polar_express", ns_dtype="float32", decay_form="corrected"),
    "stable_adamw-stochastic": partial(so.Muon, lr=2e-2, adjust_lr_fn="match_rms_adamw", stochastic_rounding=True, nesterov=False),
}
LAYOUTS = {2: ["ddp", "fsdp2", "fsdp1"], 3: ["ddp", "fsdp2", "fsdp1"], 4: ["fsdp2", "hsdp", "fsdp2_tp"]}


def mixed_groups(params: dict[str, nn.Parameter], label: str) -> list[dict[str, Any]]:
    """Matrices with two learning rates, one of them split and a stack among them; and the rest."""
    matrices = [name for name, param in AwkwardModel().named_parameters() if param.ndim >= 2]
    return [
        {"params": [(name, params[name]) for name in matrices if name != "down.weight"]},
        {"params": [("down.weight", params["down.weight"])], "lr": 1e-2, "split": (1, 3, 2)},
        {
            "params": [(name, param) for name, param in params.items() if name not in matrices],
            "algorithm": label.split("-")[0],
            "lr": 3e-3,
            "weight_decay": 0.0,
        },
    ]


def grads_of(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Spiky; some without a gradient, matrices too."""
    grads = spiky_grads(step, dtype)
    for period, name in ((3, "small"), (4, "up.weight"), (5, "cube")):
        if step % period == 1:
            del grads[name]
    return grads


def unsharded(label: str, dtype: torch.dtype, steps: range = range(STEPS)) -> dict[str, dict[str, Tensor]]:
    params = {name: nn.Parameter(value.clone()) for name, value in start_values(dtype).items()}
    optimizer = OPTIMIZERS[label](mixed_groups(params, label))
    for step in steps:
        grads = grads_of(step, dtype)
        for name, param in params.items():
            param.grad = grads.get(name)
        optimizer.step()
    return {name: {"param": param.detach(), **optimizer.state[param]} for name, param in params.items()}


def check_equal(model: ShardedModel, optimizer: torch.optim.Optimizer, expected: dict[str, dict[str, Tensor]], where: str) -> None:
    for name, param in model.params.items():
        for key, full in expected[name].items():
            actual = model.local(param if key == "param" else optimizer.state[param][key])
            part = full if key == "step" else model.slice_of(name, full)
            assert torch.equal(actual, part), f"{where} {name} {key}: {actual} != {part}"


def check_invariance(wrappers: list[str], folder: str) -> None:
    for wrapper in wrappers:
        for path in sorted(Path(folder).glob("*.pt")):
            label, dtype_name = path.stem.split(",")
            dtype = getattr(torch, dtype_name)
            for round_bytes in (SMALL, 2**25):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("sharded_optim.sharding.matrices.ROUND_BYTES", round_bytes)
                    model = ShardedModel(wrapper, start_values(dtype))
                    optimizer = OPTIMIZERS[label](mixed_groups(model.params, label), layout=model.layout)
                    for step in range(STEPS):
                        model.set_grads(grads_of(step, dtype))
                        optimizer.step()
                check_equal(model, optimizer, torch.load(path), f"{label} {dtype} {wrapper} {round_bytes}")


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_parameters_and_state_have_the_bits_of_one_process(world_size: int, tmp_path: Path) -> None:
    """20 spiky steps of mixed groups, whatever the sharding and the size of a round, for fp32 and bf16 parameters."""
    for number, label in enumerate(OPTIMIZERS):
        for dtype in (torch.float32, torch.bfloat16):
            if (number + (dtype == torch.bfloat16)) % 2 == 0 or world_size == 4:
                torch.save(unsharded(label, dtype), tmp_path / f"{label},{str(dtype).removeprefix('torch.')}.pt")
    ranks.run(check_invariance, world_size, LAYOUTS[world_size], str(tmp_path))


# --------------------------------------------------------------------------------------------------- other placements, and experts

SHAPES: dict[str, tuple[tuple[int, ...], list[Placement] | None]] = {  # None: of one rank alone
    "columns": ((9, 7), [Shard(1)]),
    "few columns": ((4, 2), [Shard(1)]),
    "row": ((1, 5), [Shard(0)]),
    "column": ((5, 1), [Shard(0)]),
    "no rows": ((0, 5), [Shard(0)]),
    "experts": ((4, 6, 5), [Shard(0)]),
    "rows of experts": ((4, 6, 5), [Shard(1)]),
    "columns of experts": ((4, 6, 5), [Shard(2)]),
    "expert of rank 0": ((6, 5), None),
    "expert of rank 2": ((6, 5), None),
}


def values_of(name: str, step: int) -> Tensor:
    shape, _ = SHAPES[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name)))


def check_placements(expected: dict[str, Tensor]) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(name: str, step: int) -> Tensor:
        placements = SHAPES[name][1]
        return values_of(name, step) if placements is None else distribute_tensor(values_of(name, step), mesh, placements)

    held = [name for name, (_, placements) in SHAPES.items() if placements is not None or name.endswith(f"rank {rank}")]
    params = {name: nn.Parameter(placed(name, 0)) for name in held}
    optimizer = so.Muon(list(params.items()), lr=0.1)
    for step in range(1, 5):
        for name, param in params.items():
            param.grad = placed(name, step)
        optimizer.step()
    for name, param in params.items():
        whole = param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
        assert torch.equal(whole, expected[name]), name


def test_columns_single_rows_and_experts_have_the_bits_of_one_process() -> None:
    """Matrices cut inside rows, of one row or column, without rows; stacks cut along each dimension; experts that one rank alone has."""
    params = {name: nn.Parameter(values_of(name, 0)) for name in SHAPES}
    optimizer = so.Muon(list(params.items()), lr=0.1)
    for step in range(1, 5):
        for name, param in params.items():
            param.grad = values_of(name, step)
        optimizer.step()
    ranks.run(check_placements, 3, {name: param.detach() for name, param in params.items()})


EXPERTS: dict[str, tuple[int, ...]] = {"experts": (4, 6, 5), "expert 0": (6, 5), "expert 1": (6, 5), "dense": (7, 3)}


def expert_value(name: str, step: int) -> Tensor:
    return torch.randn(EXPERTS[name], generator=torch.Generator().manual_seed(1000 * step + list(EXPERTS).index(name)))


def check_expert_meshes(expected: dict[str, Tensor]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "shard"))
    own = f"expert {mesh.get_local_rank('expert')}"
    placed: dict[str, tuple[DeviceMesh, list[Placement]]] = {
        "experts": (mesh, [Shard(0), Shard(1)]),
        own: (mesh["shard"], [Shard(0)]),
        "dense": (mesh, [Replicate(), Shard(0)]),
    }
    params = {name: nn.Parameter(distribute_tensor(expert_value(name, 0), *where)) for name, where in placed.items()}
    optimizer = so.Muon(list(params.items()), lr=0.1)
    for step in range(1, 5):
        for name, param in params.items():
            param.grad = distribute_tensor(expert_value(name, step), *placed[name])
        optimizer.step()
    for name, param in params.items():
        assert isinstance(param, DTensor)
        assert torch.equal(param.detach().full_tensor(), expected[name]), name


def test_experts_on_meshes_of_their_own_have_the_bits_of_one_process() -> None:
    """A stack cut into experts and their rows; experts that half of the ranks have each; and a dense matrix with replicas."""
    params = {name: nn.Parameter(expert_value(name, 0)) for name in EXPERTS}
    optimizer = so.Muon(list(params.items()), lr=0.1)
    for step in range(1, 5):
        for name, param in params.items():
            param.grad = expert_value(name, step)
        optimizer.step()
    ranks.run(check_expert_meshes, 4, {name: param.detach() for name, param in params.items()})


# ------------------------------------------------------------------------------------------------------------------------- traffic


class Linears(nn.Module):
    """Square matrices whose rows any number of ranks up to 4 share equally, and one that is small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(5))
        self.small = nn.Linear(12, 24, bias=False)


def traffic_of(model: nn.Module, optimizer: so.Muon) -> tuple[int, list[str]]:
    """Elements that all ranks together send in a step, without those to themselves, and this rank's calls in their order."""
    calls: list[str] = []
    sent = torch.zeros((), dtype=torch.int64)
    start, compute = dist.all_to_all_single, torch.addmm

    def counted(output: Tensor, given: Tensor, received: list[int], sizes: list[int], *args: Any, **options: Any) -> Any:
        assert options["async_op"]
        assert sizes[dist.get_rank()] == 0, "nothing is sent to oneself"
        assert given.dtype == torch.bfloat16
        calls.append("exchange")
        sent.add_(sum(sizes))
        return start(output, given, received, sizes, *args, **options)

    def computed(*args: Any, **options: Any) -> Tensor:
        if calls[-1:] != ["compute"]:
            calls.append("compute")
        return compute(*args, **options)

    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        patch.setattr(torch, "addmm", computed)
        optimizer.step()
    dist.all_reduce(sent)
    return int(sent), calls


def check_traffic() -> None:
    world_size = dist.get_world_size()
    numel = sum(param.numel() for param in Linears().parameters())
    shapes = {"ddp": (1, world_size), "fsdp2": (world_size, 1)} | ({"hsdp": (2, 2)} if world_size == 4 else {})
    for name, (shards, replicas) in shapes.items():
        model = Linears()
        if name != "ddp":
            sizes = (replicas, shards) if replicas > 1 else (shards,)
            fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sharded_optim.sharding.matrices.ROUND_BYTES", 24 * 24 * 2)
            optimizer = so.Muon(list(model.named_parameters()))
            elements, calls = traffic_of(model, optimizer)
        assert elements * shards == numel * ((shards - 1) + (replicas * shards - 1)), name
        rounds = calls.count("exchange") // 2
        assert rounds == -(-6 // world_size), calls
        order = calls if calls[-1] != "compute" else calls[:-1]
        gathers = ["exchange"] if rounds == 1 else ["exchange", "exchange"]
        assert order[: len(gathers)] == gathers, f"the second gather begins before the first computation: {calls}"
        (plan,) = optimizer._sets.whole.layout.matrices  # pyright: ignore[reportOptionalMemberAccess]
        assert max(plan.loads) <= min(plan.loads) + max(4 * 24**3 + 2 * 24**3, 1), plan.loads
    alone = nn.Parameter(torch.ones(3, 2))
    optimizer = so.Muon([(f"expert {dist.get_rank()}", alone)])
    module = nn.ParameterList([alone])
    assert traffic_of(module, optimizer) == (0, ["compute"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_travels_is_what_must(world_size: int) -> None:
    """2(S-1)/S + 2(RS-1)/S bytes per element with S shards and R replicas, and nothing of what one rank has whole.

    The next gather begins before a computation.
    """
    ranks.run(check_traffic, world_size)


# ------------------------------------------------------------------------------------------------------------------ all or nothing


def stepped_once() -> tuple[ShardedModel, so.Muon, Callable[[], bool]]:
    """A model with new gradients, its optimizer, and whether both are as they are now."""
    model = ShardedModel("fsdp2", start_values(torch.float32))
    optimizer = OPTIMIZERS["adamw"](mixed_groups(model.params, "adamw"))
    model.set_grads(spiky_grads(0, torch.float32))
    optimizer.step()

    def values() -> list[Tensor]:
        return [model.local(each).clone() for param in model.params.values() for each in (param, *optimizer.state[param].values())]

    before = values()
    model.set_grads(spiky_grads(2, torch.float32))
    return model, optimizer, lambda: all(map(torch.equal, before, values()))


@pytest.mark.ranks(2)
def test_nan_on_one_rank_leaves_all_ranks_as_they_were() -> None:
    """A step is skipped, or raises."""
    model, optimizer, unchanged = stepped_once()
    if dist.get_rank() == 1:
        model.local(model.params["up.weight"].grad)[0, 0] = torch.nan  # pyright: ignore[reportArgumentType]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert unchanged()
    optimizer.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match=r"'up.weight'.*rank 1|rank 1.*'up.weight'"):
        optimizer.step()
    assert unchanged()


@pytest.mark.ranks(2)
def test_a_gradient_that_one_rank_lacks_leaves_all_ranks_as_they_were() -> None:
    model, optimizer, unchanged = stepped_once()
    if dist.get_rank() == 0:
        model.params["up.weight"].grad = None
    with pytest.raises(ValueError, match=r"'up.weight'"):
        optimizer.step()
    assert unchanged()


@pytest.mark.ranks(2)
def test_a_hyperparameter_that_differs_on_one_rank_leaves_all_ranks_as_they_were() -> None:
    """And they go on when it is the same again."""
    _, optimizer, unchanged = stepped_once()
    optimizer.param_groups[0]["momentum"] = 0.9 + 0.01 * dist.get_rank()
    with pytest.raises(ValueError, match=r"ranks disagree about '.*': (momentum|threshold) is .* on rank 0, .* on rank 1"):
        optimizer.step()
    assert unchanged()
    optimizer.param_groups[0]["momentum"] = 0.95
    optimizer.step()
    assert not unchanged()


@pytest.mark.ranks(2)
def test_ranks_that_disagree_about_the_matrices_of_a_tensor_are_refused() -> None:
    whole = nn.Parameter(torch.ones(4, 3))
    whole.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 disagree about the matrices that 'w' \(shape \(4, 3\)\) is"):
        so.Muon([("w", whole)], split=1 + dist.get_rank()).step()


@pytest.mark.ranks(2)
def test_matrices_that_fsdp1_has_flattened_with_vectors_are_refused() -> None:
    flat = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))  # rank 0 has nothing of the bias
    with pytest.raises(ValueError, match=r"'bias' has shape \(2,\), which is no matrix.*flattened it with 1 others.*use_orig_params=True"):
        so.Muon(flat.parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("ask", [get_optimizer_state_dict, FullyShardedDataParallel.optim_state_dict])
def test_state_that_torch_cannot_gather_under_fsdp1_is_refused(ask: Callable[..., Any]) -> None:
    flat = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = so.Muon(so.muon_param_groups(flat, to_muon="weight"))
    optimizer.init_state()
    with pytest.raises(ValueError, match=r"'weight' has momentum_buffer, 'bias' exp_avg and exp_avg_sq. Save with so.checkpoint"):
        ask(flat, optimizer)


# --------------------------------------------------------------------------------------------------------------------- checkpoints


def check_save_or_load(folder: str, wrapper: str, steps: tuple[int, int], expected: str | None, own: bool = False) -> None:
    """Go on from a checkpoint of torch.distributed.checkpoint or our own, if the first step is not 0; and save both, or compare."""
    dtype, label = torch.float32, "stable_adamw-polar-fp32"
    model = AwkwardModel()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(start_values(dtype)[name])
    if wrapper != "ddp":
        shape, names = ((2, 2), ("replicate", "shard")) if wrapper == "hsdp" else ((dist.get_world_size(),), ("shard",))
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), ignored_params={model.scalar})
    params = dict(model.named_parameters())
    optimizer = OPTIMIZERS[label](mixed_groups(params, label))
    if steps[0] and own:
        so.checkpoint.load(f"{folder}-own", model=model, optimizer=optimizer)
    elif steps[0]:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(*steps):
        grads = grads_of(step, dtype)
        for name, param in params.items():
            grad = grads.get(name)
            if grad is not None and isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
    if expected is None:
        dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
        so.checkpoint.save(f"{folder}-own", steps[1], model=model, optimizer=optimizer)
        return
    for name, values in torch.load(expected).items():
        for key, value in values.items():
            actual = params[name].detach() if key == "param" else optimizer.state[params[name]][key]
            actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
            assert torch.equal(actual, value), f"{wrapper} {name} {key}"


def test_a_checkpoint_goes_on_under_another_sharding(tmp_path: Path) -> None:
    """Saved by FSDP2 on 2 ranks; DDP and FSDP2 on 3, and HSDP on 4, go on with the bits of one process that never stopped."""
    expected = str(tmp_path / "expected")
    torch.save(unsharded("stable_adamw-polar-fp32", torch.float32, range(8)), expected)
    ranks.run(check_save_or_load, 2, str(tmp_path / "saved"), "fsdp2", (0, 5), None)
    ranks.run(check_save_or_load, 3, str(tmp_path / "saved"), "ddp", (5, 8), expected)
    ranks.run(check_save_or_load, 3, str(tmp_path / "saved"), "fsdp2", (5, 8), expected, True)
    ranks.run(check_save_or_load, 4, str(tmp_path / "saved"), "hsdp", (5, 8), expected)
