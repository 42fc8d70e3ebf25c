"""A process knows its rank from its launcher's variables, or refuses to start, before it could wait for others."""

import json
import os
import socket
import sysconfig
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from launch import process_group
from launch.config import Config, ConfigError, load
from launch.deepspeed_extension import prepare
from launch.launchers import DEEPSPEED, MPICH, OPEN_MPI, SRUN, TORCHRUN, RankInfo, read_rank_info
from launch.process_group import pick_device, share_cores

FSDP2 = Path(__file__).parents[2] / "configs" / "fsdp2.yaml"
VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OF_OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "1212", strict=True)}
OF_MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OF_SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_NODELIST": "gpu[07-08],cpu1",
}


@pytest.fixture
def config() -> Config:
    return load(FSDP2, [])  # of two processes


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in (*VARIABLES, "LOCAL_SIZE", *OF_OPEN_MPI, *OF_MPICH, *OF_SRUN):
        monkeypatch.delenv(name, raising=False)


OF_DEEPSPEED = {"LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name: value for name, value in VARIABLES.items()}


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        (TORCHRUN, VARIABLES),
        (DEEPSPEED, OF_DEEPSPEED),
        (OPEN_MPI, OF_OPEN_MPI),
        (MPICH, OF_MPICH),
        (MPICH, OF_MPICH | OF_SRUN),  # mpirun in an allocation of Slurm
        (TORCHRUN, VARIABLES | OF_SRUN),  # srun starts one torchrun on each node
        (TORCHRUN, VARIABLES | {"LOCAL_SIZE": "7"}),
    ],
)
def test_each_launcher_says_in_words_of_its_own_which_rank_this_is(config, monkeypatch, launcher, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_rank_info(config) == RankInfo(rank=1, world_size=2, local_rank=1, local_world_size=2, launcher=launcher)


def test_srun_says_which_rank_this_is_and_the_ranks_of_each_node(monkeypatch):
    for name, value in OF_SRUN.items():
        monkeypatch.setenv(name, value)
    config = load(FSDP2, ["processes=auto", "batch_size=10"])
    assert read_rank_info(config) == RankInfo(rank=3, world_size=5, local_rank=1, local_world_size=2, launcher=SRUN)
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert read_rank_info(config).local_world_size == 1
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # a batch script, or a shell in an allocation, is no task
    assert read_rank_info(config) == RankInfo()


def test_as_many_processes_as_were_started_must_divide_the_batch(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    config = load(FSDP2, ["processes=auto", "batch_size=3"])
    assert read_rank_info(config).world_size == 2
    with pytest.raises(ConfigError, match=r"processes='auto' are 2:\s+batch_size=3 does not divide over processes=2"):
        config.with_processes(2)
    assert config.with_processes(3) == load(FSDP2, ["processes=3", "batch_size=3"])
    deepspeed = load(FSDP2.with_name("deepspeed.yaml"), ["processes=auto"])
    assert deepspeed.with_processes(2) == load(FSDP2.with_name("deepspeed.yaml"), [])


def test_without_torchrun_a_process_is_alone():
    assert read_rank_info(load(FSDP2, ["processes=1"])) == RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_another_number_of_processes_than_configured_is_refused_with_the_way_out(config):
    with pytest.raises(ConfigError, match=r"processes=2, but 1 started; use .*torchrun --nproc-per-node 2 .* or processes=1"):
        read_rank_info(config)


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
        read_rank_info(config)


def test_gpus_are_refused_where_there_are_fewer_than_processes(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    info = RankInfo(rank=1, world_size=2, local_rank=1, local_world_size=2)
    with pytest.raises(ConfigError, match="needs a GPU for each of the 2 processes here, there are 1"):
        pick_device(info, "cuda")
    assert pick_device(info, "auto").type == "cpu"
    assert pick_device(RankInfo(), "auto").type == "cuda"
    assert pick_device(RankInfo(), "cpu").type == "cpu"


def test_a_rank_that_sees_its_own_gpu_alone_takes_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("SLURM_STEP_GPUS", "3")
    device = pick_device(RankInfo(rank=3, world_size=4, local_rank=3, local_world_size=4, launcher=SRUN), "auto")
    assert (device.type, device.index) == ("cuda", 0)


def test_torchruns_default_of_one_thread_is_not_a_choice(monkeypatch):
    """So that torchrun, mpirun and srun give the same bits. The config has the last word."""
    cores = set(range(8))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores, raising=False)
    chosen = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    torchrun, mpirun = (
        RankInfo(world_size=2, local_world_size=2, launcher=TORCHRUN),
        RankInfo(world_size=2, local_world_size=2, launcher=MPICH),
    )
    for info, variable, threads, expected in (
        (torchrun, "1", None, [4]),
        (torchrun, "3", None, []),  # torch has read it
        (torchrun, "1", 1, [1]),
        (mpirun, "1", None, []),
        (mpirun, None, None, [4]),
        (mpirun, "3", 2, [2]),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", variable or "")
        if variable is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        chosen.clear()
        process_group.set_threads(info, threads, cores)
        assert chosen == expected, (info.launcher.name, variable, threads)


def test_ranks_that_a_launcher_has_bound_to_too_few_cores_are_unbound(monkeypatch):
    """Open MPI binds each rank to one core. One that has its share, as of a socket, stays there."""
    bound: list[set[int]] = []
    monkeypatch.setattr("os.sched_setaffinity", lambda _, cores: bound.append(cores), raising=False)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    info, store = RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher=OPEN_MPI), HashStore()
    for own, others, expected in (({5}, {4}, {4, 5}), ({4, 5, 6, 7}, {0, 1, 2, 3}, None)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, own=own: own, raising=False)
        store.set("cores/2", json.dumps([socket.gethostname(), sorted(others)]))
        cores = process_group.cores_of_machine(info, store)
        assert cores == own | others
        bound.clear()
        process_group.set_threads(info, None, cores)
        assert bound == ([] if expected is None else [expected])


def test_only_a_launcher_is_missed_when_it_is_gone(config, monkeypatch):
    assert read_rank_info(load(FSDP2, ["processes=1"])).launcher_pid is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in VARIABLES.items():  # by hand, in a shell
        monkeypatch.setenv(name, value)
    assert read_rank_info(config).launcher_pid is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert read_rank_info(config).launcher_pid == os.getppid()


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
    assert prepare("cpu") == tmp_path / "sharded_optim" / "torch_extensions" == Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["PATH"] == f"/usr/bin:{sysconfig.get_path('scripts')}"  # ninja's
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    assert prepare("cpu") == Path("/elsewhere")
    with pytest.raises(
        ConfigError, match=r"DS_ACCELERATOR='cpu' in the environment, but the job runs on 'cuda'; unset it, or use device=cpu"
    ):
        prepare("cuda")
