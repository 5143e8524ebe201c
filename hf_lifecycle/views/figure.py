"""What every picture in a notebook is drawn with: axes, marks and words in SVG, in colours that suit any background.

Words and rules are drawn in the host's own text colour, on no background, so that a picture is readable in a light and
in a dark notebook without asking which it is: a page's theme and the system's preference often differ. The few colours
keep a contrast of about 3:1 to white and to the dark grey of Colab, and are told apart with every common form of colour
blindness (after Okabe and Ito, 2008); each also differs in shape or place.

An element's words and attributes are escaped unless they are markup. Promise: no text of a report can become a tag, an
attribute or a control character. There are no scripts, no links and no resources of another place, so a notebook shows
the same anywhere, without a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

from hf_lifecycle.views.wording import printable

__all__ = [
    "BLUE",
    "FAINT",
    "GREEN",
    "LEFT",
    "ORANGE",
    "RED",
    "RIGHT",
    "Axis",
    "Drawing",
    "Markup",
    "element",
    "joined",
    "thinned",
]


class Markup(str):
    """A text that is markup already: what :func:`element` made."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """One element. Children that are no :class:`Markup` are escaped; None is left out, as attribute and as child.

    In names of attributes, ``_`` stands for ``-``; a trailing one (``class_``) is dropped.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(printable(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = joined(children)
    return Markup(f"<{tag}{named}>{inner}</{tag}>" if inner or tag not in _VOID else f"<{tag}{named}/>")


_VOID = frozenset({"circle", "line", "path", "polyline", "rect"})


def joined(parts: Iterable[object]) -> Markup:
    """The parts one after the other, those that are no :class:`Markup` escaped, None left out."""
    texts = (part if isinstance(part, Markup) else escape(printable(part)) for part in parts if part is not None)
    return Markup("".join(texts))


BLUE, GREEN, ORANGE, RED = "#3b8fd4", "#009e73", "#e69f00", "#dc5f00"

WIDTH, LEFT, RIGHT = 720.0, 96.0, 524.0
"""The picture's width and the range of the steps' axis, in pixels; labels stand on both sides of it."""

_FAR = 20.0  # lengths of an axis

FAINT = 0.66
"""The opacity of words that are not the main thing."""


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
        least = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
        step = max(1.0, math.ceil(step)) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + index) * step for index in range(min(count, most + 1))]


class Drawing:
    """A picture over an axis of optimizer steps, which grows downwards.

    Attributes:
        steps: The axis.
        foot: Where the picture ends so far, in pixels; whoever adds a panel sets it.
    """

    def __init__(self, steps: Axis) -> None:
        self.steps, self.foot = steps, 4.0
        self._parts: list[Markup] = []

    def svg(self, label: str) -> Markup:
        """The whole picture; ``label`` says in words what it shows."""
        drawn = element("g", *self._parts, font_size=12, fill="currentColor")
        return element("svg", drawn, viewBox=f"0 0 {WIDTH:.0f} {_place(self.foot)}", role="img", aria_label=label)

    @contextmanager
    def clipped(self, top: float, foot: float) -> Iterator[None]:
        """Cut off what runs out of a panel: an inner picture cuts at its edges, and needs no name to do so."""
        outside, self._parts = self._parts, []
        yield
        box = {"x": LEFT - 5, "y": top, "width": RIGHT - LEFT + 10, "height": foot - top + 2}
        places = {name: _place(value) for name, value in box.items()}
        self._parts = [*outside, element("svg", *self._parts, viewBox=" ".join(places.values()), **places)]

    def words(self, x: float, y: float, text: object, anchor: str | None = None, **style: object) -> None:
        """A line of text whose baseline is at ``y``; ``anchor``: ``"end"`` where it ends at ``x``, ``"middle"``."""
        self._add("text", text, x=_place(x), y=_place(y), text_anchor=anchor, **style)

    def rule(self, points: Sequence[tuple[float, float]], colour: str = "currentColor", **style: object) -> None:
        """A line through ``points``."""
        self._add("path", d=_path(points), fill="none", stroke=colour, **style)

    def area(self, outline: Sequence[tuple[float, float]], colour: str, **style: object) -> None:
        """What lies within ``outline``."""
        self._add("path", d=_path(outline) + "Z", fill=colour, **style)

    def dot(self, x: float, y: float, *, radius: float = 3.0, hollow: bool = False, told: str = "") -> None:
        """A dot, full or hollow, with what is told when the pointer rests on it."""
        style = {"fill": "none", "stroke": BLUE, "stroke_width": 1.5} if hollow else {"fill": BLUE}
        self._add("circle", _hint(told), cx=_place(x), cy=_place(y), r=radius, **style)

    def cross(self, x: float, y: float, *, told: str = "") -> None:
        """A cross: an end, or a number, that was not meant."""
        arms = f"M{_place(x - 4)} {_place(y - 4)}l8 8m0-8l-8 8"
        self._add("path", _hint(told), d=arms, fill="none", stroke=RED, stroke_width=2.2, stroke_linecap="round")

    def block(
        self, x: float, y: float, width: float, height: float, colour: str = "currentColor", **style: object
    ) -> None:
        """A rectangle whose upper left corner is at ``x``, ``y``; ``told`` as for a dot."""
        size = {"width": _place(max(width, 0.0)), "height": _place(max(height, 0.0))}
        self._add("rect", _hint(style.pop("told", "")), x=_place(x), y=_place(y), fill=colour, **size, **style)

    def _add(self, tag: str, *children: object, **attributes: object) -> None:
        self._parts.append(element(tag, *children, **attributes))


def _place(value: float) -> str:
    """A position in pixels, to the tenth."""
    return f"{value:.1f}".removesuffix(".0")


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_place(x)} {_place(y)}" for x, y in points)


def _hint(told: object) -> Markup | None:
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
