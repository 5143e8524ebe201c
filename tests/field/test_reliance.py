"""The page of the names that are relied on has those of the tables."""

from __future__ import annotations

from tests.field.reliance import PAGE, page


def test_page_is_that_of_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.field.reliance"
