"""Compare replicas: parameters, state, step counters and hyperparameters that several ranks hold must be equal, bit for bit.

    live model and optimizer -> facts (key, value) -> one int64 for each value -> one all-reduce -> facts whose largest and smallest differ

The int64 of a tensor is a hash of its bits (`position_hash.py`), that of any other value a digest of its text. The ranks exchange the keys
of their facts in the first check, and again when the keys have changed on any rank. Differing values are exchanged only to name the ranks
that differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.backends.position_hash import position_hashes
from sharded_optim.checkpoint.collectives import digest_of, gather_distinct
from sharded_optim.checkpoint.dtypes import dtype_named
from sharded_optim.checkpoint.live import LiveOptimizer, live_model, live_optimizer
from sharded_optim.checkpoint.live.optimizer import hyperparameters_of
from sharded_optim.checkpoint.local_tensor import MASTER, MODEL
from sharded_optim.checkpoint.write_plan import TensorRow, rows_of
from sharded_optim.sharding.ranks import gather_objects, named_ranks, own_process_group, raise_together
from sharded_optim.step.state import STEP
from sharded_optim.zero import ShardedOptimizer

__all__ = ["DivergenceCheck", "DivergenceError"]

NOBODY = -(2**63)  # sent by a rank that does not have the fact: never the maximum
CHANGED = 1  # sent by a rank whose facts have other keys than in the last exchange, or that has failed
NO_STATE = "no state"
NAMED = {MODEL: "parameter", MASTER: "float32 master"}  # other kinds are named as in the optimizer's state
MOST_LINES = 8  # differences that an error message lists

# The key of a value that ranks compare: a piece of a tensor, or (kind, name) of any other value.
Fact = TensorRow | tuple[str, str]


class DivergenceError(RuntimeError):
    """Replicas differ. The message names the differing values, and the ranks."""


class DivergenceCheck:
    """Compares replicas bit for bit. Call it every hundred steps or so, on every rank.

    It compares
    - elements of parameters and of optimizer state (moments, float32 masters, ...) that are on more than one rank: all of them under DDP,
      the model's under ShardedOptimizer and DeepSpeed, replicated shards under HSDP; not the buffers of the model, which may differ,
      as running means do;
    - the step counter and the param group's number of every parameter, also where the parameter itself is sharded;
    - lr, weight decay and the other hyperparameters of every param group; the counters and the loss scale of a DeepSpeedEngine.

    A call reads the replicated data once, and makes one all-reduce of 16 bytes for each compared value, in a process group of its own.
    With a single rank, or without a process group, it does nothing.

    Args:
        optimizer: an optimizer of this library; None compares the model alone.
        model: the wrapped model whose parameters the optimizer steps; the engine under DeepSpeed.
        process_group: the ranks that train this model together; None: all ranks.
    """

    def __init__(self, optimizer: Any, *, model: Any, process_group: dist.ProcessGroup | None = None) -> None:
        self._optimizer = optimizer
        self._model = model
        self._process_group = process_group
        self._own: tuple[Fact, ...] = ()  # facts that this rank had in the last exchange
        self._shared: list[Fact] | None = None  # facts of more than one rank, in the same order on all ranks; None: to be exchanged

    @torch.no_grad()
    def __call__(self) -> None:
        """Compare the replicas. A collective.

        Raises:
            DivergenceError: ranks hold different values; on every rank, with the same message.
            ValueError: it is unknown which elements the model or the optimizer of a rank holds; on every rank.
        """
        process_group = own_process_group(self._process_group, "gloo", purpose="divergence")  # gloo: values and texts are on the CPU
        if process_group is None:
            return
        local, failure = None, None
        try:
            local = _LocalFacts.of(self._optimizer, self._model)
        except Exception as error:  # the other ranks must get the error before this one raises
            failure = error
        if self._shared is None:
            self._exchange(local, failure, process_group)
        differing = self._compare(local, process_group)
        if differing is None:
            self._exchange(local, failure, process_group)
            differing = self._compare(local, process_group)
            assert differing is not None, "every rank has what it has just sent"
        if differing:
            assert local is not None, "a rank that has failed has reported it"
            self._raise(local, differing, process_group)

    def _exchange(self, local: _LocalFacts | None, failure: Exception | None, process_group: dist.ProcessGroup) -> None:
        """Exchange the keys of facts, to find those that more than one rank has. A collective."""
        self._shared = None
        raise_together(failure, None, process_group)
        assert local is not None, "else it has failed"
        own = tuple(local.values)
        digests = gather_objects(digest_of(own), process_group)
        ranks = dist.get_process_group_ranks(process_group)
        holders: dict[Fact, int] = {}
        tensors: dict[tuple[str, str], tuple[int, str]] = {}
        for rank, facts in zip(ranks, gather_distinct(own, digests, process_group), strict=True):
            for fact in facts:
                holders[fact] = holders.get(fact, 0) + 1
                if len(fact) == 2:
                    continue
                kind, name, shape, dtype, *_ = fact
                what = f"shape {shape} and dtype {dtype_named(dtype)}"
                other, known = tensors.setdefault((kind, name), (rank, what))
                if what != known:
                    raise DivergenceError(
                        f"{name!r} ({NAMED.get(kind, kind)}) has {known} on rank {other}, {what} on rank {rank}; build the same model on "
                        f"every rank, and give different tensors different names"
                    )
        self._own, self._shared = own, [fact for fact, count in holders.items() if count > 1]

    def _compare(self, local: _LocalFacts | None, process_group: dist.ProcessGroup) -> list[int] | None:
        """Compare the shared values by one all-reduce, the only collective of a check if nothing has changed and nothing differs.

        Returns:
            Indices of the shared facts with different values; None: the facts of a rank have changed since the exchange, or it has failed.
        """
        assert self._shared is not None
        on_host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        sent = torch.full((2, len(self._shared) + 1), NOBODY, **on_host)
        if local is None or tuple(local.values) != self._own:
            sent[0, -1] = CHANGED
        else:
            values = [local.values.get(fact) for fact in self._shared]
            sent[0, :-1] = torch.tensor([NOBODY if value is None else value for value in values], **on_host)
            # The largest ~value belongs to the smallest value; -value may overflow.
            sent[1, :-1] = torch.tensor([NOBODY if value is None else ~value for value in values], **on_host)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=process_group)
        largest, smallest = sent[0], ~sent[1]
        if largest[-1] == CHANGED:
            return None
        return (largest != smallest)[:-1].nonzero().flatten().tolist()

    def _raise(self, local: _LocalFacts, differing: Sequence[int], process_group: dist.ProcessGroup) -> None:
        """Raise an error that names the differing values and their ranks. A collective."""
        assert self._shared is not None
        asked = [self._shared[index] for index in differing[:MOST_LINES]]
        of_ranks = gather_objects([(local.values.get(fact), local.texts.get(fact)) for fact in asked], process_group)
        ranks = dist.get_process_group_ranks(process_group)
        lines = [_difference(fact, [each[index] for each in of_ranks], ranks) for index, fact in enumerate(asked)]
        if len(differing) > len(lines):
            lines.append(f"and {len(differing) - len(lines)} more")
        raise DivergenceError(
            f"ranks have diverged: {len(differing)} of {len(self._shared)} values that they share are not the same on all:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nGo on from a checkpoint that was saved before it; lr and other hyperparameters must be set alike on every rank"
        )


@dataclass(frozen=True, kw_only=True)
class _LocalFacts:
    """The values that this rank holds.

    Attributes:
        values: an int64 for each fact, in a fixed order.
        texts: the texts of facts that are not tensors.
    """

    values: Mapping[Fact, int]
    texts: Mapping[Fact, str]

    @classmethod
    def of(cls, optimizer: Any, model: Any) -> _LocalFacts:
        """Read the current values. No communication, except to complete a step that is still sending parameters."""
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.wait()  # first: other ranks may wait for this one, even if it fails below
        shown = live_model(model)
        state = None if optimizer is None else live_optimizer(optimizer, model, shown)
        held = [each for each in shown.tensors if not each.is_buffer]
        facts: dict[Fact, Any] = {(path, ""): value for path, value in _paths(shown.wrapper_state)}
        if state is not None:
            state.synchronize()
            held += state.tensors()
            facts |= _facts_of(state)
        texts = _texts(facts)
        held = [each for each in held if each.segment.numel]
        hashes = position_hashes([each.local for each in held])
        values: dict[Fact, int] = dict(zip(rows_of(held), hashes.tolist(), strict=True))
        return cls(values=values | {fact: _digest(text) for fact, text in texts.items()}, texts=texts)


def _facts_of(state: LiveOptimizer) -> dict[Fact, Any]:
    """Return step counters, param groups' numbers and hyperparameters of an optimizer."""
    facts: dict[Fact, Any] = {}
    for member in state.params:
        own = state.engine.state.get(member.param)
        for piece in member.local.pieces:
            if own is not None or piece.segment.numel:  # some wrappers do not step a piece that is empty here
                facts["step", piece.segment.name] = NO_STATE if own is None else own[STEP]
    facts["number of param groups", ""] = len(state.groups)
    facts |= {("param group", name): index for name, index in state.group_of.items()}
    for index, group in enumerate(state.groups):
        facts |= {(f"param_groups[{index}][{key!r}]", ""): value for key, value in hyperparameters_of(group).items()}
    return facts


