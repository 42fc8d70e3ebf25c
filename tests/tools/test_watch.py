"""`sharded-optim watch`: shows what the run folder has, follows it, and leaves the terminal as it was."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sharded_optim as so
from sharded_optim.cli import watch as command
from sharded_optim.cli.commands import app
from sharded_optim.cli.watch import ASCII_BLOCKS, BLOCKS, sparkline
from tests.run_folders import CONFIG, training_record, validation_record, write_run

ROOT = Path(__file__).parents[2]
SECONDS = 60.0  # for a process to start and to show something; it takes about 4


def once(folder: Path, **environment: str) -> str:
    result = CliRunner().invoke(app, ["watch", str(folder), "--once"], env={"COLUMNS": "200", **environment})
    assert result.exit_code == 0, result.output
    return result.stdout


def row(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{name}  +(.*?) *$", text, re.MULTILINE)
    return found


def test_one_frame_has_what_the_folder_has(tmp_path: Path) -> None:
    records = write_run(tmp_path, steps=100, tensors=["a", "b"])
    last = next(record for record in reversed(records) if "train_loss_bits" in record)
    text = once(tmp_path)
    assert row(text, "run") == str(tmp_path)
    assert row(text, "status") == "finished"
    assert row(text, "steps").startswith("100 of 100, 100%")
    assert row(text, "loss").startswith(f"{last['train_loss_bits']:.3f} bits per byte  ")
    assert row(text, "validation").startswith(
        f"{records[-1]['val_bits_per_byte']:.3f} bits per byte at step 100 (unigram 4.576, zlib 1.895)"
    )
    assert row(text, "largest RMS").startswith(f"{last['largest_rms']:.3f} of {last['largest_rms_name']}  ")
    assert row(text, "clipped").startswith("0.0% of tensors")
    assert row(text, "tokens/s").startswith(f"{last['tokens_per_second']:,.0f}  ")
    assert row(text, "skipped steps") == "0"
    assert row(text, "ranks") == "2, fsdp2, StableAdamW, cpu"
    assert re.fullmatch(r"\d+ s ago", row(text, "last record"))


def test_where_stdout_is_no_terminal_one_frame_is_printed(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "20 of 20" in result.stdout


def test_a_run_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 7\nprocesses: 2\n")
    text = once(tmp_path)
    assert row(text, "steps").startswith("0 of 7")
    assert row(text, "loss") == "no record of training yet"
    assert row(text, "ranks") == "2"


def test_an_old_run_shows_what_is_not_recorded(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20, tensors=[], optimizer=False)
    text = once(tmp_path)
    assert row(text, "clipped") == "not recorded"
    assert row(text, "largest RMS") == "none: this optimizer reports no RMS"


def test_a_run_of_a_tracker_is_shown(tmp_path: Path) -> None:
    with so.trackers.open(["jsonl"], tmp_path, run="own", config={"steps": 20}) as trackers:
        trackers.log(10, {"loss": 3.0, "rms/a": 1.5, "clipped_share": 1.0, "skipped_steps": 2.0, "validation_loss": 2.0})
    text = once(tmp_path / "own")
    assert row(text, "status") == "finished"
    assert row(text, "steps").startswith("10 of 20")
    assert row(text, "loss").split() == ["3.000", BLOCKS[0]]
    assert row(text, "validation") == "2.000 at step 10"
    assert row(text, "largest RMS").startswith("1.500 of a")
    assert row(text, "skipped steps") == "2"


def test_metrics_of_the_last_record_that_has_any_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20, tensors=["a"])
    record = training_record(30, largest_rms=None, largest_rms_name=None, optimizer=False)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    text = once(tmp_path)
    assert " of a" in row(text, "largest RMS")
    assert row(text, "clipped").startswith("0.0% of tensors")


def test_names_and_values_are_no_markup(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20, tensors=["[red]a[/red]"], summary={"status": "[bold]x\x1b[31m"})
    text = once(tmp_path)
    assert "[red]a[/red]" in row(text, "largest RMS")
    assert "\x1b" not in text


def test_a_half_written_line_is_not_shown(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "train')
    text = once(tmp_path)
    assert row(text, "steps").startswith("20 of 20")
    assert "unreadable" not in text


def test_a_run_without_a_record_for_long_is_probably_interrupted(tmp_path: Path) -> None:
    """Compared with the time between records at the last speed: 10 steps of 16 x 128 tokens at 9,000 to 9,500 tokens/s are 2 s."""
    config = CONFIG + "batch_size: 16\nsequence_length: 128\n"
    write_run(tmp_path, steps=20, status="running or interrupted", config=config)
    assert row(once(tmp_path), "status") == "running or interrupted"
    before = time.time() - 600
    os.utime(tmp_path / "metrics.jsonl", (before, before))
    assert row(once(tmp_path), "status") == ("running or interrupted; no record for 10 min 0 s, expected every 2 s: probably interrupted")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=20)
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "rnu")])
    assert result.exit_code == 2
    assert f"run folders beside it, newest first: {tmp_path}/run" in result.stderr


def test_a_sparkline_keeps_peaks_and_leaves_out_what_is_not_finite() -> None:
    values = [0.0] * 1000
    values[517] = 1.0
    assert sparkline(values).count(BLOCKS[-1]) == 1
    assert sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert sparkline([float("nan")]) == sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert set(sparkline([1.0, 2.0], ASCII_BLOCKS)) <= set(map(chr, range(128)))


# ------------------------------------------------------------------------------------------------------------------------- terminal


class Terminal:
    """A pseudoterminal in which the command runs."""

    def __init__(self, folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        arguments = ["sharded-optim", "watch", str(folder), "--interval", "0.1"]
        # As a shell's job in the foreground: where these tests run in the background, SIGINT may be ignored, which processes inherit.
        interrupted = "signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"import signal, sys; {interrupted}; sys.argv = {arguments!r}; from sharded_optim.cli import main; main()"
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "24", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        self.output = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.output:
            assert time.monotonic() < deadline, self.output[-2000:]
            assert self.process.poll() is None, self.output[-2000:]
            self._read(0.2)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        self.output += os.read(self._ours, 65536).decode(errors="replace")
        return True

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def left(self) -> tuple[int, Any]:
        """The exit status, and the terminal's settings after it."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self._read(0.1)
        while self._read(0.1):
            pass
        return self.process.returncode, termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    write_run(tmp_path, steps=50, status="running or interrupted", config=CONFIG.replace("{steps}", "900"))
    with contextlib.closing(Terminal(tmp_path)) as opened:
        opened.wait_for("50 of 900")
        yield opened


