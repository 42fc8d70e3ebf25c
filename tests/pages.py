"""The pages of the documentation as data: their code blocks, and the commands in them. Used by the tests of README, docs/ and examples/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "blocks_of", "commands_of", "inline_commands", "text_of"]

ROOT = Path(__file__).parents[1]
PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples/README.md",
        ROOT / "benchmarks/README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
]
# A fence, and the comments of the line before it: `<!-- from: FILE -->`, `<!-- run: 2 ranks -->` or `<!-- not run: REASON -->`.
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+): (?P<value>.*?) -->\n\n?)?"
    r"^(?P<ticks>`{3,})(?P<language>\S*)\n(?P<text>.*?)^(?P=ticks)$",
    re.MULTILINE | re.DOTALL,
)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page.

    Attributes:
        mark: "from", "run" or "not run" of the comment before it, else "".
        value: what the comment says after it.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str
    value: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    text = text_of(page)
    found = [
        Block(
            page=page,
            line=1 + text.count("\n", 0, match.start("ticks")),
            language=match["language"],
            text=match["text"],
            mark=match["mark"] or "",
            value=match["value"] or "",
        )
        for match in FENCE.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^```", text, re.M)), f"{page} has a fence that is not closed, or is indented"
    return found


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a block without a language, as words. Where some lines begin with a prompt, the others are output."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        words = shlex.split(line, comments=True)
        while words and ASSIGNMENT.fullmatch(words[0]):
            del words[0]
        if words:
            yield words


def inline_commands(page: str) -> Iterator[list[str]]:
    """Calls of make and sharded-optim in the sentences of a page."""
    prose = FENCE.sub("", text_of(page))
    for command in re.findall(r"`((?:make|sharded-optim|python -m) [^`]*)`", prose):
        words = shlex.split(" ".join(command.replace("\\|", "|").split()))
        if "..." not in command and not any(word.isupper() for word in words):
            yield words
