"""Use this library's optimizers under DeepSpeed: `initialize` instead of `deepspeed.initialize`, or `attach` after it.

Under ZeRO an optimizer steps flat partitions that do not record which parameters they hold. `attach` reads their layout from DeepSpeed
(`sharding/deepspeed.py`) and sets it in the optimizer. For features that would be silently wrong it raises an error, on all ranks together.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.file_baton import FileBaton

from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.sharding import deepspeed as sharding
from sharded_optim.sharding.ranks import gather_messages, message_of, own_process_group
from sharded_optim.step.engine import Engine

__all__ = ["BUILD_SECONDS", "PREFIX", "attach", "initialize", "is_own", "not_built"]

OLDEST, NEXT = (0, 19), (0, 20)  # supported versions of DeepSpeed: OLDEST <= version < NEXT; tested with 0.19.0 and 0.19.8
VERSIONS = f">={OLDEST[0]}.{OLDEST[1]},<{NEXT[0]}.{NEXT[1]}"
PREFIX = "sharded_optim."  # prefix of this library's class names in a DeepSpeed config
# Names of DeepSpeed's own optimizers in its config, in lower case. Names of torch.optim mean torch's.
DEEPSPEED_OPTIMIZERS = frozenset({"adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "muon", "musgd"})
BUILD_SECONDS = 300.0  # time limit for compiling an extension, which takes about a minute on 2 cores
NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Call `deepspeed.initialize`, and `attach` to the engine.

    Pass an optimizer of this library, or a callable that builds one from parameters, or name a class in the config, with its arguments as
    `params`: "sharded_optim.AdamW" and so on for every class, or "StableAdamW" without the prefix if DeepSpeed and torch have no class of
    that name. `zero_allow_untested_optimizer` and `zero_force_ds_cpu_optimizer` need not be set.

    Args:
        args, kwargs: the arguments of deepspeed.initialize.

    Returns:
        The result of deepspeed.initialize: engine, optimizer, training_dataloader, lr_scheduler.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: see `attach`; or another process has held the lock for compiling a DeepSpeed extension for more than BUILD_SECONDS. The
            message names the lock.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(f"so.deepspeed needs DeepSpeed: pip install 'deepspeed{VERSIONS}'") from error
    call = inspect.signature(deepspeed.initialize).bind(*args, **kwargs)
    given = call.arguments
    config = dict(_take_config(given))
    named = config.get("optimizer")
    if isinstance(named, dict) and is_own(named.get("type")):
        del config["optimizer"]  # unknown to DeepSpeed
        if given.get("optimizer") is None:
            given["optimizer"] = _maker(named["type"], named.get("params") or {})
    _check_parameters(given.get("optimizer"), given.get("model"))
    given["config"] = NEEDED | config
    with _limited_waiting():
        if dist.is_initialized() and not deepspeed.comm.is_initialized():
            _join(deepspeed)
        result = deepspeed.initialize(*call.args, **call.kwargs)
    if result[0].basic_optimizer is not None:  # an engine without an optimizer is for inference
        _attach(result[0])
    return result


def attach(engine: Any) -> None:
    """Set the layout of DeepSpeed's flat partitions in an engine's base optimizer. A collective.

    Call it again after parameters were added or replaced.

    Args:
        engine: an engine with ZeRO stage 0, 1, 2 or 3, whose base optimizer is from this library.

    Raises:
        ValueError: on every rank, if the version of DeepSpeed or a feature in use is not supported on any rank. The message names the
            feature and the way out.

    Warns:
        UserWarning: `gradient_clipping` is not in the config, so DeepSpeed clips to 1.0.
    """
    _attach(engine)


def _attach(engine: Any) -> None:
    problem = layout = None
    try:
        problem = next(_problems(engine), None)
        if problem is None:
            layout = sharding.layout_of(engine)
    except Exception as error:  # the other ranks must get the error before this one raises
        import deepspeed

        problem = f"{message_of(error)} (DeepSpeed {deepspeed.__version__}, supported are {VERSIONS})"
    if messages := gather_messages(problem, own_process_group(None)):
        raise ValueError(f"so.deepspeed.attach: {messages}")
    engine.basic_optimizer.layout = layout
    if "gradient_clipping" not in engine.config and engine.gradient_clipping():
        warnings.warn(
            f"gradient_clipping is not in the DeepSpeed config, and its default clips gradients to a norm of {engine.gradient_clipping()}; "
            f"say what you want: 0 for none",
            UserWarning,
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------------------------------------------- extensions


def not_built(lock: Path, seconds: float) -> str:
    """Return the error message for an extension that was not compiled in time."""
    remedy = f"if nothing else is compiling it, remove {lock}" if lock.exists() else "start again"
    return f"DeepSpeed's extension was not compiled within {seconds:g} s; {remedy}"


@contextmanager
def _limited_waiting() -> Iterator[None]:
    """Context that limits the wait for another process that compiles the same extension to BUILD_SECONDS.

    torch waits as long as the lock file exists, which a killed process leaves behind. Tried with torch 2.11 and 2.13.
    """

    def wait(baton: Any) -> None:
        until = time.monotonic() + BUILD_SECONDS
        while Path(baton.lock_file_path).exists():
            if time.monotonic() > until:
                raise ValueError(not_built(Path(baton.lock_file_path), BUILD_SECONDS))
            time.sleep(baton.wait_seconds)

    with mock.patch.object(FileBaton, "wait", wait):
        yield


def _join(deepspeed: Any) -> None:
    """Initialize DeepSpeed's communication on the existing process group; on a CPU this compiles an extension. A collective.

    Raises:
        ValueError: a rank has waited too long for the extension; raised on every rank.
    """
    failure = None
    try:
        deepspeed.init_distributed()
    except ValueError as error:
        failure = error
    try:
        messages = gather_messages(failure, own_process_group(None))
    except RuntimeError:
        if failure is None:
            raise
        raise failure from None  # gathering failed, as the other ranks are still waiting
    if messages:
        raise ValueError(f"so.deepspeed.initialize: {messages}")


# ------------------------------------------------------------------------------------------------------------------------ refusals


def _problems(engine: Any) -> Iterator[str]:
    """Yield an error message for each unsupported feature that an engine uses."""
    import deepspeed

    version = tuple(int(part) for part in deepspeed.__version__.split(".")[:2])
    if not OLDEST <= version < NEXT:
        yield f"the layout of DeepSpeed {deepspeed.__version__} was not tested; install deepspeed{VERSIONS}"
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    if optimizer is None:
        yield "the engine has no optimizer; pass one of sharded_optim to deepspeed.initialize"
        return
    if not isinstance(optimizer, Engine):
        yield (
            f"the base optimizer is {sharding.qualified_name(optimizer)}; pass one of sharded_optim as optimizer=, or "
            f"name it in the config, as {{'type': 'StableAdamW'}} or {{'type': 'sharded_optim.AdamW'}}"
        )
    if optimizer.gradient_release:
        yield "the optimizer was built with gradient_release=True, and DeepSpeed steps after backward; leave it out"
    zero = engine._config.zero_config
    stage = int(zero.stage)
    tagged = [name for param, name in engine.param_names.items() if getattr(param, "use_muon", False)]
    takes_by_name = type(wrapper).__name__ == "DeepSpeedZeroOptimizer"  # stages 1 and 2
    if tagged and takes_by_name and "muon" in type(optimizer).__name__.lower():
        yield (
            f"{tagged[0]!r} is tagged use_muon, by the type of the config's optimizer or by hand. Because of the name of the optimizer's "
            f"class, DeepSpeed takes it for its own Muon and orthogonalizes gradients too; name 'sharded_optim.Muon' in the config or no "
            f"optimizer, and leave the tags out"
        )
    if zero.zenflow is not None:
        yield "ZenFlow steps parts of the model with its own optimizer; leave zero_optimization.zenflow out"
    if engine.super_offload():
        yield "SuperOffload steps with its own optimizer; leave offload_optimizer.super_offload out"
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name)
        if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
            yield f"zero_optimization.{name} to NVMe leaves the optimizer tensors without values; offload to 'cpu'"
    if stage == 3 and zero.offload_optimizer is not None and engine.zero_partial_offload() != 1.0:
        yield f"offload_optimizer.ratio={engine.zero_partial_offload()} steps a part with DeepSpeed's own optimizer; leave it at 1"
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        yield "torch_autocast in float16 lets each rank decide alone whether to step; use bfloat16, or DeepSpeed's fp16"
    if engine.autotp_size() > 1 or engine.mp_world_size > 1:
        yield "tensors are sharded by tensor parallelism, which DeepSpeed's partitions do not record; use FSDP2 for it"
    if engine.pipeline_parallelism:
        yield "PipelineEngine is not supported; use DeepSpeedEngine"
    for param, name in engine.param_names.items():
        if not getattr(param, "allreduce", True) and sharding.EXPERTS not in name:  # AutoEP, which stacks experts into one tensor per rank
            yield f"{name!r} is a different tensor on each rank of an expert-parallel group; build experts with deepspeed.moe.layer.MoE"
    if wrapper is not optimizer and sharding.qualified_name(wrapper) not in sharding.OPTIMIZER_WRAPPERS:
        yield f"the optimizer wrapper {sharding.qualified_name(wrapper)} is not supported; use ZeRO stage 0, 1, 2 or 3"
    if stage == 0 and engine.fp16_enabled():
        yield "fp16 without ZeRO divides gradients by a loss scale that DeepSpeed has not multiplied them with; use ZeRO stage 1, or bf16"


# ------------------------------------------------------------------------------------------------------------------------- configs


def _take_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the config, in any of its forms, from the arguments of deepspeed.initialize, and return it as a dict."""
    import deepspeed

    config = arguments.pop("config", None)
    config = arguments.pop("config_params", None) if config is None else config
    if config is None and getattr(arguments.get("args"), "deepspeed_config", None) is not None:
        arguments["args"] = copy(arguments["args"])
        config, arguments["args"].deepspeed_config = arguments["args"].deepspeed_config, None
    if config is None:
        raise ValueError("DeepSpeed needs a config: pass config= with a dict or the path of a JSON file, or args.deepspeed_config")
    return deepspeed.load_ds_config(config)  # pyright: ignore[reportPrivateImportUsage]


