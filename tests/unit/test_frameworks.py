"""Frameworks need no remedy: what they do with an optimizer, by stand-ins of a few lines that do it in the same order."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import sharded_optim as so
from sharded_optim.sharding import FlatLayout

MAKERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda model: so.AdamW(model.named_parameters(), lr=1e-2),
    "StableAdamW": lambda model: so.StableAdamW(model.named_parameters(), lr=1e-2),
    "ShardedOptimizer": lambda model: so.ShardedOptimizer(model, so.StableAdamW, lr=1e-2),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


# --------------------------------------------------------------------------------------------------- torchtitan, torchft: first state


def init_optim_state(optimizer: Any, grad: float = 0.0) -> None:
    """What torchtitan and torchft do before a checkpoint is taken or loaded."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, grad)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


@every_maker
def test_a_step_that_only_allocates_counts_as_none(make: Callable) -> None:
    """The losses after it are those without it, bit for bit; and state is there."""
    plain, prepared = model_of(), model_of()
    expected = train(plain, make(plain))
    optimizer = make(prepared)
    init_optim_state(optimizer)
    assert len(optimizer.state) == 4
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}
    for value, other in zip(train(prepared, optimizer), expected, strict=True):
        assert torch.equal(value, other)


def test_a_real_step_of_that_name_counts() -> None:
    """With gradients, or with state that is there already."""
    model = model_of()
    optimizer = so.AdamW(model.parameters(), lr=1e-2)
    init_optim_state(optimizer, grad=1.0)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    init_optim_state(optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_first_step_of_a_warmup_counts() -> None:
    """Its lr is 0 and so may be its gradients, but nobody calls that initialization."""
    model = model_of()
    optimizer = so.AdamW(model.parameters(), lr=0.0, max_lr=1e-2)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


# ------------------------------------------------------------------------------------------------------------------- torch.compile


@every_maker
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_has_the_bits_of_an_ordinary_one(make: Callable) -> None:
    """torch.compile(optimizer.step), and a function that steps, compiled as a whole: neither traces into the step."""
    plain, compiled = model_of(), model_of()
    expected = train(plain, make(plain))
    optimizer = make(compiled)
    step = torch.compile(optimizer.step)
    whole = torch.compile(lambda: optimizer.step())
    for number in range(3):
        compiled(torch.randn(4, 3, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        (whole if number == 2 else step)()
        optimizer.zero_grad()
    for param, other in zip(compiled.parameters(), expected, strict=True):
        assert torch.equal(param, other)


# ------------------------------------------------------------------------------------------------------------------------- metrics


def stepped(names: list[str], cls: Callable[..., Any] = so.StableAdamW) -> Any:
    params = [nn.Parameter(torch.ones(3)) for _ in names]
    optimizer = cls(list(zip(names, params, strict=True)), lr=1e-2)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    return optimizer


class Around(torch.optim.Optimizer):
    """As Accelerate's AcceleratedOptimizer and DeepSpeed's wrappers: an optimizer that has another, and not its parts."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class Unattached:
    """As a LightningModule: its attributes raise before there is a trainer."""

    def __init__(self, optimizers: Any) -> None:
        self._given = optimizers

    def optimizers(self) -> Any:
        return self._given

    @property
    def optimizer(self) -> Any:
        raise RuntimeError("not attached to a Trainer")


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda ours: ours,
    "Accelerate, three deep": lambda ours: Around(Around(Around(ours))),
    "Accelerator": lambda ours: SimpleNamespace(_optimizers=[Around(ours)]),
    "Trainer of Hugging Face": lambda ours: SimpleNamespace(optimizer=Around(ours), model=nn.Linear(2, 2)),
    "LightningOptimizer": lambda ours: SimpleNamespace(_optimizer=ours),
    "Trainer of Lightning": lambda ours: SimpleNamespace(optimizers=[SimpleNamespace(_optimizer=ours)], optimizer=None),
    "LightningModule": lambda ours: Unattached(SimpleNamespace(_optimizer=ours)),
    "DeepSpeedEngine": lambda ours: SimpleNamespace(optimizer=Around(ours), basic_optimizer=ours),
    "OptimizersContainer of torchtitan": lambda ours: SimpleNamespace(optimizers=[ours]),
    "OptimizerWrapper of torchft": lambda ours: SimpleNamespace(optim=ours),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_metrics_are_found_in_every_container(container: Callable) -> None:
    ours = stepped(["a", "b.c"])
    assert so.metrics(container(ours)) == ours.metrics()
    assert {"skipped_steps", "rms/a", "rms/b.c", "clip_factor/a", "clip_factor/b.c"} <= ours.metrics().keys()


def test_metrics_of_several_optimizers_are_together() -> None:
    found = so.metrics(SimpleNamespace(optimizers={"first": stepped(["a"]), "second": stepped(["b"], so.AdamW), "third": stepped(["c"])}))
    of_tensors = {"rms/a", "rms/c", "clip_factor/a", "clip_factor/c"}
    of_groups = {f"{kind}/{number}.0" for kind in ("lr", "weight_decay") for number in range(3)}
    assert found.keys() == {"skipped_steps", "clipped_share", "non_finite_tensors"} | of_tensors | of_groups


def test_metrics_without_an_optimizer_of_ours_name_what_was_given() -> None:
    for given in (torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), SimpleNamespace(optimizer=None), None, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"found no optimizer of sharded_optim in a {type(given).__name__}; pass the optimizer"):
            so.metrics(given)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["_orig_mod.0.weight", "_orig_mod.0.bias"], ["0.weight", "0.bias"]),
        (["module._orig_mod.up.weight", "module._orig_mod.up.bias"], ["up.weight", "up.bias"]),
        (["_fsdp_wrapped_module.0._fsdp_wrapped_module.weight", "_fsdp_wrapped_module.1.bias"], ["0.weight", "1.bias"]),
        (["blocks.0._checkpoint_wrapped_module.weight", "head"], ["blocks.0.weight", "head"]),
        (["module.weight", "head.weight"], ["module.weight", "head.weight"]),  # the module's own name
        (["_orig_mod.w", "w"], ["_orig_mod.w", "w"]),  # which would be the same
    ],
)
def test_prefixes_of_wrappers_are_in_no_name_of_a_metric(names: list[str], shown: list[str]) -> None:
    metrics = stepped(names).metrics()
    for kind in ("rms", "clip_factor"):
        assert [name for name in metrics if name.startswith(kind)] == [f"{kind}/{name}" for name in shown]


# -------------------------------------------------------------------------------------------------- options that are set on a wrapper


class Stepping(Around):
    """As Accelerate's: it hands steps on, and knows nothing of our attributes."""

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Lightnings:
    """As Lightning's and Fabric's: it makes itself a subclass of the optimizer's class, without its attributes."""

    def __init__(self, optimizer: Any) -> None:
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Lightnings, type(optimizer)), {})
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self._optimizer.step()


def fresh() -> Any:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return so.StableAdamW([("w", param)], lr=1e-2)


@pytest.mark.parametrize("name", ["layout", "process_group"])
def test_an_option_on_accelerates_wrapper_raises_and_names_what_reaches_the_optimizer(name: str) -> None:
    ours, given = fresh(), FlatLayout(flat={}, whole={}, unknown_param_error="")
    wrapper = Stepping(Stepping(ours))
    setattr(wrapper.optimizer, name, given)
    with pytest.raises(ValueError, match=rf"{name} was set on the Stepping around.*so.unwrap_optimizer\(optimizer\)\.{name} = "):
        wrapper.step()
    assert not ours.state
    setattr(so.unwrap_optimizer(wrapper), name, given)
    assert getattr(ours, name) is given


class Optim(torch.optim.Optimizer):
    """As torchft's wrapper, which calls the optimizer `optim`."""

    def __init__(self, optimizer: Any) -> None:
        self.optim = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optim.step(closure)


class Container(torch.optim.Optimizer):
    """As torchtitan's, which has a list of them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizers = [optimizer]

    def step(self, closure: Any = None) -> Any:
        return [each.step(closure) for each in self.optimizers]


@pytest.mark.parametrize(
    "wrapped", [lambda ours: Stepping(Stepping(ours)), Optim, Container], ids=["outermost of two", "optim", "optimizers"]
)
@pytest.mark.parametrize("name", ["layout", "process_group"])
def test_an_option_on_what_a_user_holds_raises_whatever_is_between(name: str, wrapped: Any) -> None:
    ours = fresh()
    wrapper = wrapped(ours)
    setattr(wrapper, name, FlatLayout(flat={}, whole={}, unknown_param_error=""))
    with pytest.raises(ValueError, match=rf"{name} was set on the {type(wrapper).__name__} around"):
        wrapper.step()
    assert not ours.state


def test_a_first_step_keeps_nothing_of_its_callers_alive() -> None:
    """Before Python 3.13 a frame keeps what its f_locals has shown: what a training loop deletes must go."""
    ours, big = fresh(), nn.Linear(3, 3)
    known = ref(big)
    Stepping(ours).step()
    del big
    gc.collect()
    assert known() is None


def test_an_option_on_lightnings_wrapper_reaches_the_optimizer() -> None:
    ours, given = fresh(), FlatLayout(flat={}, whole={}, unknown_param_error="")
    wrapper: Any = Lightnings(ours)
    wrapper.layout = wrapper.process_group = given
    assert ours.layout is ours.process_group is given
    assert wrapper.layout is given
    wrapper.layout = wrapper.process_group = None
    wrapper.step()
    assert so.unwrap_optimizer(wrapper) is ours
    assert so.metrics(wrapper) == wrapper.metrics() == ours.metrics()
    assert float(so.clip_grad_norm_(wrapper, 1e9)) == pytest.approx(3**0.5)


def test_unwrapping_needs_one_optimizer() -> None:
    for given, count in ((SimpleNamespace(), "no"), (SimpleNamespace(optimizers=[fresh(), fresh()]), "2")):
        with pytest.raises(TypeError, match=f"there are {count} optimizers of sharded_optim in a SimpleNamespace"):
            so.unwrap_optimizer(given)


# ------------------------------------------------------------------------------------------------------------------------ callbacks


class HuggingFaceTrainer:
    """What its Trainer is to callbacks, and the order in which it calls them."""

    def __init__(self, optimizer: Any, reporter: Any) -> None:
        self.optimizer = Around(optimizer)
        self.accelerator = SimpleNamespace(deepspeed_engine_wrapped=None)
        self.callback_handler = SimpleNamespace(callbacks=[reporter])
        self.state = SimpleNamespace(log_history=[], global_step=0)
        self.control = SimpleNamespace(should_save=False)
        self.args = SimpleNamespace(save_strategy="steps")
        self.model = nn.Linear(1, 1)

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.callbacks.append(callback)

    def call(self, event: str, **options: Any) -> None:
        for callback in self.callback_handler.callbacks:
            getattr(callback, event, lambda *_, **__: None)(self.args, self.state, self.control, **options)

    def log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append(dict(logs))
        self.call("on_log", logs=logs)


class Reporter:
    """As those of report_to: it logs what it is given, and decides nothing."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any) -> None:
        self.logged.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any) -> None:
        control.should_save = True  # as DefaultFlowCallback, which comes before those that are added


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(TrainerCallback=object))  # type: ignore[arg-type]


