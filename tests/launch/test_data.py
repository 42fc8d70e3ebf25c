"""The text is the same for everyone, its two parts are apart, and the numbers it is compared with are right."""

import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import corpus
from launch.batches import training_batch, validation_batch
from launch.config import Config, ConfigError, load
from launch.launchers import RankInfo

FSDP2 = Path(__file__).parents[2] / "configs" / "fsdp2.yaml"
TEXT = np.frombuffer(np.random.default_rng(0).bytes(10_000), dtype=np.uint8)


def config_for(folder: Path, *overrides: str) -> Config:
    return load(FSDP2, [f"runs_folder={folder / 'runs'}", f"data.path={folder / 'text'}", "sequence_length=16", *overrides])


def write(folder: Path, sizes: dict[str, int]) -> None:
    """Files whose bytes tell which they are."""
    for index, (name, size) in enumerate(sizes.items()):
        path = folder / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([97 + index]) * size)


# ------------------------------------------------------------------------------------------------------------------------ batches


def rows(seed: int = 1, step: int = 1, rank: int = 0, world_size: int = 2) -> torch.Tensor:
    config = load(FSDP2, ["processes=auto", "batch_size=12", "sequence_length=20", f"seed={seed}"])
    return training_batch(TEXT, config, RankInfo(rank=rank, world_size=world_size), step)


