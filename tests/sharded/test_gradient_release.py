"""Gradient release: the step inside backward gives the bits of the step after it, and gradients are gone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import gradient_memory
import optimi
import pytest
import torch
import torch.distributed as dist
from collectives import collectives_of
from test_training import Model, fsdp2, fsdp2_tp, full_values, hsdp, train
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import sharded_optim as so

OPTIMIZERS: dict[str, Callable] = {
    "Adam": lambda params, **options: so.Adam(params, lr=1e-2, weight_decay=0.1, **options),
    "AdamW": lambda params, **options: so.AdamW(params, lr=1e-2, **options),
    "DecoupledAdamW": lambda params, **options: so.DecoupledAdamW(params, lr=1e-2, amsgrad=True, **options),
    "DecoupledSGDW": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, momentum=0.9, dampening=0.1, **options),
    "StableAdamW": lambda params, **options: so.StableAdamW(params, lr=1e-2, **options),
}
STEPS = range(8)


def released(model: nn.Module, make: Callable, steps: range = STEPS, rank: int = 0, world_size: int = 1) -> torch.optim.Optimizer:
    optimizer = make(model.parameters(), gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    train(model, optimizer, steps, rank, world_size)
    assert all(param.grad is None for param in model.parameters())
    return optimizer


def assert_equal(actual: nn.Module, expected: nn.Module, where: str = "") -> None:
    for a, e in zip(full_values(actual), full_values(expected), strict=True):
        assert torch.equal(a, e), where


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_ends_with_the_bits_of_ordinary_steps(name: str, dtype: torch.dtype) -> None:
    """Although `step` and `zero_grad` are still called after backward, where they find nothing to do."""
    ordinary, model = Model().to(dtype), Model().to(dtype)
    for each in (ordinary, model):
        each.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    train(ordinary, OPTIMIZERS[name](ordinary.parameters()), STEPS, 0, 1)
    optimizer = released(model, OPTIMIZERS[name])
    assert_equal(model, ordinary)
    assert {float(state["step"]) for state in optimizer.state.values()} == {float(len(STEPS))}


def test_removed_hooks_leave_gradients_for_ordinary_steps() -> None:
    ordinary, model = Model(), Model()
    train(ordinary, so.StableAdamW(ordinary.parameters(), lr=1e-2), range(8), 0, 1)
    optimizer = released(model, OPTIMIZERS["StableAdamW"], range(4))
    so.remove_gradient_release(model)
    train(model, optimizer, range(4, 8), 0, 1)
    assert all(param.grad is not None for param in model.parameters())
    assert_equal(model, ordinary)
    with pytest.warns(UserWarning, match="not prepared for gradient release"):
        so.remove_gradient_release(model)


@pytest.mark.parametrize("steps", [1, 4])
def test_metrics_cover_all_parameters_stepped_in_a_backward(steps: int) -> None:
    """From the first step on, after which `step` of all parameters finds nothing to do."""
    model, ordinary = Model(), Model()
    named = so.StableAdamW(ordinary.named_parameters(), lr=1e-2)
    train(ordinary, named, range(steps), 0, 1)
    optimizer = so.StableAdamW(model.named_parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    train(model, optimizer, range(steps), 0, 1)
    assert optimizer.metrics() == named.metrics()
    assert {f"rms/{name}" for name, _ in model.named_parameters()} <= optimizer.metrics().keys()


@pytest.mark.filterwarnings("ignore:the first step found no gradient")
def test_a_step_of_all_parameters_ends_the_reports_of_steps_of_some() -> None:
    """A parameter without a gradient in it is not reported as of a step before."""
    params = {name: nn.Parameter(torch.ones(3)) for name in ("released", "late")}
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2)
    optimizer.step()
    for name, param in params.items():
        param.grad = torch.ones(3)
        optimizer.step(param=param if name == "released" else None)
        assert [key for key in optimizer.metrics() if key.startswith(("rms/", "clip_factor/"))] == [f"rms/{name}", f"clip_factor/{name}"]
        for other, each in params.items():
            reported = optimizer.report_per_parameter_metrics(each, other, {})
            assert bool(reported[f"l2_norm/update/{other}"] > 0) == (other == name)
        optimizer.zero_grad()


def test_a_unit_that_is_not_finite_is_left_out_and_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    model[1].bias.register_hook(lambda grad: grad * torch.nan)
    before = copy.deepcopy(model)
    model(torch.ones(1, 3)).sum().backward()
    assert optimizer.skipped_steps == 1
    assert torch.equal(model[1].bias, before[1].bias)
    assert not torch.equal(model[0].bias, before[0].bias)
    assert model[1].bias.grad is None


@pytest.mark.parametrize("name", ["Adam", "AdamW", "StableAdamW"])
def test_optimizer_accumulation_follows_optimi(name: str) -> None:
    """Three micro-batches update the moments alone, the fourth the parameters too; every one counts as a step."""
    models = [Model(), Model()]
    ours = getattr(so, name)(models[0].parameters(), lr=1e-2, weight_decay=0.1, gradient_release=True)
    theirs = getattr(optimi, name)(models[1].parameters(), lr=1e-2, weight_decay=0.1, gradient_release=True, triton=False)
    so.prepare_for_gradient_release(models[0], ours)
    optimi.prepare_for_gradient_release(models[1], theirs)
    start = copy.deepcopy(models[0])
    for micro_batch in range(12):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.optimizer_accumulation = micro_batch % 4 != 3
            train(model, optimizer, range(micro_batch, micro_batch + 1), 0, 1)
        if micro_batch == 2:
            assert_equal(models[0], start)
    for a, e in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-6)
        assert ours.state[a]["step"] == 12


def test_gradients_never_exceed_one_parameter_at_a_time() -> None:
    """Bytes of gradients alive whenever one is complete."""
    model = Model()
    optimizer = so.AdamW(model.parameters(), lr=1e-2, gradient_release=True)
    alive = []

    def count(_: torch.Tensor) -> None:
        alive.append(sum(param.grad.nbytes for param in model.parameters() if param.grad is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    so.prepare_for_gradient_release(model, optimizer, ignore_existing_hooks=True)
    model(torch.ones(2, 17)).sum().backward()
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) == max(param.nbytes for param in model.parameters())


def test_peak_memory_falls_by_nearly_all_gradients() -> None:
    """Peak resident memory of a process that trains 24 layers of 4 MiB, above that of the same process before training."""
    assert gradient_memory.peak(released=False) > gradient_memory.GRADIENTS
    assert gradient_memory.peak(released=True) < 0.15 * gradient_memory.GRADIENTS


def test_misuse_is_refused() -> None:
    model = Model()
    optimizer = so.AdamW(model.parameters(), lr=1e-2, gradient_release=True)
    with pytest.raises(TypeError, match="an optimizer of sharded_optim, got AdamW"):
        so.prepare_for_gradient_release(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="pass gradient_release=True"):
        so.prepare_for_gradient_release(model, so.AdamW(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match="no trainable parameter of the model"):
        so.prepare_for_gradient_release(Model(), optimizer)
    handle = model[1].bias.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(ValueError, match=r"parameter '1.bias' has a post-accumulate-grad hook already; pass ignore_existing_hooks"):
        so.prepare_for_gradient_release(model, optimizer)
    handle.remove()
    so.prepare_for_gradient_release(model, optimizer)
    with pytest.raises(ValueError, match="already prepared"):
        so.prepare_for_gradient_release(model, optimizer)
    with pytest.raises(ValueError, match="a closure or a param, not both"):
        optimizer.step(lambda: None, param=model[1].bias)
    stranger = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="in none of the optimizer's param groups"):
        optimizer.step(param=stranger)
    with pytest.warns(UserWarning, match="foreach=True has no effect"):
        so.AdamW(model.parameters(), lr=1e-2, gradient_release=True, foreach=True)


def test_a_refused_gradient_is_gone_and_the_next_backward_goes_on() -> None:
    """Left, it would be added to every later one."""
    model = nn.Linear(3, 1)
    optimizer = so.AdamW(model.named_parameters(), lr=1e-2, gradient_release=True, nonfinite="raise")
    so.prepare_for_gradient_release(model, optimizer)
    with pytest.raises(FloatingPointError, match="gradient not finite"):
        (model(torch.ones(1, 3)) * torch.nan).sum().backward()
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    assert optimizer.state[model.weight]["step"] == 1
    assert model.weight.grad is None


def test_grad_scaler_is_refused_together_with_gradient_release() -> None:
    """Backward has stepped by scaled gradients by then, which is the earliest that can be noticed."""
    model = nn.Linear(3, 1)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    with pytest.raises(ValueError, match="gradients were released in backward, still scaled; use one of the two"):
        scaler.step(optimizer)


def test_adams_update_is_reported_although_its_gradient_is_gone() -> None:
    model = nn.Linear(3, 1)
    for make, keys in (
        (so.AdamW, {"l2_norm/moment/w", "l2_norm/param/w", "l2_norm/update/w"}),
        (so.DecoupledSGDW, {"l2_norm/param/w"}),
    ):
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.0, gradient_release=True)
        so.prepare_for_gradient_release(model, optimizer)
        model(torch.ones(1, 3)).sum().backward()
        so.remove_gradient_release(model)
        metrics = optimizer.report_per_parameter_metrics(model.weight, "w", {})
        assert metrics.keys() == keys
        assert make is so.DecoupledSGDW or metrics["l2_norm/update/w"].item() == pytest.approx(1e-2 * 3**0.5, rel=1e-4)


def test_a_prepared_model_and_its_optimizer_are_freed() -> None:
    """Though autograd holds the hooks, and Python cannot see the cycle."""
    model = Model()
    optimizer = so.AdamW(model.parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    model(torch.ones(2, 17)).sum().backward()
    seen = [weakref.ref(each) for each in (model, optimizer, model[1].weight)]
    del model, optimizer
    gc.collect()
    assert [each() for each in seen] == [None] * 3


def test_an_optimizer_that_nobody_else_holds_lives_as_long_as_its_model() -> None:
    model = Model()
    so.prepare_for_gradient_release(model, so.AdamW(model.parameters(), lr=1e-2, gradient_release=True))
    gc.collect()
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 17)).sum().backward()
    assert not torch.equal(model[1].bias, before["1.bias"])


def test_tied_and_frozen_parameters_step_once_or_not_at_all() -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 5))
        model[2].weight = model[0].weight
        model[3].weight.requires_grad_(False)
        return model

    ordinary, model = tied(), tied()
    optimizers = [so.StableAdamW(each.parameters(), lr=1e-2, gradient_release=each is model) for each in (ordinary, model)]
    so.prepare_for_gradient_release(model, optimizers[1])
    for step in range(4):
        for each, optimizer in zip((ordinary, model), optimizers, strict=True):
            each(torch.full((2, 5), step - 1.5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(model, ordinary)


# ------------------------------------------------------------------------------------------------------------------ sharded


def ddp(model: Model, **options) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=0.002, **options)  # several buckets


def grads_alive_elsewhere(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """How many other parameters have a gradient whenever some are stepped."""
    alive = []

    def count(_, args: tuple, options: dict) -> None:
        alive.append(sum(param.grad is not None for param in model.parameters()) - len(options["param"]))

    optimizer.register_step_pre_hook(count)
    model(torch.ones(2, 17)).square().mean().backward()
    return alive


def assert_bits_of_ordinary_steps(name: str, wrap: Callable[[Model], nn.Module], model_parallel: int = 1) -> None:
    rank, world_size = dist.get_rank() // model_parallel, dist.get_world_size() // model_parallel
    make = OPTIMIZERS[name]
    ordinary, model = wrap(Model()), wrap(Model())
    train(ordinary, make(ordinary.parameters()), STEPS, rank, world_size)
    released(model, make, STEPS, rank, world_size)
    assert_equal(model, ordinary, f"{name} {wrap}")


@pytest.mark.ranks(2)
def test_a_model_that_was_prepared_inside_of_ddp_is_refused() -> None:
    """Each rank would step by its own gradients."""
    model = ddp(Model())
    optimizer = so.AdamW(model.parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model.module, optimizer)
    with pytest.raises(ValueError, match=r"inside or before DistributedDataParallel.*wrap it first"):
        model(torch.ones(2, 17))


@pytest.mark.ranks(2)
def test_a_ddp_model_with_a_communication_hook_is_refused() -> None:
    hooked = ddp(Model())
    hooked.register_comm_hook(None, allreduce_hook)
    optimizer = so.AdamW(hooked.parameters(), lr=1e-2, gradient_release=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="has a communication hook already"):
            so.prepare_for_gradient_release(hooked, optimizer)


@pytest.mark.ranks(2)
def test_a_model_that_fsdp2_shards_after_it_was_prepared_is_refused() -> None:
    late = Model()
    so.prepare_for_gradient_release(late, so.AdamW(late.parameters(), lr=1e-2, gradient_release=True))
    fsdp2(late)
    with pytest.raises(ValueError, match="parameters were replaced after prepare_for_gradient_release"):
        late(torch.ones(2, 17))


bucket_views = pytest.mark.parametrize("is_view", [False, True], ids=["copies", "bucket views"])


@pytest.mark.ranks(2)
@bucket_views
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ddp_ends_with_the_bits_of_ordinary_steps(name: str, is_view: bool) -> None:
    assert_bits_of_ordinary_steps(name, partial(ddp, gradient_as_bucket_view=is_view))


@pytest.mark.ranks(2)
@bucket_views
def test_ddp_with_accumulation_ends_with_the_bits_of_ordinary_steps(is_view: bool) -> None:
    """Over two backward passes with no_sync, back to ordinary steps, and released once more: DDP keeps the hook that it was given."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    models = [ddp(Model(), gradient_as_bucket_view=is_view) for _ in range(2)]
    optimizers = [so.StableAdamW(model.parameters(), lr=1e-2, gradient_release=True) for model in models]
    so.prepare_for_gradient_release(models[1], optimizers[1])
    for step in range(6):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if index == 1 and step == 4:
                so.remove_gradient_release(model)
            x = torch.randn(4, 17, generator=torch.Generator().manual_seed(10 * step + rank))
            with model.no_sync():
                model(x).square().mean().backward()
            model(x + 1).square().mean().backward()
            optimizer.step()
            assert all((param.grad is None) == (index == 1 and step < 4) for param in model.parameters())
            optimizer.zero_grad()
    assert_equal(models[1], models[0])
    so.prepare_for_gradient_release(models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3), rank, world_size)
    assert_equal(models[1], models[0])