@pytest.mark.usefixtures("transformers")
def test_hugging_faces_trainer_logs_metrics_wherever_it_reports() -> None:
    ours, reporter = stepped(["w"]), Reporter()
    trainer = HuggingFaceTrainer(ours, reporter)
    so.callbacks.hugging_face(trainer)
    trainer.call("on_train_begin")
    trainer.log({"loss": 1.0})
    assert reporter.logged == trainer.state.log_history == [{"loss": 1.0} | ours.metrics()]
    trainer.optimizer = None  # not made yet
    trainer.log({"loss": 2.0})
    assert reporter.logged[-1] == {"loss": 2.0}


@pytest.mark.usefixtures("transformers")
def test_hugging_faces_trainer_logs_metrics_every_so_many_steps() -> None:
    trainer = HuggingFaceTrainer(stepped(["w"]), reporter := Reporter())
    so.callbacks.hugging_face(trainer, metrics_every=20)
    for step in (10, 20, 30, 40):
        trainer.state.global_step = step
        trainer.log({"loss": 1.0})
    assert ["rms/w" in logs for logs in reporter.logged] == [False, True, False, True]


def test_a_number_of_steps_that_is_none_is_refused_by_callbacks() -> None:
    for refused in (lambda: so.callbacks.hugging_face(object(), metrics_every=0), lambda: so.callbacks.lightning(metrics_every=True)):
        with pytest.raises(ValueError, match="metrics_every is a number of steps, a positive int, got"):
            refused()


