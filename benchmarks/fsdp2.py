"""The optimizer's step alone on a model that FSDP2 has sharded over two processes: `python -m benchmarks.fsdp2`.

Gloo ranks with one thread each. After one backward pass, which leaves sharded gradients, contenders take turns on the same parameters. All
ranks begin a sample together, and it takes as long as the slowest rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks import report
from benchmarks.contenders import BASELINE, by_name
from benchmarks.environment import describe, summary
from benchmarks.timing import keep_threads, quartiles, seconds_of, without_collector

__all__ = ["CONTENDERS", "Model", "main"]

RESULTS = Path(__file__).parent / "results"
WORLD_SIZE = 2
ROUNDS, WARM_UP = 40, 2
TIMEOUT = timedelta(seconds=120)  # of a collective
# A new contender is one more name of `contenders.CONTENDERS`. The first is the baseline. optimi's foreach does not run on DTensors.
CONTENDERS = (BASELINE, "torch AdamW foreach", "optimi StableAdamW loop", "ours AdamW cpu", "ours StableAdamW cpu")


class Model(nn.Module):
    """A transformer with learned positions; 76 tensors and 23.4M parameters with the default sizes."""

    def __init__(self, *, layers: int = 6, width: int = 512, vocabulary: int = 8192, positions: int = 512) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, nhead=8, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,  # int64 (batch, sequence)
    ) -> Tensor:  # (batch, sequence, width)
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def _sharded_model(sizes: dict[str, int]) -> Model:
    """The model under FSDP2, with gradients that are nowhere zero: an embedding's would be, for tokens that did not occur."""
    torch.manual_seed(0)
    model = Model(**sizes)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(torch.zeros(1, 8, dtype=torch.int64)).square().mean().backward()
    for param in model.parameters():
        assert isinstance(param.grad, DTensor), "FSDP2 shards every parameter"
        param.grad.to_local().normal_(std=1e-2)
    return model


def _rank(rank: int, folder: str, names: Sequence[str], sizes: dict[str, int], rounds: int) -> None:
    """Time the contenders; rank 0 writes down each sample of the slowest rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT)
    model = _sharded_model(sizes)
    params = list(model.parameters())
    found: dict[str, Any] = {"tensors": len(params), "elements": sum(param.numel() for param in params), "missing": {}, "remarks": []}
    steps = {}
    for name in names:
        try:  # every rank has the same packages and meets the same error
            optimizer = by_name(name).make(params)
            for _ in range(WARM_UP):
                optimizer.step()
            found["remarks"] += [remark] if (remark := keep_threads(1, name)) else []
            steps[name] = optimizer.step
        except Exception as error:  # whatever it is: the others go on, and the report has the reason
            found["missing"][name] = f"{type(error).__name__}: {error}"
    generator = random.Random(0)  # the same order on every rank
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with without_collector():
        for _ in range(rounds):
            turn = list(steps)
            generator.shuffle(turn)
            for name in turn:
                dist.barrier()
                samples[name].append(seconds_of(steps[name]))
    slowest = torch.tensor([samples[name] for name in steps], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if rank == 0:
        found["samples"] = dict(zip(steps, slowest.tolist(), strict=True))
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    del model, params, steps
    gc.collect()  # wrapped models are cycles that hold process groups, which must not outlive the interpreter
    dist.destroy_process_group()


def run(names: Sequence[str], sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Spawn the ranks, and make medians of what they found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, tuple(names), sizes, rounds), nprocs=WORLD_SIZE)  # pyright: ignore[reportPrivateImportUsage]
        found = json.loads((Path(folder) / "found.json").read_text())
    baseline = found["samples"][BASELINE]
    results = []
    for name, seconds in found["samples"].items():
        low, median, high = quartiles(seconds)
        ratio_low, ratio, ratio_high = quartiles([own / other for own, other in zip(seconds, baseline, strict=True)])
        results.append(
            {
                "contender": name,
                "samples": len(seconds),
                "milliseconds": median * 1e3,
                "quartiles": (low * 1e3, high * 1e3),
                "ratio": ratio,
                "ratio_quartiles": (ratio_low, ratio_high),
            }
        )
    missing = [{"contender": name, "reason": reason} for name, reason in found["missing"].items()]
    return {"tensors": found["tensors"], "elements": found["elements"], "results": results, "missing": missing, "remarks": found["remarks"]}


def markdown(record: dict[str, Any]) -> str:
    rows = [
        [row["contender"], f"{row['milliseconds']:.2f}", "{:.2f} - {:.2f}".format(*row["quartiles"]), f"{row['ratio']:.2f}"]
        for row in record["results"]
    ]
    model = f"{record['elements']:,} parameters in {record['tensors']} tensors"
    measured = f"the slowest rank, median of {record['results'][0]['samples']}, ratio to FSDP2 + {BASELINE}"
    parts = [
        f"# Time of a step on {WORLD_SIZE} FSDP2 ranks, one thread each",
        f"{model}; {measured}. {summary(record['environment'])}",
        report.table(["", "ms", "quartiles", "ratio"], rows),
        *(f"- {each['contender']}: {each['reason']}" for each in record["missing"]),
        *(f"- {remark}" for remark in record["remarks"]),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fsdp2", description="Times a step on two FSDP2 ranks.")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, help=f"names of contenders; {BASELINE} is always measured")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        names = list(dict.fromkeys([BASELINE, *(by_name(name).name for name in options.contenders)]))
    except ValueError as error:
        parser.error(str(error))
    environment = describe(torch.device("cpu"), "benchmarks.fsdp2") | {"threads": 1}
    sizes = {"layers": options.layers, "width": options.width, "vocabulary": options.vocabulary}
    record = {"environment": environment, "world_size": WORLD_SIZE, "baseline": BASELINE} | run(names, sizes, options.rounds)
    text = markdown(record)
    report.write(options.output, "fsdp2", record, text)
    print(text)
    print(f"written to {options.output / 'fsdp2'}.json and .md", file=sys.stderr)


if __name__ == "__main__":
    main()
