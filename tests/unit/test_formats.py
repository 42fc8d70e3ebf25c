"""Low-precision parameters lose nothing in the mean: what rounding takes is kept beside them (Kahan) or made up for at random."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import sharded_optim as so
from sharded_optim.backends import noise
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.formats import FORMATS, format_of, param_format

CLASSES = [so.Adam, so.AdamW, so.DecoupledAdamW, so.DecoupledSGDW, so.StableAdamW]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
LOW = [torch.bfloat16, torch.float16]
every_low_dtype = pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
STOCHASTIC = {torch.bfloat16: FORMATS["bf16_stochastic"], torch.float16: FORMATS["fp16_stochastic"]}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tens of thousands of tiny operations: on a busy machine two threads wait for each other ten times as long as one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


COUPLED = {"lr": 1e-2, "weight_decay": 0.1}
DECAYS: dict[type, dict] = {  # options with which a step at zero gradient shrinks a parameter by 1e-3
    so.Adam: COUPLED | {"decouple_wd": True},
    so.AdamW: COUPLED,
    so.StableAdamW: COUPLED,
    so.DecoupledAdamW: {"lr": 1e-2, "weight_decay": 1e-3},
    so.DecoupledSGDW: {"lr": 1e-2, "weight_decay": 1e-3},
}
AFTER_1000 = 0.999**1000  # 0.368


def value_of(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """What a low-precision parameter stands for, in fp32."""
    value = param.detach().to(torch.float32)
    compensation = optimizer.state[param].get("kahan_comp")
    return value if compensation is None else value + compensation.to(torch.float32)


def decayed(cls: type, params: list, steps: int, **options: object) -> torch.optim.Optimizer:
    """The optimizer after `steps` steps with zero gradients, each of which decays by 1e-3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer = cls(params, **DECAYS[cls], **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step()
    return optimizer


# ---------------------------------------------------------------------------------------------------------------- Kahan summation


@every_class
def test_small_decay_arrives_with_kahan_summation_and_is_lost_without(cls: type) -> None:
    """1e-3 is below half the distance of bfloat16 numbers, and two such distances of float16 ones, or one."""
    params = {kahan_sum: [nn.Parameter(torch.ones(3, 1, dtype=dtype)) for dtype in LOW] for kahan_sum in (None, True, False)}
    optimizer = decayed(cls, [{"params": pair, "kahan_sum": kahan_sum} for kahan_sum, pair in params.items()], 1000)
    for param in (*params[None], *params[True]):
        torch.testing.assert_close(param.detach().float(), torch.full((3, 1), AFTER_1000), rtol=0.01, atol=0)
        torch.testing.assert_close(value_of(param, optimizer), torch.full((3, 1), AFTER_1000), rtol=1e-3, atol=0)
    bf16, fp16 = params[False]
    assert (bf16 == 1.0).all()
    assert (fp16.detach().float() > 1.02 * AFTER_1000).all()


@every_class
@every_low_dtype
def test_each_of_300_steps_keeps_what_an_fp32_step_computes_to_16_bits(cls: type, dtype: torch.dtype) -> None:
    """An fp32 twin begins each step where the sum is, and takes the same gradients."""
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(5, 13, generator=generator).to(dtype))
    twin = nn.Parameter(param.detach().float())
    ours, theirs = cls([param], lr=1e-3), cls([twin], lr=1e-3)
    relative, smallest = {torch.bfloat16: (2.0**-17, 0.0), torch.float16: (2.0**-22, 2.0**-25)}[dtype]
    for _ in range(300):
        param.grad = torch.randn(5, 13, generator=generator).to(dtype)
        twin.grad = param.grad.float()
        ours.step()
        theirs.step()
        value, expected = value_of(param, ours), twin.detach()
        assert ((value - expected).abs() <= (relative * expected.abs()).clamp(min=smallest)).all()
        with torch.no_grad():
            twin.copy_(value)


