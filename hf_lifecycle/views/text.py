"""Reports as tables and paragraphs, for a terminal of 80 columns and for notebooks (:mod:`hf_lifecycle.views.html`).

Promise: text that comes from a file is shown as it is: no markup in it is obeyed, and control characters, which could
rewrite the terminal, are shown escaped. Not done here: nothing is read and nothing is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hf_lifecycle.messages import way_on
from hf_lifecycle.views.wording import (
    count_text,
    event_text,
    metric_text,
    number_text,
    place_rows,
    printable,
    receipt_rows,
    size_text,
    stopping_text,
    time_text,
    weights_text,
)

__all__ = [
    "BAD",
    "FAINT",
    "GOOD",
    "WARNING",
    "Section",
    "aside",
    "bullets",
    "checkpoint_lines",
    "draw_checkpoint",
    "draw_directory",
    "events_section",
    "facts",
    "fault",
    "new_table",
    "plain",
    "way_out",
]

Report = Mapping[str, Any]

_SHORT = ("step", "size", "saved", "state")  # columns that are never folded
GOOD, WARNING, BAD, FAINT = "green", "yellow", "red", "dim"
"""The styles of what is well, what is not quite, what is not, and what is not the main thing."""


def plain(value: object, style: str = "") -> Text:
    """Any text as it is, in one style; characters that are no print are escaped."""
    return Text(printable(value), style=style)


def new_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table with a head; the columns ``right`` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", border_style=FAINT)
    for column in columns:
        table.add_column(
            Text(column), justify="right" if column in right else "left", overflow="fold", no_wrap=column in _SHORT
        )
    return table


def bullets(
    sentences: Sequence[str], style: str = "", most: int | None = None, noun: str = "more"
) -> list[RenderableType]:
    """A line for each sentence, and how many more there are than ``most``."""
    lines: list[RenderableType] = [
        Padding(plain(f"- {sentence}", style), (0, 0, 0, 2)) for sentence in sentences[:most]
    ]
    return [*lines, *more(len(sentences) - len(lines), noun)]


def more(hidden: int, noun: str) -> list[RenderableType]:
    """How many are not shown, such as 3 of ``"earlier events"``; nothing where all are."""
    return [Padding(Text(f"and {hidden:,} {noun}", FAINT), (0, 0, 0, 4))] if hidden > 0 else []


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Labels, and what each stands for."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style=FAINT, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(plain(name), value if isinstance(value, Text) else plain(value))
    return table


@dataclass(frozen=True, slots=True)
class Section:
    """A part with a title of its own; a notebook folds it, unless it is ``open``."""

    title: str
    body: RenderableType
    open: bool = False

    def __rich__(self) -> RenderableType:
        return Group(Text(""), Text(self.title, style="bold"), Padding(self.body, (0, 0, 0, 2)))


def draw_directory(report: Report, events: int = 5) -> RenderableType:
    """Every checkpoint in one line, then what is wrong, what was moved aside or left, and the last ``events``."""
    rows = report["checkpoints"]
    shown: list[RenderableType] = [Text("no checkpoints here")]
    if rows:
        shown = [*checkpoint_lines(rows, report["newest"]), *_verdict(report)]
    happened = events_section("What happened last", report["events"][-events:] if events else [])
    return Group(plain(report["directory"], "bold"), *shown, *aside(report), *happened)


def aside(report: Report) -> list[RenderableType]:
    """What was moved aside, what a save left, and the receipt of the last resume, a section each."""
    parts: list[RenderableType] = []
    for title, key in (("Damaged, moved aside", "damaged"), ("Left by an interrupted save", "left_overs")):
        if report[key]:
            parts.append(Section(title, _sizes(report[key], "name")))
    if report.get("receipt") is not None:
        parts.append(Section("Last resume", facts(receipt_rows(report["receipt"]))))
    return parts


def events_section(title: str, events: Sequence[Report], hidden: int = 0) -> list[RenderableType]:
    """These events, and how many earlier ones there are; nothing where there are none."""
    rows = [(time_text(event["time"]), event_text(event)) for event in events]
    return [Section(title, Group(facts(rows), *more(hidden, "earlier events")))] if rows else []


def _sizes(items: Sequence[Report], name: str) -> Table:
    return facts((item[name], size_text(item["size"])) for item in items)


def checkpoint_lines(
    rows: Sequence[Report], newest: str | None, best: int | None = None, most: int | None = None
) -> list[RenderableType]:
    """A line for each checkpoint, a star before the newest whole one.

    With ``most``, so many of the newest and the one of step ``best``; words after the state instead of the star.
    """
    metrics = {row["metric"]["name"] for row in rows if row["metric"] is not None and row["metric"]["name"]}
    judged = plain(metrics.pop()).plain if len(metrics) == 1 else "metric"
    right = ("step", "epoch", judged, "size")
    table = new_table(*([""] if most is None else []), *right, "saved", "state", right=right)
    shown = [row for index, row in enumerate(rows) if most is None or index < most or row["step"] == best]
    for row in shown:
        is_newest, is_best = row["name"] == newest, row["step"] == best
        cells = [
            Text("*" if is_newest else "", GOOD),
            plain(number_text(row["step"])),
            plain(number_text(row["epoch"], 4)),
            plain(metric_text(row["metric"], named=judged == "metric")),
            Text(size_text(row["size"])),
            plain(time_text(row["created"])),
            _state(row, "" if most is None else ", ".join(["newest"] * is_newest + ["best"] * is_best)),
        ]
        table.add_row(*cells[-len(table.columns) :])
    return [table, *more(len(rows) - len(shown), "older checkpoints")]


def _state(row: Report, also: str = "") -> Text:
    if not row["whole"]:
        return Text(fault(row), BAD)
    known, style = ("intact", GOOD) if row["manifest"] else ("no manifest", WARNING)
    if row.get("older_run"):
        known, style = "older run", WARNING
    return Text(f"{known}: {also}" if also else known, style)


def _verdict(report: Report) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for row in report["checkpoints"]:
        if row["problems"]:
            said = f"{row['name']} {'was' if row['edited'] else 'is'} {fault(row)}:"
            parts += [plain(said, BAD), *bullets([*row["problems"], *way_out(row)])]
    if report["newest"] is None:
        parts.append(Text("no checkpoint is intact", f"bold {BAD}"))
    else:
        hint = " (by presence and sizes)"
        newest = plain(report["newest"], "bold")
        parts.append(Text.assemble(("* ", GOOD), "newest intact: ", newest, (hint, FAINT)))
    return parts


def fault(row: Report) -> str:
    """What to call a checkpoint that is not whole."""
    return "edited" if row["edited"] else "damaged"


def way_out(row: Report) -> list[str]:
    """What to do about one that was edited."""
    return [way_on(row["path"])] if row["edited"] else []


def draw_checkpoint(report: Report, most: int | None = None) -> Group:
    """One checkpoint: where training was, what it was judged by, what is in the files; of a kind ``most``."""
    state = _state(report)
    if report["whole"] and not report["manifest"]:
        state = Text("no manifest; its files look intact", WARNING)
    head: list[tuple[str, object]] = [("state", state), ("step", number_text(report["step"]))]
    head += [("epoch", number_text(report["epoch"])), ("metric", metric_text(report["metric"]))]
    head += [("saved", time_text(report["created"])), ("world size", number_text(report["world_size"]))]
    for one in report["accepted"]:
        head.append(("edited by hand", f"{', '.join(one['files'])}; accepted {time_text(one['time'])}"))
    files = report["files"]
    head.append(("size", f"{size_text(report['size'])} in {count_text(len(files), 'file')}"))
    if report["weights"] is not None:
        head.append(("weights", weights_text(report["weights"])))
    parts: list[RenderableType] = [plain(report["path"], "bold"), Padding(facts(head), (0, 0, 0, 2))]
    parts += bullets(report["problems"], BAD, most) + bullets(way_out(report))
    if report.get("receipt") is not None:
        parts.append(Section("Resumed from", facts(receipt_rows(report["receipt"]))))
    for rank in report["ranks"][:most]:
        parts += _rank(rank, many=len(report["ranks"]) > 1)
    listed = Group(_sizes(files[:most], "path"), *more(len(files) - len(files[:most]), "more files"))
    return Group(*parts, Section("Files", listed))


def _rank(rank: Report, *, many: bool) -> list[RenderableType]:
    rows: list[tuple[str, object]] = [*place_rows(rank["position"], rank["data"])]
    rows.append(("RNG states", ", ".join(rank["rng_sources"]) or "-"))
    rows.append(("early stopping", stopping_text(rank["early_stopping"])))
    objects = (f"{name} ({count_text(count, 'tensor')})" for name, count in rank["objects"].items())
    rows.append(("objects", ", ".join(objects) or "none"))
    proved = (f"{count} {name}" for name, count in rank["proved"].items() if count)
    rows.append(("digests of", ", ".join(proved) or "nothing"))
    state = Section(f"State in {plain(rank['file']).plain}" if many else "State", facts(rows), open=not many)
    environment = rank["environment"] or {}
    shown = [(name, value) for name, value in environment.items() if value not in (None, [])]
    texts = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in shown)
    return [state, Section("Environment", facts(texts))]
