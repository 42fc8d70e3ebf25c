"""The documentation is true where a test can tell: every code block runs, is a part of a file, or says why not; every command exists.

Blocks of Python run with the names that a reader has at that place (`Names`), each by itself. What a page shows is run by a test of its own
where `OWN_TESTS` names one.
"""

from __future__ import annotations

import ast
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed_models
import pytest
import ranks
import torch
import torch.distributed as dist
import typer.main
from _pytest.mark.expression import Expression
from deepspeed_models import NEEDS_DEEPSPEED
from pages import PAGES, ROOT, Block, blocks_of, commands_of, inline_commands, text_of
from torch import Tensor, nn

import sharded_optim as so
from launch.config import from_arguments
from launch.errors import ConfigError
from sharded_optim.cli.commands import app

OWN_TESTS = {  # of pages, and what their blocks of Python are looked for by
    "README.md": "tests/tools/test_readme.py",
    "docs/migrating.md": "tests/tools/test_migration.py",
    "docs/report.md": "tests/tools/test_report_docs.py",
    "docs/trackers.md": "tests/unit/test_trackers.py",
    "docs/verify.md": "tests/tools/test_verify.py",
}
# Blocks of these are data or text. A block without a language has commands.
NO_CODE = ("text", "mermaid", "json", "{eval-rst}")
ALL = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in ALL if block.language == "python" and block.mark in ("", "run") and block.page not in OWN_TESTS]
ids = [block.place for block in PYTHON]


# ------------------------------------------------------------------------------------------------------------------------- all blocks


def test_every_block_says_what_it_is() -> None:
    for block in ALL:
        assert block.language in ("", "python", *NO_CODE), block.place
        assert block.mark in ("", "from", "run", "not run"), f"{block.place}: {block.mark}"
        assert block.mark != "run" or block.value == "2 ranks", block.place
        assert block.mark != "not run" or len(block.value) > 10, f"{block.place}: why?"


def test_pages_with_tests_of_their_own_are_named_in_them() -> None:
    for page, test in OWN_TESTS.items():
        assert Path(page).name in (ROOT / test).read_text(), test


def test_every_page_is_in_the_index() -> None:
    index = text_of("docs/index.md")
    for page in PAGES:
        if page != "docs/index.md":
            link = page.removeprefix("docs/") if page.startswith("docs/") else f"../{page}"
            assert re.search(rf"^- \[[^\]]+\]\({re.escape(link)}\): \S", index, re.MULTILINE), f"{page} is not in docs/index.md"


def test_links_to_files_lead_to_files() -> None:
    """Those to headings are checked by `make docs`. A link to a folder leads nowhere in the built site."""
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text_of(page)):
            assert ((ROOT / page).parent / link).is_file(), f"{page}: {link}"


@pytest.mark.parametrize("block", [block for block in ALL if block.mark == "from"], ids=lambda block: block.place)
def test_a_part_of_a_file_is_in_it(block: Block) -> None:
    """Line by line, but for the indentation of the whole."""
    lines = (ROOT / block.value).read_text().splitlines()
    shown = block.text.splitlines()
    starts = [at for at, line in enumerate(lines) if line.strip() == shown[0].strip()]
    assert starts, f"{block.value} has no line {shown[0]!r}"

    def same(at: int) -> bool:
        indent = len(lines[at]) - len(shown[0])
        return lines[at : at + len(shown)] == [" " * indent + line if line else line for line in shown]

    assert any(same(at) for at in starts), f"{block.place} is no longer what {block.value} has"


# ---------------------------------------------------------------------------------------------------------------------------- python


class Net(nn.Module):
    """A model with what pages speak of: an embedding, blocks with matrices, a head."""

    def __init__(self, *, returns_loss: bool) -> None:
        super().__init__()
        self.returns_loss = returns_loss
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x).square().mean() if self.returns_loss else self.head(x)


