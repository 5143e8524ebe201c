"""The pieces that a notebook's page is made of: its style, headings, tables and folded parts.

Colours are the host's own (:mod:`hf_lifecycle.views.figure` says why). A host that drops the style still shows tables
and words. Rules of notebooks for every table (Jupyter's stripes and right alignment) are overruled by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_lifecycle.views.markup import Markup, element, joined
from hf_lifecycle.views.wording import count_text

__all__ = ["folded", "heading", "more", "page", "sign", "table"]

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


def page(*parts: Markup | None) -> str:
    """The whole page."""
    return str(element("div", element("style", Markup(_STYLE)), *parts, class_="hf-lifecycle"))


def heading(text: str) -> Markup:
    """The page's first line."""
    return element("p", text, class_="hf-title")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Markup:
    """A table whose cells keep to one line, but for the last of a row.

    Args:
        columns: The head of each; all empty for none.
        rows: Cells, text or markup.
        right: The columns that are aligned to the right.
    """
    sides = ["hf-right" if column in right else None for column in columns]
    head = element("tr", *(element("th", column, class_=side) for column, side in zip(columns, sides, strict=True)))
    classes = [" ".join(filter(None, ("hf-short", side))) for side in sides[:-1]] + [sides[-1]]
    body = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, classes, strict=True)))
        for row in rows
    ]
    shown = element("thead", head) if any(columns) else None
    return element("table", shown, element("tbody", *body), class_="hf-table")


def folded(title: str, body: Markup) -> Markup:
    """A part that opens when its title is clicked."""
    return element("details", element("summary", title), body)


def more(hidden: int, noun: str) -> Markup | None:
    """How many are not shown, such as 3 of ``"earlier event"``; None where all are."""
    return element("p", f"and {count_text(hidden, noun)}", class_="hf-faint") if hidden > 0 else None


def sign(colour: str, mark: str, text: str) -> Markup:
    """A mark in colour and what it means in words, since nobody should need the colour."""
    return joined([element("span", mark, style=f"color:{colour}"), " ", text])
