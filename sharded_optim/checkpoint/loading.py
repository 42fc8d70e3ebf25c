"""Loading: everything that could go wrong is found out, on all ranks together, before anything live changes.

manifest -> what is wanted, what does not fit -> verify (all bytes, by the ranks together) -> read what intersects -> install
"""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, NoCheckpointError
from sharded_optim.checkpoint.exchange import together
from sharded_optim.checkpoint.held import LOW_PRECISION, MASTER, MODEL, Held
from sharded_optim.checkpoint.live import LiveModel, LiveOptimizer, live_model, live_optimizer
from sharded_optim.checkpoint.live.optimizer import Landing
from sharded_optim.checkpoint.manifest import Manifest, Parameters, TensorEntry, key_of
from sharded_optim.checkpoint.read import CheckpointReader, Wish
from sharded_optim.checkpoint.steps import candidates, reading_back
from sharded_optim.checkpoint.store import MANIFEST, Store
from sharded_optim.storage.formats import extra_arrays, format_beside

__all__ = ["Choices", "load_newest", "load_step"]

logger = logging.getLogger(__name__)

SHOWN = 50  # problems in an error message


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How strict loading is.

    Attributes:
        strict: whether what is missing, left over or of another dtype is an error, for all names.
        lenient: patterns of names for which it is not, where `strict` is False.
        hyperparameters: whose count.
    """

    strict: bool
    lenient: Sequence[str]
    hyperparameters: Literal["checkpoint", "live"]

    def check(self) -> None:
        """Raise ValueError for a choice that there is not."""
        if self.hyperparameters not in ("checkpoint", "live"):
            raise ValueError(f"hyperparameters must be 'checkpoint' or 'live', got {self.hyperparameters!r}")

    def passes(self, name: str) -> bool:
        """Whether what is wrong with a name is passed over."""
        return not self.strict and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.lenient)


class _Seen(TypedDict):
    """What a rank tells the others first."""

    digest: str  # of the manifest
    groups_in: list[set[int]]  # see `LiveOptimizer`
    rounded: set[str]  # names of parameters that are rounded copies of masters
    known: int  # which of the checkpoint's parameters the optimizer has, as bits


@dataclass
class _Fit:
    """How a checkpoint fits what this rank holds."""

    wishes: list[Wish] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # keys of the checkpoint
    problems: list[tuple[str, str]] = field(default_factory=list)  # the name that each is about, and what it is


def load_newest(store: Store, load: Callable[[int], Any], process_group: dist.ProcessGroup | None) -> Any:
    """Load the highest step that is not damaged. A collective.

    Args:
        load: loads a step.

    Raises:
        CheckpointError: there is none, or `load` raises it for a reason other than damage.
    """
    told = together(f"looking into {store.root}", lambda: candidates(store), process_group)
    damaged: list[str] = []
    for step in reversed(told[0]):
        try:
            return load(step)
        except DamagedError as error:
            damaged += error.problems
            warnings.warn(f"{error}\n  Falling back to the checkpoint before it.", UserWarning, stacklevel=4)
    if damaged:
        listed = "\n  ".join(damaged[:SHOWN])
        raise DamagedError(f"there is no checkpoint in {store.root} that verifies; all {len(told[0])} are damaged:\n  {listed}", damaged)
    raise NoCheckpointError(f"there is no checkpoint in {store.root}; save one, or give the folder that holds the step-... folders")


def load_step(store: Store, step: int, model: Any, optimizer: Any, choices: Choices, process_group: dist.ProcessGroup | None) -> Any:
    """Load a step, on all ranks or on none. A collective.

    Returns:
        What was given as `extra`.

    Raises:
        CheckpointError: see `load`.
    """
    rank, world_size = (0, 1) if process_group is None else (dist.get_rank(process_group), dist.get_world_size(process_group))
    live: list[Any] = []

    def look() -> _Seen:
        reader = CheckpointReader(store, step)
        reader.check_files()
        shown = live_model(model)
        state = None if optimizer is None else live_optimizer(optimizer, model, shown)
        if state is not None:
            state.settle()
            if reader.manifest.parameters is None:
                raise MismatchError(f"{reader.where} was saved without an optimizer; load it without optimizer=")
        masters = shown.masters() if state is None and model is not None else []
        live.extend((reader, shown, state, masters))
        parameters = reader.manifest.parameters
        if state is None or parameters is None:
            return _Seen(digest=reader.digest, groups_in=[], rounded={held.segment.name for held in masters}, known=0)
        known = {*state.group_of, *state.order}
        bits = _as_bits(parameters.group_of, known)
        return _Seen(digest=reader.digest, groups_in=state.groups_in(parameters), rounded=state.rounded(), known=bits)

    looked = together(f"loading step {step} from {store.root}", look, process_group)
    reader: CheckpointReader
    shown: LiveModel
    state: LiveOptimizer | None
    masters: list[Held]
    reader, shown, state, masters = live
    if len({seen["digest"] for seen in looked}) > 1:
        raise CheckpointError(f"ranks see different checkpoints in {reader.where}; root must be a folder that all ranks share")
    groups_in = [set().union(*found) for found in zip(*(seen["groups_in"] for seen in looked), strict=True)]
    rounded = set().union(*(seen["rounded"] for seen in looked))

    landing = Landing()
    fits: list[_Fit] = []

    def fit() -> tuple[int, list[tuple[str, str]]]:
        nonlocal landing
        try:
            for name, saved in reader.manifest.wrapper.items():
                if name in shown.wrapper:
                    shown.check(saved)
        except ValueError as error:
            raise DamagedError(f"{reader.where}/{MANIFEST}: {error}") from error
        if state is not None and reader.manifest.parameters is not None:
            landing = state.land(reader.manifest, reader.manifest.parameters, groups_in)
        found = _fit(reader.manifest, shown.held, masters, landing, rounded)
        fits.append(found)
        return _as_bits(reader.manifest.tensors, found.used), found.problems

    told = together(f"comparing {reader.where} with what is live", fit, process_group)
    problems = dict.fromkeys(problem for _, found in told for problem in found)
    used = _of_bits(reader.manifest.tensors, [bits for bits, _ in told])
    problems |= dict.fromkeys(_left_over(reader.manifest, used, with_model=model is not None, state=state))
    if state is not None and reader.manifest.parameters is not None:
        known = _of_bits(reader.manifest.parameters.group_of, [seen["known"] for seen in looked])
        problems |= dict.fromkeys(_left_out(reader.manifest, reader.manifest.parameters, known))
    errors = [text for name, text in problems if not choices.passes(name)]
    if errors:
        listed = "\n  ".join(errors[:SHOWN]) + (f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else "")
        raise MismatchError(f"{reader.where} does not fit, and nothing was changed:\n  {listed}")
    if problems:
        warnings.warn(
            f"{reader.where} does not fit in all, as strict=False allows:\n  " + "\n  ".join(text for _, text in problems), stacklevel=4
        )
    wishes = fits[0].wishes

    def verify() -> None:
        reader.verify(wishes, rank, world_size)
        if state is not None and rank == 0:
            _log_differences(state, landing, choices)

    with reading_back(reader):
        together(f"verifying {reader.where}", verify, process_group)

    def install() -> None:
        shown.prepare()
        reader.load(wishes)
        if state is not None:
            state.install(landing, hyperparameters=choices.hyperparameters == "checkpoint")
        for name, saved in reader.manifest.wrapper.items():
            if name in shown.wrapper:
                shown.resume(saved)

    with reading_back(reader):
        together(f"reading {reader.where}, after which model and optimizer are of no use,", install, process_group)
    return reader.manifest.extra


# ------------------------------------------------------------------------------------------------------------------------- fitting


def _fit(manifest: Manifest, model: Sequence[Held], masters: Sequence[Held], landing: Landing, rounded: set[str]) -> _Fit:
    """What of a checkpoint goes where.

    Args:
        masters: of the model, where it is loaded alone: its values are theirs, whatever their dtype.
        rounded: names of the live parameters that are rounded copies of masters.
    """
    fit = _Fit(problems=list(landing.problems))
    alone = set(map(id, masters))
    for held in (*model, *masters, *landing.wanted):
        name = held.segment.name
        entry = _source(manifest, held)
        if entry is None:
            if held.segment.tensor_numel:
                fit.problems.append((name, f"{held.key!r} is not in the checkpoint"))
            continue
        fit.used.add(entry.key)
        if entry.shape != held.segment.shape:
            fit.problems.append((name, f"{held.key!r} has shape {held.segment.shape}, in the checkpoint {entry.shape}"))
            continue
        if held.local.is_meta or any(stride == 0 < size - 1 for stride, size in zip(held.local.stride(), held.local.shape, strict=True)):
            what = "has no memory (device meta)" if held.local.is_meta else "has elements that share memory (expanded)"
            fit.problems.append((name, f"{held.key!r} {what} and cannot be loaded into; materialize it before"))
            continue
        live, saved = held.local.dtype, entry.dtype
        beside = _beside(manifest, held, entry, rounded)
        fit.used |= {other.key for other in beside}
        is_rounding = held.kind == MODEL and name in rounded and live in LOW_PRECISION and saved == torch.float32
        is_widening = held.kind == MASTER and saved in LOW_PRECISION
        if live != saved and not (is_rounding or is_widening) and id(held) not in alone:
            fit.problems.append((name, f"{held.key!r} is of {live}, in the checkpoint of {saved}"))
        fit.wishes.append(Wish(entry=entry, held=held, beside=beside))
    return fit


def _source(manifest: Manifest, held: Held) -> TensorEntry | None:
    """Which tensor of a checkpoint a live one is loaded from: float32 values from masters, where parameters are rounded, and conversely."""
    name = held.segment.name
    own = manifest.tensors.get(held.key)
    if held.kind == MASTER:
        return own or manifest.tensors.get(key_of(MODEL, name))
    if held.kind == MODEL and held.local.dtype == torch.float32 and (own is None or own.dtype in LOW_PRECISION):
        return manifest.tensors.get(key_of(MASTER, name)) or own
    return own


def _beside(manifest: Manifest, held: Held, entry: TensorEntry, rounded: set[str]) -> list[TensorEntry]:
    """The arrays beside a saved parameter, as a Kahan compensation, where masters and their rounded copies are loaded from it.

    They begin with the value that the step computed, which is stored in all of the arrays.
    """
    name = held.segment.name
    has_masters = held.kind == MASTER or (held.kind == MODEL and name in rounded)
    if not has_masters or entry.kind != MODEL or entry.dtype not in LOW_PRECISION:
        return []
    others = {kind: manifest.tensors.get(key_of(kind, name)) for kind in extra_arrays()}
    alike = {kind: other for kind, other in others.items() if other is not None and other.shape == entry.shape}
    return [alike[array.name] for array in format_beside(entry.dtype, alike).extra]


def _as_bits(keys: Iterable[str], some: Collection[str]) -> int:
    """Some of the keys of a manifest, as a number with a bit for each: ranks may be many."""
    return sum(1 << number for number, key in enumerate(keys) if key in some)


def _of_bits(keys: Iterable[str], numbers: Iterable[int]) -> set[str]:
    """The keys that some rank has."""
    bits = 0
    for number in numbers:
        bits |= number
    return {key for number, key in enumerate(keys) if bits >> number & 1}


def _left_out(manifest: Manifest, parameters: Parameters, known: set[str]) -> list[tuple[str, str]]:
    """Parameters of a checkpoint's optimizer that no rank's has."""
    empty = {entry.name for entry in manifest.tensors.values() if entry.kind == MODEL and not entry.size}
    missing = sorted(parameters.group_of.keys() - known - empty)
    return [(name, f"parameter {name!r} of the checkpoint's optimizer is in no param group") for name in missing]


def _left_over(manifest: Manifest, used: set[str], *, with_model: bool, state: LiveOptimizer | None) -> list[tuple[str, str]]:
    """What a checkpoint has and nobody wants, of the kinds that are being loaded."""
    passed = {MASTER} if state is None else {MASTER, *state.unused_kinds()}
    masters = {entry.name for entry in manifest.tensors.values() if entry.kind == MASTER and entry.key in used}
    found = []
    for entry in manifest.tensors.values():
        is_wanted = with_model if entry.kind == MODEL else state is not None and entry.kind not in passed
        if entry.key in used or not is_wanted or not entry.size or (entry.kind == MODEL and entry.name in masters):
            continue
        found.append((entry.name, f"{entry.key!r} of the checkpoint is in nothing that is being loaded"))
    return found


def _log_differences(state: LiveOptimizer, landing: Landing, choices: Choices) -> None:
    for index, (group, values) in enumerate(zip(state.groups, landing.groups, strict=True)):
        for key, value in values.items():
            own = group.get(key)
            own = own.item() if isinstance(own, torch.Tensor) and own.numel() == 1 else own
            if repr(own) != repr(value):  # tensors and arrays have no truth value
                logger.info(
                    "param_groups[%d][%r] is %r, in the checkpoint %r; the %s's counts", index, key, own, value, choices.hyperparameters
                )
