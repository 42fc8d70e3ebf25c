"""A config means what it says, or is refused by name before anything starts."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

import sharded_optim
from launch.config import Config, ConfigError, OptimizerConfig, load
from launch.sharding import SHARDINGS

CONFIGS = Path(__file__).parents[1] / "configs"
FSDP2 = CONFIGS / "fsdp2.yaml"


def refusal(*overrides: str, path: Path = FSDP2) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_in_configs_loads_and_survives_being_written_down(path, tmp_path):
    config = load(path, [])
    assert config.name == path.stem
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(written, []) == config


def test_the_configs_differ_only_in_how_they_run():
    recipes = []
    for name in ("fsdp2", "ddp", "single"):
        config = load(CONFIGS / f"{name}.yaml", [])
        assert config.sharding == name
        recipes.append(config.model_dump(exclude={"name", "processes", "sharding"}))
    assert recipes[0] == recipes[1] == recipes[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.5e4", 25000.0), ("+1e3", 1000.0), (".5e-2", 0.005), ("1", 1.0), ("0.01", 0.01)],
)
def test_numbers_on_the_command_line_are_numbers(text, value):
    """YAML 1.1 reads 1e-3 as a string."""
    assert load(FSDP2, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_numbers_in_files_are_numbers_too(tmp_path):
    path = tmp_path / "mine.yaml"
    values = yaml.safe_load(FSDP2.read_text())
    del values["optimizer"]
    path.write_text(yaml.safe_dump(values) + "optimizer: {name: AdamW, lr: 1e-3}\n")
    assert load(path, []).optimizer == OptimizerConfig(name="AdamW", lr=1e-3)


def test_overrides_reach_every_kind_of_value():
    overrides = ["steps=77", "name=mine", "optimizer.betas=[0.9, 0.95]", "optimizer.eps=null", "data.path=/some/where", "sharding=ddp"]
    config = load(FSDP2, overrides)
    assert (config.steps, config.name, config.sharding) == (77, "mine", "ddp")
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.eps is None
    assert config.data.path == "/some/where"


def test_the_last_of_two_overrides_counts():
    assert load(FSDP2, ["steps=300", "steps=400"]).steps == 400


@pytest.mark.parametrize(
    ("override", "key", "value", "nearest"),
    [
        ("stepz=5", "stepz", "5", "steps"),
        ("momentum=0.1", "momentum", "0.1", "optimizer.momentum"),
        ("optimizer.wieght_decay=0.1", "optimizer.wieght_decay", "0.1", "optimizer.weight_decay"),
        ("lr=0.1", "lr", "0.1", "optimizer.lr"),
        ("modle.layers=2", "modle", "{'layers': 2}", "model"),
    ],
)
def test_an_unknown_key_is_refused_with_its_value_and_the_nearest_name(override, key, value, nearest):
    message = refusal(override)
    assert f"{key}={value}: there is no such key" in message
    assert nearest is None or f"did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=fifty", "steps='fifty': it should be a valid integer"),
        ("steps=50.5", "steps=50.5: it should be a valid integer"),
        ('steps="50"', "steps='50': it should be a valid integer"),
        ("steps=true", "steps=True: it should be a valid integer"),
        ("steps=0", "steps=0: it should be greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan: it should be"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1=1.0: it should be less than 1"),
        ("optimizer=5", "optimizer=5: it should be"),
        ("sharding=fsdp", "sharding='fsdp': it should be 'fsdp2', 'ddp' or 'single'; did you mean fsdp2?"),
        ("optimizer.name=StableAdam", "did you mean StableAdamW?"),
        ("optimizer={name: DecoupledSGDW, lr: 0.1, eps: 0.0}", "DecoupledSGDW has no eps; leave it out"),
        ("optimizer.momentum=0.9", "StableAdamW has no momentum; leave it out"),
        ("name=a/b", "name='a/b': it should match pattern"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_the_rule(override, expected):
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sharding=single"], "sharding='single' is one process, got processes=2"),
        (["processes=3", "batch_size=4"], "batch_size=4 does not divide over processes=3"),
        (["steps=10", "warmup_steps=10"], "warmup_steps=10 must be less than steps=10"),
        (["model.d_model=100", "model.heads=3"], "model: d_model=100 does not divide into heads=3"),
    ],
)
def test_an_impossible_combination_is_refused_with_both_values(overrides, expected):
    assert expected in refusal(*overrides)


def test_all_problems_are_named_at_once():
    message = refusal("stepz=5", "seed=-1", "optimizer.lr=fast")
    assert all(key in message for key in ("stepz", "seed", "optimizer.lr"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [("steps", "key=value"), ("=5", "key=value"), ("steps.x=5", "steps has no keys of its own"), ("steps=[", "the value is no YAML")],
)
def test_an_override_that_cannot_be_read_is_refused(override, expected):
    assert expected in refusal(override)


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("\n".join(line for line in FSDP2.read_text().splitlines() if not line.startswith("steps:")))
    assert "steps is missing" in refusal(path=path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("steps: 1\nsteps: 2\n", "'steps' is given twice"), ("- steps\n", "must hold keys and values"), ("steps: [\n", "cannot be read")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, expected):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert expected in refusal(path=path)


def test_a_file_that_does_not_exist_is_refused_with_the_nearest():
    assert "did you mean fsdp2.yaml?" in refusal(path=CONFIGS / "fsdp.yaml")


def test_names_in_the_config_are_those_of_the_code():
    assert set(get_args(OptimizerConfig.model_fields["name"].annotation)) <= set(sharded_optim.__all__)
    assert set(get_args(Config.model_fields["sharding"].annotation)) == set(SHARDINGS)
