"""Pictures of metrics and decisions, as matplotlib figures that belong to nobody but the caller.

Promise: no global state of matplotlib is read or changed (no pyplot), and matplotlib is imported only when something is
drawn. Not done here: nothing is saved or shown; ``figure.savefig("stop.png")`` is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_lifecycle.early_stopping_outcome import ReplayRecord

__all__ = ["plot_replay"]

# Okabe and Ito's palette (Color Universal Design, 2008), told apart with every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_INK, _FAINT = "#222222", "#6B6B6B"

_LIMITS = {"baseline": ":", "stopping_threshold": "--", "divergence_threshold": "-."}


def plot_replay(replay: ReplayRecord) -> Figure:
    """Draw what early stopping saw and when it stops.

    The x axis is the optimizer step, the y axis the metric in its own unit. A dot is an evaluation: full where it
    counted as an improvement, hollow where it did not, faint after the stop; a cross at the foot is one without a
    finite number. The band lies between the best that counted and what the next evaluation has to beat.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "hf-lifecycle[plot]"') from error
    figure = Figure(figsize=(10, 5.8), dpi=150, facecolor="white")
    # Room for the headline, which is text of the figure: the layout engine would not leave any.
    figure.set_layout_engine("constrained", rect=(0, 0, 0.99, 0.86))
    window = _window(replay)
    panels = figure.subplots(
        1, 1 if window is None else 2, width_ratios=None if window is None else (3, 2), squeeze=False
    )
    for axes in panels[0]:
        _draw_best(axes, replay)
        _draw_metric(axes, replay)
        _draw_limits(axes, replay)
        _draw_stop(axes, replay)
        _dress(axes)
    _label(figure, panels[0][0], replay)
    if window is not None:
        _draw_close_up(panels[0][1], replay, window)
    return figure


def _window(replay: ReplayRecord) -> range | None:
    """The evaluations around the best and the stop, None where the whole picture shows them well enough."""
    if replay.best_step is None or len(replay.steps) < 12:
        return None
    best, last = replay.steps.index(replay.best_step), len(replay.steps)
    window = range(max(0, best - 3), min(last, replay.evaluations + 3))
    return window if 2 * len(window) < 3 * last and _span(replay, window) < 0.5 * _span(replay, range(last)) else None


def _span(replay: ReplayRecord, window: range) -> float:
    finite = [replay.values[index] for index in window if math.isfinite(replay.values[index])]
    return max(finite) - min(finite)


def _draw_close_up(axes: Axes, replay: ReplayRecord, window: range) -> None:
    shown = [*(replay.values[index] for index in window), *(replay.targets[index] for index in window)]
    finite = [value for value in shown if math.isfinite(value)]
    steps = [replay.steps[index] for index in window]
    for low, high, limit in ((min(finite), max(finite), axes.set_ylim), (min(steps), max(steps), axes.set_xlim)):
        room = 0.08 * (high - low) or 0.5
        limit(low - room, high + room)
    axes.set_title("close-up", loc="left", fontsize=10, color=_FAINT)
    axes.set_xlabel("optimizer step", color=_INK)


def _draw_best(axes: Axes, replay: ReplayRecord) -> None:
    """The best that counted as steps, and the band that a metric has to leave on the good side."""
    seen = range(replay.evaluations)
    known = [(index, best) for index, best in zip(seen, replay.bests, strict=False) if best is not None]
    if not known:
        return
    steps = [replay.steps[index] for index, _ in known]
    bests = _finite([best for _, best in known])
    targets = _finite([replay.targets[index] for index, _ in known])
    if replay.settings["min_delta"] > 0:
        axes.fill_between(
            steps,
            bests,
            targets,
            step="post",
            color=_ORANGE,
            alpha=0.28,
            linewidth=0,
            label="within min_delta: not counted",
        )
    axes.plot(steps, bests, drawstyle="steps-post", color=_GREEN, linewidth=2.2, label="best that counted", zorder=2)