@pytest.mark.ranks(2)
def test_gradients_are_freed_as_soon_as_ddp_has_reduced_their_bucket() -> None:
    model = ddp(Model())
    optimizer = released(model, OPTIMIZERS["AdamW"], range(2), dist.get_rank(), dist.get_world_size())
    alive = grads_alive_elsewhere(model, optimizer)
    assert len(alive) > 2, "there are several buckets"
    assert max(alive) <= 2, "those that DDP has reduced are gone; the next bucket fills"


def released_in_part(is_view: bool) -> list[nn.Module]:
    """Two models after a step of all but three parameters, of which the second model's are released."""
    models = [ddp(Model(), gradient_as_bucket_view=is_view) for _ in range(2)]
    optimizers = [so.AdamW(list(model.parameters())[3:], lr=1e-2, gradient_release=True) for model in models]
    so.prepare_for_gradient_release(models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.randn(4, 17, generator=torch.Generator().manual_seed(dist.get_rank()))).square().mean().backward()
        optimizer.step()
    return models


@pytest.mark.ranks(2)
@bucket_views
def test_parameters_that_another_optimizer_steps_keep_their_averaged_gradients(is_view: bool) -> None:
    ordinary, model = released_in_part(is_view)
    assert_equal(model, ordinary)
    for index, (a, e) in enumerate(zip(model.parameters(), ordinary.parameters(), strict=True)):
        assert (a.grad is None) == (index >= 3)
        assert index >= 3 or torch.equal(a.grad, e.grad)