class Names(dict[str, Any]):
    """The names that a page takes for granted. A `model` and an `optimizer` are built anew for each block."""

    def __init__(self, block: Block) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        torch.manual_seed(0)
        is_released = "gradient_release=True" in block.text
        model: nn.Module = Net(returns_loss=is_released)
        tokens = torch.arange(24).view(2, 12) % 16
        if block.page == "docs/trainers.md" and "fsdp1_layout" in block.text:
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        super().__init__(
            so=so,
            torch=torch,
            dist=dist,
            model=model,
            batches=[tokens],
            step=7,
            steps=101,
            config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}},
            loss=SimpleNamespace(backward=lambda: self["model"](tokens).square().mean().backward()),
            fully_shard=fully_shard,
            FullyShardedDataParallel=lambda module, **options: FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options),
        )
        self["optimizer"] = optimizer = so.StableAdamW(model.parameters(), lr=1e-3, gradient_release=is_released)
        self["trainer"] = SimpleNamespace(optimizer=optimizer)
        self["schedule"] = self["scheduler"] = torch.optim.lr_scheduler.ConstantLR(optimizer)
        if "loss" not in block.text and not is_released:
            self["loss"].backward()


def run(block: Block) -> None:
    """Execute a block, and compare what is said behind an expression with its value."""
    names: dict[str, Any] = Names(block)
    exec(compile("\n" * block.line + block.text, block.place, "exec"), names)
    for line in block.text.splitlines():
        stated = re.fullmatch(r"(\S.*?\))  # (-?\d+(?:\.\d+)?(?:e-?\d+)?)\b.*", line)
        if stated and isinstance(ast.parse(stated[1]).body[0], ast.Expr):
            value = eval(stated[1], names)
            assert math.isclose(value, float(stated[2]), rel_tol=1e-3), f"{block.place}: {stated[1]} is {value}"


@pytest.fixture
def _in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in")
@pytest.mark.filterwarnings("ignore:weight_decay", "ignore:the first step found no gradient")
@pytest.mark.parametrize("block", [block for block in PYTHON if block.mark != "run"], ids=lambda block: block.place)
def test_a_block_of_python_runs(block: Block) -> None:
    run(block)


SEVERAL = [block for block in PYTHON if block.mark == "run"]
WITH_DEEPSPEED = [block for block in SEVERAL if "so.deepspeed" in block.text]


@pytest.mark.usefixtures("_in")
def test_blocks_for_several_ranks_run_on_two() -> None:
    others = [block for block in SEVERAL if block not in WITH_DEEPSPEED]
    assert len(others) > 3
    ranks.run(run_on_a_rank, 2, others)


@pytest.mark.usefixtures("_in")
@NEEDS_DEEPSPEED[0]
@NEEDS_DEEPSPEED[1]
def test_blocks_with_deepspeed_run_on_two_ranks() -> None:
    assert WITH_DEEPSPEED
    deepspeed_models.run(run_on_a_rank, 2, WITH_DEEPSPEED)


def run_on_a_rank(several: list[Block]) -> None:
    for block in several:
        try:
            run(block)
        except Exception as error:
            raise AssertionError(f"{block.place}: {error!r}") from error
        dist.barrier()


# --------------------------------------------------------------------------------------------------------------------------- commands

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
PROGRAMS = ("kubectl", "sbatch", "srun", "docker", "cat", "cd", "git", "curl", ".", "apt-get")  # not ours