def _paths(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested dicts to (path of keys, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _texts(facts: Mapping[Fact, Any]) -> dict[Fact, str]:
    """Convert values to texts that are equal if the values are. Values without such a text are left out."""
    scalars = {fact: value for fact, value in facts.items() if isinstance(value, Tensor) and value.numel() == 1}
    numbers: dict[Fact, Any] = {}
    for device in dict.fromkeys(value.device for value in scalars.values()):  # one copy from each device
        there = {fact: value.detach().reshape(()).double() for fact, value in scalars.items() if value.device == device}
        numbers |= dict(zip(there, torch.stack(list(there.values())).tolist(), strict=True))
    texts = {fact: _text(numbers.get(fact, value)) for fact, value in facts.items()}
    return {fact: text for fact, text in texts.items() if text is not None}


def _text(value: Any) -> str | None:
    if value is NO_STATE:
        return NO_STATE
    if isinstance(value, list | tuple):
        parts = [_text(each) for each in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value)) if float(value) == value else repr(value)  # 1 and 1.0 are equal
    return repr(value) if value is None or isinstance(value, bool | str) else None


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


# ------------------------------------------------------------------------------------------------------------------------ messages


def _difference(fact: Fact, of_ranks: Sequence[tuple[int | None, str | None]], ranks: Sequence[int]) -> str:
    """Describe which ranks have which value of a fact.

    Args:
        of_ranks: (value, text) of each rank; the value is None if the rank does not have the fact.
        ranks: the numbers of these ranks, in the same order.
    """
    sets: dict[tuple[int, str | None], list[int]] = {}
    for rank, (value, text) in zip(ranks, of_ranks, strict=True):
        if value is not None:
            sets.setdefault((value, text), []).append(rank)
    (most, majority), *others = sorted(sets.items(), key=lambda each: -len(each[1]))  # in a tie, the value of the first rank
    parts = []
    for other, odd in others:
        values = "" if other[1] is None else f" ({other[1]}, not {most[1]})"
        parts.append(f"{named_ranks(odd)} differ{'s' if len(odd) == 1 else ''} from {named_ranks(majority)}{values}")
    return f"{_named(fact)}: {', '.join(parts)}"


def _named(fact: Fact) -> str:
    """Return the name of a fact in error messages."""
    if len(fact) == 2:
        return f"{fact[1]!r} ({fact[0]})" if fact[1] else fact[0]
    kind, name, shape, _, start, run, _, count, _ = fact
    part = "" if run * count == math.prod(shape) else f", {run * count} elements from {start}"
    return f"{name!r} ({NAMED.get(kind, kind)}{part})"
