"""The text of the job: its files, their cache, the split into training and validation text, and the losses of simpler models.

Used by the ranks and by the process that starts them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.config import Config, ConfigError, DataConfig

__all__ = ["Corpus", "load", "unigram_bits_per_byte", "zlib_bits_per_byte"]

VALIDATION_FRACTION = 0.05
NEAR = 0.02  # fraction of the text by which the split may move to fall between two files

NO_TEXT = {"__pycache__"}
# Folders of the standard library that are left out: installed packages, tests (their size and presence depend on the distributor), and
# generated tables (character maps, the help topics as one literal).
NOT_LIBRARY = NO_TEXT | {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, memory-mapped: uint8 (bytes,), read-only."""

    source: Path
    train: np.ndarray
    validation: np.ndarray


def load(config: Config) -> Corpus:
    """Load the text that a config names, from the cache if its files have not changed.

    Any number of processes may call this at the same time: a cache file appears under its name only when it is complete, and its name is
    a hash of the names, sizes and modification times of the files in it.

    Raises:
        ConfigError: there is no such text, or it is too short.
    """
    try:
        source, files = _find(config.data)
        sizes = [size for _, size, _ in files]
        if not sum(sizes):
            raise ConfigError(f"data.path={str(source)!r}: there is no text in it")
        fingerprint = hashlib.sha256(repr((str(source), files)).encode()).hexdigest()[:24]
        cache = Path(config.runs_folder) / ".cache" / f"{fingerprint}.bytes"
        if not cache.exists():
            _write(cache, source, files)
        text = np.memmap(cache, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ConfigError(f"the text cannot be read and cached: {error}") from None
    split = _split(sizes)
    corpus = Corpus(source=source, train=text[:split], validation=text[split:])
    for name, piece in (("validation", corpus.validation), ("training", corpus.train)):
        if len(piece) <= config.sequence_length:  # a window needs one more byte, the target of its last byte
            raise ConfigError(
                f"sequence_length={config.sequence_length} does not fit into the {name} text of {len(piece)} bytes in {source}; "
                "make it shorter, or name more text with data.path"
            )
    return corpus


def _find(data: DataConfig) -> tuple[Path, list[tuple[str, int, int]]]:
    """Return the file or folder of the text, and its files by path: (relative path, bytes, modification time in ns)."""
    source = Path(sysconfig.get_paths()["stdlib"] if data.path is None else data.path).absolute()
    if source.is_file():
        paths = [source]
    elif source.is_dir():
        suffix = (".py" if data.path is None else "") if data.suffix is None else data.suffix
        excluded = NOT_LIBRARY if data.path is None else NO_TEXT
        paths = [path for path in source.rglob(f"*{glob.escape(suffix)}") if _is_text(path, source, excluded)]
        if not paths:
            raise ConfigError(f"data.path={str(source)!r} has no files that end in data.suffix={suffix!r}")
    else:
        raise ConfigError(f"data.path={str(source)!r}: there is no such file or folder")
    stats = {path.relative_to(source).as_posix(): path.stat() for path in paths}
    return source, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())]


def _is_text(path: Path, folder: Path, excluded: set[str]) -> bool:
    return path.is_file() and not any(part in excluded or part.startswith(".") for part in path.relative_to(folder).parts)


def _write(cache: Path, source: Path, files: list[tuple[str, int, int]]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            for name, size, _ in files:
                text = (source / name).read_bytes()
                if len(text) != size:  # the split is computed from sizes
                    raise ConfigError(f"{source / name} changed while it was read; start again")
                stream.write(text)
        os.replace(partial, cache)
    finally:
        partial.unlink(missing_ok=True)


def _split(sizes: list[int]) -> int:
    """Return the offset in bytes at which the validation text begins: about the last 5 % of the text, in order of paths.

    These are whole files at the end, because files that are close in this order (the modules of a package) resemble each other: with a
    random choice of files the validation text would repeat the training text. If no file boundary is near, as in a single file, a file is
    cut.
    """
    total = sum(sizes)
    wanted = round(total * (1.0 - VALIDATION_FRACTION))
    boundaries = np.cumsum([0, *sizes])
    nearest = int(boundaries[np.abs(boundaries - wanted).argmin()])
    return nearest if abs(nearest - wanted) <= NEAR * total else wanted


def unigram_bits_per_byte(train: np.ndarray, validation: np.ndarray) -> float:
    """Return the bits per byte of the validation text if each byte is coded by its frequency in the training text.

    No model without context does better. 1 is added to each of the 256 counts (Laplace), because a byte that was never seen in training
    would otherwise cost infinitely many bits.
    """
    counts = np.bincount(train, minlength=256) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits @ np.bincount(validation, minlength=256) / len(validation))


def zlib_bits_per_byte(text: np.ndarray) -> float:
    """Return the bits per byte to which zlib compresses a text at its highest level (9)."""
    return 8.0 * len(zlib.compress(text.tobytes(), 9)) / len(text)
