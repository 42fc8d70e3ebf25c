"""Training on two processes, the whole step and the optimizer's part of it: `python -m benchmarks.distributed`.

Gloo ranks with one thread each. Each contender of `wrappers.py` wraps its own copy of a model, and they take turns in rounds. All ranks
begin a sample together, and it takes as long as the slowest rank. Memory is measured in processes in which a contender is alone.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import report, wrappers
from benchmarks.contenders import HYPERPARAMETERS
from benchmarks.environment import describe, summary
from benchmarks.fsdp2 import Model
from benchmarks.gloo_ranks import start
from benchmarks.gpt2 import GPT2Model
from benchmarks.resident import peak, resident_after_reset
from benchmarks.timing import keep_threads, quartiles, seconds_of, without_collector
from benchmarks.wrappers import BASELINE, CONTENDERS, Training, by_name

__all__ = ["CASES", "Case", "main", "run"]

RESULTS = Path(__file__).parent / "results"
STEM = "distributed_cpu"
WORLD_SIZE = 2
WARM_UP = 2  # steps: moments are made in the first, DDP lays out its buckets anew after it
WINDOW = 3  # steps of a sample: what ends in the next forward pass is in it
MEMORY_STEPS = 4
QUICK_ROUNDS = 2
SAME_LOSS = 1e-2  # of the baseline's, relative: AdamW at the end, after a different order of summation in each step
TIMEOUT = timedelta(seconds=120)  # of a collective
IMPORTED = ("benchmarks.fsdp2", "benchmarks.gpt2", "benchmarks.wrappers", "sharded_optim", "torch._dynamo")  # by the server of ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the tokens that a rank trains it on."""

    name: str
    model: Callable[..., nn.Module]  # from int64 (batch, sequence) to (batch, sequence, classes); with `tokens` and `layers`
    sizes: dict[str, int]  # arguments of `model`
    small: dict[str, int]  # the same, for a smoke run and for what is loaded and compiled once
    batch: tuple[int, int]  # sequences and tokens of each
    rounds: int
    together: int  # contenders that are in one process with the baseline: memory for each is needed on every rank

    def build(self) -> nn.Module:
        """The model, the same on every rank."""
        torch.manual_seed(0)
        return self.model(**self.sizes)


SMALL = {"layers": 2, "width": 32, "vocabulary": 64, "positions": 64}
# A new case is one more entry. Batches are small: the larger, the less of a step is communication and the optimizer.
CASES = (
    Case(name="23M", model=Model, sizes={}, small=SMALL, batch=(2, 64), rounds=15, together=16),
    Case(name="GPT-2", model=GPT2Model, sizes={}, small=SMALL | {"heads": 4}, batch=(1, 32), rounds=7, together=2),
)


def _tokens(case: Case, model: nn.Module) -> Tensor:
    """This rank's batch, which is the same in every step."""
    embedding = model.get_submodule("tokens")
    assert isinstance(embedding, nn.Embedding)
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(embedding.num_embeddings, case.batch, generator=generator)


def _forward_and_backward(training: Training, tokens: Tensor) -> Tensor:
    """The loss, which predicts the next token: its number modulo what the model can tell apart."""
    output = training.forward(tokens)
    loss = functional.cross_entropy(output.flatten(0, 1), tokens.roll(-1, dims=1).flatten() % output.shape[-1])
    training.backward(loss)
    return loss.detach()


def _whole_steps(training: Training, tokens: Tensor, steps: int) -> Tensor:
    """Train for some steps, until the parameters are complete; the last step's loss."""
    loss = torch.zeros(())
    for _ in range(steps):
        loss = _forward_and_backward(training, tokens)
        training.step()
        training.zero_grad()
    training.wait()
    return loss


def _optimizer_step(training: Training) -> None:
    """From reduced gradients to complete parameters; FSDP2 has its shards then, and gathers in the next forward pass."""
    training.step()
    training.wait()


@dataclass(kw_only=True)
class _Entrant:
    """A contender in this process, and the seconds of its samples."""

    training: Training
    tokens: Tensor
    optimizer: list[float]
    whole: list[float]
    loss: float = math.nan

    def sample(self) -> None:
        """One of each. What the optimizer's part needs before it warms up the caches for both."""
        _forward_and_backward(self.training, self.tokens)
        self.training.finish_reduction()
        self.optimizer.append(_seconds(partial(_optimizer_step, self.training)))
        self.training.zero_grad()
        self.whole.append(_seconds(partial(_whole_steps, self.training, self.tokens, WINDOW)) / WINDOW)


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that this rank takes, when all begin together."""
    dist.barrier()
    return seconds_of(work)


def _wrap(name: str, case: Case) -> tuple[Training, Tensor]:
    """A contender's training, in a process group of its own, after a step or two."""
    process_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(process_group, dist.ProcessGroup)
    model = case.build()
    tokens = _tokens(case, model)
    training = by_name(name).wrap(model, process_group)
    _whole_steps(training, tokens, WARM_UP)
    return training, tokens


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _agreed(failure: str | None) -> str | None:
    """The first rank's failure of those that failed: a contender that fails on one is left out on all."""
    failures: list[str | None] = [None] * WORLD_SIZE
    dist.all_gather_object(failures, failure)
    return next((each for each in failures if each is not None), None)


