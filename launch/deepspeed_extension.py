"""Build the extension that DeepSpeed compiles when it starts on a CPU, before ranks begin to wait for each other.

A build that takes too long is interrupted with SIGINT, on which torch removes its lock file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from launch.errors import ConfigError
from sharded_optim.deepspeed import BUILD_SECONDS, not_built

__all__ = ["build", "prepare"]

NAME = "deepspeed_shm_comm"
SECONDS_TO_END = 10.0  # for an interrupted build to end
# A shell's background jobs ignore SIGINT, and their children inherit that.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# Starts DeepSpeed in a world of one rank, which builds the extension. The first argument is the path of a file that does not exist yet.
START = """
import sys, deepspeed
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
"""


def build(device: str = "cpu", timeout: float = BUILD_SECONDS) -> None:
    """Build the extension unless it exists, and set the environment variables by which this process and its children find it.

    Args:
        device: the device that DeepSpeed will use: "cpu", or "cuda", for which nothing is built.
        timeout: seconds that the build may take.

    Raises:
        ConfigError: DeepSpeed is not installed, cannot compile, or does not finish in time. The message names the lock file, if any.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError("sharding='deepspeed' needs DeepSpeed, which is not installed; run pip install 'deepspeed>=0.19,<0.20'")
    folder = prepare(device) / NAME
    lock = folder / "lock"
    if device != "cpu" or sys.platform != "linux" or ((folder / f"{NAME}.so").exists() and not lock.exists()):
        return
    print("waiting for an extension that DeepSpeed compiles once, in about a minute", file=sys.stderr)
    with tempfile.TemporaryDirectory() as store:
        # In a session of its own, so that the whole build can be interrupted, and Ctrl-C reaches it through this process only.
        command = [sys.executable, "-c", INTERRUPTIBLE + START, f"{store}/store"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _interrupt(process)
            raise ConfigError(not_built(lock, timeout)) from None
        except BaseException:
            _interrupt(process)
            raise
    if process.returncode:
        raise ConfigError(f"DeepSpeed cannot compile its extension, for which it needs a C++ compiler and ninja:\n{output[-2000:]}")


def _interrupt(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):  # SIGINT first: torch then removes its lock
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, number)
            process.communicate(timeout=SECONDS_TO_END)
            return


def prepare(device: str) -> Path:
    """Set the environment variables by which DeepSpeed in this process and its children chooses a device and a folder of extensions.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The folder of compiled extensions.

    Raises:
        ConfigError: DS_ACCELERATOR in the environment names another device.
    """
    chosen = os.environ.setdefault("DS_ACCELERATOR", device)
    if chosen != device:
        raise ConfigError(f"DS_ACCELERATOR={chosen!r} in the environment, but the job runs on {device!r}; unset it, or use device={chosen}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    scripts = sysconfig.get_path("scripts")  # has ninja, also if the virtual environment is not activated
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), scripts)))
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "sharded_optim" / "torch_extensions")))