def names_of_tests() -> Iterator[list[str]]:
    """What `pytest -k` looks for: the names of a test's file, class and function, and where they are written down, of its cases."""
    for path in [*(ROOT / "tests").rglob("test_*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
                yield [path.name.lower(), node.name.lower(), decorators.lower()]


TESTS = list(names_of_tests())


def check_arguments_of_tests(arguments: list[str]) -> None:
    if "-k" in arguments:
        chosen = arguments[arguments.index("-k") + 1]
        expression = Expression.compile(chosen)
        for name in re.findall(r"[\w-]+", re.sub(r"\b(and|or|not)\b", " ", chosen)):
            assert any(name.lower() in text for names in TESTS for text in names), f"no test is called {name}"
        if " and " not in chosen and "not " not in chosen:
            assert any(expression.evaluate(lambda name: any(name.lower() in text for text in names)) for names in TESTS), chosen  # noqa: B023
    for argument in arguments:
        if argument.startswith("tests/"):
            assert (ROOT / argument).exists(), argument


def check_make(words: list[str]) -> None:
    targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    assert targets, words
    assert set(targets) <= TARGETS, f"there is no target {targets}"
    assert all(re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE) for name in variables), variables
    arguments = shlex.split(variables.get("ARGS", ""))
    if targets[0] in ("test", "matrix", "reshard"):
        check_arguments_of_tests(arguments)
    if targets[0] == "train" and "..." not in variables.get("CONFIG", ""):
        check_config([variables.get("CONFIG", "configs/fsdp2.yaml"), *arguments])


def check_config(arguments: list[str]) -> None:
    from_arguments([str(ROOT / arguments[0]), *[each.replace("configs/", f"{ROOT}/configs/") for each in arguments[1:]]], "a page")


def check_sharded_optim(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    for word in words[1:]:
        subcommands = getattr(command, "commands", {})
        if word in subcommands:
            command = subcommands[word]
        elif word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
            assert word.partition("=")[0] in known, f"{' '.join(words)}: there is no option {word}"
        else:
            assert not subcommands, f"there is no command {word}"


def check_python(words: list[str]) -> None:
    """Of a module or a file of this repository, behind whatever options of Python, torchrun, mpirun or deepspeed."""
    if "--no-python" in words:
        return check(words[words.index("--no-python") + 1 :])
    if "pip" in words:
        return None
    if "-m" in words or "--module" in words:
        at = words.index("-m" if "-m" in words else "--module") + 1
        path = ROOT / words[at].replace(".", "/")
        own = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert own or words[at].split(".")[0] in ("torch", "venv"), f"there is no module {words[at]}"
        if words[at] in ("launch", "launch.train") and words[at + 1 :]:
            check_config(words[at + 1 :])
        return None
    files = [word for word in words[1:] if word.endswith(".py")]
    assert files or "-c" in words or "--version" in words, words
    assert all((ROOT / file).exists() or "/" not in file for file in files), words
    return None


def check(words: list[str]) -> None:
    """Raise AssertionError for a command that does not exist."""
    program = Path(words[0]).name if "/" in words[0] else words[0]
    checks: dict[str, Callable[[list[str]], None]] = {"make": check_make, "sharded-optim": check_sharded_optim}
    checks |= dict.fromkeys(("python", "python3", "torchrun", "mpirun", "deepspeed"), check_python)
    if words[0].startswith("launch/jobs/"):
        assert (ROOT / words[0]).exists(), words
    elif program == "pip" and words[1] == "install":
        pass  # test_readme.py looks for the extras
    elif program in checks:
        checks[program](words)
    else:
        assert program in PROGRAMS, f"{program}: what is it? A block that is no command has the language `text`"
    for word in words[1:]:
        if word.startswith(("launch/", "docker/", "configs/", "examples/", "tests/")) and "=" not in word:
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist(page: str) -> None:
    """Targets, subcommands, options, files, tests that -k chooses and keys of configs."""
    for block in blocks_of(page):
        if block.language or block.mark in ("not run", "from"):
            continue
        commands = list(commands_of(block))
        assert commands, block.place
        for words in commands:
            try:
                check(words)
            except ConfigError as error:
                lines = str(error).replace(f"{ROOT}/", "").splitlines()
                if not all(line.strip() in block.text for line in lines):  # some pages show the error
                    raise
            except AssertionError as error:
                raise AssertionError(f"{block.place}: {' '.join(words)}: {error}") from error
    for words in inline_commands(page):
        try:
            check(words)
        except (AssertionError, ConfigError) as error:
            raise AssertionError(f"{page}: {' '.join(words)}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------- single pages


def texts_of_the_code() -> list[str]:
    """All strings of the package and of the job, with a zero byte for what is formatted into them."""
    found = []
    for path in [*(ROOT / "sharded_optim").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
    return found


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """But for those that it says are of torch or another library."""
    texts = texts_of_the_code()
    cells = re.findall(r"^\| (`.*?) \| .* \|$", text_of("docs/troubleshooting.md"), re.MULTILINE)
    assert len(cells) > 40
    for cell in cells:
        for message in re.findall(r"`([^`]+)`", re.sub(r"from `.*`", "", cell)) if "(of " not in cell else []:
            parts = [part.strip() for part in message.split("...") if len(part.strip()) > 7]
            assert parts, message
            assert any(all(part in text for part in parts) for text in texts), message


def test_every_file_in_the_drawings_of_the_code_exists() -> None:
    """In the section of its folder, or with its path."""
    for section in re.split(r"^## ", text_of("docs/code.md"), flags=re.MULTILINE)[1:]:
        folder = section.split("/", 1)[0]
        places = [ROOT, ROOT / "sharded_optim", ROOT / folder, ROOT / "sharded_optim" / folder]
        for name in re.findall(r"[\w/]+\.py\b", section):
            assert any(list(place.glob(name)) or list(place.glob(f"*/{name}")) for place in places), f"{folder}: {name}"


def test_every_folder_of_the_package_has_a_drawing_and_a_line() -> None:
    sections = re.findall(r"^## (\w+)/\n.*?^```mermaid", text_of("docs/code.md"), re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\| `(\w+)/`.* \|$", text_of("docs/how-it-works.md"), re.MULTILINE)
    folders = [path.name for path in (ROOT / "sharded_optim").iterdir() if (path / "__init__.py").exists()]
    assert sorted(sections) == sorted(lines) == sorted([*folders, "launch"])


def test_every_file_and_folder_in_how_it_works_exists() -> None:
    """A file without a folder is in that of the one named before it."""
    folder = ""
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", text_of("docs/how-it-works.md")):
        folder = f"{path.rpartition('/')[0]}/" if "/" in path else folder
        places = [ROOT, ROOT / "tests", ROOT / "sharded_optim", ROOT / folder, ROOT / "sharded_optim" / folder]
        assert any((place / path).exists() for place in places), path


def test_versions_said_to_be_tested_are_those_that_are_installed() -> None:
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "examples" / "requirements.txt").read_text()
    names = "torch|deepspeed|accelerate|transformers|lightning|torchtitan|ray"
    rows = re.findall(rf"^\|.*\| ({names}) (\d[\d.]*) \|$", text_of("docs/choosing.md"), re.MULTILINE)
    assert len(rows) == 11
    for name, version in rows:
        assert re.search(rf"^{name}(\[\w+\])?=={re.escape(version)}\b", pins, re.MULTILINE), f"{name} {version}"


def test_every_public_name_is_in_the_reference() -> None:
    page = text_of("docs/api.md")
    for name in so.__all__:
        if name not in ("__version__", "callbacks", "checkpoint", "deepspeed", "trackers"):
            assert re.search(rf"^\.\. auto\w+:: {name}$", page, re.MULTILINE), name
    for name in ("save", "async_save", "load", "latest", "steps", "verify", "prune", "import_from"):
        assert f":: sharded_optim.checkpoint.{name}\n" in page, name


def test_optimizers_have_a_section_and_a_row_each() -> None:
    page = text_of("docs/optimizers.md")
    for name in so.optimizers.__all__:
        assert f"\n| [`{name}`](#" in page, name


# -------------------------------------------------------------------------------------------------------------------------- workflows


def test_targets_that_workflows_call_exist() -> None:
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text()
        lists = ", ".join(re.findall(r"^ *target: \[(.*)\]$", text, re.MULTILINE))
        targets = [*re.findall(r"\bmake ([a-z-]+)", text), *filter(None, lists.split(", "))]
        assert targets, path.name
        assert set(targets) <= TARGETS, f"{path.name}: {set(targets) - TARGETS}"
