"""`CheckpointReader`: open a committed checkpoint, verify its bytes, and copy them to local tensors.

Used by loading, verification, pruning and exports.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sharded_optim.checkpoint.chunk_reading import ChunkAction, Unreadable, read_chunks
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, UnreadableError, shorten
from sharded_optim.checkpoint.local_tensor import LocalTensor, tensor_of
from sharded_optim.checkpoint.manifest import MAX_MANIFEST_BYTES, Chunk, TensorEntry, sha256
from sharded_optim.checkpoint.manifest_json import parse
from sharded_optim.checkpoint.shard_file import header_entries, parse_header
from sharded_optim.checkpoint.store import COMMITTED, MANIFEST, Store, folder_of
from sharded_optim.sharding.segment import Segment, overlaps
from sharded_optim.storage.formats import format_beside

__all__ = ["CheckpointReader", "LoadRequest", "list_files", "marker_of"]

MAX_SHOWN = 20  # problems in an error message
NOT_A_FOLDER = (errno.ENOTDIR, errno.ELOOP)  # permanent errors of listing a folder
MARKER_BYTES = 65  # a SHA-256 in hexadecimal, and a line feed


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadRequest:
    """A local tensor to be loaded, and the stored tensor that has its elements.

    Attributes:
        entries: the stored tensor, and arrays of the same shape that hold its values together with it; see `Format.extra`.
    """

    target: LocalTensor
    entries: Sequence[TensorEntry]


class CheckpointReader:
    """A committed checkpoint.

    Attributes:
        root, step: the store's root, and the checkpoint's step.
        where: its folder, for error messages.
        manifest: its content.
        digest: SHA-256 of the manifest's file.
        version: changes if one of its files is modified after the commit; see `list_files`.

    Raises:
        CheckpointError: there is no committed checkpoint.
        DamagedError: the manifest differs from the saved one.
        MismatchError: this version of the library cannot read the manifest, which may be intact.
    """

    def __init__(self, store: Store, step: int) -> None:
        self._store = store
        self.root, self.step = store.root, step
        self.folder = folder_of(step)
        self.where = f"{store.root}/{self.folder}"
        self.sizes, self.version = list_files(store, step)
        self._check_commit()
        text = self._content(MANIFEST)
        self.digest = sha256(text)
        if self._content(COMMITTED) != marker_of(text):
            raise DamagedError(f"{self.where}: {MANIFEST} is not the one that was committed: its SHA-256 is not that in {COMMITTED}")
        self.manifest = parse(text, f"{self.where}/{MANIFEST}")
        if self.manifest.step != step:
            raise DamagedError(f"{self.where} is the folder of another step: its {MANIFEST} is of step {self.manifest.step}")

    def _check_commit(self) -> None:
        """Raise an error unless the folder has a marker and a manifest of possible sizes."""
        try:
            exists = COMMITTED in self.sizes or (self._store.renames and self.folder in self._store.folders())
        except OSError as error:
            raise UnreadableError(f"{self.root} cannot be listed: {error}") from error
        if not exists:
            raise CheckpointError(f"{self.where} is no committed checkpoint; {COMMITTED} is missing")
        for file in (COMMITTED, MANIFEST):
            if file not in self.sizes:  # both were there when it was published
                raise DamagedError(f"{self.where}/{file} is lost")
        if self.sizes[COMMITTED] != MARKER_BYTES:
            raise DamagedError(f"{self.where}/{COMMITTED} has {self.sizes[COMMITTED]} bytes, and {MARKER_BYTES} were saved")
        if self.sizes[MANIFEST] > MAX_MANIFEST_BYTES:
            raise DamagedError(f"{self.where}/{MANIFEST} has {self.sizes[MANIFEST]} bytes; the limit is {MAX_MANIFEST_BYTES}")

    def _content(self, file: str) -> bytes:
        try:
            return self._read(file, self.sizes[file])
        except OSError as error:
            raise UnreadableError(f"{self.where}/{file} cannot be read: {error}") from error

    def _read(self, file: str, size: int) -> bytes:
        """Return the first `size` bytes of a file, or all of a shorter one."""
        content = bytearray(size)
        count = self._store.read(self.folder, file, 0, memoryview(content))
        return bytes(content[:count])

    # --------------------------------------------------------------------------------------------------------------- verification

    def check_files(self) -> None:
        """Compare the names and sizes of shard files with the manifest. Reads no data.

        Raises:
            DamagedError: files are lost, do not belong to the checkpoint, or differ in size from the saved ones.
        """
        problems = []
        for name, file in self.manifest.files.items():
            if name not in self.sizes:
                problems.append(f"{name} is lost")
            elif self.sizes[name] != file.size:
                problems.append(f"{name} has {self.sizes[name]} bytes, but {file.size} were saved")
        shards = {name for name in self.sizes if name.endswith(".safetensors")}
        problems += [f"{name} does not belong to this checkpoint" for name in sorted(shards - self.manifest.files.keys())]
        self._raise_for(problems)

    def verify(self, requests: Iterable[LoadRequest], share: int, shares: int) -> None:
        """Verify the chunks of requests, and share number `share` of `shares` of all headers and chunks.

        Raises:
            DamagedError: bytes differ from the saved ones; names the files and tensors.
        """
        names = list(self.manifest.files)[share::shares]
        problems = [problem for name in names if (problem := self._header_problem(name)) is not None]
        # By bytes, not by number of chunks, so that shares are about equal whatever the sizes of chunks.
        begins = accumulate((chunk.size for chunk in self.manifest.chunks), initial=0)
        total = sum(chunk.size for chunk in self.manifest.chunks)
        chunks = {chunk for chunk, begin in zip(self.manifest.chunks, begins, strict=False) if begin * shares // total == share}
        for request in requests:
            for entry in request.entries:
                chunks.update(chunk for chunk in entry.chunks if overlaps(chunk.segment, request.target.segment))
        self._raise_for(problems + self._read_chunks(chunks, _chunk_problem))

    def _header_problem(self, name: str) -> str | None:
        file = self.manifest.files[name]
        try:
            header = self._read(name, file.header_size)
        except OSError as error:
            return Unreadable(f"{name} cannot be read: {error}")
        if len(header) != file.header_size or sha256(header) != file.header_sha256:
            return f"{name}: its header is not the one that was saved"
        if parse_header(header) != header_entries(self.manifest.chunks_of[name]):
            return f"{name}: its header lists other tensors than {MANIFEST}"
        return None

    # -------------------------------------------------------------------------------------------------------------------- loading

    def load(self, requests: Sequence[LoadRequest]) -> None:
        """Copy stored elements to local tensors.

        Raises:
            DamagedError: bytes have changed since `verify` read them. The local tensors are then partly loaded.
        """
        direct = [(request.target, request.target.flat(), request.entries[0]) for request in requests if len(request.entries) == 1]
        with torch.no_grad():
            self._copy([(entry, target.segment, flat) for target, flat, entry in direct])
            for target, flat, _ in direct:
                if not target.flat_is_view:
                    target.local.detach().copy_(flat.view(target.local.shape))
            for request in requests:  # one at a time, as each needs memory for its arrays
                if len(request.entries) > 1:
                    self._load_format(request)

    def _load_format(self, request: LoadRequest) -> None:
        """Load values that are stored in several arrays, as a parameter with a Kahan compensation is."""
        local, segment = request.target.local.detach(), request.target.segment
        arrays = [torch.empty(segment.numel, dtype=entry.dtype, device=local.device) for entry in request.entries]
        self._copy([(entry, segment, array) for entry, array in zip(request.entries, arrays, strict=True)])
        fmt = format_beside(request.entries[0].dtype, {entry.kind for entry in request.entries[1:]})
        local.copy_(fmt.load(*arrays).view(local.shape))

    def _copy(self, copies: Sequence[tuple[TensorEntry, Segment, Tensor]]) -> None:
        """Copy parts of stored tensors. Each of `copies`: a stored tensor, a segment of it, and the contiguous 1-D tensor to copy to."""
        targets: dict[Chunk, list[tuple[Segment, Tensor]]] = {}
        for entry, segment, target in copies:
            for chunk in entry.chunks:
                if overlaps(chunk.segment, segment):
                    targets.setdefault(chunk, []).append((segment, target))

        def copy(chunk: Chunk, content: memoryview) -> str | None:
            problem = _chunk_problem(chunk, content)
            if problem is not None:
                return problem
            source = tensor_of(content, chunk.dtype)
            for segment, target in targets[chunk]:
                for overlap in overlaps(chunk.segment, segment):
                    overlap.copy(source, target)
            return None

        self._raise_for(self._read_chunks(targets, copy))

    def _read_chunks(self, chunks: Iterable[Chunk], action: ChunkAction) -> list[str]:
        return read_chunks(self._store, self.folder, sorted(chunks, key=lambda chunk: (chunk.file, chunk.offset)), action)

    def _raise_for(self, problems: Sequence[str]) -> None:
        if not problems:
            return
        shown = shorten(problems, MAX_SHOWN)
        if all(isinstance(problem, Unreadable) for problem in problems):
            raise UnreadableError(f"{self.where} cannot be read, and may be whole:\n  {shown}", problems)
        raise DamagedError(f"{self.where} is damaged:\n  {shown}", problems)


def _chunk_problem(chunk: Chunk, content: memoryview) -> str | None:
    if sha256(content) == chunk.sha256:
        return None
    return f"{chunk.file}: bytes {chunk.offset} to {chunk.offset + chunk.size}, of {chunk.key!r}, are not those that were saved"


def list_files(store: Store, step: int) -> tuple[dict[str, int], bytes | None]:
    """List the files of a checkpoint.

    Returns:
        The size of each file; and 32 bytes that change when a file is written to, as far as the store notices, or None if it cannot.

    Raises:
        DamagedError: the path of the checkpoint is not a folder.
        UnreadableError: the folder cannot be listed.
    """
    try:
        files = store.files(folder_of(step))
    except OSError as error:
        kind = DamagedError if error.errno in NOT_A_FOLDER else UnreadableError
        raise kind(f"{store.root}/{folder_of(step)} cannot be listed: {error}") from error
    sizes = {name: size for name, (size, _) in files.items()}
    has_versions = all(version is not None for _, version in files.values())
    return sizes, hashlib.sha256(repr(sorted(files.items())).encode()).digest() if has_versions else None


def marker_of(manifest: bytes) -> bytes:
    """Return the content of the file `COMMITTED` for a manifest."""
    return f"{sha256(manifest)}\n".encode()
