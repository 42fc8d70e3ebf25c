"""Match live tensors with the stored tensors that they are loaded from, and report mismatches.

Reads manifests only. Used by `loading.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from sharded_optim.checkpoint.local_tensor import LOW_PRECISION, MASTER, MODEL, LocalTensor
from sharded_optim.checkpoint.manifest import Manifest, Parameters, TensorEntry, key_of
from sharded_optim.checkpoint.reader import LoadRequest
from sharded_optim.storage.formats import extra_arrays, format_beside

__all__ = ["Match", "Problem", "keys_in", "mask_of", "match", "missing_parameters", "unused_tensors"]

Problem = tuple[str, str]  # the name of the tensor ("" for other problems), and the message


@dataclass
class Match:
    """The result of matching a checkpoint with this rank's tensors.

    Attributes:
        requests: the tensors to load.
        used: keys of the stored tensors that belong to live tensors.
        problems: mismatches.
    """

    requests: list[LoadRequest] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def match(
    manifest: Manifest, tensors: Iterable[LocalTensor], masters: Sequence[LocalTensor], state: Iterable[LocalTensor], rounded: set[str]
) -> Match:
    """Find the stored tensor for each local tensor.

    Args:
        tensors: the model's tensors.
        masters: masters of a model that is loaded without its optimizer; stored tensors of any dtype may be loaded into them.
        state: the optimizer's tensors.
        rounded: names of the live parameters that are rounded copies of masters, on any rank.
    """
    result = Match()
    any_dtype = set(map(id, masters))
    for tensor in (*tensors, *masters, *state):
        name = tensor.segment.name
        entry = _source(manifest, tensor)
        if entry is None:
            if tensor.segment.tensor_numel:
                result.problems.append((name, f"{tensor.key!r} is not in the checkpoint"))
            continue
        result.used.add(entry.key)
        problem = _shape_problem(tensor, entry)
        if problem is not None:
            result.problems.append((name, problem))
            continue
        entries = [entry, *_beside(manifest, tensor, entry, rounded)]
        result.used.update(stored.key for stored in entries)
        if id(tensor) not in any_dtype and not _dtypes_match(tensor, entry, rounded):
            result.problems.append((name, f"{tensor.key!r} is of {tensor.local.dtype}, in the checkpoint of {entry.dtype}"))
        result.requests.append(LoadRequest(target=tensor, entries=entries))
    return result


def _source(manifest: Manifest, tensor: LocalTensor) -> TensorEntry | None:
    """Return the stored tensor to load from; None if there is none.

    A float32 parameter that was saved in 16 bits, or not at all, is loaded from its master; an unsaved master, from its parameter.
    """
    name = tensor.segment.name
    own = manifest.tensors.get(tensor.key)
    if tensor.kind == MASTER:
        return own or manifest.tensors.get(key_of(MODEL, name))
    if tensor.kind == MODEL and tensor.local.dtype == torch.float32 and (own is None or own.dtype in LOW_PRECISION):
        return manifest.tensors.get(key_of(MASTER, name)) or own
    return own


def _shape_problem(tensor: LocalTensor, entry: TensorEntry) -> str | None:
    """Return the reason why elements of a stored tensor cannot be copied to a local one; None if they can."""
    if entry.shape != tensor.segment.shape:
        return f"{tensor.key!r} has shape {tensor.segment.shape}, in the checkpoint {entry.shape}"
    local = tensor.local
    if local.is_meta:
        return f"{tensor.key!r} has no memory (device meta) and cannot be loaded into; materialize it before"
    if any(stride == 0 < size - 1 for stride, size in zip(local.stride(), local.shape, strict=True)):
        return f"{tensor.key!r} has elements that share memory (expanded) and cannot be loaded into; materialize it before"
    return None


def _dtypes_match(tensor: LocalTensor, entry: TensorEntry, rounded: set[str]) -> bool:
    """Return whether dtypes match: equal; saved in float32, for a parameter rounded from masters; or saved in 16 bits, for a master."""
    live, saved = tensor.local.dtype, entry.dtype
    rounds = tensor.kind == MODEL and tensor.segment.name in rounded and live in LOW_PRECISION and saved == torch.float32
    return live == saved or rounds or (tensor.kind == MASTER and saved in LOW_PRECISION)


def _beside(manifest: Manifest, tensor: LocalTensor, entry: TensorEntry, rounded: set[str]) -> list[TensorEntry]:
    """List the stored arrays, such as Kahan compensations, that hold a saved parameter's value together with the parameter.

    Masters and their rounded copies are loaded from the parameter and these arrays, and so get the value that the step computed. Other
    tensors are loaded without these arrays: the list is empty.
    """
    name = tensor.segment.name
    has_masters = tensor.kind == MASTER or (tensor.kind == MODEL and name in rounded)
    if not has_masters or entry.kind != MODEL or entry.dtype not in LOW_PRECISION:
        return []
    stored = {kind: manifest.tensors.get(key_of(kind, name)) for kind in extra_arrays()}
    arrays = {kind: array for kind, array in stored.items() if array is not None and array.shape == entry.shape}
    return [arrays[array.name] for array in format_beside(entry.dtype, arrays).extra]


# -------------------------------------------------------------------------------------------------------------- unused by any rank


def mask_of(keys: Iterable[str], some: Collection[str]) -> int:
    """Encode a subset of a manifest's keys as an integer with a bit for each key, so that many ranks can send theirs."""
    return sum(1 << number for number, key in enumerate(keys) if key in some)


def keys_in(keys: Iterable[str], masks: Iterable[int]) -> set[str]:
    """Return the keys that are in any of several masks; see `mask_of`."""
    union = 0
    for mask in masks:
        union |= mask
    return {key for number, key in enumerate(keys) if union >> number & 1}


def missing_parameters(manifest: Manifest, parameters: Parameters, known: set[str]) -> Iterator[Problem]:
    """Report parameters of a checkpoint's optimizer that no rank's optimizer has."""
    empty = {entry.name for entry in manifest.tensors.values() if entry.kind == MODEL and not entry.size}
    for name in sorted(parameters.group_of.keys() - known - empty):
        yield name, f"parameter {name!r} of the checkpoint's optimizer is in no param group"


def unused_tensors(
    manifest: Manifest, used: set[str], *, with_model: bool, with_optimizer: bool, ignored: AbstractSet[str]
) -> Iterator[Problem]:
    """Report stored tensors that no rank loads; those of the model, or of the optimizer, only if it is being loaded.

    Args:
        ignored: kinds of state that the live optimizer does not need.
    """
    loaded_masters = {entry.name for entry in manifest.tensors.values() if entry.kind == MASTER and entry.key in used}
    for entry in manifest.tensors.values():
        if entry.key in used or not entry.size:
            continue
        if entry.kind == MODEL:
            expected = with_model and entry.name not in loaded_masters
        else:
            expected = with_optimizer and entry.kind != MASTER and entry.kind not in ignored
        if expected:
            yield entry.name, f"{entry.key!r} of the checkpoint is in nothing that is being loaded"
