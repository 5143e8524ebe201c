"""Whether Python's generator was used is told as ``random.getstate`` would tell it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from hf_lifecycle.state.rng import numpy_rng, python_rng


@pytest.fixture(params=["by address", "by getstate"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by getstate":
        monkeypatch.setattr(python_rng, "_address", None)
        monkeypatch.setattr(numpy_rng, "_address", None)


def test_the_state_lies_where_it_is_looked_for() -> None:
    assert python_rng._address is not None


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("seed", [0, 1, 2**127 + 5])
def test_a_seeded_generator_is_fresh_until_it_is_used(seed: int) -> None:
    for draw in (random.random, lambda: random.gauss(0, 1), lambda: random.getrandbits(32 * 624)):
        random.seed(seed)
        assert python_rng.is_fresh()
        before = random.getstate()
        assert python_rng.is_fresh()
        assert random.getstate() == before
        draw()
        assert not python_rng.is_fresh()


@pytest.mark.usefixtures("_way")
def test_numpys_generator_is_fresh_until_it_is_used() -> None:
    import numpy as np

    draws: list[Callable[[], Any]] = [
        np.random.random_sample,
        np.random.standard_normal,
        lambda: np.random.seed(6),
        lambda: np.random.bytes(4 * 624),
    ]
    for draw in draws:
        np.random.seed(5)
        assert numpy_rng.is_fresh(5)
        draw()
        assert not numpy_rng.is_fresh(5)