@every_class
def test_a_trajectory_of_300_steps_follows_fp32_to_the_random_walk_of_its_roundings(cls: type) -> None:
    """Roundings of at most 2**-17 each; a plain bfloat16 parameter is hundreds of times further away."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(37, 11, generator=generator).to(dtype)
    grads = [torch.randn(37, 11, generator=generator).to(dtype) for _ in range(300)]
    runs = {"fp32": ({}, torch.float32), "kahan": ({}, dtype), "plain": ({"kahan_sum": False}, dtype)}
    values = {}
    for name, (options, storage) in runs.items():
        param = nn.Parameter(start.to(storage))
        optimizer = cls([param], lr=1e-3, **options)
        for grad in grads:
            param.grad = grad.to(storage)
            optimizer.step()
        values[name] = value_of(param, optimizer)
    errors = {name: float((values[name] - values["fp32"]).norm() / values["fp32"].norm()) for name in ("kahan", "plain")}
    assert errors["kahan"] < math.sqrt(300) * 2.0**-17
    assert errors["plain"] > 100 * errors["kahan"]


@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([1.0, -1.0]))
def test_the_two_arrays_of_bf16_hold_17_bits(value: float, sign: float) -> None:
    fmt = FORMATS["bf16_kahan"]
    whole = torch.tensor([sign * value])
    stored, compensation = fmt.store(whole, None)
    assert torch.equal(stored, whole.to(torch.bfloat16))
    assert abs(float(fmt.load(stored, compensation) - whole)) <= 2.0**-17 * value


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=["fp32", "bf16", "fp16"])
def test_kahan_comp_is_in_the_state_only_where_it_is_used(cls: type, dtype: torch.dtype) -> None:
    low = dtype != torch.float32
    for options, kept in (
        ({}, low),
        ({"kahan_sum": None}, low),
        ({"kahan_sum": True}, low),
        ({"kahan_sum": False}, False),
        ({"stochastic_rounding": True}, False),
        ({"stochastic_rounding": True, "kahan_sum": False}, False),
    ):
        param = nn.Parameter(torch.ones(3, 2, dtype=dtype))
        optimizer = cls([param], lr=1e-2, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state[param]
        assert ("kahan_comp" in state) == kept, options
        if kept:
            assert (state["kahan_comp"].dtype, state["kahan_comp"].shape) == (dtype, param.shape)


@every_class
def test_kahan_sum_and_stochastic_rounding_are_chosen_per_group(cls: type) -> None:
    keys = [{}, {"kahan_sum": True}, {"kahan_sum": False}, {"stochastic_rounding": True}, {"kahan_sum": None}]
    params = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in keys]
    groups = [{"params": [param]} | key for param, key in zip(params, keys, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer = cls(groups, **DECAYS[cls])
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert ["kahan_comp" in optimizer.state[param] for param in params] == [True, True, False, False, True]
    means = [float(value_of(param, optimizer).mean()) for param in params]
    assert means[2] == 1.0
    for index in (0, 1, 4):
        assert means[index] == pytest.approx(0.999**3, abs=3 * 2.0**-17)
    # A draw is a multiple of 2**-8 below 1; after three of probability 1/4 the mean of 1000 has a deviation of 9e-5.
    assert means[3] == pytest.approx(0.999**3, abs=5e-4)
    assert len(set(params[3].tolist())) > 1


def test_a_compensation_rounded_at_random_keeps_decays_that_are_too_small_for_one_rounded_to_nearest() -> None:
    """3e-6 per step, as of AdamW's defaults at lr = 3e-4: below half a unit of the compensation, where Kahan alone loses most of it."""
    means = {}
    for stochastic_rounding in (False, True):
        param = nn.Parameter(torch.linspace(0.5, 1.5, 2048).to(torch.bfloat16))
        start = param.detach().double().mean()
        optimizer = so.AdamW([param], lr=3e-4, kahan_sum=True, stochastic_rounding=stochastic_rounding)
        for _ in range(2000):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        value = param.detach().double() + optimizer.state[param]["kahan_comp"].double()
        means[stochastic_rounding] = float(value.mean() / start)
    assert means[True] == pytest.approx((1 - 3e-6) ** 2000, abs=1e-4)
    assert means[False] > 0.998


