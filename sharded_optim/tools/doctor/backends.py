"""Check which backends run here: each steps a small optimizer, and the result must equal the eager backend's, bit for bit."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from sharded_optim.backends import MODULES, PACKAGES, Backend
from sharded_optim.optimizers import Muon
from sharded_optim.tools.doctor.findings import Finding, Status, one_line

__all__ = ["examine"]

EAGER = "eager"
CPU = torch.device("cpu")
SHAPES = ((), (13, 7), (1, 1), (1009,))
MATRICES = ((13, 7), (1, 9))  # shapes of the matrices that Muon steps
DTYPES = (torch.float32, torch.bfloat16)
STEPS = 3


def examine(device: torch.device) -> list[Finding]:
    """Check each backend on this device, or on the CPU if it does not run on the device: state may be offloaded."""
    findings = [_examine(name, device) for name in MODULES]
    faster = any(each.status == "ok" for each in findings if each.name != EAGER)
    return [each if faster or each.status != "absent" else _missed(each, device) for each in findings]


def _missed(finding: Finding, device: torch.device) -> Finding:
    """Turn the absence of the device's compiled backend into a warning, as steps then run eagerly."""
    if finding.name != ("cpu" if device.type == "cpu" else "triton") or finding.way_out is None:
        return finding
    return _finding(finding.name, "warning", f"{finding.value}: steps run eagerly, many times slower", finding.way_out)


def _finding(name: str, status: Status, value: str, way_out: str | None = None, device: str | None = None) -> Finding:
    return Finding(
        section="backends",
        name=name,
        status=status,
        value=value,
        way_out=way_out,
        data={"usable": device is not None, "device": device},
        alike=f"usable on {device}" if device else "not usable",
    )


def _examine(name: str, device: torch.device) -> Finding:
    try:
        backend: Backend = import_module(f"sharded_optim.backends.{name}").BACKEND
    except ImportError as error:
        return _finding(name, "absent", one_line(error), f"pip install {PACKAGES[name]}")
    reasons = {each: backend.supports(each, frozenset(DTYPES)) for each in dict.fromkeys((device, CPU))}
    fitting = next((each for each, reason in reasons.items() if reason is None), None)
    if fitting is not None:
        return _stepped(name, fitting)
    reason = one_line(reasons[device])
    if name == "triton" and device.type != "cpu":
        return _finding(name, "warning", f"{reason}: steps run eagerly, many times slower", "update the GPU's driver, or triton")
    return _finding(name, "absent", reason)


def _stepped(name: str, device: torch.device) -> Finding:
    way_out = f"use another one (backend='{EAGER}' is the reference)"
    try:
        results = _results(name, device)
        expected = results if name == EAGER else _results(EAGER, device)
    except Exception as error:  # any error of a compiler or a driver
        return _finding(name, "problem", f"fails on {device}: {one_line(error)}", f"{way_out}, and see the whole error with it")
    if not all(bool(each.float().isfinite().all()) for each in results):
        return _finding(name, "problem", f"computes what is not finite on {device}", way_out)
    wrong = sum(int((ours != theirs).sum()) for ours, theirs in zip(results, expected, strict=True))
    if wrong:
        total = sum(map(Tensor.numel, results))
        return _finding(name, "problem", f"differs from {EAGER} on {device} in {wrong:,} of {total:,} elements", way_out)
    return _finding(name, "ok", f"runs on {device}" + ("" if name == EAGER else f", bit for bit as {EAGER}"), device=str(device.type))


def _results(name: str, device: torch.device) -> list[Tensor]:
    """Return parameters and state after a few steps, with gradients that grow a hundredfold from step to step."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in DTYPES:
        params = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in (*SHAPES, *MATRICES)]
        rest = {"params": params[: len(SHAPES)], "algorithm": "stable_adamw"}
        optimizer = Muon([rest, {"params": params[len(SHAPES) :]}], lr=1e-2, weight_decay=1e-2, backend=name)
        for step in range(STEPS):
            for param in params:
                param.grad = (torch.randn(param.shape, generator=generator) * 100.0**step).to(device, dtype)
            optimizer.step()
        state = [value for param in params for value in optimizer.state[param].values() if isinstance(value, Tensor)]
        found += [each.detach().cpu() for each in (*params, *state)]
    return found
