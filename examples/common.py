"""What all recipes share: the models, the batches, the plain loop, starting ranks, and the comparison.

A recipe has a function `train(folder, stop)`: train up to step `stop`, from the checkpoint in `folder` if there is one, and save one when
stopping before the last step. `main(train)` runs it on two CPU ranks:

- "whole": all steps, without a stop;
- "half": up to the middle, then save;
- "resumed": in new processes, from that checkpoint to the end.

Every rank gets the same batches, so that averaged gradients are exactly those of one process, and is compared with a plain loop in one
process. In two steps the loss is multiplied by 30, so that StableAdamW clips updates.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import sharded_optim as so

RANKS = 2
STEPS, STOP = 8, 4
ROWS = 4  # in a batch
SPIKES = {2: 30.0, 5: 30.0}  # one before the stop, one after it
LR = 1e-2
BITWISE = "bitwise"

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
MPIRUN = (str(Path(sys.executable).with_name("mpirun")), "-n", str(RANKS), sys.executable)
DRIVER = (sys.executable,)  # the framework starts the ranks itself

Batch = dict[str, Any]


@dataclass
class Run:
    """What a rank has after `train`."""

    losses: list[float]  # of the steps that this run trained
    params: dict[str, Tensor]  # of the whole model, by the model's names


Train = Callable[[Path, int], "Run | dict[int, Run]"]  # a dict by rank where this process only starts the ranks


class Net(nn.Module):
    """Return the loss. The odd width makes the shards uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 47)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(47), nn.Linear(47, 47), nn.GELU()) for _ in range(3))
        self.last = nn.Linear(47, 3)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (self.last(hidden) - targets).square().mean() * weight.mean()


def make_net() -> Net:
    """Build the same model on every rank."""
    torch.manual_seed(0)
    return Net()


def make_net_batches() -> list[Batch]:
    """Return a batch for each step."""
    random = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randn(ROWS, 8, generator=random),
            "targets": torch.randn(ROWS, 3, generator=random),
            "weight": torch.full((ROWS,), SPIKES.get(step, 1.0)),
        }
        for step in range(STEPS)
    ]


def make_llama() -> Any:
    """Build a tiny Llama from a config, whose loss a batch can multiply."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class WeightedLlama(LlamaForCausalLM):
        accepts_loss_kwargs = False  # the loss is the batch's mean, as in the plain loop

        def forward(self, weight: Tensor, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            output.loss = output.loss * weight.mean()
            return output

    torch.manual_seed(0)
    return WeightedLlama(
        LlamaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
        )
    )


def make_text_batches() -> list[Batch]:
    """Return token batches for `make_llama`, one for each step."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(61, (STEPS, ROWS, 12), generator=random)
    return [
        {"input_ids": tokens[step], "labels": tokens[step], "weight": torch.full((ROWS,), SPIKES.get(step, 1.0))} for step in range(STEPS)
    ]


def make_rows(batches: list[Batch]) -> list[Batch]:
    """Return a data set of rows, with each batch once per rank: all ranks get it when whole batches are dealt out in turn."""
    return [{name: values[row] for name, values in batch.items()} for batch in batches for _ in range(RANKS) for row in range(ROWS)]


def trainer_arguments(folder: Path, stop: int) -> dict[str, Any]:
    """Return what every Trainer of Hugging Face gets here, whatever the optimizer: save in the middle, log every loss."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": stop,
        "save_steps": STOP,
        "per_device_train_batch_size": ROWS,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }


def logged_losses(trainer: Any, resumed: bool) -> list[float]:
    """Return the losses that a Trainer of Hugging Face has logged since it started; its log goes on after a resume."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[STOP if resumed else 0 :]


