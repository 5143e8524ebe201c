"""The list of texts that a user can see is up to date, and none of them is in the words that this project has left."""

from __future__ import annotations

import ast
import re

import pytest

from tests.messages import LISTED, listing, texts

LEFT = re.compile(
    r"broken off|broke off|of one's own|goes on|go on|going on|begins? anew|starts anew|unbroken|put back|passed over"
    r"|second place|is waited for|is told|in place of",
    re.IGNORECASE,
)


def test_every_text_is_in_the_list_as_it_is_shown() -> None:
    assert LISTED.read_text(encoding="utf-8") == listing(), "run python -m tests.messages, and read what changed"


def test_texts_are_in_the_words_of_the_field() -> None:
    shown = [line for line in LISTED.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    assert len(shown) > 500
    assert [line for line in shown if LEFT.search(line)] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('raise ValueError(f"{name} must be a number, got {value!r}")', ["{name} must be a number, got {value}"]),
        ('logger.warning("not saved: %s; " + advice + " is next", error)', ["not saved: %s; {advice} is next"]),
        ('"""A docstring is none."""', []),
        ('said = "one two" if wide else "three four"', ["one two", "three four"]),
        ('kinds = ("oneword", "a b", "%Y-%m-%d %H")', []),
    ],
)
def test_a_text_is_a_string_with_words(code: str, found: list[str]) -> None:
    assert list(texts(ast.parse(code), with_docstrings=False)) == found
