"""Saving: all ranks write what the plan says, vote, and then one of them makes it a checkpoint.

    collect -> plan -> draft -> shards, written and hashed -> vote -> manifest, marker -> publish

Nothing that is committed is ever written to. A process that dies leaves a draft, which the next run's first save removes.
"""

from __future__ import annotations

import logging
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.checkpoint.exchange import digest_of, distinct, refuse_differences, together
from sharded_optim.checkpoint.held import MASTER, Held, checksum
from sharded_optim.checkpoint.live import LiveOptimizer, live_model, live_optimizer
from sharded_optim.checkpoint.manifest import LARGEST_MANIFEST, Chunk, Manifest, Parameters, ShardFile, TensorEntry
from sharded_optim.checkpoint.plan import Part, Plan, Row, rows_of
from sharded_optim.checkpoint.read import CheckpointReader, committed_content
from sharded_optim.checkpoint.shard_file import WrittenShard, write_shard
from sharded_optim.checkpoint.steps import Finding, finding_of, forget, reading_back, removable, remove
from sharded_optim.checkpoint.store import COMMITTED, MANIFEST, Store, folder_of, open_store, shard_name
from sharded_optim.checkpoint.values import decode, encode
from sharded_optim.version import __version__

__all__ = ["Content", "Draft", "begin", "finish"]

logger = logging.getLogger(__name__)