def allow_fsdp_on_cpus() -> None:
    """Let Accelerate use FSDP here: it does so with GPUs and the like only, and else leaves the model as it is. You do not need this."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU
    state.device = torch.device("cpu")  # FSDP1 takes cpu:0 for another


def loss_of(output: Any) -> Tensor:
    """Return a model's loss, which Hugging Face's models have in an attribute."""
    return output if isinstance(output, Tensor) else output.loss


def check_wrapper(model: nn.Module, wrapper: type) -> None:
    """Check that a model is wrapped at all: with the same batches on all ranks, one that is not would train as well."""
    if not isinstance(model, wrapper):
        raise TypeError(f"the model should be a {wrapper.__name__}, it is a {type(model).__name__}")


def whole_params(model: nn.Module, wrapper: type) -> dict[str, Tensor]:
    """Gather a model's parameters under DDP, FSDP1 or FSDP2, on every rank."""
    check_wrapper(model, wrapper)
    return copy_of(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def copy_of(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of tensors."""
    return {name: value.detach().clone() for name, value in params.items()}


def plain_loop(model: nn.Module, batches: list[Batch], **options: Any) -> Run:
    """Train in one process, without any framework."""
    optimizer = so.StableAdamW([item for item in model.named_parameters() if item[1].requires_grad], lr=LR, **options)
    losses, largest = [], 0.0
    for batch in batches:
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        largest = max(largest, *(value for name, value in optimizer.metrics().items() if name.startswith("rms/")))
    if largest <= 1.0:
        raise RuntimeError(f"no update was clipped (largest rms {largest:.2f}), so this comparison would show little")
    return Run(losses, copy_of(model.state_dict()))


def describe_difference(mine: Any, other: Any) -> str:
    """Compare losses or parameters: "bitwise", or how large the largest difference is."""
    if isinstance(mine, list):  # float64, which holds every loss
        mine, other = ({"loss": torch.tensor(losses, dtype=torch.float64)} for losses in (mine, other))
    if mine.keys() != other.keys():
        return f"other names {sorted(mine.keys() ^ other.keys())}"
    if all(torch.equal(mine[name], other[name]) for name in other):
        return BITWISE
    errors = [(mine[name].double() - other[name].double()).abs().max() / other[name].double().abs().max() for name in other]
    return f"differ by {torch.stack(errors).max():.1e}"


def is_rank() -> bool:
    """Return whether a launcher started this process."""
    return len(sys.argv) == 3


def main(
    train: Train,
    model: Callable[[], nn.Module] = make_net,
    batches: Callable[[], list[Batch]] = make_net_batches,
    launcher: tuple[str, ...] = TORCHRUN,
    single_use: bool = False,
    **options: Any,
) -> None:
    """Run a recipe, which is the script that calls this: start ranks, or be one; exit with 1 where a comparison fails.

    Args:
        train: of the recipe.
        model: builds the model for the plain loop.
        batches: of the steps.
        launcher: starts ranks.
        single_use: the framework trains once per process; else "whole" and "half" share processes, to save time.
        options: of the optimizer in the plain loop.
    """
    if is_rank():
        return _run_rank(train, sys.argv[1], Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        for runs in ("whole", "half", "resumed") if single_use else ("whole,half", "resumed"):
            subprocess.run([*launcher, sys.argv[0], runs, name], check=True)
        torch.set_num_threads(1)
        plain = plain_loop(model(), batches(), **options)
        found: dict[str, set[str]] = {"losses": set(), "parameters": set(), "resume": set()}
        for rank in range(RANKS):
            whole, half, resumed = (Run(**torch.load(folder / f"{run}-{rank}.pt")) for run in ("whole", "half", "resumed"))
            if not (len(half.losses) == STOP and len(resumed.losses) == STEPS - STOP):
                raise RuntimeError(f"steps before and after the stop: {len(half.losses)} and {len(resumed.losses)}")
            found["losses"].add(describe_difference(whole.losses, plain.losses))
            found["parameters"].add(describe_difference(whole.params, plain.params))
            found["resume"].add(describe_difference(half.losses + resumed.losses, whole.losses))
            found["resume"].add(describe_difference(resumed.params, whole.params))
    print("; ".join([Path(sys.argv[0]).stem, *(f"{what}: {' and '.join(sorted(texts))}" for what, texts in found.items())]))
    sys.exit(0 if all(texts == {BITWISE} for texts in found.values()) else 1)


def _run_rank(train: Train, runs: str, folder: Path) -> None:
    torch.set_num_threads(1)
    for run in runs.split(","):
        checkpoint = folder / ("not_used" if run == "whole" else "checkpoint")
        trained = train(checkpoint, STOP if run == "half" else STEPS)
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))  # Lightning ends the group itself
        runs_by_rank = trained if isinstance(trained, dict) else {rank: trained}
        for number, each in runs_by_rank.items():
            torch.save(vars(each), folder / f"{run}-{number}.pt")
    gc.collect()  # what still uses the process group
    if dist.is_initialized():  # a rank that ends without this may abort while it exits
        dist.destroy_process_group()
