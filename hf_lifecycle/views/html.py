"""Runs, checkpoints and replays as HTML for a notebook: words, tables, and one picture over the optimizer steps.

Promise: self-contained and small, whatever lies in the directory: no script, no resource of another place, the newest
rows and lanes only; every text is escaped (:mod:`hf_lifecycle.views.figure`). Not done here: nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lifecycle.checkpoint.directory.events import Event
from hf_lifecycle.checkpoint.inspection.attempts import Attempt, attempts_of
from hf_lifecycle.early_stopping_outcome import ReplayRecord
from hf_lifecycle.views.document import heading, page
from hf_lifecycle.views.figure import FAINT, LEFT, RIGHT, Axis, Drawing, Markup
from hf_lifecycle.views.panels import draw_attempts, draw_curve, draw_stalls
from hf_lifecycle.views.text import BAD, aside, bullets, checkpoint_lines, draw_checkpoint, events_section
from hf_lifecycle.views.wording import count_text

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

    ``report`` is of :func:`~hf_lifecycle.checkpoint.inspection.description.describe_directory`, ``replay`` the curve,
    if the log has the metric.
    """
    attempts, rows = attempts_of(events), report["checkpoints"]
    problems = [problem for row in rows for problem in row["problems"]]
    told = [{"event": one.event, "time": one.time.isoformat(), "facts": one.facts} for one in events[-_MOST_EVENTS:]]
    happened = f"What happened ({count_text(len(events), 'event')})"
    best = None if replay is None else replay.best_step
    brief = {**report, **{key: report[key][:_MOST_ROWS] for key in ("damaged", "left_overs")}}
    return page(
        heading(title or report["directory"]),
        run_sentence(report, attempts),
        _picture(attempts, replay, [row["step"] for row in rows]),
        *(checkpoint_lines(rows, report["newest"], best, _MOST_ROWS) if rows else []),
        *bullets(problems, BAD, _MOST_PROBLEMS, "more problems"),
        *aside(brief),
        *events_section(happened, told, len(events) - len(told)),
    )


def run_sentence(report: Report, attempts: Sequence[Attempt]) -> str:
    """A run in a sentence: its checkpoints, how often it was resumed, how it ended."""
    rows = report["checkpoints"]
    damaged = sum(not row["whole"] for row in rows)
    words_ = [count_text(len(rows), "checkpoint") if rows else "no checkpoints"]
    words_ += [f"newest intact: {report['newest']}"] if report["newest"] else []
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


def _picture(attempts: Sequence[Attempt], replay: ReplayRecord | None, present: Sequence[Any]) -> Markup | None:
    """Lanes, curve and stalls over one axis of steps; None where there is nothing to draw."""
    logged = [] if replay is None else list(replay.steps)
    known = [attempt.last_step for attempt in attempts] + logged
    if not known:
        return None
    begin = min([attempt.begins_at for attempt in attempts] + logged[:1])
    begin = 0 if begin < 0.5 * max(known) else begin
    drawing = Drawing(Axis(float(begin), float(max(*known, begin + 1)), LEFT, RIGHT))
    if attempts:
        draw_attempts(drawing, attempts, {step for step in present if isinstance(step, int)})
    if replay is not None:
        drawing.foot += 10
        stops = [attempt.last_step for attempt in attempts if attempt.ending == "stopped"]
        draw_curve(drawing, replay, stops[-1] if stops else None)
    draw_stalls(drawing, attempts)
    _step_axis(drawing)
    return drawing.svg("attempts, early stopping and saves over the optimizer steps")


def _step_axis(drawing: Drawing) -> None:
    top = drawing.foot
    drawing.rule([(LEFT, top + 4), (RIGHT, top + 4)], opacity=0.35, stroke_width=1)
    for tick in drawing.steps.ticks(7, whole=True):
        x = drawing.steps.at(tick)
        drawing.rule([(x, top + 4), (x, top + 8)], opacity=0.6, stroke_width=1)
        drawing.words(x, top + 20, f"{tick:,.0f}", "middle", opacity=FAINT)
    drawing.words(RIGHT + 22, top + 20, "optimizer step", opacity=FAINT)
    drawing.foot = top + 24


def replay_page(replay: ReplayRecord) -> str:
    """What early stopping would have done to a run that is over."""
    return page(str(replay), _picture((), replay, ()))


def checkpoint_page(report: Report, replay: ReplayRecord | None) -> str:
    """One checkpoint: where training was, what it was judged by (the curve, if its log has the metric), its files."""
    _, facts, *rest = draw_checkpoint(report, _MOST_FILES).renderables
    return page(heading(report["path"]), facts, _picture((), replay, ()), *rest)
