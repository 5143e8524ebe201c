"""Reports of the command line as tables for a terminal of 80 columns.

Promise: text that comes from a file is shown as it is: no markup in it is obeyed, and control characters, which could
rewrite the terminal, are shown escaped. Not done here: nothing is read and nothing is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    "draw_acceptance",
    "draw_answer",
    "draw_checkpoint",
    "draw_diff",
    "draw_directory",
    "draw_prune",
    "draw_replay",
    "draw_verification",
    "plain",
]

Report = Mapping[str, Any]

_SHORT = ("step", "size", "saved", "state")  # columns that are never folded
_GOOD, _BAD, _FAINT = "green", "red", "dim"
_CHANGES = 10  # shown of one file


def plain(value: object, style: str = "") -> Text:
    """Any text as it is, in one style; characters that are no print are escaped."""
    return Text(printable(value), style=style)


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", border_style=_FAINT)
    for column in columns:
        table.add_column(
            Text(column), justify="right" if column in right else "left", overflow="fold", no_wrap=column in _SHORT
        )
    return table


def _bullets(sentences: Sequence[str], style: str = "") -> list[RenderableType]:
    return [Padding(Group(plain(f"- {sentence}", style)), (0, 0, 0, 2)) for sentence in sentences]


def _facts(rows: Iterable[tuple[str, object]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style=_FAINT, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(plain(name), value if isinstance(value, Text) else plain(value))
    return table


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return [Text(""), Text(title, style="bold"), Padding(body, (0, 0, 0, 2))]


def draw_directory(report: Report, events: int = 5) -> RenderableType:
    """Every checkpoint in one line, then what is wrong, what was moved aside or left, and the last ``events``."""
    rows = report["checkpoints"]
    parts: list[RenderableType] = [plain(report["directory"], "bold")]
    if not rows:
        parts.append(Text("no checkpoints here"))
    else:
        parts.append(_checkpoints(rows, report["newest"]))
        parts += _verdict(report)
    for title, key in (("Damaged, moved aside", "damaged"), ("Left by a save that was broken off", "left_overs")):
        if report[key]:
            parts += _section(title, _facts((item["name"], size_text(item["size"])) for item in report[key]))
    if report.get("receipt") is not None:
        parts += _section("Last resume", _facts(receipt_rows(report["receipt"])))
    if events and report["events"]:
        parts += _section("What happened last", _facts(_event_rows(report["events"][-events:])))
    return Group(*parts)


def _event_rows(events: Sequence[Report]) -> Iterable[tuple[str, str]]:
    return ((time_text(event["time"]), event_text(event)) for event in events)


def _checkpoints(rows: Sequence[Report], newest: str | None) -> Table:
    metrics = {row["metric"]["name"] for row in rows if row["metric"] is not None and row["metric"]["name"]}
    heading = metrics.pop() if len(metrics) == 1 else "metric"
    judged = plain(heading).plain
    right = ("step", "epoch", judged, "size")
    table = _table("", "step", "epoch", judged, "size", "saved", "state", right=right)
    for row in rows:
        state = Text("whole", _GOOD) if row["whole"] else Text(_fault(row), _BAD)
        if row["whole"] and not row["manifest"]:
            state = Text("no manifest", "yellow")
        if row["whole"] and row.get("older_run"):
            state = Text("older run", "yellow")
        table.add_row(
            Text("*", _GOOD) if row["name"] == newest else Text(""),
            plain(number_text(row["step"])),
            plain(number_text(row["epoch"], 4)),
            plain(metric_text(row["metric"], named=heading == "metric")),
            size_text(row["size"]),
            plain(time_text(row["created"])),
            state,
        )
    return table


def _verdict(report: Report) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for row in report["checkpoints"]:
        if row["problems"]:
            said = f"{row['name']} {'was' if row['edited'] else 'is'} {_fault(row)}:"
            parts += [plain(said, _BAD), *_bullets([*row["problems"], *_way_on(row)])]
    if report["newest"] is None:
        parts.append(Text("no checkpoint is whole", f"bold {_BAD}"))
    else:
        hint = " (by presence and sizes)"
        newest = plain(report["newest"], "bold")
        parts.append(Text.assemble(("* ", _GOOD), "newest whole: ", newest, (hint, _FAINT)))
    return parts


def _fault(row: Report) -> str:
    return "edited" if row["edited"] else "damaged"


def _way_on(row: Report) -> list[str]:
    return [way_on(row["path"])] if row["edited"] else []


def draw_checkpoint(report: Report) -> RenderableType:
    """One checkpoint: where training was, what it was judged by, what is in the files."""
    state = Text("whole", _GOOD) if report["whole"] else Text(_fault(report), f"bold {_BAD}")
    if report["whole"] and not report["manifest"]:
        state = Text("no manifest; whole as far as its files tell", "yellow")
    head: list[tuple[str, object]] = [("state", state), ("step", number_text(report["step"]))]
    head += [("epoch", number_text(report["epoch"])), ("metric", metric_text(report["metric"]))]
    head += [("saved", time_text(report["created"])), ("world size", number_text(report["world_size"]))]
    for one in report["accepted"]:
        head.append(("edited by hand", f"{', '.join(one['files'])}; accepted {time_text(one['time'])}"))
    files = report["files"]
    head.append(("size", f"{size_text(report['size'])} in {count_text(len(files), 'file')}"))
    if report["weights"] is not None:
        head.append(("weights", weights_text(report["weights"])))
    parts: list[RenderableType] = [plain(report["path"], "bold"), Padding(_facts(head), (0, 0, 0, 2))]
    parts += _bullets(report["problems"], _BAD) + _bullets(_way_on(report))
    if report.get("receipt") is not None:
        parts += _section("Resumed from", _facts(receipt_rows(report["receipt"])))
    for rank in report["ranks"]:
        parts += _rank(rank, many=len(report["ranks"]) > 1)
    parts += _section("Files", _facts((item["path"], size_text(item["size"])) for item in files))
    return Group(*parts)


def _rank(rank: Report, *, many: bool) -> list[RenderableType]:
    rows: list[tuple[str, object]] = [*place_rows(rank["position"], rank["data"])]
    rows.append(("random numbers", ", ".join(rank["rng_sources"]) or "-"))
    rows.append(("early stopping", stopping_text(rank["early_stopping"])))
    objects = (f"{name} ({count_text(count, 'tensor')})" for name, count in rank["objects"].items())
    rows.append(("objects", ", ".join(objects) or "none"))
    proved = (f"{count} {name}" for name, count in rank["proved"].items() if count)
    rows.append(("digests of", ", ".join(proved) or "nothing"))
    parts = _section(f"State in {plain(rank['file']).plain}" if many else "State", _facts(rows))
    environment = rank["environment"] or {}
    shown = ((name, _plain_value(value)) for name, value in environment.items() if value not in (None, []))
    return parts + _section("Environment", _facts(shown))


def _plain_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw_verification(report: Report) -> RenderableType:
    """Each checkpoint with what is wrong with it."""
    parts: list[RenderableType] = []
    for row in report["checkpoints"]:
        name = plain(row["path"], "bold")
        if row["problems"]:
            parts += [Text.assemble(name, ": ", (_fault(row), f"bold {_BAD}"))]
            parts += _bullets([*row["problems"], *_way_on(row)])
        else:
            parts.append(Text.assemble(name, ": ", ("good", _GOOD), (f" ({row['checked']})", _FAINT)))
    if not report["checkpoints"]:
        parts.append(Text.assemble(plain(report["path"], "bold"), ": no checkpoints here"))
    return Group(*parts)


def draw_acceptance(report: Report, *, answered: bool = True) -> RenderableType:
    """What was edited in a checkpoint, why it cannot be accepted, and, once ``answered``, whether it was."""
    parts: list[RenderableType] = [plain(report["path"], "bold")]
    for edit in report["edits"]:
        rows = [("was", _file_text(edit["was"], edit["saved"])), ("is", _file_text(edit["now"], edit["changed"]))]
        rows += [("compared with", edit["old_copy"])] if edit["old_copy"] is not None else []
        rows += [] if edit["values"] is None else edit["values"].items()
        parts += _section(plain(edit["path"]).plain, _facts(rows))
        changes = edit["changes"] or []
        parts += _bullets(changes[:_CHANGES])
        if len(changes) > _CHANGES:
            parts.append(Padding(Text(f"and {len(changes) - _CHANGES:,} more", _FAINT), (0, 0, 0, 4)))
    return Group(*parts, Text(""), *([draw_answer(report)] if answered else []))


def _file_text(file: Report, time: Any) -> str:
    return f"{size_text(file['size'])}, {file['xxh3_128']}, {time_text(time)}"


def draw_answer(report: Report) -> RenderableType:
    """Whether what was edited was accepted."""
    if report["refused"]:
        refused = Text("refused; what differs cannot be accepted:", f"bold {_BAD}")
        return Group(refused, *_bullets(report["refused"], _BAD))
    if not report["edits"]:
        return Text("nothing differs from the manifest: there is nothing to accept", _GOOD)
    if report["accepted"]:
        return Text("accepted: training resumes from it as it is now", f"bold {_GOOD}")
    return Text("not accepted: nothing was written", "yellow")


def draw_diff(report: Report, limit: int = 10) -> RenderableType:
    """The first difference, a table of what was compared, and every difference, ``limit`` to a group (0: all)."""
    verdict = Text("identical, bit for bit", f"bold {_GOOD}")
    if report["first"] is not None:
        first = report["first"]
        verdict = Text.assemble(("different", f"bold {_BAD}"), plain(f", first in {first['group']}: {_line(first)}"))
    head = _facts([("A", report["a"]), ("B", report["b"])])
    table = _table("", "compared", "different", "", right=("compared", "different"))
    for group in report["groups"]:
        same = not group["differences"]
        mark = Text("identical", _GOOD) if same else Text("different", _BAD)
        number = str(len(group["differences"])) if group["differences"] else "-"
        table.add_row(plain(group["name"]), f"{group['compared']:,}", number, mark)
    parts: list[RenderableType] = [head, Text(""), verdict, table]
    for group in report["groups"]:
        found = group["differences"]
        shown = found if limit == 0 else found[:limit]
        if shown:
            parts += [plain(group["name"], "bold"), *_bullets([_line(item) for item in shown])]
        if len(found) > len(shown):
            rest = f"and {len(found) - len(shown):,} more; --limit 0 shows all"
            parts.append(Padding(Text(rest, _FAINT), (0, 0, 0, 4)))
    parts += [plain(f"not compared: {note}", "yellow") for note in report["not_compared"]]
    return Group(*parts)


def _line(difference: Report) -> str:
    return f"{difference['where']}: {difference['what']}"


def draw_prune(report: Report) -> RenderableType:
    """What goes, what stays and why."""
    verb = "would be removed" if report["dry_run"] else "removed"
    table = _table("checkpoint", "size", "", right=("size",))
    for row in report["checkpoints"]:
        mark = Text(verb, _BAD) if row["removed"] else Text("kept", _GOOD)
        if row["why"]:
            mark.append_text(plain(f": {row['why']}", _FAINT))
        table.add_row(plain(row["name"]), size_text(row["size"]), mark)
    total = size_text(report["freed"])
    done = count_text(sum(row["removed"] for row in report["checkpoints"]), "checkpoint")
    return Group(plain(report["directory"], "bold"), table, Text(f"{done} {verb}, {total}"))


def draw_replay(report: Report) -> RenderableType:
    """When early stopping would have ended the run, and what that would have saved or missed."""
    verdict = Text("would not have stopped", f"bold {_GOOD}")
    if report["stopped_at"] is not None:
        verdict = Text(f"would have stopped at step {report['stopped_at']:,} of {report['last_step']:,}", "bold")
    rows: list[tuple[str, object]] = [("log", report["history"]), ("metric", f"{report['metric']}, {report['mode']}")]
    rows.append(("evaluations", f"{report['evaluations']:,} of {report['logged_evaluations']:,} seen"))
    if report["best_step"] is not None:
        rows.append(("best", f"{number_text(report['best_metric'])} at step {report['best_step']:,}"))
    if report["stopped_at"] is not None:
        rows.append(("reason", report["reason"]))
        rows.append(("saved", count_text(report["saved_steps"], "step")))
        missed = report["missed"]
        later = (
            "nothing better came later"
            if missed is None
            else f"{number_text(missed['value'])} at step {missed['step']:,}"
        )
        rows.append(("missed", plain(later, _GOOD if missed is None else _BAD)))
    if report["plot"] is not None:
        rows.append(("plot", report["plot"]))
    return Group(verdict, Padding(_facts(rows), (0, 0, 0, 2)))
