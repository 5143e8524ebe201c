"""``doctor``: a run in ten lines: can it be resumed, what would differ here, what happened, what to do next.

It only reads, takes no lock, and needs no torch. What a resume compares beyond Python and the packages, such as the
hardware, is not known here: this may be the login node of a cluster.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.lock import holder_of
from hf_lifecycle.checkpoint.directory.store import hidden_folder, no_checkpoints_in
from hf_lifecycle.checkpoint.inspection.attempts import Attempt, attempts_of
from hf_lifecycle.checkpoint.inspection.description import describe_checkpoint, timeline
from hf_lifecycle.messages import few
from hf_lifecycle.state.environment import capture_versions, compare
from hf_lifecycle.views.run import Run
from hf_lifecycle.views.text import BAD, FAINT, GOOD, WARNING, draw_checkpoint, facts, fault, plain
from hf_lifecycle.views.wording import count_text, event_text, metric_text, number_text, stopping_text, time_text

__all__ = ["diagnose", "draw_checkpoint_here", "draw_diagnosis", "with_place"]

Report = Mapping[str, Any]

_ENDINGS = {
    "ended": "finished at step {step}",
    "stopped": "early stopping ended it at step {step} ({why})",
    "preempted": "{why} at step {step}, which was saved",
    "failed": "a save failed at step {step}: {why}",
}
_IS_OVER = ("ended", "stopped")
_MOST = 3  # problems, or differences, that are shown


def diagnose(directory: Path) -> dict[str, Any]:
    """The state of a run as plain data."""
    listed = Run(directory).report()
    events = read_events(directory)
    attempts = attempts_of(events)
    last = attempts[-1] if attempts else None
    holder = holder_of(hidden_folder(directory) / "lock")
    newest = None if listed["newest"] is None else describe_checkpoint(directory / listed["newest"])
    found: dict[str, Any] = {
        "directory": str(directory),
        "holder": holder,
        "state": _state(last, holder),
        "is_over": holder is None and last is not None and last.ending in _IS_OVER,
        "attempts": len(attempts),
        "checkpoints": len(listed["checkpoints"]),
        "resumes_from": newest,
        "faulty": [row for row in listed["checkpoints"] if row["problems"]],
        "damaged": [one["name"] for one in listed["damaged"]],
        "not_checkpoints": [path.name for _, path in no_checkpoints_in(directory)],
        "differences": [] if newest is None else _differences_here(newest),
        "receipt": listed["receipt"],
        "last_event": listed["events"][-1] if listed["events"] else None,
    }
    return found | {"next": _next(found)}


def _state(last: Attempt | None, holder: str | None) -> str:
    if holder is not None:
        return f"training now ({holder})"
    if last is None:
        return "no run of hf_lifecycle has started here"
    if last.ending is None:
        return f"interrupted after step {last.last_step:,}: the log has no end"
    return _ENDINGS.get(last.ending, last.ending).format(step=f"{last.last_step:,}", why=last.why or "a signal")


def with_place(checkpoint: Report) -> dict[str, Any]:
    """A report of one checkpoint, with what would differ here, and the last event of its run."""
    events = timeline(Path(checkpoint["path"]).parent)
    differences = _differences_here(checkpoint)
    return {**checkpoint, "differences": differences, "last_event": events[-1] if events else None}


def _differences_here(checkpoint: Report) -> list[str]:
    """What of Python and the packages is not as it was when ``checkpoint`` was saved; harmless ones are left out."""
    saved = next((rank["environment"] for rank in checkpoint["ranks"] if isinstance(rank["environment"], Mapping)), {})
    present = capture_versions()
    found = compare({name: value for name, value in saved.items() if name in present}, present) if saved else []
    return [str(one) for one in found if not one.is_harmless]


def _next(found: Report) -> str:
    directory, newest = shlex.quote(found["directory"]), found["resumes_from"]
    if found["holder"] is not None:
        return f"hf-lifecycle list {directory}"
    if newest is None and not (found["faulty"] or found["damaged"]):
        return "run the training command: it starts from step 0"
    edited = next((row for row in found["faulty"] if row["edited"]), None)
    if edited is not None and (newest is None or (edited["step"] or 0) > (newest["step"] or 0)):
        return f"hf-lifecycle accept {shlex.quote(edited['path'])}"
    if newest is None:
        return f"hf-lifecycle verify {directory}"
    if found["is_over"]:
        return f"hf-lifecycle show {shlex.quote(newest['path'])}"
    many = newest["world_size"] not in (None, 1)
    processes = f" with {newest['world_size']} processes" if many else ""
    return f"run the training command again{processes}: it resumes at step {newest['step']}"


def draw_diagnosis(report: Report) -> RenderableType:
    """About ten lines, the most important first."""
    newest = report["resumes_from"]
    rows: list[tuple[str, object]] = [("state", report["state"]), ("can be resumed", _answer(report))]
    for row in report["faulty"][:_MOST]:
        rows.append((fault(row), plain(f"{row['name']}: {row['problems'][0]}", BAD)))
    if report["damaged"]:
        rows.append(("moved aside", ", ".join(report["damaged"][:_MOST])))
    if report["not_checkpoints"]:
        rows.append(("skipped", f"{few(report['not_checkpoints'])}: no trainer_state.json, no files of hf_lifecycle"))
    if newest is not None:
        rows.append(("differs here", _differences(report["differences"])))
        rows.append(("metric", metric_text(newest["metric"])))
        rows += [("early stopping", stopping_text(rank["early_stopping"])) for rank in newest["ranks"][:1]]
    if report["receipt"] is not None:
        rows.append(("last resume", _resume_text(report["receipt"])))
    rows += _last_event(report)
    next_ = Text.assemble((f"{'next':16}", FAINT), plain(report["next"], "bold"), no_wrap=True, overflow="ignore")
    return Group(plain(report["directory"], "bold"), facts(rows), next_)


def draw_checkpoint_here(report: Report) -> RenderableType:
    """The content of one checkpoint, after what one asks first: can it be resumed from, what differs, what happened."""
    can = Text("no: see the problems below", BAD) if report["problems"] else Text("yes, by presence and sizes", GOOD)
    rows: list[tuple[str, object]] = [("can be resumed", can), ("differs here", _differences(report["differences"]))]
    return Group(facts([*rows, *_last_event(report)]), Text(""), draw_checkpoint(report))


def _last_event(report: Report) -> list[tuple[str, object]]:
    event = report["last_event"]
    return [] if event is None else [("last event", f"{time_text(event['time'])}  {event_text(event)}")]


def _answer(report: Report) -> Text:
    newest, count = report["resumes_from"], count_text(report["checkpoints"], "checkpoint")
    if newest is None:
        found = f"no: none of {count} is intact" if report["checkpoints"] or report["damaged"] else "no checkpoint yet"
        return plain(found, BAD if report["checkpoints"] or report["damaged"] else "")
    where = f"step {number_text(newest['step'])}, epoch {number_text(newest['epoch'], 4)}"
    saved = f"from {newest['name']} ({where}, saved {time_text(newest['created'])}); {report['checkpoints']} here"
    if report["is_over"]:
        return plain(f"the run is over; its last checkpoint is {newest['name']} ({where})", GOOD)
    return plain(f"yes, {saved}", GOOD)


def _differences(found: list[str]) -> Text:
    if not found:
        return plain("nothing: Python and the packages are the same; a resume also compares the rest", GOOD)
    return plain(few(found, "; "), WARNING)


def _resume_text(receipt: Report) -> str:
    why = receipt.get("why_not_exact")
    exact = "exact" if not why else f"not exact: {why[0]}" if isinstance(why, list) else "not exact"
    return f"{time_text(receipt.get('time'))}, from {receipt.get('checkpoint')}: {exact}"
