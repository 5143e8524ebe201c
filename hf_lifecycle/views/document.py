"""What is drawn for a terminal (:mod:`hf_lifecycle.views.text`) as a page for a notebook.

Tables become tables, and sections parts that fold; what is well or wrong has a mark beside its colour, since nobody
should need the colour. Colours are the host's own (:mod:`hf_lifecycle.views.figure` says why). A host that drops the
style still shows tables and words. Rules of notebooks for every table (Jupyter's stripes and right alignment) are
overruled by name.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hf_lifecycle.views.figure import GREEN, ORANGE, RED, Markup, element, joined
from hf_lifecycle.views.text import BAD, FAINT, GOOD, WARNING, Section

__all__ = ["heading", "page"]

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