def test_it_follows_new_records_and_a_resumed_run_until_q(tmp_path: Path, terminal: Terminal) -> None:
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        line = json.dumps(training_record(60)) + "\n"
        stream.write(line[:50])
        stream.flush()
        stream.write(line[50:])
        stream.flush()
        terminal.wait_for("60 of 900")
        stream.write(json.dumps(validation_record(61)) + "\n")
    terminal.wait_for("61 of 900")
    draft = tmp_path / "draft"
    draft.write_text(json.dumps(training_record(30)) + "\n")
    draft.replace(tmp_path / "metrics.jsonl")
    terminal.wait_for("30 of 900")
    terminal.type("x")
    terminal.type("q")
    assert terminal.left() == (0, terminal.before)
    assert terminal.output.rindex("\x1b[?1049h") < terminal.output.rindex("\x1b[?1049l"), "the screen before is shown again"
    assert terminal.output.rindex("\x1b[?25l") < terminal.output.rindex("\x1b[?25h"), "and the cursor"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals, status: int, terminal: Terminal) -> None:
    """Ctrl-C is an ordinary way to leave."""
    terminal.process.send_signal(number)
    assert terminal.left() == (status, terminal.before)
    assert terminal.output.rindex("\x1b[?1049h") < terminal.output.rindex("\x1b[?1049l")


def test_the_terminal_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "r+b", buffering=0) as stream, open(ours, "r+b", buffering=0):
        before = termios.tcgetattr(stream)
        monkeypatch.setattr(sys, "stdin", stream)
        with contextlib.suppress(RuntimeError), command._keys():
            assert termios.tcgetattr(stream) != before
            raise RuntimeError
        assert termios.tcgetattr(stream) == before
