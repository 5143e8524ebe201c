"""The early-stopping curve: the metric, the best that counted, what the next has to beat, and the stop.

The same facts as :mod:`hf_lifecycle.views.plots` draws with matplotlib, in a small SVG that needs none. Bounded: of
evaluations that would fall on one pixel, the best and the worst are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_lifecycle.early_stopping_outcome import ReplayRecord
from hf_lifecycle.views.figure import (
    BLUE,
    FAINT,
    GREEN,
    LEFT,
    ORANGE,
    RED,
    RIGHT,
    Axis,
    block,
    coordinate,
    cross,
    dot,
    rule,
    thinned,
    words,
)
from hf_lifecycle.views.markup import Markup, element, joined
from hf_lifecycle.views.wording import number_text

__all__ = ["draw_curve"]

_HEIGHT = 120.0
_FEW = 8  # evaluations; a curve of fewer is shown whole
_HUGE = 1e300
_LONGEST_NAME = 26
_PER_PIXEL = 1.5  # pixels between two places on a line


def draw_curve(replay: ReplayRecord, steps: Axis, top: float, stop: int | None = None) -> tuple[Markup, float]:
    """The curve below ``top``; nothing where no evaluation has a finite metric.

    Args:
        replay: What early stopping saw.
        steps: The axis of the optimizer steps.
        top: Where to begin, in pixels.
        stop: The step at which the run stopped, where the replay does not know of it.

    Returns:
        The drawing and where it ends.
    """
    finite = [value for value in replay.values if math.isfinite(value)]
    if not finite:
        return Markup(), top
    foot = top + _HEIGHT
    metric = _metric_axis(replay, finite, foot, top + 10)
    stop = replay.stopped_at if replay.stopped_at is not None else stop
    curve = [*_best(replay, steps, metric), *_values(replay, steps, metric, foot)]
    parts = [*_grid(metric), _clipped(curve, top, foot)]
    if stop is not None:
        x = steps.at(stop)
        parts.append(rule([(x, top), (x, foot)], RED, stroke_width=2))
        last = steps.at(replay.steps[-1])
        if last > x:
            parts.append(block(x, top, last - x, foot - top, "currentColor", opacity=0.06))
    faint = [_patience(replay)]
    if not all(metric.low <= value <= metric.high for value in finite):
        faint.append("worse values run off")
    parts += _legend(replay, top + 20, stop, [*filter(None, faint)])
    return joined(parts), foot


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


def _clipped(parts: Sequence[Markup], top: float, foot: float) -> Markup:
    """``parts`` without what runs off the panel: an inner picture cuts at its edges, and needs no name to do so."""
    box = {"x": LEFT - 5, "y": top, "width": RIGHT - LEFT + 10, "height": foot - top + 2}
    view = " ".join(map(coordinate, box.values()))
    return element("svg", *parts, viewBox=view, **{name: coordinate(value) for name, value in box.items()})


def _grid(metric: Axis) -> list[Markup]:
    parts: list[Markup] = []
    for tick in metric.ticks(5):
        y = metric.at(tick)
        parts.append(rule([(LEFT, y), (RIGHT, y)], opacity=0.14, stroke_width=1))
        parts.append(words(LEFT - 8, y + 4, f"{tick:.4g}", "end", opacity=FAINT))
    return parts


def _best(replay: ReplayRecord, steps: Axis, metric: Axis) -> list[Markup]:
    """The best that counted as steps, and the band that a metric has to leave on the good side."""
    known = [
        (steps.at(replay.steps[index]), metric.at(best), metric.at(replay.targets[index]))
        for index, best in enumerate(replay.bests[: replay.evaluations])
        if best is not None and math.isfinite(best)
    ]
    if not known:
        return []
    stairs, targets = _stairs([(x, best) for x, best, _ in known]), _stairs([(x, target) for x, _, target in known])
    parts = []
    if replay.settings["min_delta"] > 0:
        outline = "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in [*stairs, *reversed(targets)]) + "Z"
        parts.append(element("path", d=outline, fill=ORANGE, opacity=0.3))
    return [*parts, rule(stairs, GREEN, stroke_width=2.2)]


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of a line that stays at each height until the next point."""
    corners = list(points[:1])
    for x, y in points[1:]:
        if y != corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (points[-1][0], corners[-1][1])]


