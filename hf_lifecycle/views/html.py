"""Runs, checkpoints and replays as HTML for a notebook: words, tables, and one picture over the optimizer steps.

Promise: self-contained and small, whatever lies in the directory: no script, no resource of another place, the newest
rows and lanes only; every text is escaped (:mod:`hf_lifecycle.views.markup`). Not done here: nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_lifecycle.checkpoint.directory.events import Event
from hf_lifecycle.checkpoint.inspection.attempts import Attempt, attempts_of
from hf_lifecycle.early_stopping_outcome import ReplayRecord
from hf_lifecycle.views.curve import draw_curve
from hf_lifecycle.views.document import folded, heading, more, page, sign, table
from hf_lifecycle.views.figure import FAINT, GREEN, LEFT, ORANGE, RED, RIGHT, WIDTH, Axis, coordinate, rule, words
from hf_lifecycle.views.markup import Markup, element, joined
from hf_lifecycle.views.timeline import draw_attempts, draw_stalls
from hf_lifecycle.views.wording import (
    count_text,
    event_text,
    metric_text,
    number_text,
    size_text,
    stopping_text,
    time_text,
    weights_text,
)

__all__ = ["checkpoint_page", "replay_page", "run_page", "run_sentence"]

Report = Mapping[str, Any]

_MOST_ROWS = 10
_MOST_EVENTS = 40
_MOST_PROBLEMS = 5
_MOST_FILES = 60


def run_page(
    report: Report,
    events: Sequence[Event],
    replay: ReplayRecord | None,
    *,
    title: str | None = None,
) -> str:
    """A run: what happened to it in a sentence, a picture and a table.

    Args:
        report: What :func:`~hf_lifecycle.checkpoint.inspection.description.describe_directory` gives.
        events: The event log, oldest first.
        replay: The early-stopping curve, if the log has the metric.
        title: Default: the directory.
    """
    attempts = attempts_of(events)
    rows = report["checkpoints"]
    parts: list[Markup | None] = [heading(title or report["directory"])]
    parts.append(element("p", run_sentence(report, attempts)))
    parts.append(_picture(attempts, replay, [row["step"] for row in rows]))
    if rows:
        parts.append(_checkpoints(rows, report["newest"], None if replay is None else replay.best_step))
    parts += _problems([problem for row in rows for problem in row["problems"]])
    aside = [(item["name"], size_text(item["size"])) for key in ("damaged", "left_overs") for item in report[key]]
    if aside:
        listed = table(("", ""), aside[:_MOST_ROWS])
        parts.append(folded(f"{len(aside)} moved aside, or left by a save that was broken off", listed))
    if events:
        parts.append(folded(f"What happened ({count_text(len(events), 'event')})", _events(events)))
    return page(*parts)


def run_sentence(report: Report, attempts: Sequence[Attempt]) -> str:
    """A run in a sentence: its checkpoints, how often it was resumed, how it ended."""
    rows = report["checkpoints"]
    damaged = sum(not row["whole"] for row in rows)
    words_ = [count_text(len(rows), "checkpoint") if rows else "no checkpoints"]
    words_ += [f"newest whole: {report['newest']}"] if report["newest"] else []
    words_ += [f"{damaged:,} damaged"] if damaged else []
    resumes = sum(attempt.resumed_from is not None for attempt in attempts)
    words_ += [] if not attempts else ["never resumed"] if not resumes else [f"resumed {count_text(resumes, 'time')}"]
    if attempts and attempts[-1].ending is not None:
        last = attempts[-1]
        how = {"stopped": "early stopping", "ended": "finished", "failed": "a save failed"}.get(
            str(last.ending), str(last.ending)
        )
        words_.append(f"{how} at step {last.last_step:,}" + (f" ({last.why})" if last.why else ""))
    return "; ".join(words_)


def _problems(problems: Sequence[str]) -> list[Markup | None]:
    lines: list[Markup | None] = [element("p", sign(RED, "✕", problem)) for problem in problems[:_MOST_PROBLEMS]]
    return [*lines, more(len(problems) - _MOST_PROBLEMS, "more problem")]


def _checkpoints(rows: Sequence[Report], newest: str | None, best_step: int | None) -> Markup:
    """The newest rows, newest first, and the best one."""
    shown = [row for index, row in enumerate(rows) if index < _MOST_ROWS or row["step"] == best_step]
    names = {row["metric"]["name"] for row in rows if row["metric"] is not None}
    heading = str(next(iter(names)) or "best metric") if len(names) == 1 else "metric"
    columns = ("step", "epoch", heading, "size", "saved", "state")
    cells = [
        (
            number_text(row["step"]),
            number_text(row["epoch"], 4),
            metric_text(row["metric"], named=len(names) > 1),
            size_text(row["size"]),
            _time(row["created"]),
            _state(row, [row["name"] == newest and "newest", row["step"] == best_step and "best"]),
        )
        for row in shown
    ]
    drawn = table(columns, cells, right=("step", "epoch", heading, "size"))
    return joined([drawn, more(len(rows) - len(shown), "older checkpoint")])


def _state(row: Report, distinctions: Iterable[str | bool]) -> Markup:
    told = ", ".join(str(word) for word in distinctions if word)
    rest = f": {told}" if told else ""
    if not row["whole"]:
        return sign(RED, "✕", "damaged")
    if not row["manifest"]:
        return sign(ORANGE, "●", f"no manifest{rest}")
    return sign(GREEN, "●", f"whole{rest}")


def _time(created: Any) -> Markup | str:
    text = time_text(created)
    return text if text == "-" else element("time", text, datetime=created)


def _events(events: Sequence[Event]) -> Markup:
    shown = events[-_MOST_EVENTS:]
    told = [
        (_time(event.time.isoformat()), event_text({"event": event.event, "facts": event.facts})) for event in shown
    ]
    return joined([table(("", ""), told), more(len(events) - len(shown), "earlier event")])


def _picture(attempts: Sequence[Attempt], replay: ReplayRecord | None, present: Sequence[Any]) -> Markup | None:
    """Lanes, curve and stalls over one axis of steps; None where there is nothing to draw."""
    logged = [] if replay is None else list(replay.steps)
    known = [attempt.last_step for attempt in attempts] + logged
    if not known:
        return None
    begin = min([attempt.begins_at for attempt in attempts] + logged[:1])
    begin = 0 if begin < 0.5 * max(known) else begin
    steps = Axis(float(begin), float(max(*known, begin + 1)), LEFT, RIGHT)
    there = {step for step in present if isinstance(step, int)}
    parts: list[Markup] = []
    lower = 4.0
    if attempts:
        drawn, lower = draw_attempts(attempts, steps, lower, there)
        parts.append(drawn)
    if replay is not None:
        stops = [attempt.last_step for attempt in attempts if attempt.ending == "stopped"]
        drawn, lower = draw_curve(replay, steps, lower + 10, stops[-1] if stops else None)
        parts.append(drawn)
    drawn, lower = draw_stalls(attempts, steps, lower)
    parts += [drawn, _step_axis(steps, lower)]
    height = lower + 24
    return element(
        "svg",
        element("g", *parts, font_size=12, fill="currentColor"),
        viewBox=f"0 0 {coordinate(WIDTH)} {coordinate(height)}",
        role="img",
        aria_label="attempts, early stopping and saves over the optimizer steps",
    )


def _step_axis(steps: Axis, top: float) -> Markup:
    parts = [rule([(LEFT, top + 4), (RIGHT, top + 4)], opacity=0.35, stroke_width=1)]
    for tick in steps.ticks(7, whole=True):
        x = steps.at(tick)
        parts.append(rule([(x, top + 4), (x, top + 8)], opacity=0.6, stroke_width=1))
        parts.append(words(x, top + 20, f"{tick:,.0f}", "middle", opacity=FAINT))
    return joined([*parts, words(RIGHT + 22, top + 20, "optimizer step", opacity=FAINT)])


def replay_page(replay: ReplayRecord) -> str:
    """What early stopping would have done to a run that is over."""
    return page(element("p", str(replay)), _picture((), replay, ()))


def checkpoint_page(report: Report, replay: ReplayRecord | None) -> str:
    """One checkpoint: where training was, what it was judged by, what is in the files.

    Args:
        report: What :func:`~hf_lifecycle.checkpoint.inspection.description.describe_checkpoint` gives.
        replay: The early-stopping curve up to it, if its log has the metric.
    """
    files = report["files"]
    facts: list[tuple[str, object]] = [
        ("state", _state(report, ())),
        ("step", f"{number_text(report['step'])}, epoch {number_text(report['epoch'], 4)}"),
        ("metric", metric_text(report["metric"])),
        ("saved", _time(report["created"])),
        ("size", f"{size_text(report['size'])} in {count_text(len(files), 'file')}"),
        ("weights", "-" if report["weights"] is None else weights_text(report["weights"])),
    ]
    for rank in report["ranks"][:1]:
        proved = [f"{count} {name}" for name, count in rank["proved"].items() if count]
        objects = [f"{name} ({count_text(count, 'tensor')})" for name, count in rank["objects"].items()]
        facts += [
            ("random numbers", ", ".join(rank["rng_sources"]) or "-"),
            ("early stopping", stopping_text(rank["early_stopping"])),
            ("objects", ", ".join(objects) or "none"),
            ("digests of", ", ".join(proved) or "nothing"),
        ]
    facts.append(("world size", number_text(report["world_size"])))
    listed = [(item["path"], size_text(item["size"])) for item in files[:_MOST_FILES]]
    environment = report["ranks"][0]["environment"] if report["ranks"] else None
    return page(
        heading(report["path"]),
        *_problems(report["problems"]),
        table(("", ""), facts),
        _picture((), replay, ()),
        folded("Files", joined([table(("", ""), listed), more(len(files) - len(listed), "more file")])),
        folded("Environment", _environment(environment)) if environment else None,
    )


def _environment(environment: Report) -> Markup:
    known = ((name, value) for name, value in environment.items() if value not in (None, []))
    return table(("", ""), [(name, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for name, v in known])
