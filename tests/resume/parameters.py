"""The cases of a matrix as parameters: half of those outside the core are left to the exhaustive run, and to CI."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import pytest

__all__ = ["half_of"]


class _Case(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def core(self) -> bool: ...


def half_of(cases: Iterable[_Case]) -> list[object]:
    """The core and every second of the other cases run by default; kinds that are alike stand beside each other."""
    parameters: list[object] = []
    others = 0
    for case in cases:
        others += not case.core
        left_out = not case.core and others % 2 == 0
        marks = [pytest.mark.core] if case.core else [pytest.mark.exhaustive] if left_out else []
        parameters.append(pytest.param(case, id=case.name, marks=marks))
    return parameters
