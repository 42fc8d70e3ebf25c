"""Batches of byte sequences, the same under every launcher and sharding.

A whole batch is drawn from the seed and the step alone, and each rank takes its block of rows. So the sequences of a rank are fixed by
(seed, step, rank), and the whole batch does not depend on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from launch.config import Config
from launch.launchers import RankInfo

__all__ = ["training_batch", "validation_batch"]


def training_batch(text: np.ndarray, config: Config, info: RankInfo, step: int) -> Tensor:
    """Draw this rank's sequences for a step. They begin at random positions of the text.

    Args:
        text: uint8 (bytes,).

    Returns:
        int64 (batch_size / world_size, sequence_length + 1): the last byte of each sequence is only a target.
    """
    # Counter-based: the key is the whole state, so no generator has to be carried from step to step, or saved.
    generator = np.random.Generator(np.random.Philox(key=np.array([config.seed, step], dtype=np.uint64)))
    starts = generator.integers(0, len(text) - config.sequence_length, size=config.batch_size)
    return _rows(text, starts, config, info)


def validation_batch(text: np.ndarray, config: Config, info: RankInfo, index: int) -> Tensor:
    """Return this rank's sequences of one batch of the validation set, whose sequences are spread evenly over the whole text.

    Args:
        text: uint8 (bytes,).
        index: number of the batch, from 0.

    Returns:
        int64 (batch_size / world_size, sequence_length + 1).
    """
    last = len(text) - config.sequence_length - 1
    all_starts = np.linspace(0, last, num=config.validation_batches * config.batch_size).astype(np.int64)
    return _rows(text, all_starts[index * config.batch_size : (index + 1) * config.batch_size], config, info)


def _rows(text: np.ndarray, starts: np.ndarray, config: Config, info: RankInfo) -> Tensor:
    share = len(starts) // info.world_size
    starts = starts[info.rank * share : (info.rank + 1) * share]
    return torch.from_numpy(text[starts[:, None] + np.arange(config.sequence_length + 1)].astype(np.int64))
