"""ShardedOptimizer's state: how much of it a rank has, what it sends, and how it is saved and loaded."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_models import AWKWARD
from safetensors.torch import load_model, save_model
from test_zero import SMALL, STABLE, assert_like, contributions, one_process, sharded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from benchmarks.fsdp2 import Model as Transformer
from benchmarks.given_gradients import Model, gradients, two_groups
from sharded_optim.step.kernel_calls import KernelCall

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

KAHAN = partial(so.AdamW, lr=1e-2, kahan_sum=True)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends, by the function of torch.distributed that sends them."""
    found: dict[str, int] = {}
    originals = {name: getattr(dist, name) for name in ("isend", "all_reduce", "broadcast")}

    def count(name: str, tensor: Tensor, *args: Any, **options: Any) -> Any:
        found[name] = found.get(name, 0) + tensor.nbytes
        return originals[name](tensor, *args, **options)

    for name in originals:
        setattr(dist, name, partial(count, name))
    try:
        yield found
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        model(contributions(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "make", "per_element"),
    [(torch.float32, STABLE, 8), (torch.bfloat16, STABLE, 12), (torch.bfloat16, KAHAN, 10)],
    ids=["fp32", "bf16 with masters", "bf16 with Kahan sums"],
)
def test_state_falls_with_the_number_of_ranks_and_traffic_is_twice_the_parameters(
    world_size: int, dtype: torch.dtype, make: partial, per_element: int
) -> None:
    """Of a transformer: state in equal shards, 2 (N - 1) / N of the parameters' bytes sent, one small all-reduce in a step."""
    model = Transformer(layers=2, width=32, vocabulary=301, positions=64).to(dtype)
    optimizer = sharded(make, model, bucket_mb=0.05, transport="sends")
    numel = sum(param.numel() for param in model.parameters())
    tokens = torch.randint(301, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with counted() as sent:
        model(tokens).square().mean().backward()
        optimizer.finish_reduction()
        in_backward = dict(sent)
        optimizer.step()
        optimizer.wait()
    padded = sum(bucket.numel for bucket in optimizer._bucket_layout.buckets)
    assert padded - numel < 16 * 4 * world_size * len(optimizer._bucket_layout.buckets), "one pad for each bucket"
    itemsize = dtype.itemsize
    if world_size > 1:
        half = padded * itemsize * (world_size - 1) // world_size
        tensors = len(list(model.parameters()))
        assert in_backward == {"isend": half, "all_reduce": 4 * (tensors + 2)}
        small = sent["all_reduce"] - in_backward["all_reduce"]
        assert sent["isend"] == 2 * half
        assert small == (8 * (2 * tensors + 4) if make.func is so.StableAdamW else 0)
    state = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
    held = sum(value.nbytes for value in state)
    share = per_element * numel / world_size
    pads = per_element * sum(
        bucket.numel - sum(p.numel() for p in (h.param for h in bucket.slots)) for bucket in optimizer._bucket_layout.buckets
    )
    assert share - pads <= held <= share + pads / world_size, f"{held} of {share}"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_equal_whatever_the_sizes_of_tensors(world_size: int) -> None:
    """With default buckets at most 0.1 % of them is padding."""
    model = nn.ParameterList(nn.Parameter(torch.zeros(numel)) for numel in (1_000_003, 7, 1, 0, 12_345, 999_983, 31))
    optimizer = sharded(STABLE, model)
    (bucket,) = optimizer._bucket_layout.buckets
    held = torch.tensor([sum(slot.numel for slot in bucket.slots)])
    everything = [torch.zeros_like(held) for _ in range(world_size)]
    dist.all_gather(everything, held)
    mean = sum(map(int, everything)) / len(everything)
    assert max(map(int, everything)) / mean - 1 < 1e-3
    assert min(map(int, everything)) / mean > 1 - 1e-3


# ------------------------------------------------------------------------------------------------------------------- state dicts

every_dtype = pytest.mark.parametrize(
    ("dtype", "make"),
    [(torch.float32, STABLE), (torch.bfloat16, STABLE), (torch.bfloat16, KAHAN)],
    ids=["fp32", "bf16 with masters", "bf16 with Kahan sums"],
)


@pytest.mark.ranks(2)
@every_dtype
def test_a_run_that_is_saved_and_loaded_goes_on_with_the_bits_of_one_that_is_not(tmp_path: Path, dtype: torch.dtype, make: partial) -> None:
    models = [Model(AWKWARD).to(dtype) for _ in range(2)]
    optimizers = [sharded(make, two_groups(model), bucket_mb=SMALL) for model in models]
    train(models[0], optimizers[0], 1, 3)
    optimizers[0].param_groups[1]["lr"] = 2e-3
    optimizers[0].wait()
    path = tmp_path / f"{dist.get_rank()}.pt"
    torch.save({"model": models[0].state_dict(), "optimizer": optimizers[0].state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    models[1].load_state_dict(saved["model"])
    optimizers[1].load_state_dict(saved["optimizer"])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 4, 5)
        optimizer.wait()
    assert optimizers[1].param_groups[1]["lr"] == 2e-3
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizers[0].state.get(a, {}).keys() == optimizers[1].state.get(b, {}).keys()
        for key, value in optimizers[0].state.get(a, {}).items():
            assert torch.equal(value, optimizers[1].state[b][key]), key


@pytest.mark.ranks(2)
@pytest.mark.parametrize("to", [0, 1])
@every_dtype
def test_what_one_rank_saves_after_consolidation_is_continued_by_all(tmp_path: Path, dtype: torch.dtype, make: partial, to: int) -> None:
    """As trainers save, with the bits of a run that goes on; and it is the state of an optimizer in one process."""
    models = [Model(AWKWARD).to(dtype) for _ in range(2)]
    optimizers = [sharded(make, two_groups(model), bucket_mb=SMALL) for model in models]
    train(models[0], optimizers[0], 1, 3)
    optimizers[0].consolidate_state_dict(to=to)
    path = tmp_path / "consolidated.pt"
    weights = models[0].state_dict()
    if dist.get_rank() == to:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.save({"model": weights, "optimizer": optimizers[0].state_dict()}, path)
    dist.barrier()
    saved = torch.load(path, weights_only=True)
    assert "shards" not in saved["optimizer"]
    for values in saved["optimizer"]["state"].values():
        assert values["exp_avg"].shape in {param.shape for param in models[0].parameters()}
    models[1].load_state_dict(saved["model"])
    optimizers[1].load_state_dict(saved["optimizer"])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 4, 5)
        optimizer.wait()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizers[0].state.get(a, {}).items():
            assert torch.equal(value, optimizers[1].state[b][key]), key
    assert "shards" in optimizers[0].state_dict(), "a step has changed what was collected"
    if dtype == torch.float32:
        expected, _ = one_process(make, [gradients(step, AWKWARD) for step in range(1, 6)], two_groups)
        ordinary = Model(AWKWARD)
        ordinary.load_state_dict(saved["model"])
        resumed = make(two_groups(ordinary), process_group=dist.new_subgroups(1)[0])
        resumed.load_state_dict(saved["optimizer"])
        for step in (4, 5):
            for param, grad in zip(ordinary.parameters(), gradients(step, AWKWARD), strict=True):
                param.grad = grad
            resumed.step()
        for a, b in zip(ordinary.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.ranks(2)
def test_consolidation_to_a_rank_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"to must be a rank of the optimizer's process group, 0 to 1, got 2"):
        sharded(STABLE, Model(AWKWARD)).consolidate_state_dict(to=2)


@pytest.mark.ranks(2)
def test_who_saves_one_ranks_part_is_warned_once(tmp_path: Path) -> None:
    """And who only copies it is not."""
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    train(model, optimizer, 1, 1)
    path = tmp_path / f"{dist.get_rank()}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(optimizer.state_dict())
        table = optimizer.state_dict()["shards"]
        assert type(table)(table.items()) == table, "as Accelerate makes it again"
    with pytest.warns(UserWarning, match=r"one rank's part.*optimizer.consolidate_state_dict\(\) on every rank"):
        torch.save(optimizer.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(optimizer.state_dict(), path)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_saved_alone_and_not_with_its_bucket(tmp_path: Path, dtype: torch.dtype) -> None:
    """A parameter, its master and this rank's part of its state."""
    model = Transformer(layers=2, width=64, vocabulary=301, positions=64).to(dtype)
    optimizer = sharded(STABLE, model)
    model(torch.randint(301, (2, 8))).square().mean().backward()
    optimizer.step()
    optimizer.wait()
    path = tmp_path / f"{dist.get_rank()}.pt"
    for name, param in model.named_parameters():
        own = [value for key, value in optimizer.state.get(param, {}).items() if key != "step"]
        for value in (param, param.detach(), *own):
            torch.save(value, path)
            assert path.stat().st_size < value.nbytes + 2500, f"{name}: {path.stat().st_size} bytes of {value.nbytes}"
        assert param.untyped_storage().nbytes() == param.nbytes
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    save_model(model, str(path))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    load_model(model, str(path))
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert all(bucket.is_bound(slot) for bucket in optimizer._bucket_layout.buckets for slot in bucket.slots)
    copy.deepcopy(model)
    model.share_memory()
    model(torch.randint(301, (2, 8))).square().mean().backward()
    optimizer.step()
    optimizer.wait()
    assert all(torch.isfinite(param).all() and not torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.ranks(2)
def test_the_state_dict_of_an_optimizer_in_one_process_is_continued() -> None:
    """Each rank takes its part."""
    steps = [gradients(step, AWKWARD) for step in (1, 2, 3)]
    expected = one_process(STABLE, steps, two_groups)
    half, saved = one_process(STABLE, steps[:2], two_groups)
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, two_groups(model), bucket_mb=SMALL)
    model.load_state_dict(half.state_dict())
    optimizer.load_state_dict(saved.state_dict())
    train(model, optimizer, 3, 3)
    assert_like(model, optimizer, *expected, "from one process")


@pytest.mark.ranks(2)
def test_the_state_dict_of_torchs_adamw_is_continued() -> None:
    steps = [gradients(step, AWKWARD) for step in (1, 2, 3)]

    def torchs(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2)

    half, saved = one_process(torchs, steps[:2])
    ours = partial(so.AdamW, lr=1e-2, weight_decay=0.0)
    reference = ours(half.parameters())
    reference.load_state_dict(saved.state_dict())
    model = Model(AWKWARD)
    model.load_state_dict(half.state_dict())
    optimizer = sharded(ours, model)
    optimizer.load_state_dict(saved.state_dict())
    train(model, optimizer, 3, 3)
    for param, grad in zip(half.parameters(), steps[2], strict=True):
        param.grad = grad
    reference.step()
    assert_like(model, optimizer, half, reference, "from torch")


@pytest.mark.ranks(2)
def test_a_state_dict_that_does_not_fit_on_one_rank_changes_nothing_on_any() -> None:
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    train(model, optimizer, 1, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(saved)
    number = next(iter(wrong["shards"]))
    wrong["shards"][number]["start"] += 1
    with pytest.raises(ValueError, match=r"rank 0: the state dict was saved with another sharding: of '.*' it has .*in one process"):
        optimizer.load_state_dict(wrong if dist.get_rank() == 0 else saved)
    wrong = copy.deepcopy(saved)
    wrong["param_groups"][0]["betas"] = (2.0, 0.9)
    with pytest.raises(ValueError, match=r"rank 1: betas must be numbers in \[0, 1\)"):
        optimizer.load_state_dict(wrong if dist.get_rank() == 1 else saved)
    with pytest.raises(ValueError, match=r"param groups of \[9\] parameters, the optimizer of \[\d, \d\]"):
        sharded(STABLE, two_groups(Model(AWKWARD))).load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_an_optimizer_that_holds_buckets_cannot_be_copied(way: Callable[..., Any]) -> None:
    optimizer = sharded(STABLE, Model(AWKWARD))
    with pytest.raises(ValueError, match=r"cannot be copied or pickled.*save its state_dict"):
        way(optimizer)


@pytest.mark.ranks(2)
def test_sums_are_taken_as_buckets_arrive_and_again_where_anything_has_changed() -> None:
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    seen = 0

    def count(*arguments: Any, sums: Callable[..., Any] = KernelCall._sums) -> Any:
        nonlocal seen
        seen += 1
        return sums(*arguments)

    buckets = sum(any(slot.numel for slot in bucket.slots) for bucket in optimizer._bucket_layout.buckets)
    assert buckets > 2
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: optimizer.clip_grad_norm_(1e9),
        lambda: optimizer.param_groups[0].update(betas=(0.9, 0.95)),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ]
    train(model, optimizer, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelCall, "_sums", count)
        for step, change in enumerate(changes, start=2):
            model(contributions(step)).backward()
            optimizer.finish_reduction()
            seen = 0
            optimizer.finish_reduction()
            change()
            optimizer.step()
            optimizer.zero_grad()
            assert seen == (0 if step == 2 else buckets), step


@pytest.mark.ranks(2)
def test_real_gradients_train_as_under_ddp() -> None:
    """But for the order in which float32 numbers are added."""
    sizes = {"layers": 2, "width": 32, "vocabulary": 301, "positions": 64}
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(Transformer(**sizes))
    expected = STABLE(wrapped.parameters())
    torch.manual_seed(0)
    model = Transformer(**sizes)
    optimizer = sharded(STABLE, model, bucket_mb=0.05)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(10):
        tokens = torch.randint(301, (2, 16), generator=generator)
        for each, stepping in ((wrapped, expected), (model, optimizer)):
            (each(tokens) - 1.0).square().mean().backward()
            stepping.step()
            stepping.zero_grad()
    optimizer.wait()
    for (name, param), other in zip(model.named_parameters(), wrapped.parameters(), strict=True):
        error = (param - other).norm() / other.norm()
        assert error < 1e-5, f"{name}: {error}"
    assert math.isfinite(float(error))


@pytest.mark.ranks(2)
def test_masters_of_weights_that_were_loaded_are_saved_as_they_are_now() -> None:
    model = nn.Linear(3, 5, bias=False).bfloat16()
    optimizer = so.ShardedOptimizer(model, so.AdamW, lr=1e-2)
    optimizer.init_state()
    with torch.no_grad():
        model.weight.fill_(7.0)
    for state in optimizer.state_dict()["state"].values():  # none on a rank whose shard is padding
        assert torch.equal(state["master"], torch.full_like(state["master"], 7.0))
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        assert torch.equal(optimizer.state_dict()["state"][0]["master"], torch.full((5, 3), 7.0))
