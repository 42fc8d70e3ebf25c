"""Bad input is a ValueError that names the tensor, the rule and the way out: on every rank, also when one rank alone has it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import sharded_optim as so

CLASSES = [so.Adam, so.AdamW, so.DecoupledAdamW, so.DecoupledSGDW, so.StableAdamW]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@every_class
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), r"parameter 'w' is sparse .*; build the layer with sparse=False|only dense tensors"),
        (torch.ones(3, dtype=torch.complex64), "parameter 'w' is complex .*view_as_real"),
        (torch.ones(3, dtype=torch.int64), "parameter 'w' has integer dtype torch.int64; .*leave it out"),
        (torch.ones(3, dtype=torch.float64), r"parameter 'w': dtype torch.float64 is not supported .*convert with .to"),
    ],
    ids=["sparse", "complex", "integer", "float64"],
)
def test_unusable_parameters_are_refused_at_construction(cls: type, tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls([("w", tensor)], lr=1e-3)


@every_class
def test_sparse_gradients_are_refused_and_nothing_is_written(cls: type) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = cls([("other", other), ("embedding.weight", embedding.weight)], lr=1e-3)
    before = embedding.weight.detach().clone()
    other.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 'embedding.weight' is sparse .*sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert torch.equal(other.detach(), torch.ones(2))


WRONG_LATER = {
    "shape": (lambda grad: grad.reshape(3, 2), "has shape"),
    "sparse": (lambda grad: grad.to_sparse(), "is sparse"),
    "negated": (lambda grad: torch._neg_view(grad), "negated when it is read"),
    "integers": (lambda grad: grad.view(torch.int32), "integer dtype"),
    "meta": (lambda grad: grad.to("meta"), "is on meta"),
    "without memory": (lambda grad: torch._efficientzerotensor(grad.shape), "has no memory"),
    "subclass": (lambda grad: torch.nn.Buffer(grad).as_subclass(Tagged), "is a Tagged"),
}


class Tagged(torch.Tensor):
    """A tensor that is not torch's own."""


@every_class
@pytest.mark.parametrize("wrong", WRONG_LATER)
@pytest.mark.parametrize("where", ["gradient", "state"])
def test_what_is_wrong_with_a_tensor_that_was_allocated_anew_is_seen_in_a_later_step(cls: type, wrong: str, where: str) -> None:
    """Also where it has as many bytes as the one before."""
    make, words = WRONG_LATER[wrong]
    options = {"momentum": 0.9} if cls is so.DecoupledSGDW else {}
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    optimizer = cls([(f"w{index}", param) for index, param in enumerate(params)], lr=1e-2, **options)
    for param in params:
        param.grad = torch.ones(2, 3)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.full((2, 3), 0.5)
    spoiled = make(torch.ones(2, 3))
    if where == "gradient":
        try:
            params[1].grad = spoiled
        except (RuntimeError, TypeError):
            pytest.skip("torch refuses it as a gradient")
    else:
        key = "momentum_buffer" if cls is so.DecoupledSGDW else "exp_avg"
        optimizer.state[params[1]][key] = spoiled
    with pytest.raises(ValueError, match=f"of 'w1'.* {words}"):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(params, before, strict=True))


@every_class
def test_duplicate_parameters_are_refused(cls: type) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="parameter 'b' appears twice, also as 'a'; give each parameter once"):
        cls([("a", a), ("b", a)], lr=1e-3)
    with pytest.raises(ValueError, match=r"param_groups\[1\].params\[1\]' appears twice, also as 'param_groups\[0\].params\[0\]"):
        cls([{"params": [a]}, {"params": [b, a]}], lr=1e-3)
    optimizer = cls([a], lr=1e-3)
    with pytest.raises(ValueError, match="appears twice"):
        optimizer.add_param_group({"params": a})
    assert len(optimizer.param_groups) == 1


