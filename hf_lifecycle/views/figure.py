"""What every picture in a notebook is drawn with: an axis, marks and words in SVG, in colours that suit any background.

Words and rules are drawn in the host's own text colour, on no background, so that a picture is readable in a light and
in a dark notebook without asking which it is: a page's theme and the system's preference often differ. The few colours
keep a contrast of about 3:1 to white and to the dark grey of Colab, and are told apart with every common form of colour
blindness (after Okabe and Ito, 2008); each also differs in shape or place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_lifecycle.views.markup import Markup, element

__all__ = [
    "BLUE",
    "FAINT",
    "GREEN",
    "LEFT",
    "ORANGE",
    "RED",
    "RIGHT",
    "WIDTH",
    "Axis",
    "block",
    "coordinate",
    "cross",
    "dot",
    "rule",
    "thinned",
    "words",
]

BLUE, GREEN, ORANGE, RED = "#3b8fd4", "#009e73", "#e69f00", "#dc5f00"

WIDTH, LEFT, RIGHT = 720.0, 96.0, 524.0
"""The picture's width and the range of the steps' axis, in pixels; labels stand on both sides of it."""

_FAR = 20.0  # lengths of an axis

FAINT = 0.66
"""The opacity of words that are not the main thing."""


def coordinate(value: float) -> str:
    """A position in pixels, to the tenth."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Axis:
    """Where a number lies between two pixels.

    Attributes:
        low: The number at ``begin``.
        high: The number at ``end``; above ``low``.
        begin: Pixel of ``low``.
        end: Pixel of ``high``; for a vertical axis it is the smaller one.
    """

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of ``value``; what lies far outside is put a few axes away."""
        share = (value - self.low) / (self.high - self.low)
        return self.begin + min(max(share, -_FAR), _FAR) * (self.end - self.begin)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Round numbers between ``low`` and ``high``, at most ``most`` of them."""
        step = _round_step((self.high - self.low) / most)
        if whole:
            step = max(1.0, math.ceil(step))
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + index) * step for index in range(min(count, most + 1))]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def words(x: float, y: float, text: object, anchor: str | None = None, **style: object) -> Markup:
    """A line of text whose baseline is at ``y``; ``anchor``: ``"end"`` where it ends at ``x``, ``"middle"``."""
    return element("text", text, x=coordinate(x), y=coordinate(y), text_anchor=anchor, **style)


def rule(points: Sequence[tuple[float, float]], colour: str = "currentColor", **style: object) -> Markup:
    """A line through ``points``."""
    path = "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)
    return element("path", d=path, fill="none", stroke=colour, **style)


def dot(x: float, y: float, colour: str, *, radius: float = 3.0, hollow: bool = False, told: str = "") -> Markup:
    """A dot, full or hollow, with what is told when the pointer rests on it."""
    style = {"fill": "none", "stroke": colour, "stroke_width": 1.5} if hollow else {"fill": colour}
    return element("circle", _hint(told), cx=coordinate(x), cy=coordinate(y), r=radius, **style)


def cross(x: float, y: float, colour: str, *, told: str = "") -> Markup:
    """A cross: an end that was not meant."""
    arms = f"M{coordinate(x - 4)} {coordinate(y - 4)}l8 8m0-8l-8 8"
    return element("path", _hint(told), d=arms, fill="none", stroke=colour, stroke_width=2.2, stroke_linecap="round")


def block(x: float, y: float, width: float, height: float, colour: str, *, told: str = "", **style: object) -> Markup:
    """A rectangle whose upper left corner is at ``x``, ``y``."""
    size = {"width": coordinate(max(width, 0.0)), "height": coordinate(max(height, 0.0))}
    return element("rect", _hint(told), x=coordinate(x), y=coordinate(y), fill=colour, **size, **style)


def _hint(told: str) -> Markup | None:
    return element("title", told) if told else None


def thinned(positions: Iterable[float], least: float) -> list[int]:
    """Indices of ``positions``, which ascend, that stand at least ``least`` apart; the first is among them."""
    kept: list[int] = []
    last = -math.inf
    for index, position in enumerate(positions):
        if position - last >= least:
            kept.append(index)
            last = position
    return kept
