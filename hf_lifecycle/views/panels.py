"""The panels of a run's picture: its attempts as lanes, the early-stopping curve, and what the saves cost.

A lane is one call of ``train()``. A full dot on it is a checkpoint that is there, a hollow one a checkpoint that was
removed since; where a later lane begins, a dashed line comes down from the checkpoint it continued from. Bounded: the
newest lanes, and of marks that would cover each other the first.

The curve has the metric, the best that counted, what the next has to beat, and the stop: the facts that
:mod:`hf_lifecycle.views.plots` draws with matplotlib, in a small SVG that needs none. Bounded: of evaluations that
would fall on one pixel, the best and the worst are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

from hf_lifecycle.checkpoint.inspection.attempts import Attempt, Save
from hf_lifecycle.early_stopping_outcome import ReplayRecord
from hf_lifecycle.views.figure import BLUE, FAINT, GREEN, LEFT, ORANGE, RED, RIGHT, Axis, Drawing, thinned
from hf_lifecycle.views.wording import count_text, number_text, seconds_text, size_text

__all__ = ["draw_attempts", "draw_curve", "draw_stalls"]

_MOST_LANES = 8
_LANE = 24.0  # pixels from one to the next
_STALLS = 30.0  # height of the highest bar
_TAIL = 14.0  # how far the lane of an interrupted attempt continues, dashed: the log does not have how far training got


def draw_attempts(drawing: Drawing, attempts: Sequence[Attempt], present: Collection[int]) -> None:
    """The newest of ``attempts`` (oldest first) as lanes; ``present``: the steps of which there is a checkpoint."""
    shown = attempts[-_MOST_LANES:]
    if len(attempts) > len(shown):
        earlier = f"{count_text(len(attempts) - len(shown), 'earlier attempt')} not shown"
        drawing.words(LEFT, drawing.foot + 11, earlier, opacity=FAINT)
        drawing.foot += 18
    heights = [drawing.foot + _LANE * (index + 0.5) for index in range(len(shown))]
    for (_, upper), (attempt, lower) in pairwise(zip(shown, heights, strict=True)):
        if attempt.first_step:  # else it began anew
            x = drawing.steps.at(attempt.first_step)
            drawing.rule([(x, upper), (x, lower)], stroke_width=1.2, opacity=0.6, stroke_dasharray="2 2")
    for attempt, y in zip(shown, heights, strict=True):
        _lane(drawing, attempt, y, present)
        _end(drawing, attempt, y, is_last=attempt is attempts[-1])
    drawing.foot += _LANE * len(shown)


def _lane(drawing: Drawing, attempt: Attempt, y: float, present: Collection[int]) -> None:
    begin, end = drawing.steps.at(attempt.begins_at), drawing.steps.at(attempt.last_step)
    left = "started" if attempt.first_step == 0 else f"from {attempt.begins_at:,}"
    drawing.words(LEFT - 12, y + 4, left, "end", opacity=FAINT)
    drawing.block(begin, y - 3, end - begin, 6, opacity=0.22, rx=3)
    if attempt.ending is None:
        drawing.rule([(end, y), (end + _TAIL, y)], opacity=0.5, stroke_width=1.5, stroke_dasharray="3 3")
    saves = [save for save in attempt.saves if save.committed]
    positions = [drawing.steps.at(save.step) for save in saves]
    for index in thinned(positions, 5.0):
        save = saves[index]
        gone = save.removed or save.step not in present
        drawing.dot(positions[index], y, radius=3.6, hollow=gone, told=_hint(save, gone))


def _hint(save: Save, gone: bool) -> str:
    known = [f"checkpoint-{save.step}"]
    known += [] if save.size is None else [size_text(save.size)]
    known += [] if save.stall is None else [f"training waited {seconds_text(save.stall)}"]
    known += ["removed since"] if gone else []
    return ", ".join(known)


def _end(drawing: Drawing, attempt: Attempt, y: float, *, is_last: bool) -> None:
    """The mark at a lane's end, and the words beside it."""
    x, why = drawing.steps.at(attempt.last_step), attempt.why or ""
    said = {"stopped": "early stopping at", "ended": "finished at", "failed": "a save failed at"}
    beside = f"{said.get(attempt.ending or '', '')} {attempt.last_step:,}"
    if attempt.ending == "preempted":
        beside = f"{why[:12] or 'interrupted'} at {attempt.last_step:,}, saved"
        for shift in (5.0, 10.0):
            drawing.block(x + shift, y - 6, 3, 12, ORANGE, told=why)
    elif attempt.ending == "failed":
        drawing.cross(x + 9, y, told=why)
    elif attempt.ending is not None:
        thick, colour = (4, RED) if attempt.ending == "stopped" else (2, "currentColor")
        drawing.block(x + 5, y - 6, thick, 12, colour, told=why)
    else:
        beside = f"{'no end logged' if is_last else 'interrupted'} after {attempt.last_step:,}"
        if not is_last:
            drawing.cross(x + _TAIL + 5, y)
    drawing.words(RIGHT + 22, y + 4, beside)