def is_own(name: Any) -> bool:
    """Return whether an optimizer type in a DeepSpeed config means a class of this library."""
    if not isinstance(name, str) or name.removeprefix(PREFIX) not in OPTIMIZERS:
        return False
    return name.startswith(PREFIX) or not (name.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, name))


def _maker(name: str, hyperparameters: dict[str, Any]) -> Callable[[list[Any]], Engine]:
    """Return a function that builds the optimizer that a DeepSpeed config names."""
    kind: Callable[..., Engine] = OPTIMIZERS[name.removeprefix(PREFIX)]

    def make(parameters: list[Any]) -> Engine:
        from deepspeed.moe.utils import configure_moe_param_groups, is_moe_param

        tensors = [tensor for each in parameters for tensor in (each["params"] if isinstance(each, dict) else [each])]
        if any(map(is_moe_param, tensors)):  # as DeepSpeed does for its own optimizers
            parameters = configure_moe_param_groups(parameters) or parameters
        return kind(parameters, **hyperparameters)

    return make


def _check_parameters(optimizer: Any, model: Any) -> None:
    """Raise ValueError for optimized parameters that are not in the model, on every rank: DeepSpeed's own check raises only on rank 0."""
    if isinstance(optimizer, Engine) and isinstance(model, nn.Module):
        known = set(model.parameters())
        unknown = [param for group in optimizer.param_groups for param in group["params"] if param not in known]
        if unknown:
            raise ValueError(
                f"the optimizer has a parameter of shape {tuple(unknown[0].shape)} that is not in the model, and DeepSpeed steps only "
                f"parameters of its model; make it a parameter of the model"
            )
