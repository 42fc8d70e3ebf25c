"""The config of a training job: one YAML file, read into the models below, and `key=value` overrides.

Every mistake that can be found before a process starts is refused here. To add an option, add a field: its name becomes a key of the YAML
files. Hyperparameters are taken from the declarations of the optimizers in `sharded_optim`.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from launch import deepspeed_config
from launch.errors import ConfigError, nearest
from launch.keys import find_section, read
from sharded_optim.formulas.hyperparameters import Choice, Float, Floats, Hyperparameter, Int, Switch, Unsupported, by_name
from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.step.engine import Engine
from sharded_optim.trackers import MODULES, check_options

__all__ = ["CheckpointConfig", "Config", "ConfigError", "DataConfig", "ModelConfig", "OptimizerConfig", "from_arguments", "load"]

TRACKERS = tuple(name for name in MODULES if name != "jsonl")  # not jsonl: the run folder has JSON lines anyway
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]  # part of a folder's name


class _Section(BaseModel):
    # strict: "50" is not a number and true is not 1. A value that is silently converted is worse than an error.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """The text to train on.

    path: a file, or a folder of files; None: the source code of the running Python's standard library.
    suffix: the end of the names of files to read from a folder and its subfolders; None: `.py` for the standard library, else any.
    """

    path: str | None = None
    suffix: str | None = None


class ModelConfig(_Section):
    """The size of the transformer."""

    layers: PositiveInt
    heads: PositiveInt
    d_model: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.d_model % (2 * self.heads):
            raise ValueError(
                f"d_model={self.d_model} does not divide into heads={self.heads} of even width; make it a multiple of {2 * self.heads}"
            )
        return self


def _arguments(optimizer: type[Engine]) -> dict[str, Hyperparameter]:
    """Return the hyperparameters of an optimizer's constructor except lr: those of its class, and those common to all optimizers."""
    names = {*inspect.signature(optimizer).parameters, *inspect.signature(Engine).parameters} - {"lr"}
    declared = by_name(optimizer.hyperparameters)
    return {name: declared[name] for name in declared if name in names and not isinstance(declared[name], Unsupported)}


def _field_type(hyperparameter: Hyperparameter) -> Any:
    """Return the type against which pydantic checks a hyperparameter. Further rules are checked by the hyperparameter itself."""
    match hyperparameter:
        case Float(least=least, below=below):
            return Annotated[float, Field(ge=least, lt=below)]
        case Floats(least=least, below=below, count=count):
            element = Annotated[float, Field(ge=least, lt=below)]
            elements = tuple[element, ...] if count is None else tuple[(element,) * count]
            return Annotated[elements, Field(strict=False)]  # a YAML sequence is a list
        case Switch():
            return bool
        case Choice(options=options):
            return Literal[options]
        case Int():
            return int
        case _:
            return Any


class _NamedOptimizer(_Section):
    name: Literal[tuple(OPTIMIZERS)]  # pyright: ignore[reportInvalidTypeForm]
    lr: Annotated[float, Field(gt=0.0)]


def _with_hyperparameters(section: type[_NamedOptimizer]) -> type[_NamedOptimizer]:
    """Add a field for every hyperparameter of any optimizer's constructor; None stands for the optimizer's default."""
    declared: dict[str, set[Hyperparameter]] = {}
    for optimizer in OPTIMIZERS.values():
        for name, hyperparameter in _arguments(optimizer).items():
            declared.setdefault(name, set()).add(hyperparameter)
    # Two optimizers may declare one name differently: the field then accepts any value, which is checked for the config's optimizer.
    types = {name: _field_type(next(iter(variants))) if len(variants) == 1 else Any for name, variants in declared.items()}
    fields: dict[str, Any] = {name: (field_type | None, None) for name, field_type in types.items()}
    return create_model(section.__name__, __base__=section, **fields)


class OptimizerConfig(_with_hyperparameters(_NamedOptimizer)):
    """Name of an optimizer class of sharded_optim, and the hyperparameters of its constructor; None: the optimizer's own default.

    lr: the peak learning rate of the schedule.
    weight_decay: DecoupledAdamW and DecoupledSGDW take away this fraction of a parameter in a step at the peak learning rate, Adam adds the
        decay to the gradient, the others multiply it by lr.
    """

    @model_validator(mode="after")
    def _has_hyperparameters_of_its_own(self) -> OptimizerConfig:
        own = _arguments(OPTIMIZERS[self.name])
        for key, value in self:
            if key not in ("name", "lr") and value is not None:
                if key not in own:
                    raise ValueError(f"{self.name} has no {key}; leave it out")
                own[key].check(value)
        return self


