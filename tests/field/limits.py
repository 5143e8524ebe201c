"""Every known limit of exactness, with the line that a user sees; made into a section of docs/exactness.md.

A test module of this folder declares its limits as constants, and its tests hold them against what a training really
logs or raises, by :meth:`Limit.require_told`. From the repository's root: ``python -m tests.field.limits`` writes the
section.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"
HEADING = "## What cannot be exact"
WHEN = ("before training", "at the first save", "at a save", "at the resume", "at the end")


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that cannot be exact, or cannot be had.

    Attributes:
        what: The situation, as a person would describe it.
        when: When it is reported.
        line: What is logged or raised, on one line; ``…`` stands for what depends on the run.
        outcome: What becomes of the training then.
    """

    what: str
    when: Literal["before training", "at the first save", "at a save", "at the resume", "at the end"]
    line: str
    outcome: Literal["an error", "a warning", "a line in the log"] = "a warning"

    def is_told_in(self, text: str) -> bool:
        """Whether the line stands in ``text``."""
        pattern = ".*".join(re.escape(part) for part in self.line.split("…"))
        return re.search(pattern, text, re.DOTALL) is not None

    def require_told(self, text: str) -> None:
        """Fail unless the line stands in ``text``."""
        assert self.is_told_in(text), f"not reported: {self.line!r}\nreported was:\n{text}"


def modules() -> list[str]:
    """The test modules that may declare limits."""
    return sorted(path.stem for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_limits")


def limits() -> Iterator[tuple[str, str, Limit]]:
    """Every limit, with its module and the name of its constant."""
    kind = importlib.import_module("tests.field.limits").Limit  # run as a script, this module has another one
    for module in modules():
        for name, value in vars(importlib.import_module(f"tests.field.{module}")).items():
            if isinstance(value, kind):
                yield module, name, value


def section() -> str:
    """The section, as Markdown."""
    found = sorted({limit for _, _, limit in limits()}, key=lambda one: (WHEN.index(one.when), one.what))
    lines = [
        HEADING,
        "",
        "Made by `python -m tests.field.limits` from `tests/field/`, whose tests compare each line with what a "
        "training logs or raises. `…` stands for text that depends on the run.",
        "",
        "| situation | when | line | reported as |",
        "|---|---|---|---|",
        *(f"| {one.what} | {one.when} | {one.line} | {one.outcome} |".replace("\n", " ") for one in found),
    ]
    return "\n".join(lines) + "\n"


def split_page(text: str) -> tuple[str, str, str]:
    """What stands before the section, the section, and what stands after it."""
    before, heading, rest = text.partition(HEADING)
    body, following, after = rest.partition("\n## ")
    return before, heading + body, following + after


def main() -> None:
    """Write the section into the page, at its end where it has none yet."""
    before, _, after = split_page(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(before.rstrip("\n") + "\n\n" + section() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
