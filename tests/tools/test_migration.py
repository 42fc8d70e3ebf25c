"""The pairs of scripts in examples/migration: the other library's and this one's train alike and continue each other's checkpoints."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composer_formulas
import deepspeed_models
import optimi
import pytest
import ranks
import torch
import torch.distributed as dist
from deepspeed_models import NEEDS_DEEPSPEED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

import sharded_optim as so

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "migration"
PAGE = (ROOT / "docs" / "migrating.md").read_text()
STEPS = 20  # of one run of a script
# Relative, of losses and of parameters' norms, over 40 steps: the formulas are the same, their order of operations is not, so each step may
# round the last bit of float32 (6e-8) differently. Up to 2.4e-7 was measured.
TOLERANCE = 2e-6

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")


def play(name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
    """Run a script in the current folder, with other text in place of some, and return its variables."""
    text = (EXAMPLES / f"{name}.py").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, f"{name}.py", "exec"), namespace)
    return namespace


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Runs:
    """Runs of scripts, one after the other, of which each continues what the one before has saved."""

    def __init__(self, folder: Path, play: Callable[[str], dict[str, Any]], *names: str) -> None:
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        played = [play(name) for name in names]
        last = played[-1]
        self.losses = [loss for each in played if "losses" in each for loss in each["losses"]]
        model = last["engine"].module if "engine" in last else last.get("model")
        model = getattr(model, "module", model)
        self.params = {} if model is None else {name: whole(param.detach()).clone() for name, param in model.named_parameters()}

    def assert_close(self, other: Runs, what: str) -> None:
        assert len(self.losses) == len(other.losses) == 2 * STEPS
        torch.testing.assert_close(self.losses, other.losses, rtol=TOLERANCE, atol=0.0, msg=lambda text: f"{what}: {text}")
        for name, param in self.params.items():
            error = (param - other.params[name]).norm() / other.params[name].norm()
            assert error <= TOLERANCE, f"{what}: {name} by {error}"

    def differs(self, other: Runs) -> bool:
        """Whether the last losses are further apart than any rounding."""
        return abs(self.losses[-1] - other.losses[-1]) > 100 * TOLERANCE * other.losses[-1]


def there_and_back(library: str, folder: Path, play: Callable[[str], dict[str, Any]], *, back: bool = True) -> None:
    """Compare the library alone, ours alone, its checkpoint continued by ours and, with `back`, ours by its."""
    before, after = f"{library}_before", f"{library}_after"
    theirs = Runs(folder / "theirs", play, before, before)
    assert theirs.losses[-1] < 0.5 * theirs.losses[0], "it trains"
    Runs(folder / "ours", play, after, after).assert_close(theirs, "ours alone")
    Runs(folder / "there", play, before, after).assert_close(theirs, "theirs continued by ours")
    if back:
        Runs(folder / "back", play, after, before).assert_close(theirs, "ours continued by theirs")


def play_with_formulas(name: str) -> dict[str, Any]:
    """As Composer does not install beside this torch, its script runs with the formulas in tests/composer_formulas.py."""
    return play(name, *[("composer.optim", "composer_formulas")] * (name == "composer_before"))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # undone after a script has changed it


# ------------------------------------------------------------------------------------------------------------------------ one process


def test_from_torch_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there_and_back("torch", tmp_path, play)
    assert len(re.findall(r"^step \d+  loss \d\.\d{6}$", capsys.readouterr().out, re.MULTILINE)) == 8 * STEPS


def test_from_optimi(tmp_path: Path) -> None:
    there_and_back("optimi", tmp_path, play, back=False)


def test_optimis_other_class_by_its_name(tmp_path: Path) -> None:
    there_and_back("optimi", tmp_path, lambda name: play(name, ("StableAdamW", "AdamW")), back=False)


def test_nothing_goes_back_to_optimi_silently(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="triton"):
        Runs(tmp_path / "back", play, "optimi_after", "optimi_before")


def test_from_composer_and_back(tmp_path: Path) -> None:
    there_and_back("composer", tmp_path, play_with_formulas)


def test_a_checkpoint_of_composers_trainer_continues_by_the_names_of_parameters() -> None:
    """From torch 2.4 on the trainer saves what torch's get_optimizer_state_dict returns, under the name of the class."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            source = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.mse_loss(model(source), source[:, :4].sin())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    theirs = composer_formulas.DecoupledAdamW(model.parameters(), lr=3e-3, weight_decay=3e-4)
    train(model, theirs, range(STEPS))
    checkpoint = {"state": {"optimizers": {"DecoupledAdamW": copy.deepcopy(get_optimizer_state_dict(model, theirs))}}}
    ours = copy.deepcopy(model)
    optimizer = so.DecoupledAdamW(ours.parameters(), lr=1.0, weight_decay=0.0)
    set_optimizer_state_dict(ours, optimizer, checkpoint["state"]["optimizers"]["DecoupledAdamW"])
    before = [param.detach().clone() for param in model.parameters()]
    train(model, theirs, range(STEPS, 2 * STEPS))
    train(ours, optimizer, range(STEPS, 2 * STEPS))
    for start, actual, expected in zip(before, ours.parameters(), model.parameters(), strict=True):
        assert (actual - expected).norm() <= TOLERANCE * expected.norm()
        assert (start - expected).norm() > 100 * TOLERANCE * expected.norm()


