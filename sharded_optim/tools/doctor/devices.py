"""GPUs and what ranks communicate by."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter

import torch
import torch.cuda.nccl
import torch.distributed as dist

from sharded_optim.tools.doctor.findings import Finding, Status, one_line
from sharded_optim.tools.doctor.place import Place

__all__ = ["at_hand", "examine", "identity_of"]

GIB = 2**30


def at_hand(place: Place) -> torch.device:
    """What this rank would train on."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", place.local_rank % count) if count else torch.device("cpu")


def identity_of(device: torch.device) -> str | None:
    """Of a GPU, wherever a process counts it; None: it is a CPU."""
    if device.type != "cuda":
        return None
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def examine(device: torch.device) -> list[Finding]:
    return [_cpu(), _gpus(device), _collectives(device)]


def _finding(name: str, status: Status, value: str, way_out: str | None = None, **rest: object) -> Finding:
    return Finding(section="devices", name=name, status=status, value=value, way_out=way_out, **rest)  # pyright: ignore[reportArgumentType]


def _cpu() -> Finding:
    name = platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return _finding("cpu", "ok", name, data={"model": name, "machine": platform.machine()})


def _gpus(device: torch.device) -> Finding:
    if device.type != "cuda":
        return _no_gpu()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter((each.name, each.total_memory, f"{each.major}.{each.minor}") for each in properties)
    told = "; ".join(
        f"{count} x {name}, {memory / GIB:.0f} GiB, compute capability {level}" for (name, memory, level), count in kinds.items()
    )
    alike = "; ".join(f"{count} x {name}" for (name, _, _), count in kinds.items())
    try:
        free, total = torch.cuda.mem_get_info(device)
        right = bool((torch.ones(1000, device=device) * 2).sum().item() == 2000)
    except RuntimeError as error:
        way_out = "see whether nvidia-smi lists the GPU, and whether this build of torch is for its compute capability and driver"
        return _finding("gpu", "problem", f"{told}, of which {device} fails: {one_line(error)}", way_out, alike=alike)
    name, _, level = next(iter(kinds))
    data = {"count": len(properties), "name": name, "memory": total, "free": free, "compute_capability": level}
    if not right:
        return _finding("gpu", "problem", f"{told}, of which {device} computes wrongly", "do not use it", data=data, alike=alike)
    return _finding("gpu", "ok", told, data=data, alike=alike)


def _no_gpu() -> Finding:
    """Whether there is one that torch does not see."""
    there = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None
    data = {"count": 0}
    if not there:
        return _finding("gpu", "absent", "none", data=data, alike="none")
    if torch.version.cuda is None:
        return _finding(
            "gpu", "warning", "an NVIDIA driver is there, torch has no CUDA", "install a CUDA build of torch", data=data, alike="none"
        )
    way_out = "give the container GPUs (docker run --gpus all), or unset CUDA_VISIBLE_DEVICES, or update the driver"
    return _finding("gpu", "warning", "an NVIDIA driver is there, torch finds no GPU", way_out, data=data, alike="none")


def _collectives(device: torch.device) -> Finding:
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else None
    names = [*(["gloo"] if gloo else []), *([f"NCCL {version}"] if nccl else [])]
    told, data = ", ".join(names) or "none", {"gloo": gloo, "nccl": version}
    if not gloo:
        return _finding("collectives", "problem", f"{told}, no gloo", "install a build of torch with gloo", data=data, alike=told)
    if device.type == "cuda" and not nccl:
        return _finding("collectives", "warning", f"{told}, no NCCL", "install a build of torch with NCCL", data=data, alike=told)
    return _finding("collectives", "ok", told, data=data, alike=told)
