"""HTML and SVG as text that is safe to show: an element's words and attributes are escaped unless they are markup.

Promise: no text of a report can become a tag, an attribute or a control character. There are no scripts, no links and
no resources of another place, so a notebook shows the same anywhere, without a network.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from hf_lifecycle.views.wording import printable

__all__ = ["Markup", "element", "joined"]


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