class CheckpointConfig(_Section):
    """Checkpoints of the job.

    every: steps between checkpoints; the last step has one too. None: no checkpoints.
    keep: the number of checkpoints that remain.
    folder: a folder in which each run has a subfolder of its name; None: `checkpoints` in the run's own folder.
    """

    every: PositiveInt | None = None
    keep: PositiveInt = 2
    folder: str | None = None


class Config(_Section):
    """A training job.

    name: the name of the job, by which resume=auto finds its newest run; by default the config file's name without its suffix.
    run: the name of the run's folder in `runs_folder`; None: `<time>-<name>`.
    processes: the number of processes; "auto": as many as were started, or with `python -m launch` one for each GPU.
    threads: CPU threads of each process; None: an equal share of the machine's cores.
    device: "auto": a GPU for each process if there are enough, else the CPU.
    batch_size: sequences in a step over all processes together, so that the loss curve does not depend on the number of processes.
    validation_batches: the size of the validation set, in batches of `batch_size` sequences.
    resume: "never" begins a new run. "auto" resumes `run` if that exists, from its newest checkpoint; if `run` is None, the newest run of
        this name, unless all its steps are done.
    warmup_steps: steps of the learning rate's linear warm-up. An override of steps alone changes warmup_steps in proportion.
    muon_rest: the optimizer that steps, beside Muon, all but hidden matrices: "adamw", or "stable_adamw", which clips updates.
    max_restarts: how often `python -m launch` restarts all processes when one has failed; they resume from checkpoints with resume=auto.
    heartbeat: seconds, 5 or more, for which a rank may send no heartbeat, or keep others waiting, before the job ends; None: no limit, as
        under a debugger.
    metrics_every: steps between records with the optimizer's metrics, a multiple of log_every; None: every record has them. Reading metrics
        waits for the device, and makes a record long.
    divergence_every: steps between comparisons of replicas; replicas are also compared before each regular checkpoint. None: no
        comparisons.
    max_skipped_steps: the number of consecutive steps that may be skipped because gradients are not finite.
    trackers: destinations of metrics besides the run folder, by their names in `sharded_optim/trackers/registry.py`.
    tracker_options: options of these trackers by tracker name, such as {prometheus: {port: 9500}}.
    deepspeed: the DeepSpeed config, without optimizer and batch size. In a file or an override it may also be the path of a DeepSpeed
        config in JSON, which may have these two (`launch/deepspeed_config.py`).
    """

    name: Name
    run: Name | None = None
    runs_folder: str = "runs"
    processes: PositiveInt | Literal["auto"]
    threads: PositiveInt | None = None
    sharding: Literal["fsdp2", "fsdp1", "zero2", "zero1", "ddp", "single", "deepspeed"]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: PositiveInt
    warmup_steps: Annotated[int, Field(ge=0)]
    batch_size: PositiveInt
    sequence_length: PositiveInt
    log_every: PositiveInt
    metrics_every: PositiveInt | None = None
    validation_every: PositiveInt
    validation_batches: PositiveInt
    model: ModelConfig
    optimizer: OptimizerConfig
    muon_rest: Literal["adamw", "stable_adamw"] = "adamw"
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: Literal["auto", "never"] = "never"
    max_restarts: Annotated[int, Field(ge=0)] = 0
    heartbeat: Annotated[float, Field(ge=5.0)] | None = 20.0
    divergence_every: PositiveInt | None = 100
    max_skipped_steps: PositiveInt = 20
    trackers: list[Literal[TRACKERS]] = []  # pyright: ignore[reportInvalidTypeForm]
    tracker_options: dict[str, dict[str, Any]] = {}
    deepspeed: Annotated[dict[str, Any], AfterValidator(deepspeed_config.check)] | None = None

    @model_validator(mode="after")
    def _check_trackers(self) -> Config:
        if len(set(self.trackers)) != len(self.trackers):
            raise ValueError(f"trackers={self.trackers!r} names one twice; leave the second out")
        for name, options in self.tracker_options.items():
            if name not in self.trackers:
                raise ValueError(
                    f"tracker_options.{name}={options!r}, but trackers={self.trackers!r}; add {name!r} there, or leave this out"
                )
            check_options(name, options)
        return self

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.sharding == "single" and self.processes not in (1, "auto"):
            raise ValueError(f"sharding='single' is one process, got processes={self.processes}; use sharding=ddp or fsdp2, or processes=1")
        if self.sharding == "deepspeed" and self.deepspeed is None:
            raise ValueError("sharding='deepspeed' needs a DeepSpeed config; use deepspeed=configs/deepspeed_zero2.json or another one")
        if self.sharding != "deepspeed" and self.deepspeed is not None:
            raise ValueError(f"sharding={self.sharding!r} does not use the key deepspeed; use sharding=deepspeed, or deepspeed=null")
        if self.processes != "auto" and self.batch_size % self.processes:
            raise ValueError(f"batch_size={self.batch_size} does not divide over processes={self.processes}; make it a multiple")
        if self.metrics_every is not None and self.metrics_every % self.log_every:
            raise ValueError(
                f"metrics_every={self.metrics_every} is no multiple of log_every={self.log_every}, and only records have metrics; use "
                f"metrics_every={self.metrics_every + -self.metrics_every % self.log_every}, or log more often"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}; lower it, or train for longer")
        if self.max_restarts and not (self.resume == "auto" and self.checkpoint.every):
            raise ValueError(f"max_restarts={self.max_restarts} would begin anew each time; use resume=auto checkpoint.every=100 too")
        return self

    def with_processes(self, processes: int) -> Config:
        """Return the config of the same job on this number of processes.

        Raises:
            ConfigError: the config does not fit this number of processes.
        """
        return _validate(self.model_dump() | {"processes": processes}, f"processes='auto' are {processes}")