@pytest.mark.ranks(2)
def test_a_gradient_that_somebody_holds_is_not_written_by_later_backward_passes() -> None:
    """But where it is a view of a bucket."""
    _, model = released_in_part(is_view=False)
    for _ in range(2):  # DDP makes its buckets anew after the first
        held = [(param.grad, param.grad.clone()) for param in list(model.parameters())[:3]]
        model.zero_grad()
        model(torch.ones(4, 17)).square().mean().backward()
        assert all(torch.equal(grad, before) for grad, before in held)


@pytest.mark.ranks(2)
def test_ddp_with_find_unused_parameters_is_refused() -> None:
    unused = DistributedDataParallel(Model(), find_unused_parameters=True)
    optimizer = so.AdamW(unused.parameters(), lr=1e-2, gradient_release=True)
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        so.prepare_for_gradient_release(unused, optimizer)


class Partly(nn.Module):
    """A unit of which some parameters get a gradient in some steps only, and one whose input needs none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(17, 8)
        self.sometimes = nn.Linear(8, 8)
        self.plain = nn.Parameter(torch.ones(8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        h = self.first(x) * self.plain
        return self.last(h + self.sometimes(h) if use else h)


def partly_sharded() -> Partly:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Partly()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.last, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.plain})
    return model


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fsdp2_ends_with_the_bits_of_ordinary_steps(name: str) -> None:
    assert_bits_of_ordinary_steps(name, fsdp2)


@pytest.mark.ranks(2)
def test_fsdp2_agrees_once_for_each_group_and_keeps_no_gradient_of_another() -> None:
    """Gloo reduces and scatters by all-reduces: one more than AdamW's for three layers, and for the root with the norm."""
    counts = {}
    for name in ("AdamW", "StableAdamW"):
        model = fsdp2(Model())
        optimizer = released(model, OPTIMIZERS[name], range(2), dist.get_rank(), dist.get_world_size())
        loss = model(torch.ones(2, 17)).square().mean()
        counts[name] = collectives_of(loss.backward).count("gloo:all_reduce")
    assert counts["StableAdamW"] - counts["AdamW"] == 4, counts
    assert grads_alive_elsewhere(model, optimizer) == [0] * 4