@every_class
@pytest.mark.parametrize(
    ("params", "words"),
    [
        (nn.Linear(2, 2), r"got Linear; pass model.parameters\(\) or model.named_parameters\(\)"),
        (nn.Sequential(nn.Linear(2, 2)), r"got Sequential; pass model.parameters\(\)"),  # which can be iterated over
        (nn.Linear(2, 2).parameters, r"got a method that was not called; pass model.parameters\(\)"),
        ([{"params": nn.Linear(2, 2)}], r"the params of param_groups\[0\] must be .*, got Linear; pass"),
        (nn.Linear(2, 2).state_dict(), r"got OrderedDict; pass model.named_parameters\(\)"),
        ({"params": list(nn.Linear(2, 2).parameters())}, "got dict; put a param group into a list"),
        (3, "got int; pass"),
    ],
    ids=["model", "iterable model", "method", "model in a group", "state dict", "group", "number"],
)
def test_what_is_no_collection_of_parameters_is_refused_with_what_to_pass(cls: type, params: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        cls(params)
    if not isinstance(params, nn.Module):  # which it takes
        with pytest.raises(TypeError, match=words):
            so.ShardedOptimizer(params, cls)
    cls(nn.ParameterList([nn.Parameter(torch.ones(2))]))


@every_class
def test_two_parameters_of_one_name_are_refused(cls: type) -> None:
    """Their statistics would be added up as if they were pieces of one tensor."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"two parameters are named 'w'; make the names unique"):
        cls([("w", a), ("w", b)], lr=1e-3)


@every_class
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", math.nan, "lr must be a finite number"),
        ("lr", math.inf, "lr must be a finite number"),
        ("lr", -0.5, "lr must be a finite number >= 0, got -0.5"),
        ("lr", "1e-3", "lr must be a finite number >= 0, got '1e-3'"),
        ("betas", 0.9, "betas must be numbers"),
        ("weight_decay", -1.0, "weight_decay must be a finite number >= 0"),
        ("eps", None, "eps must be a finite number >= 0, got None"),
        ("betas", (0.9, 1.0), "betas must be numbers"),
        ("decay_form", "none", "decay_form must be one of"),
        ("maximize", True, "maximize=True is not supported"),
    ],
)
def test_hyperparameters_that_change_later_are_checked_before_anything_is_written(cls: type, key: str, value: object, words: str) -> None:
    """By a scheduler or a user before a step, or by a state dict when it is loaded."""
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([param], lr=1e-3)
    param.grad = torch.ones(3)
    saved = optimizer.state_dict()
    saved["param_groups"][0] = saved["param_groups"][0] | {key: value}
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0].get(key, ...) != value
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))


def test_moments_that_would_never_fall_are_refused_when_betas_change_later() -> None:
    """As when the state dict of a torch AdamW, with its beta2 of 0.999, is loaded into bf16 moments."""
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([param], lr=1e-3, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs beta2 <= 0.9961, got 0.999"):
        optimizer.load_state_dict(torch.optim.AdamW([param], lr=1e-3).state_dict())
    optimizer.param_groups[0]["betas"] = (0.9, 0.9999)
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"needs beta2 <= 0.9961, got 0.9999"):
        optimizer.step()


@every_class
def test_a_scheduler_may_round_an_lr_to_just_below_0(cls: type) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([param], lr=1e-3)
    optimizer.param_groups[0]["lr"] = -1e-20
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))


@every_class
def test_an_optimizer_without_any_parameter_is_refused(cls: type) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([], lr=1e-3)
    for groups in ([{"params": []}], [{"params": []}, {"params": ()}]):
        with pytest.raises(ValueError, match="params has no parameters, in any group; give the parameters of a model"):
            cls(groups, lr=1e-3)


@every_class
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "max_lr", "momentum", "dampening"])
def test_negative_and_non_finite_hyperparameters_are_refused(cls: type, name: str, value: float) -> None:
    if name not in inspect.signature(cls).parameters:
        pytest.skip(f"{cls.__name__} has no {name}")
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=rf"{name} must be a finite number >= 0, got {value}"):
        cls(params, **({"lr": 1e-3} | {name: value}))
    with pytest.raises(ValueError, match=rf"{name} must be a finite number >= 0, got {value} in param_groups\[0\]"):
        cls([{"params": params, name: value}], lr=1e-3)


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.DecoupledAdamW, so.StableAdamW])
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), (0.9,)])
def test_betas_outside_0_to_1_are_refused(cls: type, betas: tuple) -> None:
    with pytest.raises(ValueError, match=r"betas must be (two )?numbers in \[0, 1\)"):
        cls([nn.Parameter(torch.ones(2))], lr=1e-3, betas=betas)


def test_unknown_options_are_refused_with_the_known_ones() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"backend must be one of auto, cpu.*eager.*got 'cuda'"):
        so.AdamW(params, lr=1e-3, backend="cuda")
    with pytest.raises(ValueError, match=r"nonfinite must be 'skip', 'raise' or 'allow', .* got 'ignore'"):
        so.AdamW(params, lr=1e-3, nonfinite="ignore")
    with pytest.raises(ValueError, match=r"state_dtype must be torch.float32, torch.bfloat16 or .* got torch.float16"):
        so.AdamW(params, lr=1e-3, state_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"needs beta2 <= 0.9961, got 0.999 in the optimizer.s arguments: .* never decrease; lower beta2"):
        so.AdamW(params, lr=1e-3, betas=(0.9, 0.999), state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"amsgrad=True is not supported by StableAdamW.*in param_groups\[0\]"):
        so.StableAdamW([{"params": params, "amsgrad": True}], lr=1e-3)
    with pytest.raises(ValueError, match="decay_form must be one of coupled, decoupled, corrected, l2, got 'none'"):
        so.AdamW(params, lr=1e-3, decay_form="none")
    with pytest.raises(ValueError, match="decay_form='l2' is not supported by StableAdamW"):
        so.StableAdamW(params, lr=1e-3, decay_form="l2")
    with pytest.raises(ValueError, match="decouple_lr=True means decay_form='decoupled'"):
        so.AdamW(params, lr=1e-3, decouple_lr=True, decay_form="coupled")


@every_class
def test_lr_0_is_legal(cls: type) -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = cls([param], lr=0)
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))


# ------------------------------------------------------------------------------------------------------------------ sharded


def refused(words: str, call) -> None:
    """This rank, like every rank, gets the ValueError; the barrier shows that none hangs."""
    with pytest.raises(ValueError, match=words):
        call()
    dist.barrier()


def mesh_1d():
    return init_device_mesh("cpu", (dist.get_world_size(),))


@pytest.mark.ranks(2)
def test_partial_parameters_are_refused() -> None:
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh_1d(), [Partial()], run_check=False))
    for cls in CLASSES:
        refused(r"parameter 'w' is Partial .*redistribute", lambda cls=cls: cls([("w", partial)], lr=1e-3))


@pytest.mark.ranks(2)
def test_gradients_that_are_not_reduced_yet_are_reduced_for_the_step() -> None:
    """Partial DTensors are reduced over their mesh, results of functional collectives waited for. Gradients are not written."""
    rank = dist.get_rank()
    values = torch.arange(8.0).view(4, 2)
    for cls in CLASSES:
        for placement, op in ((Replicate(), "sum"), (Shard(0), "sum"), (Shard(0), "avg")):
            param, expected = (nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh_1d(), [placement])) for _ in range(2))
            param.grad = DTensor.from_local(values * (rank + 1), mesh_1d(), [Partial(op)], run_check=False)
            whole = values * (3 if op == "sum" else 1.5)
            expected.grad = distribute_tensor(whole, mesh_1d(), [placement])
            for each in (param, expected):
                cls([("w", each)], lr=1e-1).step()
            assert torch.equal(param.full_tensor(), expected.full_tensor())
            assert param.grad.placements == (Partial(op),)
        plain, whole = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4, 2))
        plain.grad = funcol.all_reduce(values, "sum", dist.group.WORLD)
        assert type(plain.grad) is not torch.Tensor
        whole.grad = values * 2
        for each in (plain, whole):
            cls([("w", each)], lr=1e-1).step()
        assert torch.equal(plain, whole)


@pytest.mark.ranks(2)
def test_a_gradient_that_is_partial_on_one_rank_alone_is_refused_on_all() -> None:
    """The others take part in the reduction, in the first step and later; reports of one rank communicate nothing."""
    rank = dist.get_rank()
    for cls in (so.StableAdamW, so.AdamW):
        for first in (True, False):
            params = {name: nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh_1d(), [Replicate()])) for name in ("v", "w")}
            optimizer = cls(params.items(), lr=1e-1, nonfinite="skip")

            def give(*, all_ranks: bool, params: dict = params) -> None:
                for param in params.values():
                    param.grad = DTensor.from_local(torch.ones(4, 2), mesh_1d(), [Partial()], run_check=False)
                if rank == 1 and not all_ranks:
                    params["w"].grad = None

            if not first:
                give(all_ranks=True)
                optimizer.step()
                report = optimizer.report_per_parameter_metrics(params["w"], "w", {}) if rank == 0 else {}
                assert not any("grad" in key for key in report)
                assert ("l2_norm/param/w" in report) == (rank == 0)
            give(all_ranks=False)
            refused("'w' has a gradient on rank 0 and none on rank 1", optimizer.step)
            give(all_ranks=True)
            optimizer.step()


@pytest.mark.ranks(2)
def test_a_gradient_placed_otherwise_than_its_parameter_is_refused() -> None:
    for cls in CLASSES:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh_1d(), [Shard(0)]))
        optimizer = cls([("w", param)], lr=1e-3)
        param.grad = distribute_tensor(torch.ones(4, 2), mesh_1d(), [Replicate()])
        refused(r"gradient of 'w' is placed as .*Replicate.*redistribute it", optimizer.step)


@pytest.mark.ranks(2)
def test_pieces_that_overlap_are_refused() -> None:
    # Each rank claims to hold rows that another holds too: a _StridedShard alone interleaves rows, which no Segment of one box can express.
    param = nn.Parameter(
        DTensor.from_local(torch.ones(4, 2), mesh_1d(), [_StridedShard(0, split_factor=2)], run_check=False, shape=(8, 2), stride=(2, 1))
    )
    refused(r"pieces of 'w' \(shape \(8, 2\)\) do not tile it: element", so.StableAdamW([("w", param)], lr=1e-3).step)


@pytest.mark.ranks(2)
def test_a_shard_whose_other_half_is_outside_the_process_group_is_refused() -> None:
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh_1d(), [Shard(0)]))
    optimizer = so.StableAdamW([("w", sharded)], lr=1e-3, process_group=dist.new_subgroups(1)[0])
    refused(r"pieces of 'w' .* do not tile it: elements \[\d+, \d+\) of 8 are held by no rank.*process group", optimizer.step)


@pytest.mark.ranks(2)
def test_ranks_that_disagree_about_a_shape_are_refused() -> None:
    param = nn.Parameter(torch.ones(3 + dist.get_rank()))
    refused(
        r"ranks disagree about 'w': shape \(3,\).*on rank 0, shape \(4,\).*on rank 1.*same model",
        so.StableAdamW([("w", param)], 1e-3).step,
    )


@pytest.mark.ranks(2)
def test_ranks_that_disagree_about_a_dtype_are_refused() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.float32 if dist.get_rank() == 0 else torch.bfloat16))
    refused(r"ranks disagree about 'w': .*torch.float32 on rank 0.*torch.bfloat16 on rank 1", so.StableAdamW([("w", param)], 1e-3).step)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [None, "w"])
def test_replicas_with_different_values_are_refused(name: str | None) -> None:
    different = nn.Parameter(torch.full((3,), float(dist.get_rank())))
    params = [different] if name is None else [(name, different)]
    refused(r"ranks 0 and 1 both hold .* but with different values.*names that are unique", so.StableAdamW(params, 1e-3).step)


@pytest.mark.ranks(2)
def test_replicas_with_different_gradients_are_refused() -> None:
    """Two stages of a pipeline that begin alike, or ranks that train apart."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3) * (1 + dist.get_rank())
    refused(r"ranks 0 and 1 both hold 'w' .* but with different gradients", so.StableAdamW([("w", param)], 1e-3).step)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "of_ranks",
    [
        ({"betas": (0.9, 0.99)}, {"betas": (0.9, 0.985)}),
        ({"betas": (0.9, 0.99)}, {"betas": (0.5, 0.99)}),
        ({"lr": 1e-3}, {"lr": 2e-3}),
        ({"weight_decay": 0.0}, {"weight_decay": 0.1}),
        ({"eps": 1e-6}, {"eps": 1e-8}),
    ],
    ids=["beta2", "beta1", "lr", "weight_decay", "eps"],
)
def test_ranks_that_disagree_about_a_hyperparameter_are_refused(of_ranks: tuple[dict, dict]) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], **({"lr": 1e-3} | of_ranks[dist.get_rank()]))
    param.grad = torch.ones(3)
    refused(r"ranks disagree about 'w': .* is .* on rank 0, .* on rank 1; make hyperparameters", optimizer.step)