def test_trainers_that_give_parameters_without_names_report_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two groups, one of them empty, before the first step; names that are there stay."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(TrainerCallback=object))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=object))  # type: ignore[arg-type]

    def begin(optimizer: Any, model: nn.Module) -> Any:
        trainer: Any = HuggingFaceTrainer(optimizer, Reporter())
        trainer.model = model
        so.callbacks.hugging_face(trainer)
        trainer.call("on_train_begin")
        return optimizer

    def begin_lightning(optimizer: Any, model: nn.Module) -> Any:
        so.callbacks.lightning().on_train_start(SimpleNamespace(optimizers=[optimizer], global_step=0), model)
        return optimizer

    for start in (begin, begin_lightning):
        model = model_of()
        optimizer = start(so.StableAdamW([{"params": list(model.parameters())}, {"params": []}], lr=1e-2), model)
        train(model, optimizer, 1)
        assert {f"rms/{name}" for name, _ in model.named_parameters()} <= optimizer.metrics().keys()
        model = model_of()
        optimizer = start(so.StableAdamW([(f"own.{name}", param) for name, param in model.named_parameters()], lr=1e-2), model)
        train(model, optimizer, 1)
        assert "rms/own.0.weight" in optimizer.metrics()


@pytest.mark.usefixtures("transformers")
def test_hugging_faces_trainer_saves_whole_state_of_a_sharded_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step in which it saves, by steps, by epochs or the best, and in no other."""
    collected: list[int] = []
    monkeypatch.setattr(so.ShardedOptimizer, "consolidate_state_dict", lambda self: collected.append(1))
    trainer = HuggingFaceTrainer(so.ShardedOptimizer(model_of(), so.AdamW, lr=1e-2), Reporter())
    so.callbacks.hugging_face(trainer)
    trainer.call("on_evaluate")
    trainer.call("on_epoch_end")
    assert len(collected) == 0
    trainer.call("on_step_end")
    assert len(collected) == 1
    trainer.args.save_strategy = "best"
    trainer.call("on_evaluate")
    assert len(collected) == 2
    trainer.optimizer = Around(stepped(["w"]))
    trainer.call("on_step_end")
    assert len(collected) == 2


@pytest.mark.usefixtures("transformers")
def test_hugging_faces_trainer_attaches_deepspeed_when_training_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    attached: list[Any] = []
    monkeypatch.setattr(so.deepspeed, "attach", attached.append)
    engine, theirs = SimpleNamespace(optimizer=Around(fresh())), SimpleNamespace(optimizer=Around(None))
    trainer = HuggingFaceTrainer(fresh(), Reporter())
    so.callbacks.hugging_face(trainer)
    for wrapped in (None, SimpleNamespace(engine=theirs), SimpleNamespace(engine=engine)):
        trainer.accelerator.deepspeed_engine_wrapped = wrapped
        trainer.call("on_train_begin")
    assert attached == [engine]


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightnings_trainer_logs_metrics_in_the_steps_in_which_it_logs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(Callback=object))  # type: ignore[arg-type]
    ours, logged = stepped(["w"]), []
    callback = so.callbacks.lightning()
    module = SimpleNamespace(log_dict=logged.append)
    for step in range(1, 6):
        trainer = SimpleNamespace(optimizers=[Around(ours)], global_step=step, log_every_n_steps=2)
        callback.on_train_batch_end(trainer, module, None, None, step)
    assert logged == [ours.metrics()] * 2
    callback, logged[:] = so.callbacks.lightning(metrics_every=4), []
    for step in range(1, 9):
        trainer = SimpleNamespace(optimizers=[Around(ours)], global_step=step, log_every_n_steps=2)
        callback.on_train_batch_end(trainer, module, None, None, step)
    assert logged == [ours.metrics()] * 2, "at steps 4 and 8"


def test_lightnings_trainer_logs_metrics_once_per_step_while_gradients_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor before the first step, nor again in the step after which it resumes: `global_step` is that of the batch before."""
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=object))  # type: ignore[arg-type]
    trainer = SimpleNamespace(optimizers=[Around(stepped(["w"]))], global_step=0, log_every_n_steps=2)
    for start, logged_in in ((0, [2, 4]), (2, [4])):
        logged: list[int] = []
        module = SimpleNamespace(log_dict=lambda found, logged=logged: logged.append(trainer.global_step), named_parameters=list)
        callback = so.callbacks.lightning()
        trainer.global_step = start
        callback.on_train_start(trainer, module)
        for batch in range(3 * start + 1, 16):  # three batches to a step
            trainer.global_step = batch // 3
            callback.on_train_batch_end(trainer, module, None, None, batch)
        assert logged == logged_in