@pytest.mark.ranks(2)
def test_fsdp2_units_that_are_complete_in_part_end_with_the_bits_of_ordinary_steps() -> None:
    """With a plain parameter among them."""
    models = [partly_sharded() for _ in range(2)]
    optimizers = [so.StableAdamW(model.parameters(), lr=1e-2, gradient_release=index == 1) for index, model in enumerate(models)]
    so.prepare_for_gradient_release(models[1], optimizers[1])
    for step in range(6):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x = torch.randn(4, 17, generator=torch.Generator().manual_seed(step))
            model(x, use=step % 2 == 0).square().mean().backward()
            assert all(param.grad is None for param in model.parameters()) == (index == 1)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(models[1], models[0])


@pytest.mark.ranks(2)
def test_fsdp2_with_accumulation_keeps_gradients_until_the_last_micro_batch() -> None:
    rank = dist.get_rank()
    models = [fsdp2(Model()) for _ in range(2)]
    optimizers = [so.StableAdamW(model.parameters(), lr=1e-2, gradient_release=index == 1) for index, model in enumerate(models)]
    so.prepare_for_gradient_release(models[1], optimizers[1])
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            for last in (False, True):
                model.set_requires_gradient_sync(last)
                x = torch.randn(4, 17, generator=torch.Generator().manual_seed(100 * step + 10 * last + rank))
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(models[1], models[0])
    assert {float(state["step"]) for state in optimizers[1].state.values()} == {4.0}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("wrap", "model_parallel", "names"),
    [(hsdp, 1, ("Adam", "DecoupledAdamW", "StableAdamW")), (fsdp2_tp, 2, ("AdamW", "DecoupledSGDW", "StableAdamW"))],
)
def test_hsdp_and_tensor_parallelism_end_with_the_bits_of_ordinary_steps(
    wrap: Callable[[Model], nn.Module], model_parallel: int, names: Sequence[str], everything: bool
) -> None:
    """Each optimizer under one of both, and StableAdamW, which agrees, under both, unless everything is asked for."""
    for name in OPTIMIZERS if everything else names:
        assert_bits_of_ordinary_steps(name, wrap, model_parallel)


