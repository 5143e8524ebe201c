"""The cases of a matrix as parameters; those of the core are marked, for the run with the oldest versions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import pytest

__all__ = ["parameters"]


class _Case(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def core(self) -> bool: ...


def parameters(cases: Iterable[_Case]) -> list[object]:
    """A parameter for each case, named like it."""
    return [pytest.param(case, id=case.name, marks=[pytest.mark.core] if case.core else []) for case in cases]
