"""The attempts of a run as lanes over the optimizer steps: saves, breaks, resumes, stops, and what the saves cost.

A lane is one call of ``train()``. A full dot on it is a checkpoint that is there, a hollow one a checkpoint that was
removed since; where a later lane begins, a dashed line comes down from the checkpoint it went on from. Bounded: the
newest lanes, and of marks that would cover each other the first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from hf_lifecycle.checkpoint.inspection.attempts import Attempt, Save
from hf_lifecycle.views.figure import (
    BLUE,
    FAINT,
    LEFT,
    ORANGE,
    RED,
    RIGHT,
    Axis,
    block,
    cross,
    dot,
    rule,
    thinned,
    words,
)
from hf_lifecycle.views.markup import Markup, joined
from hf_lifecycle.views.wording import count_text, seconds_text, size_text

__all__ = ["draw_attempts", "draw_stalls"]

_MOST_LANES = 8
_LANE = 24.0  # pixels from one to the next
_STALLS = 30.0  # height of the highest bar
_TAIL = 14.0  # how far a broken-off lane goes on, dashed: the log does not tell how far training went


def draw_attempts(
    attempts: Sequence[Attempt], steps: Axis, top: float, present: Collection[int]
) -> tuple[Markup, float]:
    """The newest attempts as lanes below ``top``.

    Args:
        attempts: Oldest first.
        steps: The axis of the optimizer steps.
        top: Where to begin, in pixels.
        present: The steps of which there is a checkpoint.

    Returns:
        The drawing and where it ends.
    """
    parts: list[Markup] = []
    shown = attempts[-_MOST_LANES:]
    if len(attempts) > len(shown):
        earlier = f"{count_text(len(attempts) - len(shown), 'earlier attempt')} not shown"
        parts.append(words(LEFT, top + 11, earlier, opacity=FAINT))
        top += 18
    heights = [top + _LANE * (index + 0.5) for index in range(len(shown))]
    for (_, upper), (attempt, lower) in pairwise(zip(shown, heights, strict=True)):
        if attempt.first_step:  # else it began anew
            x = steps.at(attempt.first_step)
            parts.append(rule([(x, upper), (x, lower)], stroke_width=1.2, opacity=0.6, stroke_dasharray="2 2"))
    for attempt, y in zip(shown, heights, strict=True):
        parts += _lane(attempt, steps, y, present, is_last=attempt is attempts[-1])
    return joined(parts), top + _LANE * len(shown)


def _lane(attempt: Attempt, steps: Axis, y: float, present: Collection[int], *, is_last: bool) -> list[Markup]:
    begin, end = steps.at(attempt.begins_at), steps.at(attempt.last_step)
    left = "started" if attempt.first_step == 0 else f"from {attempt.begins_at:,}"
    parts = [
        words(LEFT - 12, y + 4, left, "end", opacity=FAINT),
        block(begin, y - 3, end - begin, 6, "currentColor", opacity=0.22, rx=3),
    ]
    is_open = attempt.ending is None
    if is_open:
        parts.append(rule([(end, y), (end + _TAIL, y)], opacity=0.5, stroke_width=1.5, stroke_dasharray="3 3"))
    saves = [save for save in attempt.saves if save.committed]
    positions = [steps.at(save.step) for save in saves]
    for index in thinned(positions, 5.0):
        save = saves[index]
        gone = save.removed or save.step not in present
        parts.append(dot(positions[index], y, BLUE, radius=3.6, hollow=gone, told=_hint(save, gone)))
    parts += _end(attempt, end, y, is_last=is_last)
    return parts


def _hint(save: Save, gone: bool) -> str:
    known = [f"checkpoint-{save.step}"]
    known += [] if save.size is None else [size_text(save.size)]
    known += [] if save.stall is None else [f"training waited {seconds_text(save.stall)}"]
    known += ["removed since"] if gone else []
    return ", ".join(known)


def _end(attempt: Attempt, x: float, y: float, *, is_last: bool) -> list[Markup]:
    """The mark at a lane's end, and the words beside it."""
    step, why = f"{attempt.last_step:,}", attempt.why or ""
    beside = RIGHT + 22
    if attempt.ending == "stopped":
        return [block(x + 5, y - 6, 4, 12, RED, told=why), words(beside, y + 4, f"early stopping at {step}")]
    if attempt.ending == "ended":
        return [block(x + 5, y - 6, 2, 12, "currentColor"), words(beside, y + 4, f"finished at {step}")]
    if attempt.ending == "preempted":
        bars = (block(x + 5 + shift, y - 6, 3, 12, ORANGE, told=why) for shift in (0.0, 5.0))
        return [*bars, words(beside, y + 4, f"{why[:12] or 'interrupted'} at {step}, saved")]
    if attempt.ending == "failed":
        return [cross(x + 9, y, RED, told=why), words(beside, y + 4, f"a save failed at {step}")]
    if is_last:
        return [words(beside, y + 4, f"no end told after {step}")]
    return [cross(x + _TAIL + 5, y, RED), words(beside, y + 4, f"broken off after {step}")]


def draw_stalls(attempts: Sequence[Attempt], steps: Axis, top: float) -> tuple[Markup, float]:
    """For how long each save kept training waiting, as bars below ``top``; nothing where no save tells.

    Returns:
        The drawing and where it ends.
    """
    stalls = sorted((save.step, save.stall) for attempt in attempts for save in attempt.saves if save.stall is not None)
    if not stalls:
        return Markup(), top
    longest, total = max(stall for _, stall in stalls), sum(stall for _, stall in stalls)
    foot = top + _STALLS + 8
    height = Axis(0.0, longest or 1.0, 0.0, _STALLS)
    highest: dict[int, tuple[float, float]] = {}  # one bar a place: the longest of those that fall there
    for step, stall in stalls:
        x = steps.at(step)
        place = int(x / 4)
        if place not in highest or stall > highest[place][1]:
            highest[place] = (x, stall)
    parts = [
        block(x - 1.5, foot - height.at(stall), 3, height.at(stall), ORANGE, told=seconds_text(stall))
        for x, stall in highest.values()
    ]
    parts += [
        rule([(LEFT, foot), (RIGHT, foot)], opacity=0.35, stroke_width=1),
        words(LEFT - 12, foot, "waited", "end", opacity=FAINT),
        words(RIGHT + 22, foot - 15, f"{count_text(len(stalls), 'save')}: {seconds_text(total)} in all"),
        words(RIGHT + 22, foot, f"at most {seconds_text(longest)}", opacity=FAINT),
    ]
    return joined(parts), foot