def _time(case: Case, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time contenders that take turns: the samples of the slowest rank, by name, and who is missing."""
    entrants: dict[str, _Entrant] = {}
    missing: dict[str, str] = {}
    remarks: list[str] = []
    for name in names:
        failure = None
        try:
            training, tokens = _wrap(name, case)
            entrants[name] = _Entrant(training=training, tokens=tokens, optimizer=[], whole=[])
        except Exception as error:  # whatever it is: the others go on, and the report has the reason
            failure = _reason(error)
        remarks += [remark] if (remark := keep_threads(1, name)) else []
        if (reason := _agreed(failure)) is not None:
            entrants.pop(name, None)
            missing[name] = reason
    generator = random.Random(0)  # the same order on every rank
    for number in range(rounds):
        turn = list(entrants)
        generator.shuffle(turn)
        begin = time.monotonic()
        with without_collector():  # which collects first: wrapped models leave cycles
            for name in turn:
                entrants[name].sample()
        if dist.get_rank() == 0:
            print(f"{case.name}: round {number + 1} of {rounds}, {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"missing": missing, "remarks": remarks, "samples": {}}
    for name, entrant in entrants.items():
        slowest = torch.tensor([entrant.optimizer, entrant.whole], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        loss = _whole_steps(entrant.training, entrant.tokens, 1).double()
        dist.all_reduce(loss)
        optimizer, whole = slowest.tolist()
        found["samples"][name] = {"optimizer": optimizer, "whole": whole, "loss": loss.item() / WORLD_SIZE}
    for entrant in entrants.values():
        entrant.training.close()
    return found


def _remember(case: Case, name: str) -> dict[str, Any]:
    """The most memory that a rank needs for a contender. What is loaded and compiled once is there before, from training a small model."""
    training, _ = _wrap(name, replace(case, sizes=case.small))
    training.close()
    del training
    gc.collect()
    before = resident_after_reset()
    training, tokens = _wrap(name, case)
    _whole_steps(training, tokens, MEMORY_STEPS - WARM_UP)
    most = torch.tensor([peak() - before], dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    training.close()
    return {"bytes": most.item()}


def _ranks(environment: dict[str, str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 finds, of as many as are measured."""
    imported = [*IMPORTED, *([wrappers.DEEPSPEED] if "DS_ACCELERATOR" in environment else [])]
    return start(work, world_size=WORLD_SIZE, imported=imported, environment=environment, timeout=TIMEOUT)


def run(case: Case, names: Sequence[str], rounds: int, environment: dict[str, str], missing: dict[str, str]) -> dict[str, Any]:
    """Measure contenders on a case.

    Args:
        case: the model.
        names: of contenders, the baseline first.
        rounds: how many samples each gives.
        environment: for the ranks.
        missing: which of `names` are known to be out, and why.
    """
    with torch.device("meta"):
        sizes = [param.numel() for param in case.build().parameters()]
    others = [name for name in names[1:] if name not in missing]
    turns = max(1, math.ceil(len(others) / case.together))
    found = [_ranks(environment, partial(_time, case, [names[0], *others[turn::turns]], rounds)) for turn in range(turns)]
    missing = missing | {name: reason for each in found for name, reason in each["missing"].items()}
    results = []
    for name in names:
        if name in missing:
            continue
        print(f"{case.name}: memory of {name}", file=sys.stderr, flush=True)
        memory = _ranks(environment, partial(_remember, case, name))["bytes"]
        theory = by_name(name).bytes_in_theory(sum(sizes), WORLD_SIZE)
        samples = [(each["samples"][name], each["samples"][names[0]]) for each in found if name in each["samples"]]
        loss = samples[0][0]["loss"]
        results.append({"contender": name, "loss": loss, "peak_mebibytes": memory / 2**20, "theory_mebibytes": theory / 2**20})
        for part in ("whole", "optimizer"):
            seconds = [second for own, _ in samples for second in own[part]]
            ratios = [own_second / second for own, other in samples for own_second, second in zip(own[part], other[part], strict=True)]
            results[-1][part] = _statistics(seconds, ratios)
    remarks = [remark for each in found for remark in each["remarks"]] + _other_losses(results)
    return {
        "name": case.name,
        "tensors": len(sizes),
        "elements": sum(sizes),
        "batch": case.batch,
        "processes": turns,
        "results": results,
        "missing": [{"contender": name, "reason": reason} for name, reason in missing.items()],
        "remarks": list(dict.fromkeys(remarks)),
    }


def _statistics(seconds: Sequence[float], ratios: Sequence[float]) -> dict[str, Any]:
    low, median, high = quartiles(seconds)
    ratio_low, ratio, ratio_high = quartiles(ratios)
    return {
        "samples": len(seconds),
        "milliseconds": median * 1e3,
        "quartiles": (low * 1e3, high * 1e3),
        "ratio": ratio,
        "ratio_quartiles": (ratio_low, ratio_high),
    }


def _other_losses(results: Sequence[dict[str, Any]]) -> list[str]:
    """Who has not trained as the baseline has: all of AdamW have taken the same steps on the same tokens."""
    expected = results[0]["loss"]
    return [
        f"{each['contender']} ends with a loss of {each['loss']:.4f}, the baseline with {expected:.4f}: it does not do the same work"
        for each in results
        if by_name(each["contender"]).algorithm == "AdamW" and not math.isclose(each["loss"], expected, rel_tol=SAME_LOSS)
    ]


def _prepare(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Have DeepSpeed compile what it compiles when it starts, before there are ranks that wait for it, forever if it cannot.

    Args:
        names: of contenders.

    Returns:
        The environment of the ranks; who of `names` cannot be measured, with the reason.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    using = [name for name in names if by_name(name).library == wrappers.DEEPSPEED]
    if using:
        try:
            import_module("launch.deepspeed_extension").build()
        except Exception as error:  # whatever it is: the others go on, and the report has the reason
            return environment, dict.fromkeys(using, _reason(error))
        environment |= {name: os.environ[name] for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "PATH") if name in os.environ}
    return environment, {}


def markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    parts = [
        f"# Training on {WORLD_SIZE} gloo ranks, one thread each",
        f"Time of the slowest rank, ratio to {BASELINE}, below 1 is faster. {summary(environment)}",
        f"`{environment['command']}`, commit {environment['commit']}",
    ]
    for case in record["cases"]:
        parts += [f"## {case['name']}: {case['elements']:,} parameters in {case['tensors']} tensors", _table(case)]
        parts += ["\n".join(f"- {line}" for line in _lines(case))]
    return "\n\n".join(parts) + "\n"


def _table(case: dict[str, Any]) -> str:
    rows = []
    for row in case["results"]:
        cells = [row["contender"]]
        for part in ("whole", "optimizer"):
            times = row[part]
            cells += [f"{times['milliseconds']:.1f}", "{:.1f} - {:.1f}".format(*times["quartiles"]), f"{times['ratio']:.2f}"]
        rows.append([*cells, f"{row['peak_mebibytes']:.0f}", f"{row['theory_mebibytes']:.0f}"])
    header = ["", "step, ms", "quartiles", "ratio", "optimizer's part, ms", "quartiles", "ratio", "peak MiB per rank", "in theory"]
    return report.table(header, rows)


def _lines(case: dict[str, Any]) -> list[str]:
    sequences, length = case["batch"]
    samples = sorted({row["whole"]["samples"] for row in case["results"]})
    return [
        f"{sequences} x {length} tokens per rank; medians of {' or '.join(map(str, samples))} samples, of {WINDOW} steps each",
        *(f"{each['contender']} is not measured: {each['reason']}" for each in case["missing"]),
        *case["remarks"],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description="Times training on two gloo ranks.")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--contenders", nargs="+", help=f"names of contenders, default: all; {BASELINE} is always measured")
    parser.add_argument("--rounds", type=int, help=f"default: {', '.join(f'{case.rounds} for {case.name}' for case in CASES)}")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small models, few rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        wanted = options.contenders or [contender.name for contender in CONTENDERS]
        names = list(dict.fromkeys([BASELINE, *(by_name(name).name for name in wanted)]))
    except ValueError as error:
        parser.error(str(error))
    record = {
        "environment": describe(torch.device("cpu"), "benchmarks.distributed") | {"threads": 1},
        "world_size": WORLD_SIZE,
        "baseline": BASELINE,
        "hyperparameters": HYPERPARAMETERS,
        "steps_of_a_sample": WINDOW,
        "cases": [],
    }
    environment, missing = _prepare(names)
    for case in CASES:
        if case.name in (options.cases or [case.name]):
            rounds = options.rounds or (QUICK_ROUNDS if options.quick else case.rounds)
            chosen = replace(case, sizes=case.small, together=len(names)) if options.quick else case
            record["cases"].append(run(chosen, names, rounds, environment, missing))
    text = markdown(record)
    report.write(options.output, STEM, record, text)
    print(text)
    print(f"written to {options.output / STEM}.json and .md", file=sys.stderr)


if __name__ == "__main__":
    main()