def test_a_copy_of_a_prepared_model_is_an_ordinary_model() -> None:
    """For averages of weights, as a teacher, or saved whole; before and after the first forward pass. No step is taken in it or for it."""

    def saved(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    inputs = torch.randn(4, 8)
    for copied in (copy.deepcopy, saved, lambda model: AveragedModel(model).module):
        for is_used in (False, True):
            model = nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3))
            optimizer = so.StableAdamW(model.parameters(), lr=1e-2, gradient_release=True)
            so.prepare_for_gradient_release(model, optimizer)
            if is_used:
                model(inputs).square().mean().backward()
            twin = copied(model)
            before = [param.detach().clone() for param in (*twin.parameters(), *model.parameters())]
            twin(inputs).square().mean().backward()
            assert all(map(torch.equal, before, (*twin.parameters(), *model.parameters())))
            assert all(param.grad is not None for param in twin.parameters())
            own = so.StableAdamW(twin.parameters(), lr=1e-2, gradient_release=True)
            so.prepare_for_gradient_release(twin, own)
            so.remove_gradient_release(model)
            twin(inputs).square().mean().backward()
            assert own.state[next(twin.parameters())]["step"] == 1


@pytest.mark.ranks(2)
def test_a_copy_of_a_prepared_ddp_model_is_an_ordinary_one() -> None:
    """It averages gradients as any other, and nobody steps it."""
    model = DistributedDataParallel(nn.Linear(8, 3))
    optimizer = so.AdamW(model.parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(list(twin.parameters()))
    twin(torch.full((2, 8), float(1 + dist.get_rank()))).sum().backward()
    assert all(map(torch.equal, before, twin.parameters()))
    assert torch.equal(next(twin.parameters()).grad, torch.full((3, 8), 3.0))


def test_parameters_that_are_replaced_before_the_first_forward_pass_are_still_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 3))
    optimizer = so.AdamW(model.parameters(), lr=1e-2, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer)
    model[1].weight = nn.Parameter(torch.ones(3, 7))
    with pytest.raises(ValueError, match="replaced after prepare_for_gradient_release"):
        model(torch.randn(2, 8))