_cleaned: set[str] = set()  # roots in which this process has removed the drafts of processes that died


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a rank has to save.

    Attributes:
        held: tensors.
        parameters: what it knows of an optimizer beside them; None: there is no optimizer.
        wrapper: what only the same wrapper takes up again, by the wrapper's name.
        extra: of the user; None where the rank gives none.
        aliases: further names of the model's tensors, each with the one that they are saved under.
        order: names of parameters in an order that the ranks have in common; others come after these.
    """

    held: Sequence[Held]
    parameters: Parameters | None = None
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    extra: Any = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    order: Sequence[str] = ()

    @classmethod
    def of(cls, model: Any, optimizer: Any, extra: Any) -> Content:
        """Of what is live.

        Raises:
            ValueError, TypeError: it cannot be saved.
        """
        if model is None and optimizer is None:
            raise ValueError("there is nothing to save; pass model=, optimizer= or both")
        shown = live_model(model)
        if optimizer is None:
            return cls(held=shown.held, wrapper=shown.wrapper, extra=extra, aliases=shown.aliases)
        state = live_optimizer(optimizer, model, shown)
        state.settle()
        held = [*shown.held, *_with_masters(state, shown.held)]
        return cls(held=held, parameters=state.parameters(), wrapper=shown.wrapper, extra=extra, aliases=shown.aliases, order=state.order)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """A save that has begun.

    Attributes:
        held: what this rank's parts are parts of.
        parts: what this rank writes.
    """

    store: Store
    step: int
    plan: Plan
    rank: int
    held: Sequence[Held]
    manifest: Manifest  # without files and chunks
    process_group: dist.ProcessGroup | None
    keep: int | None
    _flat: list[Any] = field(default_factory=list)  # the row that was asked for last, and its elements

    @property
    def parts(self) -> Sequence[Part]:
        return self.plan.parts[self.rank]

    def content(self, part: Part) -> Tensor:
        """The elements of a part, as they are now: 1-D."""
        if not self._flat or self._flat[0] != part.row:  # of a tensor that is not contiguous it is a copy, for all of its parts
            self._flat[:] = part.row, self.held[part.row].flat()
        return self._flat[1][part.offset : part.offset + part.segment.numel]

    def release(self) -> None:
        """Let go of what `content` may have copied."""
        self._flat.clear()


def begin(
    root: str | os.PathLike[str],
    step: int,
    collect: Callable[[], Content],
    *,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Draft:
    """Look at what there is to save, and plan who writes what. A collective.

    Args:
        root, step, keep, process_group: as of `checkpoint.save`.
        collect: tells what this rank has, without communication.

    Raises:
        CheckpointError: see `checkpoint.save`.
    """
    rank = 0 if process_group is None else dist.get_rank(process_group)
    opened: list[Store] = []
    held: list[Held] = []
    rows: list[Row] = []
    rest: list[Any] = []

    def tell() -> tuple[bytes, bytes, bool]:
        content = collect()
        _check_arguments(step, keep)
        opened.append(open_store(root))
        is_there = rank == 0 and _is_there(opened[0], step)
        held.extend(content.held)
        rows.extend(rows_of(held))
        extra = None if content.extra is None else encode(content.extra, "extra")
        rest.extend((content.parameters, content.order, content.aliases, content.wrapper, extra, {"step": step, "keep": keep}))
        return digest_of(rows), digest_of(rest), is_there

    digests, rest_digests, are_there = zip(*together("collecting what to save", tell, process_group), strict=True)
    parameters, orders, aliases, wrappers, extras, arguments = zip(*distinct(rest, rest_digests, process_group), strict=True)
    refuse_differences(arguments)
    if any(are_there):
        _make_way(opened[0], step, process_group)
    manifest = Manifest(
        step=step,
        world_size=len(digests),
        files={},
        tensors={},
        parameters=_joined(parameters, orders[0]),
        extra=decode(_only(extras, "extra")),
        wrapper=_only(wrappers, "what the wrapper counts"),
        libraries={"sharded_optim": __version__, "torch": torch.__version__},
    )
    plan = _plan(rows, held, digests, process_group)
    names = {name for _, name in plan.tensors}
    manifest = replace(manifest, aliases={alias: name for own in reversed(aliases) for alias, name in own.items() if alias not in names})
    return Draft(
        store=opened[0],
        step=step,
        plan=plan,
        rank=rank,
        held=held,
        manifest=manifest,
        process_group=process_group,
        keep=keep,
    )


def finish(draft: Draft, content: Callable[[Part], Tensor]) -> None:
    """Write, vote and commit. A collective.

    Args:
        content: the elements of one of this rank's parts.

    Raises:
        CheckpointError: on every rank; the draft is gone, and nothing else was touched.
    """
    store, where = draft.store, f"{draft.store.root}/{folder_of(draft.step)}"
    world_size = len(draft.plan.parts)
    committed: list[str] = []
    folder, *_ = together(f"beginning {where}", lambda: _make_draft(draft) if draft.rank == 0 else "", draft.process_group)
    try:
        written = together(
            f"writing {where}",
            lambda: write_shard(store, folder, shard_name(draft.rank, world_size), draft.parts, content) if draft.parts else None,
            draft.process_group,
        )
        together(
            f"committing {where}",
            lambda: committed.append(_commit(draft, folder, written)) if draft.rank == 0 else None,
            draft.process_group,
        )
    except BaseException:
        if draft.rank == 0 and not committed:  # else others may have returned
            _discard(store, folder)
        raise
    if draft.keep is not None:
        try:
            _prune(draft, draft.keep)
        except Exception as error:  # the checkpoint is there
            # On all ranks: where warnings are errors, one rank would raise alone.
            warnings.warn(f"{store.root} could not be pruned: {error}", UserWarning, stacklevel=3)


def _prune(draft: Draft, keep: int) -> None:
    """Remove old checkpoints. A collective.

    The ranks read back together what `removable` says, each its share: rank 0 alone would take as many times as long as there are ranks,
    and the others would run into a timeout.
    """
    store, group = draft.store, draft.process_group
    found = together(f"pruning {store.root}", lambda: removable(store, keep, spare=draft.step) if draft.rank == 0 else ([], None), group)
    older, unread = found[0]
    if unread is not None:
        _read_back(store, unread, group)
    for step in older:
        forget(store, step)
    if older:
        together(f"pruning {store.root}", lambda: remove(store, older) if draft.rank == 0 else None, group)


def _read_back(store: Store, step: int, process_group: dist.ProcessGroup | None) -> None:
    """Read all of a checkpoint, each rank its share, unless rank 0 knows already what it is. A collective.

    Raises:
        CheckpointError: see `CheckpointReader`.
    """
    rank, world_size = (0, 1) if process_group is None else (dist.get_rank(process_group), dist.get_world_size(process_group))
    where = f"{store.root}/{folder_of(step)}"
    readers: list[CheckpointReader] = []

    def look() -> Finding | None:
        finding = finding_of(store, step) if rank == 0 else None
        if finding is Finding.DAMAGED:
            raise DamagedError(f"{where} was damaged when this process read it")
        readers.append(CheckpointReader(store, step))
        readers[0].check_files()
        return finding

    finding, *_ = together(f"looking at {where}", look, process_group)
    if finding is not Finding.WHOLE:
        with reading_back(readers[0]):
            together(f"reading back {where}", lambda: readers[0].verify((), rank, world_size), process_group)


# ---------------------------------------------------------------------------------------------------------------------- collecting


class _Alone:
    """Stands for the group of a process that is alone."""


_ALONE = _Alone()
# The last plan of each group, with the digests of all ranks' rows: whether it still holds is the same on all of its ranks.
_plans: WeakKeyDictionary[Any, tuple[Sequence[bytes], Plan]] = WeakKeyDictionary()


def _plan(rows: Sequence[Row], held: Sequence[Held], digests: Sequence[bytes], process_group: dist.ProcessGroup | None) -> Plan:
    """The plan for what all ranks hold: the last one, if they hold what they held then. A collective.

    Raises:
        CheckpointError: see `Plan.of`; or what should be replicas has different values. That is looked at when a plan is made.
    """
    group = process_group or _ALONE
    if group not in _plans or _plans[group][0] != digests:
        plan = Plan.of(distinct(rows, digests, process_group))
        if plan.replicas:
            _compare_replicas(plan, held, process_group)
        _plans[group] = digests, plan
    return _plans[group][1]


def _compare_replicas(plan: Plan, held: Sequence[Held], process_group: dist.ProcessGroup | None) -> None:
    """Tensors that ranks hold under one name are the same tensor, or one of them would be lost."""
    rank = dist.get_rank(process_group)

    def look() -> dict[int, int]:
        own = [row for _, holders in plan.replicas for holder, row in holders if holder == rank]
        return {row: checksum(held[row].flat()) for row in own}

    found = together("comparing replicas", look, process_group)
    for key, holders in plan.replicas:
        first, row = holders[0]
        for other, its_row in holders[1:]:
            if found[other][its_row] != found[first][row]:
                raise CheckpointError(
                    f"ranks {first} and {other} both hold {key!r}, with different values: they are not replicas of one tensor. If they "
                    f"should be, broadcast them from one rank; if they are different tensors (stages of a pipeline, experts), give them "
                    f"different names; if the ranks train apart, save with process_group= of those that train together"
                )


def _check_arguments(step: int, keep: int | None) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be a whole number >= 0, got {step!r}")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep must be a whole number >= 1, or None, got {keep!r}")


def _with_masters(state: LiveOptimizer, model: Sequence[Held]) -> list[Held]:
    """An optimizer's state; masters that have the dtype of the model's own parameters are the same values again, and are left out."""
    dtypes = {held.segment.name: held.local.dtype for held in model}
    return [held for held in state.held() if held.kind != MASTER or dtypes.get(held.segment.name) != held.local.dtype]


def _joined(parameters: Sequence[Parameters | None], order: Sequence[str]) -> Parameters | None:
    """What all ranks know, each of its own parameters.

    Args:
        order: in which to name them.

    Raises:
        CheckpointError: two ranks contradict each other.
    """
    known = [each for each in parameters if each is not None]
    if not known:
        return None
    if len(known) < len(parameters):
        raise CheckpointError("optimizer= was given on some ranks only; give it on all")
    first = known[0]
    group_of: dict[str, int] = {}
    steps: dict[str, float] = {}
    for rank, each in enumerate(known):
        if (each.optimizer, len(each.groups)) != (first.optimizer, len(first.groups)):
            raise CheckpointError(
                f"rank {rank} has a {each.optimizer} with {len(each.groups)} param groups, rank 0 a {first.optimizer} with "
                f"{len(first.groups)}; build the same optimizer on every rank"
            )
        for index, (own, other) in enumerate(zip(first.groups, each.groups, strict=True)):
            differ = sorted(key for key in own.keys() | other.keys() if repr(own.get(key)) != repr(other.get(key)))
            if differ:
                raise CheckpointError(
                    f"param_groups[{index}] has {differ[0]}={other.get(differ[0])!r} on rank {rank}, {own.get(differ[0])!r} on rank 0; "
                    f"change hyperparameters alike on every rank"
                )
        tables: list[tuple[Mapping[str, float], dict[str, Any], str]] = [
            (each.group_of, group_of, "the param group"),
            (each.steps, steps, "the step counter"),
        ]
        for told, found, what in tables:
            for name, value in told.items():
                if found.setdefault(name, value) != value:
                    raise CheckpointError(f"{what} of {name!r} is {value} on rank {rank}, {found[name]} on another; the ranks went apart")
    ordered = {name: group_of[name] for name in order if name in group_of} | group_of
    return replace(first, group_of=ordered, steps=steps)


def _only(values: Sequence[Any], what: str) -> Any:
    """The value that ranks have given; those that gave none do not count.

    Raises:
        CheckpointError: two gave different ones.
    """
    given = [(rank, value) for rank, value in enumerate(values) if value is not None]
    for rank, value in given[1:]:
        if repr(value) != repr(given[0][1]):
            raise CheckpointError(
                f"{what} is not the same on ranks {given[0][0]} and {rank}; a checkpoint holds one for all ranks: gather what belongs to "
                f"single ranks, for example {{rank: value}}, or give it on one rank alone"
            )
    return given[0][1] if given else None


# ------------------------------------------------------------------------------------------------------- a step that is there already


def _is_there(store: Store, step: int) -> bool:
    """Whether a step has a folder, which on an object store must have been committed."""
    folder = folder_of(step)
    return folder in store.folders() and (store.renames or COMMITTED in store.files(folder))


def _make_way(store: Store, step: int, process_group: dist.ProcessGroup | None) -> None:
    """Clear the place of a step if what is there cannot be loaded, so that training that fell back behind it can go on. A collective.

    What is damaged is removed. What cannot be read may be whole, and gets another name.

    Raises:
        CheckpointError: it is whole, or cannot be renamed.
    """
    rank = 0 if process_group is None else dist.get_rank(process_group)
    folder = folder_of(step)
    where = f"{store.root}/{folder}"
    try:
        _read_back(store, step, process_group)
    except DamagedError as error:
        found = error
    except MismatchError as error:
        raise MismatchError(f"step {step} is there already, and only what is damaged is replaced: {error}") from error
    else:
        raise CheckpointError(
            f"step {step} is committed already, and a committed checkpoint is never overwritten; save to another root, or remove {where}"
        )

    def clear() -> None:
        if not isinstance(found, UnreadableError):
            warnings.warn(f"replacing a checkpoint that is damaged: {found}", UserWarning, stacklevel=2)
            if rank == 0:
                store.remove(folder)
            return
        unread = f"step {step} is there already, and cannot be read to see whether it is whole"
        try:
            name = store.set_aside(folder) if rank == 0 else f"{folder}.unreadable-*"
        except OSError as error:
            raise CheckpointError(f"{unread}; nor can it be renamed ({error}); save to another root: {found}") from error
        warnings.warn(f"{unread}; it is now called {name}, and nothing removes it: {found}", UserWarning, stacklevel=2)

    together(f"making way for {where}", clear, process_group)


# ---------------------------------------------------------------------------------------------------------------------- rank 0


def _make_draft(draft: Draft) -> str:
    """Make its folder."""
    store = draft.store
    if store.root not in _cleaned:
        for other in filter(store.is_draft, store.folders()):
            logger.info("removing %s/%s, which a process has left that died", store.root, other)
            store.remove(other)
        _cleaned.add(store.root)
    return store.begin(folder_of(draft.step), secrets.token_hex(4))


def _commit(draft: Draft, folder: str, written: Sequence[WrittenShard | None]) -> str:
    """Make the draft a checkpoint; returns its folder."""
    files: dict[str, ShardFile] = {}
    chunks: dict[tuple[str, str], list[Chunk]] = {key: [] for key in draft.plan.tensors}
    for rank, (shard, parts) in enumerate(zip(written, draft.plan.parts, strict=True)):
        if shard is None:
            continue
        name = shard_name(rank, len(written))
        offset = shard.header_size
        for part, digest in zip(parts, shard.chunks_sha256, strict=True):
            chunk = Chunk(segment=part.segment, file=name, offset=offset, size=part.size, sha256=digest)
            chunks[part.kind, part.segment.name].append(chunk)
            offset += part.size
        files[name] = ShardFile(size=offset, header_size=shard.header_size, header_sha256=shard.header_sha256)
    tensors = [
        TensorEntry(kind=kind, name=name, shape=shape, dtype=dtype, chunks=tuple(chunks[kind, name]))
        for (kind, name), (shape, dtype) in draft.plan.tensors.items()
    ]
    found = draft.store.files(folder)
    for name, file in files.items():
        size, _ = found.get(name, ("none", None))
        if size != file.size:
            raise CheckpointError(
                f"{name} was written with {file.size} bytes, and {draft.store.root}/{folder} has {size}; root must "
                f"be a folder that all ranks share, to which no other job saves"
            )
    manifest = replace(draft.manifest, files=files, tensors={entry.key: entry for entry in tensors}).to_json()
    if len(manifest) > LARGEST_MANIFEST:
        raise CheckpointError(
            f"the manifest would have {len(manifest)} bytes, of which none is read back that is larger than {LARGEST_MANIFEST}"
        )
    _write_file(draft.store, folder, MANIFEST, manifest)
    _write_file(draft.store, folder, COMMITTED, committed_content(manifest))
    draft.store.publish(folder, folder_of(draft.step))
    return folder_of(draft.step)


def _write_file(store: Store, folder: str, name: str, content: bytes) -> None:
    writer = store.create(folder, name)
    try:
        writer.write(memoryview(content))
    except BaseException:
        writer.abandon()
        raise
    writer.close()


def _discard(store: Store, folder: str) -> None:
    """Remove what a save has left that failed."""
    try:
        store.remove(folder)
    except Exception as error:  # what it failed of is more important
        logger.warning("%s/%s could not be removed: %s", store.root, folder, error)