def draw_stalls(drawing: Drawing, attempts: Sequence[Attempt]) -> None:
    """For how long each save kept training waiting, as bars; nothing where no save tells."""
    stalls = sorted((save.step, save.stall) for attempt in attempts for save in attempt.saves if save.stall is not None)
    if not stalls:
        return
    longest, total = max(stall for _, stall in stalls), sum(stall for _, stall in stalls)
    drawing.foot += _STALLS + 8
    foot, height = drawing.foot, Axis(0.0, longest or 1.0, 0.0, _STALLS)
    highest: dict[int, tuple[float, float]] = {}  # one bar a place: the longest of those that fall there
    for step, stall in stalls:
        x = drawing.steps.at(step)
        place = int(x / 4)
        if place not in highest or stall > highest[place][1]:
            highest[place] = (x, stall)
    for x, stall in highest.values():
        drawing.block(x - 1.5, foot - height.at(stall), 3, height.at(stall), ORANGE, told=seconds_text(stall))
    drawing.rule([(LEFT, foot), (RIGHT, foot)], opacity=0.35, stroke_width=1)
    drawing.words(LEFT - 12, foot, "waited", "end", opacity=FAINT)
    drawing.words(RIGHT + 22, foot - 15, f"{count_text(len(stalls), 'save')}: {seconds_text(total)} in all")
    drawing.words(RIGHT + 22, foot, f"at most {seconds_text(longest)}", opacity=FAINT)


_HEIGHT = 120.0
_FEW = 8  # evaluations; a curve of fewer is shown whole
_HUGE = 1e300
_LONGEST_NAME = 26
_PER_PIXEL = 1.5  # pixels between two places on a line


def draw_curve(drawing: Drawing, replay: ReplayRecord, stop: int | None = None) -> None:
    """The curve, with the ``stop`` of the run where the replay does not know it; nothing without a finite metric."""
    finite = [value for value in replay.values if math.isfinite(value)]
    if not finite:
        return
    top, foot = drawing.foot, drawing.foot + _HEIGHT
    metric = _metric_axis(replay, finite, foot, top + 10)
    for tick in metric.ticks(5):
        drawing.rule([(LEFT, metric.at(tick)), (RIGHT, metric.at(tick))], opacity=0.14, stroke_width=1)
        drawing.words(LEFT - 8, metric.at(tick) + 4, f"{tick:.4g}", "end", opacity=FAINT)
    with drawing.clipped(top, foot):
        _best(drawing, replay, metric)
        _values(drawing, replay, metric, foot)
    stop = replay.stopped_at if replay.stopped_at is not None else stop
    if stop is not None:
        x, last = drawing.steps.at(stop), drawing.steps.at(replay.steps[-1])
        drawing.rule([(x, top), (x, foot)], RED, stroke_width=2)
        if last > x:
            drawing.block(x, top, last - x, foot - top, opacity=0.06)
    run_off = not all(metric.low <= value <= metric.high for value in finite)
    _legend(drawing, replay, top + 20, stop, run_off=run_off)
    drawing.foot = foot