@pytest.mark.ranks(2)
def test_ranks_that_disagree_about_the_number_of_steps_are_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], 1e-3)
    optimizer.init_state()
    optimizer.state[param]["step"] += dist.get_rank()
    param.grad = torch.ones(3)
    refused("number of steps taken is 0 on rank 0, 1 on rank 1", optimizer.step)


def give_gradients_to_replicas(of_ranks: tuple[float, float]) -> so.StableAdamW:
    """Two tensors, of which one has another gradient on each rank."""
    largest, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    largest.grad, other.grad = torch.ones(1), torch.full((1,), of_ranks[dist.get_rank()])
    return so.StableAdamW([("largest", largest), ("other", other)], 1e-3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("of_ranks", [(1.0, 1.03), (1e-3, 1.1e-3)])
def test_replicas_whose_gradient_norms_differ_by_3_percent_are_refused(of_ranks: tuple[float, float]) -> None:
    """They train apart; also where a tensor has small gradients."""
    refused(r"ranks 0 and 1 both hold 'other' .* but with different gradients", give_gradients_to_replicas(of_ranks).step)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("of_ranks", [(1.0, 1.003), (1e-5, 3e-5)])
def test_gradients_of_replicas_may_differ_by_rounding(of_ranks: tuple[float, float]) -> None:
    give_gradients_to_replicas(of_ranks).step()


@pytest.mark.ranks(2)
def test_replicas_may_have_drifted_in_their_last_bits() -> None:
    """Harmless once training goes on: unfreezing layers must not end a run."""
    param, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], 1e-3)
    param.grad = torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        param[0] = torch.nextafter(param[0], torch.tensor(2.0 * dist.get_rank()))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(3)
    optimizer.step()
    dist.barrier()


