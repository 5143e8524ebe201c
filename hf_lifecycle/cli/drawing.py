"""The answers of the commands that only the command line has, as tables (:mod:`hf_lifecycle.views.text`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from hf_lifecycle.views.text import (
    BAD,
    FAINT,
    GOOD,
    WARNING,
    Section,
    bullets,
    facts,
    fault,
    new_table,
    plain,
    way_out,
)
from hf_lifecycle.views.wording import count_text, number_text, size_text, time_text

__all__ = ["draw_acceptance", "draw_answer", "draw_diff", "draw_prune", "draw_replay", "draw_verification"]

Report = Mapping[str, Any]

_CHANGES = 10  # shown of one file


def draw_verification(report: Report) -> RenderableType:
    """Each checkpoint with what is wrong with it."""
    parts: list[RenderableType] = []
    for row in report["checkpoints"]:
        name = plain(row["path"], "bold")
        if row["problems"]:
            parts += [Text.assemble(name, ": ", (fault(row), f"bold {BAD}"))]
            parts += bullets([*row["problems"], *way_out(row)])
        else:
            parts.append(Text.assemble(name, ": ", ("good", GOOD), (f" ({row['checked']})", FAINT)))
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
        parts += [Section(plain(edit["path"]).plain, facts(rows)), *bullets(edit["changes"] or [], most=_CHANGES)]
    return Group(*parts, Text(""), *([draw_answer(report)] if answered else []))


def _file_text(file: Report, time: Any) -> str:
    return f"{size_text(file['size'])}, {file['xxh3_128']}, {time_text(time)}"


def draw_answer(report: Report) -> RenderableType:
    """Whether what was edited was accepted."""
    if report["refused"]:
        refused = Text("refused; what differs cannot be accepted:", f"bold {BAD}")
        return Group(refused, *bullets(report["refused"], BAD))
    if not report["edits"]:
        return Text("nothing differs from the manifest: there is nothing to accept", GOOD)
    if report["accepted"]:
        return Text("accepted: training resumes from it as it is now", f"bold {GOOD}")
    return Text("not accepted: nothing was written", WARNING)


def draw_diff(report: Report, limit: int = 10) -> RenderableType:
    """The first difference, a table of what was compared, and every difference, ``limit`` to a group (0: all)."""
    verdict = Text("identical, bit for bit", f"bold {GOOD}")
    if report["first"] is not None:
        first = report["first"]
        verdict = Text.assemble(("different", f"bold {BAD}"), plain(f", first in {first['group']}: {_line(first)}"))
    head = facts([("A", report["a"]), ("B", report["b"])])
    table = new_table("", "compared", "different", "", right=("compared", "different"))
    for group in report["groups"]:
        same = not group["differences"]
        mark = Text("identical", GOOD) if same else Text("different", BAD)
        number = str(len(group["differences"])) if group["differences"] else "-"
        table.add_row(plain(group["name"]), f"{group['compared']:,}", number, mark)
    parts: list[RenderableType] = [head, Text(""), verdict, table]
    for group in report["groups"]:
        lines = [_line(item) for item in group["differences"]]
        if lines:
            hint = "more; --limit 0 shows all"
            parts += [plain(group["name"], "bold"), *bullets(lines, most=limit or None, noun=hint)]
    parts += [plain(f"not compared: {note}", WARNING) for note in report["not_compared"]]
    return Group(*parts)


def _line(difference: Report) -> str:
    return f"{difference['where']}: {difference['what']}"


def draw_prune(report: Report) -> RenderableType:
    """What goes, what stays and why."""
    verb = "would be removed" if report["dry_run"] else "removed"
    table = new_table("checkpoint", "size", "", right=("size",))
    for row in report["checkpoints"]:
        mark = Text(verb, BAD) if row["removed"] else Text("kept", GOOD)
        if row["why"]:
            mark.append_text(plain(f": {row['why']}", FAINT))
        table.add_row(plain(row["name"]), size_text(row["size"]), mark)
    total = size_text(report["freed"])
    done = count_text(sum(row["removed"] for row in report["checkpoints"]), "checkpoint")
    return Group(plain(report["directory"], "bold"), table, Text(f"{done} {verb}, {total}"))


def draw_replay(report: Report) -> RenderableType:
    """When early stopping would have ended the run, and what that would have saved or missed."""
    verdict = Text("would not have stopped", f"bold {GOOD}")
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
        rows.append(("missed", plain(later, GOOD if missed is None else BAD)))
    if report["plot"] is not None:
        rows.append(("plot", report["plot"]))
    return Group(verdict, Padding(facts(rows), (0, 0, 0, 2)))