# ------------------------------------------------------------------------------------------------------------------- the way to torch


def test_decoupled_decay_goes_to_torch_by_to_torch_and_comes_back(tmp_path: Path) -> None:
    """DecoupledAdamW, which torch's AdamW continues with weight_decay / reference_lr. Without that, the decay is lost silently."""

    def strong(name: str) -> dict[str, Any]:
        return play(name, *[("weight_decay=3e-4", "weight_decay=1e-2")] * (name == "composer_after"))

    ours = Runs(tmp_path / "ours", strong, "composer_after", "composer_after")
    Runs(tmp_path / "to_torch", strong, "composer_after", "to_torch", "torch_before").assert_close(ours, "continued by torch")
    assert Runs(tmp_path / "unconverted", strong, "composer_after", "torch_before").differs(ours)
    torchs = Runs(tmp_path / "torchs", strong, "composer_after", "to_torch", "torch_before", "torch_before")
    again = Runs(tmp_path / "again", strong, "composer_after", "to_torch", "torch_before", "torch_after")
    torch.testing.assert_close(again.losses, torchs.losses, rtol=TOLERANCE, atol=0.0)


def test_torch_has_no_clipping_of_updates(tmp_path: Path) -> None:
    """StableAdamW's moments load into torch's AdamW; where it divides the learning rate by an update's rms, trajectories part."""
    params = [nn.Parameter(torch.ones(40, 30))]
    stable = so.StableAdamW(params, lr=1e-2, weight_decay=0.1)

    def step(optimizer: torch.optim.Optimizer, on: list[nn.Parameter], seed: int, size: float) -> None:
        on[0].grad = size * torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    for seed in range(30):
        step(stable, params, seed, 1.0)
    for size, clips in ((0.5, False), (100.0, True)):
        copies = [[nn.Parameter(params[0].detach().clone())] for _ in range(2)]
        ours, theirs = so.StableAdamW(copies[0], lr=1.0), torch.optim.AdamW(copies[1])
        for optimizer, own in ((ours, copies[0]), (theirs, copies[1])):
            optimizer.load_state_dict(copy.deepcopy(stable.state_dict()))
            step(optimizer, own, 30, size)
        (rms,) = (value for name, value in ours.metrics().items() if name.startswith("rms"))
        assert (rms > 1.0) == clips
        close = bool((copies[0][0] - copies[1][0]).abs().max() <= 1e-6)
        assert close != clips


