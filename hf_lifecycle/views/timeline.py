"""The attempts of a run as lanes over the optimizer steps: saves, breaks, resumes, stops, and what the saves cost.

A lane is one call of ``train()``. A full dot on it is a checkpoint that is there, a hollow one a checkpoint that was
removed since; where a later lane begins, a dashed line comes down from the checkpoint it continued from. Bounded: the
newest lanes, and of marks that would cover each other the first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from hf_lifecycle.checkpoint.inspection.attempts import Attempt, Save
from hf_lifecycle.views.figure import FAINT, LEFT, ORANGE, RED, RIGHT, Axis, Drawing, thinned
from hf_lifecycle.views.wording import count_text, seconds_text, size_text

__all__ = ["draw_attempts", "draw_stalls"]

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
