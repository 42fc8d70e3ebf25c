"""Saving in the background: what is to be written is copied once, to a buffer that is kept, and training goes on."""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor

from sharded_optim.checkpoint.plan import Part
from sharded_optim.checkpoint.saving import Draft, finish
from sharded_optim.storage import memory

__all__ = ["Saving", "settle", "start"]

logger = logging.getLogger(__name__)


class Saving:
    """A save in the background."""

    def __init__(self, draft: Draft) -> None:
        self._where = f"{draft.store.root}, step {draft.step}"
        self._failure: BaseException | None = None
        self._not_staged: Exception | None = None
        self._parts: dict[int, Tensor] = {}
        try:
            self._parts |= {id(part): tensor for part, tensor in zip(draft.parts, _stage(draft), strict=True)}
        except Exception as error:  # as of memory: the ranks hear of it together, in the background
            self._not_staged = error
        draft.release()
        self._thread = threading.Thread(target=self._run, args=(draft,), name="sharded_optim save")  # no daemon: it ends before the process
        try:
            self._thread.start()
        except RuntimeError:  # there can be no more threads; the other ranks wait for this one
            self._run(draft)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is committed.

        Raises:
            CheckpointError: it failed, on every rank. Raised once, here or by the next save or load.
        """
        if self._thread.ident is not None:
            self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _content(self, part: Part) -> Tensor:
        if self._not_staged is not None:
            raise self._not_staged
        return self._parts[id(part)]

    def _run(self, draft: Draft) -> None:
        try:
            finish(draft, self._content)
        except BaseException as error:
            logger.error("saving %s in the background failed: %s", self._where, error)  # also if nobody asks
            self._failure = error
        finally:
            self._parts.clear()


_in_flight: Saving | None = None
_buffer = torch.empty(0, dtype=torch.uint8, device="cpu")


def start(draft: Draft) -> Saving:
    """Copy, and begin to write. After `settle`."""
    global _in_flight
    _in_flight = Saving(draft)
    return _in_flight


def settle() -> None:
    """Wait for the save in flight, if there is one.

    Raises:
        CheckpointError: it failed, and nobody has heard of it.
    """
    global _in_flight
    saving, _in_flight = _in_flight, None
    if saving is not None:
        saving.wait()


def _stage(draft: Draft) -> list[Tensor]:
    """Copies of this rank's parts, in the buffer."""
    size = sum(part.size for part in draft.parts)
    on_gpu = any(held.local.is_cuda for held in draft.held)
    staged = []
    begin = 0
    buffer = _buffer_of(size, pinned=on_gpu)
    for part in draft.parts:
        content = draft.content(part)
        target = buffer[begin : begin + part.size].view(part.dtype)
        target.copy_(content, non_blocking=on_gpu)
        staged.append(target)
        begin += part.size
    if on_gpu:
        torch.cuda.synchronize()
    return staged


def _buffer_of(size: int, *, pinned: bool) -> Tensor:
    """Bytes that are used again by the next save."""
    global _buffer
    if _buffer.numel() < size or _buffer.is_pinned() != pinned:
        _buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # gives the old one back before the new one is there
        _buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) if pinned else memory.zeros(size, torch.uint8)
    return _buffer