@pytest.mark.parametrize(
    "optimizer",
    [
        "so.AdamW(model.parameters(), decay_form='corrected')",
        "so.DecoupledSGDW(model.parameters(), momentum=0.9, weight_decay=1e-4)",
    ],
)
def test_decay_without_a_counterpart_in_torch_is_refused_by_to_torch(optimizer: str) -> None:
    play("torch_after", ("so.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)", optimizer))
    before = Path("checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="no optimizer of torch decays"):
        play("to_torch")
    assert Path("checkpoint.pt").read_bytes() == before


def test_a_compensation_does_not_come_back_from_torch(tmp_path: Path) -> None:
    """torch keeps entries of the state that it does not know: a Kahan compensation of parameters that it has changed since."""
    model, data = "nn.Linear(32, 4))\n", "generator=torch.Generator().manual_seed(step))"
    in_bfloat16 = ((model, model.replace("\n", ".bfloat16()\n")), (data, data + ".bfloat16()"))
    for name, has in (("torch_after", True), ("to_torch", False), ("torch_before", False)):
        play(name, *in_bfloat16 if name != "to_torch" else ())
        state = torch.load("checkpoint.pt")["optimizer"]["state"]
        assert all(("kahan_comp" in each) == has for each in state.values()), name


# ---------------------------------------------------------------------------------------------------------------------------- ranks


def play_on_ranks(name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
    """Run a script in a process group that exists already, and wait for all ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda backend: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        namespace = play(name, *replacements)
    dist.barrier()
    return namespace


def check_pair(library: str, folder: str) -> None:
    os.chdir(folder)
    there_and_back(library, Path(folder), play_on_ranks)


def test_from_zero_redundancy_optimizer_and_back(tmp_path: Path) -> None:
    ranks.run(check_pair, 2, "zero", str(tmp_path))


def check_fsdp2(folder: str) -> None:
    before, after = ((EXAMPLES / f"fsdp2_{which}.py").read_text() for which in ("before", "after"))
    matching = after[after.index("    own_groups") : after.index("    set_state_dict")]

    def play_matching(name: str) -> dict[str, Any]:
        """The lines by which ours loads torch's param groups let torch load ours."""
        assert matching not in before
        return play_on_ranks(name, *[("    set_state_dict", matching + "    set_state_dict")] * (name == "fsdp2_before"))

    there_and_back("fsdp2", Path(folder), play_matching)
    with pytest.raises(KeyError, match="param_groups"):
        Runs(Path(folder, "unmatched"), play_on_ranks, "fsdp2_after", "fsdp2_before")


def test_from_fsdp2_with_whole_state_dicts_and_back(tmp_path: Path) -> None:
    ranks.run(check_fsdp2, 2, str(tmp_path))


@NEEDS_DEEPSPEED[0]
@NEEDS_DEEPSPEED[1]
def test_from_deepspeed_and_back(tmp_path: Path) -> None:
    deepspeed_models.run(check_pair, 2, "deepspeed", str(tmp_path))


# ------------------------------------------------------------------------------------------------------------------------- the page


def test_every_block_of_code_on_the_page_is_of_a_script() -> None:
    """The first line names it; "..." stands for what was left out."""
    blocks = re.findall(r"^```python\n# examples/migration/(\w+)\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.count("```python")
    assert {name for name, _ in blocks} == {path.stem for path in EXAMPLES.glob("*.py")}
    for name, block in blocks:
        text, at = (EXAMPLES / f"{name}.py").read_text(), 0
        for piece in re.split(r"\n*^\.\.\.\n", block, flags=re.MULTILINE):
            assert piece in text[at:], f"{name}: {piece}"
            at = text.index(piece, at) + len(piece)


@pytest.mark.parametrize("library", ["torch", "optimi", "composer", "zero", "deepspeed"])
def test_a_pair_differs_in_imports_and_at_most_two_lines(library: str) -> None:
    before, after = ((EXAMPLES / f"{library}_{which}.py").read_text().splitlines()[1:] for which in ("before", "after"))
    changed = [line[2:] for line in difflib.ndiff(before, after) if line.startswith("+ ") and line[2:]]
    assert 1 <= len(changed) <= 3
    assert sum("sharded_optim" in line and "import" in line for line in changed) == 1


def defaults_of(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


PAIRS = {"AdamW": (torch.optim.AdamW, so.AdamW), "Adam": (torch.optim.Adam, so.Adam), "SGD": (torch.optim.SGD, so.DecoupledSGDW)}


def test_the_table_of_defaults_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.*?)` \| `(.*?)` \|$", PAGE, re.MULTILINE)
    listed = {(name, argument): (ast.literal_eval(there), ast.literal_eval(here)) for name, argument, there, here in rows}
    found = {}
    for name, (theirs, ours) in {**PAIRS, "Muon": (torch.optim.Muon, so.Muon)}.items():
        there, here = defaults_of(theirs), defaults_of(ours)
        assert "lr" in there.keys() & here.keys()
        found |= {(name, key): (there[key], here[key]) for key in there.keys() & here.keys() if there[key] != here[key]}
    assert listed == found


def test_lines_of_the_page_for_torchs_classes_have_its_trajectory_and_continue_both_ways() -> None:
    rows = re.findall(r"^\| `(torch\.optim\.\w+\(.*?\))` \| `(so\.\w+\(.*?\))` \|$", PAGE, re.MULTILINE)
    assert {re.split(r"[.(]", there)[2] for there, _ in rows} == PAIRS.keys()

    def start() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in ((7, 5), (5,))]

    def train(lines: list[str]) -> list[Tensor]:
        """Ten steps by each line's optimizer, under a scheduler; each loads the state of the one before."""
        params, saved = start(), None
        for index, line in enumerate(lines):
            optimizer = eval(line, {"torch": torch, "so": so, "params": params})
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
            if saved is not None:
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            for step in range(10 * index, 10 * index + 10):
                for number, param in enumerate(params):
                    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * step + number))
                optimizer.step()
                scheduler.step()
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        return [param.detach() for param in params]

    for there, here in rows:
        expected = train([there, there, there])
        for lines in ([here, here, here], [there, here, there], [here, there, here]):
            for actual, wanted in zip(train(lines), expected, strict=True):
                assert (actual - wanted).norm() <= TOLERANCE * wanted.norm(), lines


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("arguments", ["1e-3, (0.9, 0.999), 1e-8", "1e-3, (0.9, 0.999), 1e-8, 0.1"])
def test_arguments_by_position_in_torchs_order_warn(name: str, arguments: str) -> None:
    params = [nn.Parameter(torch.ones(3))]
    eval(f"torch.optim.{name}(params, {arguments})", {"torch": torch, "params": params})
    with pytest.warns(UserWarning, match="look swapped"):
        eval(f"so.{name}(params, {arguments})", {"so": so, "params": params})


def test_what_optimi_has_and_this_library_has_not_is_listed() -> None:
    classes = {name for name, value in vars(optimi).items() if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)}
    (sentence,) = re.findall(r"optimi 0\.3\.3's other optimizers are not here: (.*?)\.", " ".join(PAGE.split()))
    assert set(re.findall(r"`(\w+)`", sentence)) == {name for name in classes if not hasattr(so, name)}