@every_class
def test_fp32_parameters_ignore_both_options_bitwise(cls: type) -> None:
    results = []
    for options in ({}, {"kahan_sum": True}, {"kahan_sum": False}, {"stochastic_rounding": True, "rounding_seed": 3}):
        generator = torch.Generator().manual_seed(4)
        param = nn.Parameter(torch.randn(7, 3, generator=generator))
        optimizer = cls([param], lr=1e-2, **options)
        for _ in range(20):
            param.grad = torch.randn(7, 3, generator=generator)
            optimizer.step()
        results.append([param.detach(), *optimizer.state[param].values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unsupported_dtypes_are_refused_and_the_options_choose_the_format() -> None:
    with pytest.raises(ValueError, match=r"torch.float64 is not supported.*convert with \.to"):
        format_of(torch.float64)
    names = {
        (dtype, options): param_format(dtype, kahan_sum=options == "kahan", stochastic_rounding=options == "stochastic").name
        for dtype in (torch.float32, *LOW)
        for options in ("none", "kahan", "stochastic")
    }
    low = {(d, o): n + s for d, n in zip(LOW, ("bf16", "fp16"), strict=True) for o, s in (("none", ""), ("kahan", "_kahan"))}
    low |= {(torch.bfloat16, "stochastic"): "bf16_stochastic", (torch.float16, "stochastic"): "fp16_stochastic"}
    assert names == low | {(torch.float32, options): "fp32" for options in ("none", "kahan", "stochastic")}


# ------------------------------------------------------------------------------------------------------------ stochastic rounding

DRAWS = 2**16


def drawn(count: int, name: str = "w", seed: int = 0, step: int = 1) -> Tensor:
    (key,) = noise.keys(noise.sources([seed], [name]), torch.tensor([step]))
    return noise.uniform(key, Segment.whole(name, (count,)))


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` next to `value`, towards 0 and away from it, both `value` where it is one: from the order of their bits."""
    nearest = value.to(dtype)
    bits = nearest.view(torch.int16)
    beyond = (nearest.double().abs() > value.double().abs()).to(torch.int16)
    short = (nearest.double().abs() < value.double().abs()).to(torch.int16)
    return (bits - beyond).view(dtype), (bits + short).view(dtype)


HARD_VALUES = {
    torch.bfloat16: [1.2345678, 3.1415927, 1.0e-3, 1.0e30, 1.1754945e-38, 3.3e-39, 1.4e-40, 1e-41, 1 + 2.0**-23, 1.99609375 + 2.0**-12],
    torch.float16: [1.2345678, 3.1415927, 1.0e-3, 40001.3, 65503.9, 6.1035e-05, 3.3e-6, 1.1e-7, 7.7e-8, 4.5e-8, 1.3e-8, 1 + 2.0**-23],
}
JUST_UNDER = [
    float(torch.nextafter(torch.tensor(power), torch.tensor(0.0))) for power in (2.0, 1.0, 0.5, 4096.0, 2.0**-13, 2.0**-14, 2.0**-15)
]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, sign * value) for dtype in LOW for value in (*HARD_VALUES[dtype], *JUST_UNDER) for sign in (1.0, -1.0)],
)
def test_stochastic_rounding_gives_both_neighbours_with_the_value_as_their_mean(dtype: torch.dtype, value: float) -> None:
    exact = torch.tensor([value])
    towards, away = neighbours(exact, dtype)
    assert towards.abs() < away.abs(), "a test value that needs no rounding"
    low, high = float(towards), float(away)
    (stored,) = STOCHASTIC[dtype].store(exact.expand(DRAWS), drawn(DRAWS, name=str(value)))
    assert stored.dtype == dtype
    assert set(stored.tolist()) <= {low, high}
    probability = (float(exact) - low) / (high - low)
    ups = int((stored == away).sum())
    deviation = math.sqrt(DRAWS * probability * (1 - probability))
    assert abs(ups - DRAWS * probability) <= 5 * deviation + 1e-9
    mean = float(stored.double().mean())
    assert abs(mean - float(exact)) <= (5 * deviation + 1e-9) / DRAWS * abs(high - low)


@every_low_dtype
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**24 - 1))
@settings(deadline=None)
def test_stochastic_rounding_always_gives_a_neighbour_of_the_same_sign(dtype: torch.dtype, value: float, draw: int) -> None:
    """Beyond the largest number infinity is the neighbour, as it is of rounding to nearest."""
    exact = torch.tensor([value])
    (stored,) = STOCHASTIC[dtype].store(exact, torch.tensor([draw * 2.0**-24]))
    if exact.abs() > torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps):
        assert float(stored) == math.copysign(math.inf, value)
    elif exact.abs() > torch.finfo(dtype).max:
        assert float(stored.abs()) in (torch.finfo(dtype).max, math.inf)
    else:
        assert float(stored) in [float(each) for each in neighbours(exact, dtype)]
    assert torch.equal(stored.signbit(), exact.signbit())


@every_low_dtype
@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_every_number_of_the_dtype_is_kept_whatever_is_drawn(dtype: torch.dtype, uniform: float) -> None:
    """All 65536 bit patterns: subnormals, both zeros and infinities; NaN stays NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    (stored,) = STOCHASTIC[dtype].store(numbers.to(torch.float32), torch.full(numbers.shape, uniform))
    is_nan = numbers.isnan()
    assert torch.equal(stored.isnan(), is_nan)
    assert torch.equal(stored.view(torch.int16)[~is_nan], numbers.view(torch.int16)[~is_nan])


@every_low_dtype
def test_draws_decide_at_the_distance_from_the_lower_neighbour(dtype: torch.dtype) -> None:
    """A quarter of the way up is rounded up by draws below 1/4 and by no others, also below zero."""
    eps = torch.finfo(dtype).eps
    draws = torch.tensor([0.0, 0.25 - 2.0**-24, 0.25, 0.75])
    for sign in (1.0, -1.0):
        (stored,) = STOCHASTIC[dtype].store(sign * torch.full((4,), 1 + eps / 4), draws)
        assert stored.tolist() == [sign * (1 + eps), sign * (1 + eps), sign, sign]


@every_class
def test_small_decay_arrives_in_the_mean_with_stochastic_rounding(cls: type) -> None:
    param = nn.Parameter(torch.ones(61, 67, dtype=torch.bfloat16))
    decayed(cls, [param], 1000, stochastic_rounding=True)
    assert float(param.detach().double().mean()) == pytest.approx(AFTER_1000, rel=0.01)
    assert float(param.detach().float().std()) > 0


# ----------------------------------------------------------------------------------------------------- what the random bits depend on


class Run:
    """Low-precision parameters that are stepped with gradients known from the step alone."""

    def __init__(self, cls: type, **options: object) -> None:
        generator = torch.Generator().manual_seed(5)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((11, 7), (23,)) for dtype in LOW]
        self.optimizer = cls(self.params, lr=1e-3, stochastic_rounding=True, **options)

    def step(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(100 + step)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            self.optimizer.step()

    def equals(self, other: Run) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(self.params, other.params, strict=True)]


@every_class
def test_one_seed_gives_the_same_bits_again_and_after_a_checkpoint_and_another_seed_others(cls: type) -> None:
    """Loading takes the seed along: the optimizer that loads was built with another."""
    first, again, other = Run(cls, rounding_seed=7), Run(cls, rounding_seed=7), Run(cls, rounding_seed=8)
    for run in (first, again, other):
        run.step(range(10))
    assert all(first.equals(again))
    assert not any(first.equals(other))

    before, after = Run(cls, rounding_seed=7), Run(cls)
    before.step(range(4))
    with torch.no_grad():
        for param, saved in zip(after.params, before.params, strict=True):
            param.copy_(saved)
    after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    after.step(range(4, 10))
    assert all(first.equals(after))


@every_class
@every_low_dtype
def test_equal_tensors_are_rounded_differently_under_each_name_and_at_each_step(cls: type, dtype: torch.dtype) -> None:
    """With zero gradients and the same values each time, only the name and the step tell one rounding from another."""
    params = [nn.Parameter(torch.ones(203, dtype=dtype)) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # A quarter of bfloat16's spacing, half of float16's.
        options = DECAYS[cls] | {"weight_decay": DECAYS[cls]["weight_decay"] / (1 if dtype == torch.bfloat16 else 4)}
        optimizer = cls([(f"layers.{i}.weight", param) for i, param in enumerate(params)], stochastic_rounding=True, **options)
    results = []
    for _ in range(3):
        for param in params:
            with torch.no_grad():
                param.fill_(1.0)
            param.grad = torch.zeros_like(param)
        optimizer.step()
        results += [param.detach().clone() for param in params]
    assert all(len(set(result.tolist())) == 2 for result in results)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))


@every_class
def test_the_bits_do_not_depend_on_the_other_tensors_or_their_order(cls: type) -> None:
    def run(names: list[str]) -> dict[str, Tensor]:
        params = {name: nn.Parameter(torch.linspace(-1, 1, 31).to(torch.bfloat16)) for name in names}
        optimizer = cls(list(params.items()), lr=1e-3, stochastic_rounding=True)
        for _ in range(5):
            for param in params.values():
                param.grad = torch.ones_like(param)
            optimizer.step()
        return {name: param.detach() for name, param in params.items()}

    alone, together = run(["b"]), run(["c", "b", "a"])
    assert torch.equal(alone["b"], together["b"])
    assert not torch.equal(together["a"], together["b"])


def elements(segment: Segment) -> list[int]:
    return [segment.start + k * segment.stride + i for k in range(segment.count) for i in range(segment.run)]


@st.composite
def pieces(draw: Callable) -> Segment:
    """A flat or a strided piece of a tensor, possibly empty."""
    if draw(st.booleans()):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        low, high = sorted((draw(st.integers(0, math.prod(shape))), draw(st.integers(0, math.prod(shape)))))
        return Segment.flat("w", shape, low, high - low)
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    height, width = draw(st.integers(0, rows - row)), draw(st.integers(0, columns - column))
    return Segment.box("w", (rows, columns), (row, column), (height, width))


@given(pieces(), st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None)
def test_a_piece_draws_its_slice_of_the_whole_tensors_numbers(piece: Segment, key: int) -> None:
    whole = noise.uniform(torch.tensor(key), Segment.whole("w", piece.shape))
    mine = noise.uniform(torch.tensor(key), piece)
    assert mine.dtype == torch.float32
    assert mine.shape == (piece.numel,)
    assert torch.equal(mine, whole[torch.tensor(elements(piece), dtype=torch.int64)])


def test_the_generator_is_splitmix64() -> None:
    """Its outputs for the seed 1234567, as published with it; element i draws the upper 24 bits of the i-th."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    numbers = noise.uniform(torch.tensor(1234567), Segment.flat("w", (9,), 1, 5))
    assert numbers.tolist() == [(each >> 40) / 2**24 for each in published]


def test_numbers_are_24_bits_below_1_and_look_independent() -> None:
    """In neighbouring elements, steps, seeds and names; each bound is five deviations."""
    count = 2**17
    sequence = drawn(count, name="layers.0.weight", seed=1, step=1).double()
    assert 0.0 <= float(sequence.min()) < 1e-4
    assert 1 - 1e-4 < float(sequence.max()) < 1.0
    assert torch.equal(sequence * 2**24, (sequence * 2**24).floor())
    assert abs(float(sequence.mean()) - 0.5) < 5 / math.sqrt(12 * count)
    assert abs(float(sequence.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
    bits = (sequence * 2**24).long()
    for bit in range(24):
        assert abs(float(((bits >> bit) & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(count), bit
    for lag in (1, 2, 3, 7, 64, 1000, 4096):
        assert abs(correlation(sequence[lag:], sequence[:-lag])) < 5 / math.sqrt(count - lag), lag
    for other in ({"step": 2}, {"step": 3}, {"seed": 2}, {"name": "layers.1.weight"}, {"name": "layers.0.weight "}):
        options = {"name": "layers.0.weight", "seed": 1, "step": 1} | other
        assert abs(correlation(sequence, drawn(count, **options).double())) < 5 / math.sqrt(count), other


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_keys_differ_between_seeds_names_and_steps() -> None:
    combinations = list(itertools.product(range(-3, 30), ["w", "w2", "1/w", "layers.1.bias"], range(1, 60)))
    seeds, names, steps = zip(*combinations, strict=True)
    assert len(set(noise.keys(noise.sources(seeds, names), torch.tensor(steps)).tolist())) == len(combinations)


@pytest.mark.parametrize(
    "name",
    [
        "module.layers.0.weight",
        "_orig_mod.layers.0.weight",
        "_orig_mod.module.layers.0.weight",
        "module._orig_mod.layers.0._checkpoint_wrapped_module.weight",
        "_fsdp_wrapped_module.layers._checkpoint_wrapped_module.0._fsdp_wrapped_module.weight",
    ],
)
def test_names_that_wrappers_give_draw_the_numbers_of_the_plain_name(name: str) -> None:
    """So one training has the same bits under every wrapper; names that differ otherwise do not."""
    plain = noise.sources([7], ["layers.0.weight"])
    assert torch.equal(noise.sources([7], [name]), plain)
    for other in ("layers.1.weight", "layers.0.bias", "layers.0.module.weight", "layers.0.weight.module"):
        assert not torch.equal(noise.sources([7], [other]), plain)


def test_wrapped_models_are_rounded_at_random_alike() -> None:
    """DistributedDataParallel aside, whose name is as that of AveragedModel."""

    def trained(wrap: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).bfloat16())
        optimizer = so.AdamW([(name, p) for name, p in model.named_parameters()], lr=1e-2, stochastic_rounding=True)
        for step in range(3):
            for index, param in enumerate(model.parameters()):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + index)).bfloat16()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    def checkpointed(model: nn.Module) -> nn.Module:
        model[0] = checkpoint_wrapper(model[0])
        return model

    plain = trained(lambda model: model)
    for wrap in (AveragedModel, checkpointed, lambda model: torch.compile(model, backend="eager")):
        assert all(map(torch.equal, trained(wrap), plain))
