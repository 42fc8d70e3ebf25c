"""Save in the background: copy the tensors once, to a buffer that later saves reuse, and write them in a thread.

Owns the buffer, and the save in flight, which the next save or load waits for. Used by `so.checkpoint.async_save`, `save` and `load`.
"""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor

from sharded_optim.checkpoint.saving import PendingSave, finish
from sharded_optim.checkpoint.write_plan import PlannedChunk
from sharded_optim.storage import memory

__all__ = ["Saving", "start", "wait_for_save_in_flight"]

logger = logging.getLogger(__name__)


class Saving:
    """A save in the background, as returned by `async_save`."""

    def __init__(self, save: PendingSave) -> None:
        self._where = f"{save.store.root}, step {save.manifest.step}"
        self._failure: BaseException | None = None
        self._staged: dict[int, Tensor] | Exception
        try:
            self._staged = {id(chunk): copy for chunk, copy in zip(save.chunks, _stage(save), strict=True)}
        except Exception as error:  # such as out of memory: `_content` raises it, so that all ranks fail together
            self._staged = error
        save.release()
        self._thread = threading.Thread(target=self._run, args=(save,), name="sharded_optim save")  # no daemon: the process waits for it
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be started; save here, as the other ranks wait for this one
            self._run(save)

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint is committed.

        Raises:
            CheckpointError: the save failed, on every rank. Raised once: here, or by the next save or load.
        """
        if self._thread.ident is not None:
            self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _content(self, chunk: PlannedChunk) -> Tensor:
        if isinstance(self._staged, Exception):
            raise self._staged
        return self._staged[id(chunk)]

    def _run(self, save: PendingSave) -> None:
        try:
            finish(save, self._content)
        except BaseException as error:
            logger.error("saving %s in the background failed: %s", self._where, error)  # even if nobody calls wait()
            self._failure = error
        finally:
            self._staged = {}


_in_flight: Saving | None = None
_buffer = torch.empty(0, dtype=torch.uint8, device="cpu")


def start(save: PendingSave) -> Saving:
    """Copy the tensors of a save, and start writing them. To be called after `wait_for_save_in_flight`."""
    global _in_flight
    _in_flight = Saving(save)
    return _in_flight


def wait_for_save_in_flight() -> None:
    """Wait for the save in flight, if there is one.

    Raises:
        CheckpointError: that save failed, and its error was not raised yet.
    """
    global _in_flight
    saving, _in_flight = _in_flight, None
    if saving is not None:
        saving.wait()


def _stage(save: PendingSave) -> list[Tensor]:
    """Copy this rank's chunks to the buffer. Returns the copies in the order of the chunks, each 1-D."""
    on_gpu = any(tensor.local.is_cuda for tensor in save.tensors)
    parts = _buffer_of(sum(chunk.size for chunk in save.chunks), pinned=on_gpu).split([chunk.size for chunk in save.chunks])
    staged = [part.view(chunk.dtype) for part, chunk in zip(parts, save.chunks, strict=True)]
    for target, chunk in zip(staged, save.chunks, strict=True):
        target.copy_(save.content(chunk), non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.synchronize()
    return staged


def _buffer_of(size: int, *, pinned: bool) -> Tensor:
    """Return the first `size` bytes of the buffer; reallocates it if it is too small, or not pinned as required."""
    global _buffer
    if _buffer.numel() < size or _buffer.is_pinned() != pinned:
        _buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # frees the old one before the new one is allocated
        _buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) if pinned else memory.zeros(size, torch.uint8)
    return _buffer[:size]