@pytest.mark.ranks(2)
def test_tensors_of_one_name_on_different_meshes_are_different_tensors() -> None:
    """A DTensor on another mesh is another tensor, whatever its name."""
    meshes = [DeviceMesh("cpu", [rank]) for rank in range(dist.get_world_size())]
    values = torch.randn(4, 2, generator=torch.Generator().manual_seed(dist.get_rank()))
    param = nn.Parameter(distribute_tensor(values, meshes[dist.get_rank()], [Shard(0)]))
    refused("both hold 'weight' .* different values", so.StableAdamW([("weight", param)], 1e-3).step)


def stepped_once() -> tuple[nn.Parameter, so.StableAdamW]:
    param = nn.Parameter(torch.ones(4, 2))
    optimizer = so.StableAdamW([("w", param)], lr=1e-3)
    param.grad = torch.ones(4, 2)
    optimizer.step()
    return param, optimizer


@pytest.mark.ranks(2)
def test_a_sparse_gradient_on_one_rank_alone_is_refused_on_all() -> None:
    param, optimizer = stepped_once()
    before = param.detach().clone()
    if dist.get_rank() == 1:
        param.grad = torch.ones(4, 2).to_sparse()
    refused("rank 1: gradient of 'w' is sparse", optimizer.step)
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