def from_arguments(arguments: list[str], program: str) -> Config:
    """Read the config from command-line arguments: a YAML file and overrides.

    Raises:
        ConfigError: the file or an override cannot be used. The message has the key, the value and the nearest valid name.
        SystemExit: the arguments are malformed, or ask for help.
    """
    parser = argparse.ArgumentParser(prog=program, description="Train a small byte-level language model.")
    parser.add_argument("config", type=Path, help="a YAML file, as configs/fsdp2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides a key of the file, as steps=50 or optimizer.lr=1e-3")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher, which sets it in the environment too
    parsed = parser.parse_args(arguments)
    return load(parsed.config, parsed.overrides)


def load(path: Path, overrides: list[str]) -> Config:
    """Read a YAML file and apply overrides.

    Raises:
        ConfigError: see `from_arguments`.
    """
    values: dict[str, Any] = {"name": path.stem} | read(path, _parse, str(path))
    # Applied first, as other overrides may change keys of such a file.
    sources = [override for override in overrides if override.startswith("deepspeed=")]
    for override in sources:
        _apply(values, override)
    deepspeed_config.include(values, path)
    steps: Any = values.get("steps")
    warmup_steps: Any = values.get("warmup_steps")
    for override in overrides:
        if override not in sources:
            _apply(values, override)
    overridden = {override.partition("=")[0] for override in overrides}
    scales = "steps" in overridden and "warmup_steps" not in overridden
    if scales and type(steps) is type(warmup_steps) is type(values["steps"]) is int and steps > 0:  # `_validate` refuses other values
        values["warmup_steps"] = warmup_steps * values["steps"] // steps
    return _validate(values, f"{path} cannot be used")


# ------------------------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-3 as a number (in YAML 1.1 it is a string) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader


def _apply(values: dict[str, Any], override: str) -> None:
    """Apply one override, such as `optimizer.lr=1e-3`, to `values`. `_validate` checks whether the key exists."""
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise ConfigError(f"an override is key=value, as steps=50, got {override!r}")
    section, leaf = find_section(values, key, override)
    try:
        section[leaf] = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override}: the value is no YAML, {getattr(error, 'problem', error)}; put quotes around it") from None


# -------------------------------------------------------------------------------------------------------------------------- errors


def _nearest_key(key: str) -> str:
    """Return `; did you mean ...?` with a key of the same name in any section, or else the most similar key of the same section."""
    section, dot, name = key.rpartition(".")
    fields: dict[str, Any] = {"": Config} | {f"{name}.": field.annotation for name, field in Config.model_fields.items()}
    names = {prefix: list(model.model_fields) for prefix, model in fields.items() if hasattr(model, "model_fields")}
    for prefix, keys in names.items():
        if name in keys:  # lr is optimizer.lr
            return f"; did you mean {prefix}{name}?"
    # Only the last parts are compared: with `optimizer.` in front, all names would be similar.
    siblings = names.get(section + dot, [])
    return nearest(name, siblings, section + dot) or f"; the keys here are {', '.join(siblings)}"


def _validate(values: dict[str, Any], heading: str) -> Config:
    """Build a Config from these values, or raise a ConfigError with a heading and all problems."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{heading}:", *map(_explain, error.errors())])) from None


def _explain(problem: ErrorDetails) -> str:
    """Describe one of pydantic's errors in one line: key, value, rule, and the nearest valid name if there is one."""
    key = ".".join(map(str, problem["loc"]))
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}={value!r}: there is no such key{_nearest_key(key)}"
    if kind == "missing":
        return f"{key} is missing; add it to the file, or {key}=... to the command"
    if kind == "value_error":  # raised above, with keys and values in the message
        return f"{key + ': ' if key else ''}{context['error']}"
    rule = re.sub(r"^\w+ should ", "", problem["msg"])  # Input should be ...
    choices = re.findall(r"'([^']+)'", context.get("expected", ""))
    return f"{key}={value!r}: it should {rule}{nearest(str(value), choices)}"
