"""Load a checkpoint. All ranks together check everything that can fail before the model or the optimizer changes.

    open -> match live tensors with stored ones -> report what does not match -> verify all bytes, each rank its share -> install

Used by `so.checkpoint.load`.
"""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist

from sharded_optim.checkpoint.collectives import all_or_nothing, rank_and_world_size
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, NoCheckpointError, shorten
from sharded_optim.checkpoint.integrity import recording_integrity
from sharded_optim.checkpoint.live import LiveModel, LiveOptimizer, StatePlan, install_state, live_model, live_optimizer, plan_state
from sharded_optim.checkpoint.local_tensor import LocalTensor
from sharded_optim.checkpoint.matching import Match, Problem, keys_in, mask_of, match, missing_parameters, unused_tensors
from sharded_optim.checkpoint.reader import CheckpointReader
from sharded_optim.checkpoint.steps import candidates
from sharded_optim.checkpoint.store import MANIFEST, Store

__all__ = ["LoadOptions", "load_newest", "load_step"]

logger = logging.getLogger(__name__)

MAX_SHOWN = 50  # problems in an error message


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of loading; see `checkpoint.load`.

    Attributes:
        strict: whether everything must match.
        lenient: patterns of the names of tensors that may mismatch if `strict` is False.
        hyperparameters: the source of the optimizer's hyperparameters after loading.
    """

    strict: bool
    lenient: Sequence[str]
    hyperparameters: Literal["checkpoint", "live"]

    def check(self) -> None:
        if self.hyperparameters not in ("checkpoint", "live"):
            raise ValueError(f"hyperparameters must be 'checkpoint' or 'live', got {self.hyperparameters!r}")

    def allow(self, name: str) -> bool:
        """Return whether a mismatch of the tensor with this name is a warning instead of an error."""
        return not self.strict and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.lenient)


class _Summary(TypedDict):
    """The values that a rank sends to the other ranks after it has opened a checkpoint."""

    digest: str  # SHA-256 of the manifest
    saved_groups: list[set[int]]  # see `LiveOptimizer.saved_groups`
    rounded: set[str]  # names of parameters that are rounded copies of masters
    known: int  # mask (`mask_of`) of the checkpoint's parameters that this rank's optimizer has


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """An open checkpoint, and this rank's parts of the model and optimizer that it is loaded into."""

    reader: CheckpointReader
    model: LiveModel
    optimizer: LiveOptimizer | None
    masters: list[LocalTensor]  # masters of the model's parameters, if the model is loaded without its optimizer

    @classmethod
    def of(cls, store: Store, step: int, model: Any, optimizer: Any) -> _Opened:
        reader = CheckpointReader(store, step)
        reader.check_files()
        live = live_model(model)
        if optimizer is None:
            return cls(reader=reader, model=live, optimizer=None, masters=live.masters() if model is not None else [])
        state = live_optimizer(optimizer, model, live)
        state.synchronize()
        if reader.manifest.parameters is None:
            raise MismatchError(f"{reader.where} was saved without an optimizer; load it without optimizer=")
        return cls(reader=reader, model=live, optimizer=state, masters=[])

    def summary(self) -> _Summary:
        parameters = self.reader.manifest.parameters
        if self.optimizer is None or parameters is None:
            return _Summary(digest=self.reader.digest, saved_groups=[], rounded={tensor.segment.name for tensor in self.masters}, known=0)
        known = {*self.optimizer.group_of, *self.optimizer.order}
        return _Summary(
            digest=self.reader.digest,
            saved_groups=self.optimizer.saved_groups(parameters),
            rounded=self.optimizer.rounded(),
            known=mask_of(parameters.group_of, known),
        )


def load_newest(store: Store, model: Any, optimizer: Any, options: LoadOptions, process_group: dist.ProcessGroup | None) -> Any:
    """Load the highest step that is not damaged. A collective.

    Raises:
        CheckpointError: there is no checkpoint, or `load_step` raised an error other than DamagedError.
        DamagedError: there are checkpoints, and all are damaged or cannot be read.
    """
    _, (steps, *_) = all_or_nothing(f"listing {store.root}", lambda: candidates(store), process_group)
    damaged: list[str] = []
    for step in reversed(steps):
        try:
            return load_step(store, step, model, optimizer, options, process_group)
        except DamagedError as error:
            damaged += error.problems
            warnings.warn(f"{error}\n  Falling back to the checkpoint before it.", UserWarning, stacklevel=3)
    if damaged:
        shown = "\n  ".join(damaged[:MAX_SHOWN])
        raise DamagedError(f"there is no checkpoint in {store.root} that verifies; all {len(steps)} are damaged:\n  {shown}", damaged)
    raise NoCheckpointError(f"there is no checkpoint in {store.root}; save one, or give the folder that holds the step-... folders")