def _values(replay: ReplayRecord, steps: Axis, metric: Axis, foot: float) -> list[Markup]:
    end = replay.evaluations
    before: tuple[float | None, ...] = (None, *replay.bests)
    improved = [index for index in range(end) if replay.bests[index] != before[index]]
    parts = _line(replay, steps, metric, range(end), {"stroke_width": 1.6})
    later = {"stroke_width": 1.4, "opacity": 0.55, "stroke_dasharray": "4 2"}
    parts += (
        _line(replay, steps, metric, range(max(end - 1, 0), len(replay.steps)), later)
        if end < len(replay.steps)
        else []
    )
    for chosen, radius in ((range(end), 1.8), (improved, 3.2)):
        finite = [index for index in chosen if math.isfinite(replay.values[index])]
        positions = [steps.at(replay.steps[index]) for index in finite]
        for place in thinned(positions, 4.0):
            index = finite[place]
            told = f"step {replay.steps[index]:,}: {number_text(replay.values[index])}"
            parts.append(dot(positions[place], metric.at(replay.values[index]), BLUE, radius=radius, told=told))
    broken = [index for index in range(len(replay.values)) if not math.isfinite(replay.values[index])]
    places = [steps.at(replay.steps[index]) for index in broken]
    for place in thinned(places, 8.0):
        told = f"step {replay.steps[broken[place]]:,}: {replay.values[broken[place]]}"
        parts.append(cross(places[place], foot - 5, RED, told=told))
    return parts


def _line(replay: ReplayRecord, steps: Axis, metric: Axis, indices: range, style: dict[str, object]) -> list[Markup]:
    """The finite metrics of ``indices`` as a line; at each place the first and the two extremes of what falls there."""
    places: dict[int, list[tuple[float, float]]] = {}
    for index in indices:
        if math.isfinite(replay.values[index]):
            x = steps.at(replay.steps[index])
            places.setdefault(round(x / _PER_PIXEL), []).append((x, metric.at(replay.values[index])))
    points = []
    for here in places.values():
        extremes = [min(here, key=lambda point: point[1]), max(here, key=lambda point: point[1])]
        points += sorted({here[0], *extremes}) if len(here) > 3 else here
    return [rule(points, BLUE, stroke_linejoin="round", **style)] if len(points) > 1 else []


def _patience(replay: ReplayRecord) -> str:
    patience, unit = replay.settings["patience"], replay.settings["patience_unit"]
    return "" if patience is None else f"patience {patience:,} {unit}"


def _legend(replay: ReplayRecord, y: float, stop: int | None, faint: Sequence[str]) -> list[Markup]:
    """What the colours are, each in a line beside the curve, and below them what has none."""
    name = replay.metric if len(replay.metric) <= _LONGEST_NAME else replay.metric[: _LONGEST_NAME - 1] + "…"
    rows = [(BLUE, name)]
    if replay.best_metric is not None and replay.best_step is not None:
        rows.append((GREEN, f"best {number_text(replay.best_metric, 4)} at {replay.best_step:,}"))
    if replay.settings["min_delta"] > 0:
        rows.append((ORANGE, f"within min_delta {replay.settings['min_delta']:g}"))
    if stop is not None:
        rows.append((RED, f"stop at {stop:,}"))
    parts = [words(RIGHT + 40, y + 17 * (len(rows) + index), text, opacity=FAINT) for index, text in enumerate(faint)]
    for index, (colour, text) in enumerate(rows):
        parts.append(block(RIGHT + 22, y + 17 * index - 6, 12, 4, colour, rx=2))
        parts.append(words(RIGHT + 40, y + 17 * index, text))
    return parts
