"""Whose step a CUDA graph can record, tried in processes of their own: `python -m benchmarks.graphs CONTENDER DTYPE ...`.

A capture that fails leaves torch's allocator behind as if it went on (before torch 2.12), and a step that waits for the device may take the
stream along: neither is to happen where others are measured afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from benchmarks.cases import DTYPES
from benchmarks.contenders import Contender, by_name
from benchmarks.devices import Device, pick
from benchmarks.storage import make_params, notices_shared_moments

__all__ = ["Refused", "main", "probe", "try_capture"]

Refused: TypeAlias = dict[tuple[str, str], str]  # reasons by names of contender and dtype
SHAPES = ((300_000,), (64, 64), (7,), ())  # several tensors, aligned and not, of which one takes many programs
SECONDS, SECONDS_OF_ALL = 60, 100  # of a process, which compiles, and of all that are started


def probe(contenders: Sequence[Contender], dtypes: Sequence[str]) -> Refused:
    """Why graphs of these contenders' steps cannot be captured, in a process that ends with the first that cannot, and then another.

    A process that ends without a reason, or not in time, has its end from the first pair that it did not answer for.
    """
    end = time.monotonic() + SECONDS_OF_ALL
    left = [(each.name, dtype) for each in contenders if each.graphed for dtype in dtypes if dtype in each.dtypes]
    refused: Refused = {}
    while left and (seconds := min(SECONDS, end - time.monotonic())) > 0:
        answers, why = _ask(left, seconds)
        if len(answers) < len(left) and not any(answers):
            answers.append(why)
        for pair, answer in zip(left, answers, strict=False):
            if answer is not None:
                refused[pair] = answer
        left = left[len(answers) :]
    return refused | dict.fromkeys(left, f"whether it can be captured was not tried: others took {SECONDS_OF_ALL} s")


def _ask(pairs: Sequence[tuple[str, str]], seconds: float) -> tuple[list[str | None], str]:
    """(for the first of the pairs None or why it cannot be captured, and why the process ended)."""
    command = [sys.executable, "-m", "benchmarks.graphs", *(text for pair in pairs for text in pair)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as error:
        return _answers(error.stdout), f"a process that tried to capture it did not end within {seconds:.0f} s"
    end = (result.stderr.strip() or "it said nothing").splitlines()[-1]
    return _answers(result.stdout), f"a process that tried to capture it ended with status {result.returncode}: {end}"[:300]


def _answers(output: str | bytes | None) -> list[str | None]:
    """Those that a process gave; subprocess has bytes, or nothing, of one that it stopped."""
    lines = (output.decode() if isinstance(output, bytes) else output or "").splitlines()
    return [json.loads(line)["refused"] for line in lines if line.startswith("{")]


def try_capture(contender: Contender, dtype: str, device: Device) -> str | None:
    """Why a graph of its step cannot be captured and replayed, or None."""
    try:
        params = make_params(contender.storage, SHAPES, DTYPES[dtype], device.place)
        optimizer = contender.make(params)
        optimizer.step()
        replay = device.captured(optimizer.step)
        if not notices_shared_moments(optimizer, params[0], replay):
            return "a replay of its graph does not step"
        if not all(bool(param.isfinite().all()) for param in params):
            return "a replay of its graph makes parameters that are not finite"
    except Exception as error:  # whatever it is: it is the answer
        return f"its step cannot be captured: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]
    return None


def main(arguments: Sequence[str]) -> None:
    """Print a line of JSON for each pair, up to the first that cannot be captured."""
    device = pick("cuda")
    for name, dtype in zip(arguments[::2], arguments[1::2], strict=True):
        refused = try_capture(by_name(name), dtype, device)
        print(json.dumps({"refused": refused}), flush=True)
        if refused is not None:
            os._exit(0)  # what is left of the device's state is not to be tidied up
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
