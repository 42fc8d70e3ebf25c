"""Reading a checkpoint: what lies on the disk is compared with what was saved, and copied to where it is wanted, chunk by chunk."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, UnreadableError
from sharded_optim.checkpoint.held import Held, numbers_of
from sharded_optim.checkpoint.manifest import CHUNK_BYTES, LARGEST_MANIFEST, Chunk, Manifest, TensorEntry, sha256
from sharded_optim.checkpoint.shard_file import tensors_in, tensors_of
from sharded_optim.checkpoint.store import COMMITTED, MANIFEST, Store, folder_of
from sharded_optim.sharding.segment import Segment, overlaps
from sharded_optim.storage.formats import format_beside

__all__ = ["CheckpointReader", "Wish", "committed_content", "look_at"]

_Stretch = list[tuple[TensorEntry, Chunk]]  # that are read at once

THREADS = 4  # that read and hash, each with memory for a chunk
SHOWN = 20  # problems in an error message
BROKEN = (errno.ENOTDIR, errno.ELOOP)  # errors of a folder that is none, now and later


@dataclass(frozen=True, kw_only=True, eq=False)
class Wish:
    """Elements that are to be loaded, and the tensor that has them.

    Attributes:
        beside: arrays of the same shape that its values are stored in too; see `Format.extra`.
    """

    entry: TensorEntry
    held: Held
    beside: Sequence[TensorEntry] = ()

    @property
    def entries(self) -> list[TensorEntry]:
        return [self.entry, *self.beside]


class CheckpointReader:
    """A committed checkpoint.

    Args:
        store, step: which.

    Attributes:
        root, step: of the store, and its number.
        manifest: of it.
        text, digest: of the manifest as it is stored, and its SHA-256.
        version: see `look_at`.

    Raises:
        CheckpointError: there is none.
        DamagedError: the manifest is not what was saved.
        MismatchError: this version of the library, or this environment, cannot read it, though it may be whole.
    """

    def __init__(self, store: Store, step: int) -> None:
        self._store = store
        self.root, self.step = store.root, step
        self.folder = folder_of(step)
        self.where = f"{store.root}/{self.folder}"
        self._unreadable: set[str] = set()  # of the problems that were found, those that are no damage
        self.sizes, self.version = look_at(store, step)
        try:
            is_there = COMMITTED in self.sizes or (store.renames and self.folder in store.folders())
        except OSError as error:
            raise UnreadableError(f"{store.root} cannot be listed: {error}") from error
        if not is_there:
            raise CheckpointError(f"{self.where} is no committed checkpoint; {COMMITTED} is missing")
        for file in (COMMITTED, MANIFEST):
            if file not in self.sizes:  # it was published with both
                raise DamagedError(f"{self.where}/{file} is lost")
        if self.sizes[COMMITTED] != COMMITTED_BYTES:
            raise DamagedError(f"{self.where}/{COMMITTED} has {self.sizes[COMMITTED]} bytes, and as it was saved {COMMITTED_BYTES}")
        if self.sizes[MANIFEST] > LARGEST_MANIFEST:
            raise DamagedError(f"{self.where}/{MANIFEST} has {self.sizes[MANIFEST]} bytes; none is larger than {LARGEST_MANIFEST}")
        self.text = self._all_of(MANIFEST)
        self.digest = sha256(self.text)
        if self._all_of(COMMITTED) != committed_content(self.text):
            raise DamagedError(f"{self.where}: {MANIFEST} is not the one that was committed: its SHA-256 is not that in {COMMITTED}")
        self.manifest = Manifest.from_json(self.text, f"{self.where}/{MANIFEST}")
        if self.manifest.step != step:
            raise DamagedError(f"{self.where} is the folder of another step: its {MANIFEST} is of step {self.manifest.step}")

    def _all_of(self, file: str) -> bytes:
        content = bytearray(self.sizes[file])
        try:
            count = self._store.read(self.folder, file, 0, memoryview(content))
        except OSError as error:
            raise UnreadableError(f"{self.where}/{file} cannot be read: {error}") from error
        return bytes(content[:count])

    def check_files(self) -> None:
        """Raise DamagedError for files that are lost, foreign, or of another size than was saved. Reads no data."""
        problems = []
        for name, file in self.manifest.files.items():
            if name not in self.sizes:
                problems.append(f"{name} is lost")
            elif self.sizes[name] != file.size:
                problems.append(f"{name} has {self.sizes[name]} bytes, but {file.size} were saved")
        known = {*self.manifest.files, MANIFEST, COMMITTED}
        problems += [f"{name} does not belong to this checkpoint" for name in sorted(self.sizes) if name not in known and is_shard(name)]
        self._raise(problems)

    def verify(self, wishes: Iterable[Wish], share: int, shares: int) -> None:
        """Read and compare what is wished for, and one share of everything.

        Raises:
            DamagedError: something is not what was saved; names all such files and tensors.
        """
        names = list(self.manifest.files)
        problems = [problem for name in names[share::shares] if (problem := self._header_problem(name)) is not None]
        found: dict[tuple[str, int], tuple[TensorEntry, Chunk]] = {}
        for entry, chunk in self.manifest.chunks()[share::shares]:
            found[chunk.file, chunk.offset] = entry, chunk
        for entry, chunk in self._wished(wishes):
            found[chunk.file, chunk.offset] = entry, chunk
        todo = [found[place] for place in sorted(found)]
        problems += self._each(todo, _problem)
        self._raise(problems)

    def load(self, wishes: Sequence[Wish]) -> None:
        """Copy what is wished for to where it is wanted.

        Raises:
            DamagedError: bytes are others than when `verify` read them. What is wished for is then partly loaded.
        """
        simple = [(wish, wish.held.flat()) for wish in wishes if not wish.beside]
        with torch.no_grad():
            self._copy([(wish.entry, wish.held.segment, flat) for wish, flat in simple])
            for wish, flat in simple:
                if not wish.held.shares_memory:
                    wish.held.local.detach().copy_(flat.view(wish.held.local.shape))
            for wish in wishes:  # one after the other: each needs memory for its arrays
                if wish.beside:
                    local, segment = wish.held.local.detach(), wish.held.segment
                    fmt = format_beside(wish.entry.dtype, {entry.kind for entry in wish.beside})
                    arrays = [torch.empty(segment.numel, dtype=entry.dtype, device=local.device) for entry in wish.entries]
                    self._copy([(entry, segment, array) for entry, array in zip(wish.entries, arrays, strict=True)])
                    local.copy_(fmt.load(*arrays).view(local.shape))

    def _copy(self, wanted_of: Sequence[tuple[TensorEntry, Segment, Tensor]]) -> None:
        """Copy the elements of a segment of each tensor to where they are wanted: 1-D and contiguous."""
        wanted: dict[tuple[str, int], list[tuple[Segment, Tensor]]] = {}
        chunks: dict[tuple[str, int], tuple[TensorEntry, Chunk]] = {}
        for entry, segment, target in wanted_of:
            for chunk in entry.chunks:
                if overlaps(chunk.segment, segment):
                    chunks[chunk.file, chunk.offset] = entry, chunk
                    wanted.setdefault((chunk.file, chunk.offset), []).append((segment, target))

        def take(entry: TensorEntry, chunk: Chunk, content: memoryview) -> str | None:
            problem = _problem(entry, chunk, content)
            if problem is not None:
                return problem
            source = numbers_of(content, entry.dtype)
            for segment, target in wanted[chunk.file, chunk.offset]:
                for overlap in overlaps(chunk.segment, segment):
                    overlap.copy(source, target)
            return None

        self._raise(self._each([chunks[place] for place in sorted(chunks)], take))

    def _wished(self, wishes: Iterable[Wish]) -> list[tuple[TensorEntry, Chunk]]:
        return [
            (entry, chunk)
            for wish in wishes
            for entry in wish.entries
            for chunk in entry.chunks
            if overlaps(chunk.segment, wish.held.segment)
        ]

    def _each(
        self, chunks: Sequence[tuple[TensorEntry, Chunk]], action: Callable[[TensorEntry, Chunk, memoryview], str | None]
    ) -> list[str]:
        """Read chunks, and do something with the content of each, in several threads.

        Args:
            chunks: in the order of the files.

        Returns:
            What the actions return, where it is something.
        """
        buffers = threading.local()

        def read(stretch: _Stretch) -> list[str]:
            (first, chunk), (_, last) = stretch[0], stretch[-1]
            begin, size = chunk.offset, last.offset + last.size - chunk.offset
            content: bytearray | None = getattr(buffers, "content", None)
            if content is None or len(content) < size:
                content = buffers.content = bytearray(max(size, CHUNK_BYTES))
            try:
                count = self._store.read(self.folder, chunk.file, begin, memoryview(content)[:size])
            except OSError as error:
                problem = f"{chunk.file} cannot be read at {begin}, from {first.key!r} on: {error}"
                self._unreadable.add(problem)
                return [problem]
            told = []
            for entry, chunk in stretch:
                offset = chunk.offset - begin
                if offset + chunk.size > count:
                    told.append(f"{chunk.file} ends at {begin + count}, inside of {entry.key!r}")
                else:
                    told.append(action(entry, chunk, memoryview(content)[offset : offset + chunk.size]))
            return [each for each in told if each is not None]

        stretches = _stretches(chunks)
        lock = threading.Lock()
        results: list[str] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not failures:
                    with lock:
                        stretch = next(stretches, None)
                    if stretch is None:
                        return
                    results.extend(read(stretch))
            except BaseException as error:
                failures.append(error)

        threads: list[threading.Thread] = []
        try:
            for _ in range(min(THREADS, len(chunks))):
                thread = threading.Thread(target=work, name="sharded_optim read", daemon=True)
                thread.start()
                threads.append(thread)
        except RuntimeError:  # there can be no more threads
            if not threads:
                work()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return sorted(results)

    def _header_problem(self, name: str) -> str | None:
        file = self.manifest.files[name]
        header = bytearray(file.header_size)
        try:
            count = self._store.read(self.folder, name, 0, memoryview(header))
        except OSError as error:
            problem = f"{name} cannot be read: {error}"
            self._unreadable.add(problem)
            return problem
        if count != file.header_size or sha256(bytes(header)) != file.header_sha256:
            return f"{name}: its header is not the one that was saved"
        chunks = [(entry.key, entry.dtype, chunk.segment) for entry, chunk in self.manifest.chunks_of[name]]
        if tensors_in(bytes(header)) != tensors_of(chunks):
            return f"{name}: its header tells of other tensors than {MANIFEST}"
        return None

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            shown = "\n  ".join(problems[:SHOWN]) + (f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
            if self._unreadable.issuperset(problems):
                raise UnreadableError(f"{self.where} cannot be read, and may be whole:\n  {shown}", problems)
            raise DamagedError(f"{self.where} is damaged:\n  {shown}", problems)


def _problem(entry: TensorEntry, chunk: Chunk, content: memoryview) -> str | None:
    """What is wrong with a chunk."""
    if sha256(content) == chunk.sha256:
        return None
    return f"{chunk.file}: bytes {chunk.offset} to {chunk.offset + chunk.size}, of {entry.key!r}, are not those that were saved"


def _stretches(chunks: Sequence[tuple[TensorEntry, Chunk]]) -> Iterator[_Stretch]:
    """Chunks that lie one after the other in a file, up to `CHUNK_BYTES` together; one where it is larger."""
    stretch: _Stretch = []
    for entry, chunk in chunks:
        if stretch:
            first, last = stretch[0][1], stretch[-1][1]
            follows = (chunk.file, chunk.offset) == (last.file, last.offset + last.size)
            if not follows or chunk.offset + chunk.size - first.offset > CHUNK_BYTES:
                yield stretch
                stretch = []
        stretch.append((entry, chunk))
    if stretch:
        yield stretch


def look_at(store: Store, step: int) -> tuple[dict[str, int], bytes | None]:
    """List the files of a checkpoint.

    Returns:
        The size of each, and 32 bytes that are others once a file was written to, as far as the store notices; None where it does not tell.

    Raises:
        DamagedError: there is something else in the place of its folder.
        UnreadableError: the folder cannot be listed.
    """
    try:
        files = store.files(folder_of(step))
    except OSError as error:
        kind = DamagedError if error.errno in BROKEN else UnreadableError
        raise kind(f"{store.root}/{folder_of(step)} cannot be listed: {error}") from error
    sizes = {name: size for name, (size, _) in files.items()}
    is_told = all(version is not None for _, version in files.values())
    return sizes, hashlib.sha256(repr(sorted(files.items())).encode()).digest() if is_told else None


COMMITTED_BYTES = 65  # of the marker: a SHA-256 in hexadecimal, and a line feed


def committed_content(manifest: bytes) -> bytes:
    """What stands in the marker of a checkpoint with this manifest."""
    return f"{sha256(manifest)}\n".encode()


def is_shard(name: str) -> bool:
    return name.endswith(".safetensors")
