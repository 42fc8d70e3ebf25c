"""Ranks that the tests of a module share: each test meets them as if they were new."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from sharded_optim.sharding import waiting


def write_pid(folder: str) -> None:
    Path(folder, f"pid{dist.get_rank()}").write_text(str(os.getpid()))


def pids(folder: Path) -> list[str]:
    ranks.run(write_pid, 2, str(folder))
    return [(folder / f"pid{rank}").read_text() for rank in (0, 1)]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("on purpose")
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60.0)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def set_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def replace_a_constant() -> None:
    waiting.HINT_SECONDS = 1.0


def set_the_environment() -> None:
    os.environ["SET_BY_A_TEST"] = "1"
    torch.manual_seed(7)


def check_environment_and_seed() -> None:
    assert "SET_BY_A_TEST" not in os.environ
    assert torch.initial_seed() == 0


def test_tests_share_the_processes(tmp_path: Path) -> None:
    assert pids(tmp_path) == pids(tmp_path)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_rank_1, r"--- rank 1 of 2 ---\n(.*\n)*.*fail_on_rank_1\n(.*\n)*ArithmeticError: on purpose"),
        (hang_on_rank_1, r"ranks \[0, 1\] of 2 did not finish within 2.0 s\n(.*\n)*--- rank 1 hangs.*\n.*\n.*in hang_on_rank_1"),
        (die_on_rank_1, r"ranks \[1\] of 2 died without an exception"),
        (set_the_default_dtype, r"has not restored the default dtype"),
        (replace_a_constant, r"has not restored sharded_optim.sharding.waiting.HINT_SECONDS"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_failure_says_where_and_the_next_test_has_new_ranks(function: object, message: str, tmp_path: Path) -> None:
    before = pids(tmp_path)
    with pytest.raises(AssertionError, match=message):
        ranks.run(function, 2, timeout=2.0 if function is hang_on_rank_1 else ranks.TIMEOUT)  # type: ignore[arg-type]
    assert not set(before) & set(pids(tmp_path))


def test_environment_and_seed_are_those_of_each_test() -> None:
    ranks.run(set_the_environment, 2)
    ranks.run(check_environment_and_seed, 2)


def end_the_default_group() -> None:
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_who_replaces_the_default_process_group_gets_no_other_test_into_it(tmp_path: Path) -> None:
    before = pids(tmp_path)
    ranks.run(end_the_default_group, 2)
    assert not set(before) & set(pids(tmp_path))


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_marked_test_runs_on_its_ranks_with_its_arguments(world_size: int, tmp_path: Path) -> None:
    assert dist.get_world_size() == world_size
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == world_size