def _draw_metric(axes: Axes, replay: ReplayRecord) -> None:
    """The evaluations: up to the stop in full colour, what would not have been run in a faint one."""
    end = replay.evaluations
    improved = set(replay.improvements)
    axes.plot(
        replay.steps[:end], _finite(replay.values[:end]), color=_BLUE, linewidth=1.3, zorder=3, label=replay.metric
    )
    if end < len(replay.steps):
        axes.plot(
            replay.steps[end - 1 :],
            _finite(replay.values[end - 1 :]),
            color=_BLUE,
            linewidth=1.1,
            alpha=0.4,
            linestyle=(0, (4, 2)),
            label="the rest of the run",
        )
    hollow = [index for index in range(end) if index not in improved]
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": _BLUE, "zorder": 4}
    _points(axes, replay, sorted(improved), **style, markersize=5.5)
    _points(axes, replay, hollow, **style, markersize=5, markerfacecolor="white", markeredgewidth=1.2)
    broken = [step for step, value in zip(replay.steps, replay.values, strict=True) if not math.isfinite(value)]
    if broken:
        foot = axes.get_xaxis_transform()
        axes.plot(
            broken,
            [0.03] * len(broken),
            "x",
            color=_RED,
            markersize=7,
            markeredgewidth=2,
            transform=foot,
            label="not finite",
        )


def _draw_limits(axes: Axes, replay: ReplayRecord) -> None:
    for name, linestyle in _LIMITS.items():
        value = replay.settings[name]
        if value is not None:
            label = f"{name.replace('_', ' ')} {value:g}"
            axes.axhline(value, color=_FAINT, linestyle=linestyle, linewidth=1.2, zorder=1, label=label)


def _draw_stop(axes: Axes, replay: ReplayRecord) -> None:
    if replay.best_step is not None and replay.best_metric is not None:
        label = f"best: {replay.best_metric:.4g} at step {replay.best_step:,}"
        star: dict[str, Any] = {"marker": "*", "markersize": 15, "markeredgecolor": "white", "zorder": 6}
        axes.plot([replay.best_step], [replay.best_metric], linestyle="none", color=_GREEN, label=label, **star)
    if replay.stopped_at is not None:
        axes.axvline(replay.stopped_at, color=_RED, linewidth=2, zorder=5, label=f"stop at step {replay.stopped_at:,}")
        if replay.saved_steps > 0:
            axes.axvspan(replay.stopped_at, replay.steps[-1], color=_FAINT, alpha=0.07, linewidth=0, zorder=0)


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=3)
    axes.margins(x=0.02, y=0.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#B0B0B0")


def _label(figure: Figure, axes: Axes, replay: ReplayRecord) -> None:
    """Headline, axis labels and legend: what happened in the first line, why and under which settings below."""
    figure.text(0.012, 0.95, _headline(replay), fontsize=15, fontweight="bold", color=_INK)
    figure.text(
        0.012, 0.905, f"{_settings_line(replay)}\n{replay.reason or ''}", fontsize=10, color=_FAINT, va="center"
    )
    axes.set_xlabel("optimizer step", color=_INK)
    direction = "lower" if replay.settings["mode"] == "min" else "higher"
    axes.set_ylabel(f"{replay.metric} ({direction} is better)", color=_INK)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, labelcolor=_INK)


def _headline(replay: ReplayRecord) -> str:
    if replay.stopped_at is None:
        return f"No stop in {replay.evaluations:,} evaluations"
    headline = f"Stop at step {replay.stopped_at:,} of {replay.steps[-1]:,}"
    if replay.missed is not None:
        return f"{headline}, before a better {replay.missed[1]:.4g} at step {replay.missed[0]:,}"
    if replay.saved_steps > 0:
        return f"{headline}: {replay.saved_steps:,} steps saved, nothing better missed"
    return headline


def _settings_line(replay: ReplayRecord) -> str:
    settings = replay.settings
    patience, unit = settings["patience"], settings["patience_unit"]
    parts = ["no patience limit" if patience is None else f"patience {patience:,} {unit}"]
    if settings["min_delta"] > 0:
        relative = " of the best" if settings["min_delta_mode"] == "relative" else ""
        parts.append(f"min_delta {settings['min_delta']:g}{relative}")
    if settings["start_after"]:
        parts.append(f"first {settings['start_after']} only watched")
    return ", ".join(parts)


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _points(axes: Axes, replay: ReplayRecord, indices: Sequence[int], **style: Any) -> None:
    axes.plot([replay.steps[index] for index in indices], _finite([replay.values[index] for index in indices]), **style)
