"""Kill a training job many times, and look at its checkpoints after each kill.

    python -m tests.chaos [kills] [--seed N] [--root FOLDER]

Ends with 1 and says what is wrong where a save that had returned is lost, a checkpoint is torn or holds another state than one process that
was given the same gradients, or the last state is not that of a job that nobody has killed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from benchmarks.given_gradients import gradients
from sharded_optim import checkpoint
from tests.chaos.board import RANKS, Board, Phase
from tests.chaos.job import KEEP, LAYERS, Job, hash_of, reference, resumed, run_rank, whole_state

AIMS = (
    Phase.TRAINING,
    Phase.SAVING,
    Phase.SAVING_IN_THE_BACKGROUND,
    Phase.PRUNING,
    Phase.LOADING,
    Phase.SAVING,
    Phase.SAVING_IN_THE_BACKGROUND,
)
# Seconds, about as long as each takes: the kill comes at a random moment of it.
LENGTHS = {
    Phase.LOADING: 0.05,
    Phase.TRAINING: 0.03,
    Phase.SAVING: 0.05,
    Phase.SAVING_IN_THE_BACKGROUND: 0.06,
    Phase.PRUNING: 0.002,
}
SURVIVED = 0.2  # s, that ranks at most live on when one is killed
PATIENCE = 60.0  # s, for anything to happen
PRELOADED = ["tests.chaos.job", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]


class WrongError(Exception):
    """What a checkpoint library must not do."""


class Reference:
    """What one process computes from the same gradients, without checkpoints."""

    def __init__(self) -> None:
        self._model, self._optimizer = reference()
        self._step = 0
        self._hashes = {0: self._hash()}

    def at(self, step: int) -> tuple[str, str]:
        """Hashes of the whole state, and of the model alone."""
        while self._step < step:
            self._step += 1
            for param, grad in zip(self._model.parameters(), gradients(self._step, LAYERS), strict=True):
                param.grad = grad
            self._optimizer.step()
            self._hashes[self._step] = self._hash()
        return self._hashes[step]

    def _hash(self) -> tuple[str, str]:
        state = whole_state(self._model, self._optimizer)
        return hash_of(state), hash_of({name: value for name, value in state.items() if name.startswith("model/")})


@dataclass
class Tally:
    """What has happened."""

    kills: Counter[tuple[str, str]]  # by phase, and by who was killed
    drafts: int = 0  # that kills have left
    unacknowledged: int = 0  # checkpoints that were committed when the job died before it could say so
    loads: int = 0


class Chaos:
    """A job, and whoever kills it.

    Args:
        folder: for all files.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.root = folder / "checkpoints"
        (folder / "acknowledged").mkdir()
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._board = Board(folder / "board")
        self._reference = Reference()
        self._attempts = 0
        self.tally = Tally(kills=Counter())
        self.job = Job(
            root=str(self.root),
            acknowledged=str(folder / "acknowledged"),
            result=str(folder / "result"),
            board=str(folder / "board"),
            last=None,
            wrapper="zero",
        )

    # -------------------------------------------------------------------------------------------------------------------- processes

    def _start(self, job: Job) -> list[ForkServerProcess]:
        """Its ranks, which find each other through a file that no attempt before has used."""
        self._attempts += 1
        self._store = self.folder / f"store-{self._attempts}"
        self._board.clear()
        processes = [self._context.Process(target=run_rank, args=(job, rank, str(self._store)), daemon=True) for rank in range(RANKS)]
        for process in processes:
            process.start()
        return processes

    def finish(self, job: Job) -> dict[str, str]:
        """Run a job to its end; what it says of it."""
        processes = self._start(job)
        seen, deadline = 0, time.monotonic() + PATIENCE
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            processes[0].join(0.1)
            if self._board.step(0) != seen:  # many steps take long, but each does not
                seen, deadline = self._board.step(0), time.monotonic() + PATIENCE
        if any(process.exitcode != 0 for process in processes):
            self._end(processes)
            raise WrongError(f"the job has not run to its end:\n{self._failures()}")
        return json.loads(Path(job.result).read_text())

    def kill_once(self) -> None:
        """Start the job, wait for what is aimed at, and kill a rank, or all at once."""
        wrapper = self._random.choice(("zero", "fsdp2"))
        aim = AIMS[self._attempts % len(AIMS)]
        everyone = self._random.random() < 0.4
        victim = 0 if aim == Phase.PRUNING else self._random.randrange(RANKS)  # rank 0 prunes
        processes = self._start(replace(self.job, wrapper=wrapper))
        try:
            self._wait_for(victim, aim, processes)
            for process in processes if everyone else [processes[victim]]:
                process.kill()
            if not everyone:
                processes[victim].join()
                phase = self._board.phase(victim)
                time.sleep(self._random.uniform(0, SURVIVED))  # the others notice, and may do something about it
        finally:
            self._end(processes)
        if everyone:
            phase = self._board.phase(victim)
        self.tally.kills[phase.name, "all ranks" if everyone else f"rank {victim}"] += 1

    def _wait_for(self, rank: int, aim: Phase, processes: list[ForkServerProcess]) -> None:
        """Return at a random moment of a phase."""
        deadline = time.monotonic() + PATIENCE
        for _ in range(1 if aim == Phase.LOADING else self._random.randint(1, 3)):
            for is_inside in (False, True):
                while (self._board.phase(rank) == aim) != is_inside:
                    if any(not process.is_alive() for process in processes):
                        raise WrongError(f"the job has ended by itself:\n{self._failures()}")
                    if time.monotonic() > deadline:
                        raise WrongError(f"rank {rank} has not come to {aim.name}; it is in {self._board.phase(rank).name}")
                    time.sleep(0.0002)
        time.sleep(self._random.uniform(0, LENGTHS[aim]))

    def _end(self, processes: list[ForkServerProcess]) -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def _failures(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"{self._store.name}.failed-*"))) or "(no rank has said why)"

    # ------------------------------------------------------------------------------------------------------------------ what is left

    def check(self) -> None:
        """Look at every checkpoint.

        Raises:
            WrongError: one is lost, torn or another.
        """
        found = checkpoint.steps(self.root)
        acknowledged = self._acknowledged()
        for step in found:
            try:
                checkpoint.verify(self.root, step)
                state = resumed(str(self.root), step)
            except checkpoint.CheckpointError as error:
                raise WrongError(f"step {step} is torn: {error}") from error
            self.tally.loads += 1
            if hash_of(state) != self._reference.at(step)[0]:
                raise WrongError(f"step {step} is whole, but holds another state than training had")
        for step, digest in acknowledged.items():
            if digest != self._reference.at(step)[1]:
                raise WrongError(f"step {step} was saved of a model that had gone wrong")
            if step not in found and sum(other > step for other in found) < KEEP:
                raise WrongError(f"the save of step {step} had returned, and it is lost; there are {found}")
        latest = checkpoint.latest(self.root)
        if latest != (found[-1] if found else None):
            raise WrongError(f"the latest is step {latest}, not {found[-1:]}")
        names = {path.name for path in self.root.glob("*")} if self.root.exists() else set()
        drafts = {name for name in names if name.startswith(".")}
        if len(names - drafts) != len(found):
            raise WrongError(f"there are folders that are no checkpoints: {sorted(names - drafts)}")
        self.tally.drafts += len(drafts)
        self.tally.unacknowledged += sum(step not in acknowledged for step in found)

    def _acknowledged(self) -> dict[int, str]:
        """The hash of the model in each step whose save has returned on any rank."""
        found: dict[int, str] = {}
        for path in (self.folder / "acknowledged").iterdir():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    told = json.loads(line)
                    if found.setdefault(told["step"], told["hash"]) != told["hash"]:
                        raise WrongError(f"ranks have saved different models in step {told['step']}")
        return found

    def check_end(self) -> int:
        """Run to a last step, and compare with a job that nobody has killed.

        Returns:
            The step.
        """
        last = max(checkpoint.steps(self.root), default=0) + 7
        killed = self.finish(replace(self.job, last=last))
        self.check()
        left = [path.name for path in self.root.glob(".*")]
        if left:
            raise WrongError(f"drafts of processes that died are still there: {left}")
        if len(checkpoint.steps(self.root)) != KEEP:
            raise WrongError(f"{checkpoint.steps(self.root)} were not pruned to {KEEP}")
        uninterrupted = self.finish(replace(self.job, root=None, last=last, wrapper="fsdp2"))
        if not killed == uninterrupted == {"step": last, "hash": self._reference.at(last)[0]}:
            raise WrongError(
                f"the state of step {last} is {killed}, uninterrupted {uninterrupted}, in one process {self._reference.at(last)}"
            )
        return last


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; printed")
    parser.add_argument("--root", type=Path, default=None, help="where to make a folder for the files; it stays if something is wrong")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"{arguments.kills} kills, --seed {seed}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=arguments.root))
    chaos = Chaos(folder, seed)
    started = time.monotonic()
    kill = 0
    try:
        for kill in range(1, arguments.kills + 1):
            chaos.kill_once()
            chaos.check()
            if kill % 20 == 0:
                print(f"{kill} kills, {time.monotonic() - started:.0f} s, checkpoints {checkpoint.steps(chaos.root)}", flush=True)
        last = chaos.check_end()
    except WrongError as error:
        print(f"after kill {kill}: {error}\n{folder} has all files", file=sys.stderr)
        return 1
    _print_table(chaos.tally)
    print(
        f"{chaos.tally.loads} checkpoints loaded and compared, none torn; {chaos.tally.unacknowledged} committed before anybody knew, "
        f"{chaos.tally.drafts} drafts left and removed; step {last} as of a job that nobody has killed; {time.monotonic() - started:.0f} s"
    )
    with suppress(OSError):
        _remove(folder)
    return 0


def _print_table(tally: Tally) -> None:
    victims = ["all ranks", *(f"rank {rank}" for rank in range(RANKS))]
    print(f"\n{'killed in':<26}" + "".join(f"{victim:>10}" for victim in victims) + f"{'sum':>10}")
    for phase in Phase:
        counts = [tally.kills[phase.name, victim] for victim in victims]
        print(f"{phase.name.lower().replace('_', ' '):<26}" + "".join(f"{count:>10}" for count in (*counts, sum(counts))))
    sums = [sum(count for (_, killed), count in tally.kills.items() if killed == victim) for victim in victims]
    print(f"{'sum':<26}" + "".join(f"{count:>10}" for count in (*sums, sum(sums))) + "\n")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    raise SystemExit(main())