def load_step(store: Store, step: int, model: Any, optimizer: Any, options: LoadOptions, process_group: dist.ProcessGroup | None) -> Any:
    """Load the checkpoint of a step, on all ranks or on none. A collective.

    Returns:
        The `extra` that was saved.

    Raises:
        CheckpointError: see `checkpoint.load`.
    """
    rank, world_size = rank_and_world_size(process_group)
    opened, summaries = all_or_nothing(
        f"loading step {step} from {store.root}",
        lambda: _Opened.of(store, step, model, optimizer),
        process_group,
        share=_Opened.summary,
    )
    reader = opened.reader
    if len({summary["digest"] for summary in summaries}) > 1:
        raise CheckpointError(f"ranks see different checkpoints in {reader.where}; root must be a folder that all ranks share")
    (matched, plan), results = all_or_nothing(
        f"comparing {reader.where} with the model and optimizer",
        lambda: _match(opened, summaries),
        process_group,
        share=lambda result: (mask_of(reader.manifest.tensors, result[0].used), result[0].problems),
    )
    used = keys_in(reader.manifest.tensors, [mask for mask, _ in results])
    problems = dict.fromkeys(problem for _, of_rank in results for problem in of_rank)
    problems |= dict.fromkeys(_unused(opened, summaries, used, with_model=model is not None))
    _report(reader.where, list(problems), options)

    def verify() -> None:
        reader.verify(matched.requests, rank, world_size)
        if opened.optimizer is not None and rank == 0:
            _log_differences(opened.optimizer, plan, options)

    with recording_integrity(reader):
        all_or_nothing(f"verifying {reader.where}", verify, process_group)
    with recording_integrity(reader):
        all_or_nothing(
            f"reading {reader.where}, after which model and optimizer are unusable,",
            lambda: _install(opened, matched, plan, options),
            process_group,
        )
    return reader.manifest.extra


def _match(opened: _Opened, summaries: Sequence[_Summary]) -> tuple[Match, StatePlan]:
    """Compare a checkpoint with this rank's part of the model and optimizer. Changes nothing."""
    manifest = opened.reader.manifest
    try:
        for name, saved in manifest.wrapper.items():
            if name in opened.model.wrapper_state:
                opened.model.check_wrapper_state(saved)
    except ValueError as error:
        raise DamagedError(f"{opened.reader.where}/{MANIFEST}: {error}") from error
    plan = StatePlan()
    if opened.optimizer is not None and manifest.parameters is not None:
        saved_groups = [set().union(*indices) for indices in zip(*(summary["saved_groups"] for summary in summaries), strict=True)]
        plan = plan_state(opened.optimizer, manifest, manifest.parameters, saved_groups)
    rounded = set().union(*(summary["rounded"] for summary in summaries))
    matched = match(manifest, opened.model.tensors, opened.masters, plan.targets, rounded)
    matched.problems[:0] = plan.problems
    return matched, plan


def _unused(opened: _Opened, summaries: Sequence[_Summary], used: set[str], *, with_model: bool) -> list[Problem]:
    """List tensors and parameters of the checkpoint that no rank loads."""
    manifest, optimizer = opened.reader.manifest, opened.optimizer
    ignored = frozenset() if optimizer is None else optimizer.ignored_kinds()
    problems = list(unused_tensors(manifest, used, with_model=with_model, with_optimizer=optimizer is not None, ignored=ignored))
    if optimizer is not None and manifest.parameters is not None:
        known = keys_in(manifest.parameters.group_of, [summary["known"] for summary in summaries])
        problems += missing_parameters(manifest, manifest.parameters, known)
    return problems


def _report(where: str, problems: Sequence[Problem], options: LoadOptions) -> None:
    """Raise MismatchError for mismatches, or warn if the options allow them."""
    errors = [text for name, text in problems if not options.allow(name)]
    if errors:
        raise MismatchError(f"{where} does not fit, and nothing was changed:\n  {shorten(errors, MAX_SHOWN)}")
    if problems:
        listed = "\n  ".join(text for _, text in problems)
        warnings.warn(f"{where} does not fit completely, as strict=False allows:\n  {listed}", stacklevel=4)


def _install(opened: _Opened, matched: Match, plan: StatePlan, options: LoadOptions) -> None:
    """Write the checkpoint's values to the model and the optimizer."""
    opened.model.before_load()
    opened.reader.load(matched.requests)
    if opened.optimizer is not None:
        install_state(opened.optimizer, plan, hyperparameters=options.hyperparameters == "checkpoint")
    for name, saved in opened.reader.manifest.wrapper.items():
        if name in opened.model.wrapper_state:
            opened.model.restore_wrapper_state(saved)


def _log_differences(optimizer: LiveOptimizer, plan: StatePlan, options: LoadOptions) -> None:
    for index, (group, values) in enumerate(zip(optimizer.groups, plan.groups, strict=True)):
        for key, value in values.items():
            own = group.get(key)
            own = own.item() if isinstance(own, torch.Tensor) and own.numel() == 1 else own
            if repr(own) != repr(value):  # tensors and arrays have no truth value
                chosen = options.hyperparameters
                logger.info("param_groups[%d][%r] is %r, in the checkpoint %r (hyperparameters=%r)", index, key, own, value, chosen)
