"""Batches of byte sequences, the same under every launcher and sharding.

A batch is drawn as a whole, from its seed and step alone, and each rank takes its block of rows. So the sequences of a rank are fixed by
(seed, step, rank), and the whole batch does not depend on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["training_batch", "validation_batch"]


def training_batch(
    text: np.ndarray,  # uint8 (bytes,)
    *,
    seed: int,
    step: int,
    batch_size: int,  # of all ranks together
    sequence_length: int,
    rank: int,
    world_size: int,
) -> Tensor:
    """Draw this rank's sequences, which begin at random positions of the text.

    Returns:
        int64 (batch_size / world_size, sequence_length + 1): the last byte of each is a target only.
    """
    # Counter-based: the key is the whole state, so no generator has to be carried from step to step, or saved.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    starts = generator.integers(0, len(text) - sequence_length, size=batch_size)
    return _rows(text, starts, sequence_length, rank, world_size)


def validation_batch(
    text: np.ndarray,  # uint8 (bytes,)
    index: int,  # which batch
    *,
    batches: int,
    batch_size: int,  # of all ranks together
    sequence_length: int,
    rank: int,
    world_size: int,
) -> Tensor:
    """Return this rank's sequences of one batch of the validation set, which is `batches` batches at even distances over the whole text.

    Returns:
        int64 (batch_size / world_size, sequence_length + 1).
    """
    all_starts = np.linspace(0, len(text) - sequence_length - 1, num=batches * batch_size).astype(np.int64)
    return _rows(text, all_starts[index * batch_size : (index + 1) * batch_size], sequence_length, rank, world_size)


def _rows(text: np.ndarray, starts: np.ndarray, sequence_length: int, rank: int, world_size: int) -> Tensor:
    share = len(starts) // world_size
    starts = starts[rank * share : (rank + 1) * share]
    return torch.from_numpy(text[starts[:, None] + np.arange(sequence_length + 1)].astype(np.int64))
