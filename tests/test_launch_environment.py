"""A process knows its place from its launcher's variables, or refuses to start, before it could wait for others."""

import os
import sysconfig
from pathlib import Path

import pytest

from launch.config import Config, ConfigError, load
from launch.environment import Place, find_place, pick_device, prepare_for_deepspeed, share_cores

FSDP2 = Path(__file__).parents[1] / "configs" / "fsdp2.yaml"
VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def config() -> Config:
    return load(FSDP2, [])  # of two processes


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in (*VARIABLES, "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_torchrun_says_which_rank_this_is(config, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert find_place(config) == Place(rank=1, world_size=2, local_rank=1, local_world_size=2)


def test_the_deepspeed_launcher_says_it_in_words_of_its_own(config, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv("LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name, value)
    assert find_place(config) == Place(rank=1, world_size=2, local_rank=1, local_world_size=2)


def test_without_torchrun_a_process_is_alone():
    assert find_place(load(FSDP2, ["processes=1"])) == Place(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_another_number_of_processes_than_configured_is_refused_with_the_way_out(config):
    with pytest.raises(ConfigError, match=r"processes=2, but 1 started; use .*torchrun --nproc-per-node 2 .* or processes=1"):
        find_place(config)


@pytest.mark.parametrize(
    ("name", "value", "expected"), [("WORLD_SIZE", None, "WORLD_SIZE not in"), ("RANK", "one", "must be whole numbers")]
)
def test_broken_variables_are_refused(config, monkeypatch, name, value, expected):
    for variable, good in VARIABLES.items():
        monkeypatch.setenv(variable, good)
    monkeypatch.delenv(name)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        find_place(config)


def test_gpus_are_refused_where_there_are_fewer_than_processes(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    place = Place(rank=1, world_size=2, local_rank=1, local_world_size=2)
    with pytest.raises(ConfigError, match="needs a GPU for each of the 2 processes here, there are 1"):
        pick_device(place, "cuda")
    assert pick_device(place, "auto").type == "cpu"
    assert pick_device(Place(), "auto").type == "cuda"
    assert pick_device(Place(), "cpu").type == "cpu"


def test_cores_are_shared_unless_the_user_has_chosen(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that the test's end restores it
    for chosen, processes, expected in ((None, 2, "4"), (None, 16, "1"), ("3", 2, "3")):
        if chosen is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        share_cores(processes)
        assert os.environ["OMP_NUM_THREADS"] == expected


def test_deepspeed_is_told_where_to_run_and_to_build_unless_the_user_has_chosen(tmp_path, monkeypatch):
    for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR"):  # so that the test's end restores them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert prepare_for_deepspeed("cpu") == tmp_path / "sharded_optim" / "torch_extensions" == Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["PATH"] == f"/usr/bin:{sysconfig.get_path('scripts')}"  # ninja's
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    assert prepare_for_deepspeed("cpu") == Path("/elsewhere")
    with pytest.raises(
        ConfigError, match=r"DS_ACCELERATOR='cpu' in the environment, but the job runs on 'cuda'; unset it, or use device=cpu"
    ):
        prepare_for_deepspeed("cuda")
