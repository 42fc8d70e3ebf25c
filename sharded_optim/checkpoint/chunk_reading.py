"""Read chunks in several threads, contiguous chunks by one read. Used by `CheckpointReader`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from sharded_optim.checkpoint.manifest import CHUNK_BYTES, Chunk
from sharded_optim.checkpoint.store import Store

__all__ = ["ChunkAction", "Unreadable", "read_chunks"]

ChunkAction = Callable[[Chunk, memoryview], str | None]  # receives a chunk and its content; returns a problem, or None

THREADS = 4  # read and hash in parallel, each with a buffer of CHUNK_BYTES


class Unreadable(str):
    """A problem that may be temporary: a file could not be read."""


def read_chunks(store: Store, folder: str, chunks: Sequence[Chunk], action: ChunkAction) -> list[str]:
    """Read chunks and call an action with the content of each.

    Args:
        chunks: sorted by file and offset.
        action: called for each chunk, in several threads.

    Returns:
        The problems, sorted: those that actions returned, and files that are too short or cannot be read.
    """
    problems: list[str] = []
    ranges = _ranges(chunks)
    lock = threading.Lock()
    stopped = threading.Event()

    def work() -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while not stopped.is_set():
            with lock:
                contiguous = next(ranges, None)
            if contiguous is None:
                return
            first, last = contiguous[0], contiguous[-1]
            content = buffer[: last.offset + last.size - first.offset]
            try:
                count = store.read(folder, first.file, first.offset, content)
            except OSError as error:
                problems.append(Unreadable(f"{first.file} cannot be read at {first.offset}, from {first.key!r} on: {error}"))
            else:
                problems.extend(_problems(contiguous, content[:count], action))

    _run_in_threads(work, min(THREADS, len(chunks)), stopped)
    return sorted(problems)


def _problems(chunks: Sequence[Chunk], content: memoryview, action: ChunkAction) -> Iterator[str]:
    """Call the action for contiguous chunks, and yield problems. `content` is shorter than the chunks if the file ends early."""
    begin = chunks[0].offset
    for chunk in chunks:
        own = content[chunk.offset - begin : chunk.offset - begin + chunk.size]
        if len(own) < chunk.size:
            yield f"{chunk.file} ends at {begin + len(content)}, inside of {chunk.key!r}"
        elif (problem := action(chunk, own)) is not None:
            yield problem


def _ranges(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks that are contiguous in a file, up to `CHUNK_BYTES` together."""
    contiguous: list[Chunk] = []
    for chunk in chunks:
        if contiguous:
            first, last = contiguous[0], contiguous[-1]
            follows = (chunk.file, chunk.offset) == (last.file, last.offset + last.size)
            if not follows or chunk.offset + chunk.size - first.offset > CHUNK_BYTES:
                yield contiguous
                contiguous = []
        contiguous.append(chunk)
    if contiguous:
        yield contiguous


def _run_in_threads(work: Callable[[], None], count: int, stopped: threading.Event) -> None:
    """Run a function in up to `count` threads; in this thread if none can be started. Raises the error of any thread.

    Args:
        stopped: set when a thread fails or this thread is interrupted, so that the other threads end.
    """
    if count == 0:
        return
    with ThreadPoolExecutor(count, thread_name_prefix="sharded_optim read") as pool:
        started = []
        try:
            for _ in range(count):
                started.append(pool.submit(work))
        except RuntimeError:  # no more threads, or the interpreter exits while a save in the background reads back
            if not started:
                work()
        try:
            wait(started, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()  # before the pool waits for its threads
        for future in started:
            future.result()
