"""Runs, checkpoints and replays as HTML for a notebook: words, tables, and one picture over the optimizer steps.

Promise: self-contained and small, whatever lies in the directory: no script, no resource of another place, the newest
rows and lanes only; every text is escaped (:mod:`hf_lifecycle.views.figure`). Not done here: nothing is read.

What is drawn for a terminal (:mod:`hf_lifecycle.views.text`) becomes a page: tables, and sections that fold; what is
well or wrong has a mark beside its colour, since nobody should need the colour. Colours are the host's own
(:mod:`hf_lifecycle.views.figure` says why). A host that drops the style still shows tables and words. Rules of
notebooks for every table (Jupyter's stripes and right alignment) are overruled by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hf_lifecycle.checkpoint.directory.events import Event
from hf_lifecycle.checkpoint.inspection.attempts import Attempt, attempts_of
from hf_lifecycle.early_stopping_outcome import ReplayRecord
from hf_lifecycle.views.figure import FAINT as FAINT_WORDS
from hf_lifecycle.views.figure import GREEN, LEFT, ORANGE, RED, RIGHT, Axis, Drawing, Markup, element, joined
from hf_lifecycle.views.panels import draw_attempts, draw_curve, draw_stalls
from hf_lifecycle.views.text import (
    BAD,
    FAINT,
    GOOD,
    WARNING,
    Section,
    aside,
    bullets,
    checkpoint_lines,
    draw_checkpoint,
    events_section,
)
from hf_lifecycle.views.wording import count_text

__all__ = ["checkpoint_page", "heading", "page", "replay_page", "run_page", "run_sentence"]

_STYLE = """
.hf-lifecycle{max-width:720px;margin:4px 0;font:13px/1.45 system-ui,sans-serif;font-variant-numeric:tabular-nums}
.hf-lifecycle p{margin:0 0 6px;max-width:none}
.hf-lifecycle p.hf-title{font-size:15px;font-weight:600;margin:0 0 2px;overflow-wrap:anywhere}
.hf-lifecycle>svg{display:block;width:100%;height:auto;margin:8px 0}
.hf-lifecycle table.hf-table{border-collapse:collapse;border:none;margin:8px 0;table-layout:auto;width:auto;
font-size:13px}
.hf-lifecycle table.hf-table tr,.hf-lifecycle table.hf-table tbody tr{background:none}
.hf-lifecycle table.hf-table th,.hf-lifecycle table.hf-table td{text-align:left;vertical-align:top;
padding:2px 18px 2px 0;border:none;border-bottom:1px solid rgba(128,128,128,.35);font-weight:400;
overflow-wrap:anywhere;background:none;color:inherit}
.hf-lifecycle table.hf-table th{opacity:.7;white-space:nowrap}
.hf-lifecycle table.hf-table .hf-right{text-align:right}
.hf-lifecycle table.hf-table .hf-short{white-space:nowrap}
.hf-lifecycle details{margin:4px 0}
.hf-lifecycle summary{cursor:pointer;opacity:.8}
.hf-lifecycle .hf-faint{opacity:.7}
"""

_SIGNS = {GOOD: (GREEN, "●"), WARNING: (ORANGE, "●"), BAD: (RED, "✕")}


def page(*parts: RenderableType | Markup | None) -> str:
    """The whole page."""
    return str(element("div", element("style", Markup(_STYLE)), *map(_drawn, parts), class_="hf-lifecycle"))


def heading(text: str) -> Markup:
    """The page's first line."""
    return element("p", text, class_="hf-title")


def _drawn(part: RenderableType | Markup | None) -> Markup | None:
    """A part of a page as markup; words that are no markup are escaped."""
    if part is None or isinstance(part, Markup):
        return part
    if isinstance(part, Group):
        return joined(map(_drawn, part.renderables))
    if isinstance(part, Padding):
        return _drawn(part.renderable)
    if isinstance(part, Section):
        is_open = "open" if part.open else None
        return element("details", element("summary", part.title), _drawn(part.body), open=is_open)
    if isinstance(part, Table):
        return _table(part)
    is_faint = isinstance(part, Text) and part.style == FAINT
    return element("p", _words(part), class_="hf-faint" if is_faint else None)


def _table(table: Table) -> Markup:
    """A table whose cells keep to one line, but for the last of a row."""
    sides = ["hf-right" if column.justify == "right" else None for column in table.columns]
    heads = [element("th", str(column.header), class_=side) for column, side in zip(table.columns, sides, strict=True)]
    kinds = [" ".join(filter(None, ("hf-short", side))) for side in sides[:-1]] + sides[-1:]
    body = [
        element("tr", *(element("td", _words(cell), class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
    head = element("thead", element("tr", *heads)) if table.show_header else None
    return element("table", head, element("tbody", *body), class_="hf-table")


def _words(text: object) -> Markup:
    colour, mark = _SIGNS.get(str(text.style) if isinstance(text, Text) else "", (None, ""))
    if colour is None:
        return joined([str(text)])
    return joined([element("span", mark, style=f"color:{colour}"), " ", str(text).removeprefix("- ")])


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
        drawing.words(x, top + 20, f"{tick:,.0f}", "middle", opacity=FAINT_WORDS)
    drawing.words(RIGHT + 22, top + 20, "optimizer step", opacity=FAINT_WORDS)
    drawing.foot = top + 24


def replay_page(replay: ReplayRecord) -> str:
    """What early stopping would have done to a run that is over."""
    return page(str(replay), _picture((), replay, ()))


def checkpoint_page(report: Report, replay: ReplayRecord | None) -> str:
    """One checkpoint: where training was, what it was judged by (the curve, if its log has the metric), its files."""
    _, facts, *rest = draw_checkpoint(report, _MOST_FILES).renderables
    return page(heading(report["path"]), facts, _picture((), replay, ()), *rest)