@pytest.mark.ranks(2)
def test_a_gradient_that_one_rank_lacks_is_refused_on_all() -> None:
    param, optimizer = stepped_once()
    before = param.detach().clone()
    param.grad = torch.ones(4, 2) if dist.get_rank() == 0 else None
    refused("'w' has a gradient on rank . and none on rank .; .*set the missing gradients to zero", optimizer.step)
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


@pytest.mark.ranks(2)
def test_state_that_one_rank_has_lost_is_refused_on_all() -> None:
    """Whatever goes wrong on a rank before the agreement, the others hear of it instead of waiting."""
    param, optimizer = stepped_once()
    if dist.get_rank() == 1:
        del optimizer.state[param]["exp_avg_sq"]
    refused(r"rank 1: the state of 'w' lacks 'exp_avg_sq' after 1 steps", optimizer.step)


@pytest.mark.ranks(2)
def test_a_hyperparameter_that_one_rank_has_lost_is_refused_on_all() -> None:
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = so.AdamW([("w", param)], lr=1e-3, nonfinite="skip")
    if dist.get_rank() == 1:
        del optimizer.param_groups[0]["reference_lr"]
    refused(r"rank 1: param_groups\[0\] has lost 'reference_lr'", optimizer.step)


@pytest.mark.ranks(2)
def test_a_parameter_that_one_rank_has_replaced_by_a_bad_one_is_refused_on_all() -> None:
    """Found when the layout is built: parameters may have been replaced since construction."""
    param = nn.Parameter(torch.ones(4))
    optimizer = so.StableAdamW([("w", param)], lr=1e-3)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, dtype=torch.float64))
    refused("rank 1: parameter 'w': dtype torch.float64 is not supported", optimizer.step)


@pytest.mark.ranks(4)
def test_a_dtensor_cut_along_two_inner_dimensions_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4, 4), mesh, [Shard(1), Shard(2)]))
    for cls in CLASSES:
        refused(
            r"'w' of shape \(4, 4, 4\) is cut along dimensions \[1, 2\].*shard it along fewer", lambda cls=cls: cls([("w", param)], 1e-3)
        )