def _metric_axis(replay: ReplayRecord, finite: Sequence[float], foot: float, top: float) -> Axis:
    """From the best to the worst; a steep beginning, beside which the rest would be flat, is left to run off."""
    scale = _HUGE if max(map(abs, finite)) > _HUGE else math.inf  # so that no difference is infinite
    shown = sorted(min(max(value, -scale), scale) for value in finite)
    if replay.settings["mode"] == "max":
        shown.reverse()
    best, late, worst = shown[0], shown[(3 * len(shown)) // 4], shown[-1]
    if len(shown) >= _FEW and 0 < 4 * abs(late - best) < abs(worst - best):
        worst = best + 3 * (late - best)
    last = replay.targets[replay.evaluations - 1]
    best = min(max(last, best - abs(worst - best)), best + abs(worst - best)) if math.isfinite(last) else best
    low, high = min(best, worst), max(best, worst)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 0.5
    return Axis(low - room, high + room, foot, top)


def _best(drawing: Drawing, replay: ReplayRecord, metric: Axis) -> None:
    """The best that counted as steps, and the band that a metric has to leave on the good side."""
    known = [
        (drawing.steps.at(replay.steps[index]), metric.at(best), metric.at(replay.targets[index]))
        for index, best in enumerate(replay.bests[: replay.evaluations])
        if best is not None and math.isfinite(best)
    ]
    if not known:
        return
    stairs, targets = _stairs([(x, best) for x, best, _ in known]), _stairs([(x, target) for x, _, target in known])
    if replay.settings["min_delta"] > 0:
        drawing.area([*stairs, *reversed(targets)], ORANGE, opacity=0.3)
    drawing.rule(stairs, GREEN, stroke_width=2.2)


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of a line that stays at each height until the next point."""
    corners = list(points[:1])
    for x, y in points[1:]:
        if y != corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (points[-1][0], corners[-1][1])]


def _values(drawing: Drawing, replay: ReplayRecord, metric: Axis, foot: float) -> None:
    """The metrics as lines, up to the stop and after it, with a dot for each and a greater one for an improvement."""
    end, at = replay.evaluations, drawing.steps.at
    _line(drawing, replay, metric, range(end), stroke_width=1.6)
    if end < len(replay.steps):
        later = range(max(end - 1, 0), len(replay.steps))
        _line(drawing, replay, metric, later, stroke_width=1.4, opacity=0.55, stroke_dasharray="4 2")
    for chosen, radius in ((range(end), 1.8), (replay.improvements, 3.2)):
        finite = [index for index in chosen if math.isfinite(replay.values[index])]
        for index in (finite[place] for place in thinned([at(replay.steps[index]) for index in finite], 4.0)):
            step, value = replay.steps[index], replay.values[index]
            drawing.dot(at(step), metric.at(value), radius=radius, told=f"step {step:,}: {number_text(value)}")
    broken = [pair for pair in zip(replay.steps, replay.values, strict=True) if not math.isfinite(pair[1])]
    for step, value in (broken[place] for place in thinned([at(step) for step, _ in broken], 8.0)):
        drawing.cross(at(step), foot - 5, told=f"step {step:,}: {value}")


def _line(drawing: Drawing, replay: ReplayRecord, metric: Axis, indices: range, **style: object) -> None:
    """The finite metrics of ``indices`` as a line; at each place the first and the two extremes of what falls there."""
    places: dict[int, list[tuple[float, float]]] = {}
    for index in indices:
        if math.isfinite(replay.values[index]):
            x = drawing.steps.at(replay.steps[index])
            places.setdefault(round(x / _PER_PIXEL), []).append((x, metric.at(replay.values[index])))
    points = []
    for here in places.values():
        extremes = [min(here, key=lambda point: point[1]), max(here, key=lambda point: point[1])]
        points += sorted({here[0], *extremes}) if len(here) > 3 else here
    if len(points) > 1:
        drawing.rule(points, BLUE, stroke_linejoin="round", **style)


def _legend(drawing: Drawing, replay: ReplayRecord, y: float, stop: int | None, *, run_off: bool) -> None:
    """What the colours are, each in a line beside the curve, and below them what has none."""
    name = replay.metric if len(replay.metric) <= _LONGEST_NAME else replay.metric[: _LONGEST_NAME - 1] + "…"
    rows: list[tuple[str | None, str]] = [(BLUE, name)]
    if replay.best_metric is not None and replay.best_step is not None:
        rows.append((GREEN, f"best {number_text(replay.best_metric, 4)} at {replay.best_step:,}"))
    if replay.settings["min_delta"] > 0:
        rows.append((ORANGE, f"within min_delta {replay.settings['min_delta']:g}"))
    if stop is not None:
        rows.append((RED, f"stop at {stop:,}"))
    patience, unit = replay.settings["patience"], replay.settings["patience_unit"]
    rows += [] if patience is None else [(None, f"patience {patience:,} {unit}")]
    rows += [(None, "worse values are cut off")] if run_off else []
    for index, (colour, text) in enumerate(rows):
        if colour is not None:
            drawing.block(RIGHT + 22, y + 17 * index - 6, 12, 4, colour, rx=2)
        drawing.words(RIGHT + 40, y + 17 * index, text, opacity=FAINT if colour is None else None)
