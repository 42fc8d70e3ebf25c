"""A config means what it says, or is refused by name before anything starts."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import sharded_optim
from launch.config import Config, ConfigError, OptimizerConfig, load
from launch.sharding import SHARDINGS

CONFIGS = Path(__file__).parents[2] / "configs"
FSDP2 = CONFIGS / "fsdp2.yaml"
DEEPSPEED = CONFIGS / "deepspeed.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # paths in configs are relative to it


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
    for name in ("fsdp2", "fsdp1", "zero2", "ddp", "single", "deepspeed"):
        config = load(CONFIGS / f"{name}.yaml", [])
        assert config.sharding == name
        recipes.append(config.model_dump(exclude={"name", "processes", "sharding", "deepspeed"}))
    assert all(recipe == recipes[0] for recipe in recipes)


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
        (
            "sharding=fsdp",
            "sharding='fsdp': it should be 'fsdp2', 'fsdp1', 'zero2', 'zero1', 'ddp', 'single' or 'deepspeed'; did you mean fsdp2?",
        ),
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
        (["sharding=deepspeed"], "sharding='deepspeed' needs a DeepSpeed config; use deepspeed=configs/deepspeed_zero2.json"),
        (["deepspeed={}"], "sharding='fsdp2' does not use the key deepspeed"),
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


# ------------------------------------------------------------------------------------------------------------ the DeepSpeed config


def write_json(folder: Path, content: Any) -> str:
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return f"deepspeed={path}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_deepspeed_configs_stand_alone_and_differ_only_in_zero(stage):
    """DeepSpeed's own flow needs the batch size, the optimizer, and a clipping that is not its default of 1."""
    content = json.loads((CONFIGS / f"deepspeed_zero{stage}.json").read_text())
    assert content.pop("zero_optimization")["stage"] == stage
    optimizer = {"type": "StableAdamW", "params": {"lr": 4e-3}}
    assert content == {"train_batch_size": 16, "gradient_clipping": 0.0, "optimizer": optimizer}


def test_the_optimizer_and_the_batch_of_the_deepspeed_config_become_the_jobs(tmp_path):
    optimizer = {"type": "sharded_optim.AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}}
    source = write_json(tmp_path, {"train_batch_size": 6, "optimizer": optimizer, "zero_optimization": {"stage": 1}})
    config = load(DEEPSPEED, [source])
    assert config.optimizer == OptimizerConfig(name="AdamW", lr=0.1, betas=(0.9, 0.95))
    assert config.batch_size == 6
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}


def test_overrides_reach_the_deepspeed_config_and_what_came_from_it(tmp_path):
    source = write_json(tmp_path, {"optimizer": {"type": "StableAdamW", "params": {"lr": 0.1}}})
    config = load(DEEPSPEED, ["optimizer.lr=0.2", "deepspeed.zero_optimization.stage=3", "batch_size=4", source])
    assert (config.optimizer.lr, config.batch_size) == (0.2, 4)
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


def test_two_files_that_contradict_each_other_are_refused_by_both_names(tmp_path):
    mine = tmp_path / "mine.yaml"
    text = DEEPSPEED.read_text()
    mine.write_text(text + "optimizer: {name: StableAdamW, lr: 1e-3}\n")
    expected = f"optimizer.lr=0.001 in {mine}, but optimizer.params.lr=0.004 in configs/deepspeed_zero2.json; give it in one of the files"
    assert expected in refusal(path=mine)
    mine.write_text(text + "batch_size: 8\n")
    assert f"batch_size=8 in {mine}, but train_batch_size=16 in configs/deepspeed_zero2.json" in refusal(path=mine)
    mine.write_text(text + "optimizer: {lr: 0.004, eps: 1e-7}\n")  # one gives what the other leaves out
    assert load(mine, []).optimizer == OptimizerConfig(name="StableAdamW", lr=0.004, eps=1e-7)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type='AdamW' in mine.json is DeepSpeed's own; use 'sharded_optim.AdamW'"),
        ({"optimizer": {"type": "Lamb", "params": {"lr": 0.1}}}, "optimizer.name='Lamb': it should be"),
        ({"optimizer": "StableAdamW"}, "optimizer in mine.json must be as"),
        ({"optimizer": {"type": "StableAdamW", "params": {"lr": 0.1, "foreach": True}}}, "optimizer.foreach=True: there is no such key"),
        ({"zero_optimization": {"stage": 2}}, "optimizer is missing"),
        ({"scheduler": {"type": "WarmupLR"}}, "the job has a schedule of its own; leave it out"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8 is not used here: use train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: the job has one batch in a step; leave it out"),
        ([1], "must hold keys and values, got [1]"),
    ],
)
def test_what_the_job_cannot_take_from_a_deepspeed_config_is_refused(tmp_path, monkeypatch, content, expected):
    write_json(tmp_path, content)
    monkeypatch.chdir(tmp_path)
    assert expected in refusal("deepspeed=mine.json", path=DEEPSPEED)


def test_a_deepspeed_config_that_cannot_be_read_is_refused(tmp_path):
    expected = "deepspeed='configs/deepspeed_zero.json': there is no such file; did you mean deepspeed_zero"
    assert expected in refusal("deepspeed=configs/deepspeed_zero.json", path=DEEPSPEED)
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json' cannot be read" in refusal(f"deepspeed={tmp_path / 'broken.json'}", path=DEEPSPEED)
    assert "deepspeed=5: it should be a valid dictionary" in refusal("deepspeed=5", path=DEEPSPEED)


def test_names_in_the_config_are_those_of_the_code():
    assert set(get_args(OptimizerConfig.model_fields["name"].annotation)) <= set(sharded_optim.__all__)
    assert set(get_args(Config.model_fields["sharding"].annotation)) == set(SHARDINGS)


def test_steps_alone_scale_the_warm_up_too():
    """A first try is a few steps, fewer than a whole warm-up."""
    assert (load(FSDP2, []).steps, load(FSDP2, []).warmup_steps) == (650, 50)
    for steps, warmup_steps in ((20, 1), (65, 5), (1, 0), (1300, 100)):
        assert load(FSDP2, [f"steps={steps}"]).warmup_steps == warmup_steps
        assert load(DEEPSPEED, [f"steps={steps}"]).warmup_steps == warmup_steps
    assert load(FSDP2, ["steps=80", "warmup_steps=50"]).warmup_steps == 50
    assert load(FSDP2, ["warmup_steps=20"]).warmup_steps == 20
    assert "steps='x': it should be a valid integer" in refusal("steps=x")


def test_what_a_file_says_of_both_is_not_changed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FSDP2.read_text().replace("steps: 650", "steps: 40", 1))
    assert "warmup_steps=50 must be less than steps=40" in refusal(path=path)