def test_a_batch_is_fixed_by_seed_step_and_rank():
    first = rows()
    assert first.dtype == torch.int64
    assert first.shape == (6, 21)
    assert torch.equal(first, rows())
    for other in (rows(seed=2), rows(step=2), rows(rank=1)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_batch_of_all_ranks_together_does_not_depend_on_their_number(world_size):
    together = torch.cat([rows(rank=rank, world_size=world_size) for rank in range(world_size)])
    assert torch.equal(together, rows(world_size=1))


def test_sequences_are_pieces_of_the_text_up_to_its_last_byte():
    """The text of 22 bytes has two windows of 21; both are drawn."""
    text = np.arange(22, dtype=np.uint8)
    config = load(FSDP2, ["batch_size=8", "sequence_length=20"])
    drawn = torch.cat([training_batch(text, config, RankInfo(), step) for step in range(4)])
    assert {tuple(row) for row in drawn.tolist()} == {tuple(range(21)), tuple(range(1, 22))}


def test_validation_covers_the_whole_text_whatever_the_number_of_ranks():
    config = load(FSDP2, ["validation_batches=3", "batch_size=4", "sequence_length=20"])

    def batches(world_size: int) -> torch.Tensor:
        infos = [RankInfo(rank=rank, world_size=world_size) for rank in range(world_size)]
        return torch.cat([validation_batch(TEXT, config, info, index) for index in range(3) for info in infos])

    assert batches(1).shape == (12, 21)
    assert torch.equal(batches(1), batches(4))
    assert batches(1)[0].tolist() == TEXT[:21].tolist()
    assert batches(1)[-1].tolist() == TEXT[-21:].tolist()


# ------------------------------------------------------------------------------------------------------------------- files and split


def test_the_split_falls_between_files_in_order_of_their_paths(tmp_path):
    write(tmp_path, {"b.txt": 500, "a/x.txt": 450, "c.txt": 40})
    text = corpus.load(config_for(tmp_path))
    assert bytes(text.train) == b"b" * 450 + b"a" * 500  # a/x.txt comes first
    assert bytes(text.validation) == b"c" * 40


def test_a_single_file_is_cut_at_95_percent(tmp_path):
    write(tmp_path, {"one.txt": 1000})
    text = corpus.load(config_for(tmp_path, f"data.path={tmp_path / 'text' / 'one.txt'}"))
    assert (len(text.train), len(text.validation)) == (950, 50)


def test_the_split_is_disjoint_and_the_same_in_every_load(tmp_path):
    write(tmp_path, {f"{index:02}.txt": 37 + index for index in range(60)})
    first, second = corpus.load(config_for(tmp_path)), corpus.load(config_for(tmp_path))
    assert bytes(first.train) == bytes(second.train)
    assert bytes(first.validation) == bytes(second.validation)
    whole = b"".join(path.read_bytes() for path in sorted((tmp_path / "text").iterdir()))
    assert bytes(first.train) + bytes(first.validation) == whole
    assert not set(bytes(first.train)) & set(bytes(first.validation))  # every file has a byte of its own
    assert len(first.validation) == pytest.approx(0.05 * len(whole), abs=0.02 * len(whole))


def test_the_text_is_memory_mapped_and_read_only(tmp_path):
    write(tmp_path, {"one.txt": 1000})
    text = corpus.load(config_for(tmp_path))
    assert isinstance(text.train, np.memmap)
    assert not text.train.flags.writeable


def test_the_cache_is_reused_until_a_file_changes(tmp_path):
    write(tmp_path, {"a.txt": 950, "b.txt": 50})
    cache = tmp_path / "runs" / ".cache"
    corpus.load(config_for(tmp_path))
    (first,) = cache.iterdir()
    written = first.stat().st_mtime_ns
    corpus.load(config_for(tmp_path))
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    (tmp_path / "text" / "a.txt").write_bytes(b"z" * 950)  # same size, another time
    os.utime(tmp_path / "text" / "a.txt", ns=(1, 1))
    assert bytes(corpus.load(config_for(tmp_path)).train) == b"z" * 950
    (tmp_path / "text" / "b.txt").rename(tmp_path / "text" / "0.txt")
    assert bytes(corpus.load(config_for(tmp_path)).train[:50]) == b"b" * 50


def test_hidden_files_and_caches_and_other_suffixes_are_left_out(tmp_path):
    write(tmp_path, {"a.txt": 1000, ".git/b.txt": 10, "__pycache__/c.txt": 10, "d.md": 10})
    text = corpus.load(config_for(tmp_path, "data.suffix=.txt"))
    assert set(bytes(text.train) + bytes(text.validation)) == set(b"a")


def test_the_default_is_the_standard_library_without_tests_and_installed_packages():
    source, files = corpus._find(load(FSDP2, []).data)
    names = [name for name, _, _ in files]
    assert "json/decoder.py" in names
    assert str(Path(os.__file__).resolve().parent) == str(source.resolve())
    assert all(name.endswith(".py") for name in names)
    assert not any(part in {"site-packages", "test", "tests"} for name in names for part in name.split("/"))
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("sizes", "override", "expected"),
    [
        ({"a.txt": 1000}, "sequence_length=50", "sequence_length=50 does not fit into the validation text of 50 bytes"),
        ({"a.txt": 1000}, "data.suffix=.rst", "has no files that end in data.suffix='.rst'"),
        ({"a.txt": 0}, "seed=0", "there is no text in it"),
        ({"a.txt": 1000}, "data.path=/no/such/folder", "data.path='/no/such/folder': there is no such file or folder"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_name(tmp_path, sizes, override, expected):
    write(tmp_path, sizes)
    with pytest.raises(ConfigError) as caught:
        corpus.load(config_for(tmp_path, override))
    assert expected in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------------ baselines


def test_unigram_entropy_of_a_hand_computed_example():
    """Training text aaab: with one count added to each of 256, p(a) = 4/260, p(b) = 2/260, p(c) = 1/260."""
    train, validation = np.frombuffer(b"aaab", np.uint8), np.frombuffer(b"aabc", np.uint8)
    expected = -(2 * math.log2(4 / 260) + math.log2(2 / 260) + math.log2(1 / 260)) / 4
    assert corpus.unigram_bits_per_byte(train, validation) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_random_bytes_is_8_bits():
    assert corpus.unigram_bits_per_byte(np.tile(np.arange(256, dtype=np.uint8), 100), TEXT) == pytest.approx(8.0, abs=1e-9)


def test_zlib_bits_per_byte_count_the_compressed_bytes():
    text = b"the quick brown fox " * 50
    assert corpus.zlib_bits_per_byte(np.frombuffer(text, np.uint8)) == 8 * len(zlib.compress(text, 9)) / len(text)
