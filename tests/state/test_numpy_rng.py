"""NumPy's global generator, through its memory: the same bits as NumPy's own functions give."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from hf_lifecycle.state.rng import numpy_rng

DRAWS = (
    lambda: np.random.randn(),
    lambda: np.random.rand(),
    lambda: np.random.normal(size=3),
    lambda: np.random.randint(5),
    lambda: np.random.permutation(4),
)


def equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] == b[0] and a[1].tobytes() == b[1].tobytes() and tuple(a[2:]) == tuple(b[2:])


def test_the_layout_of_this_numpy_is_known() -> None:
    assert numpy_rng._is_fast()


def test_read_is_get_state_and_changes_nothing_with_and_without_a_cached_gaussian() -> None:
    choose = random.Random(1)
    cached = 0
    for seed in range(500):
        np.random.seed(seed)
        for _ in range(choose.randrange(6)):
            choose.choice(DRAWS)()
        before = np.random.get_state()
        assert equal(numpy_rng.read(), before)
        assert equal(np.random.get_state(), before)
        cached += before[3]
    assert 50 < cached < 450


def test_write_is_set_state_whatever_was_drawn_since() -> None:
    choose = random.Random(2)
    for seed in range(500):
        np.random.seed(seed)
        for _ in range(choose.randrange(4)):
            choose.choice(DRAWS)()
        state = numpy_rng.read()
        expected = np.random.randn(3).tolist(), np.random.rand()
        for _ in range(choose.randrange(4)):
            choose.choice(DRAWS)()
        numpy_rng.write(state)
        assert (np.random.randn(3).tolist(), np.random.rand()) == expected


def test_another_bit_generator_is_left_to_numpy() -> None:
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        assert not numpy_rng._is_fast()
    finally:
        np.random.set_bit_generator(own)
    assert numpy_rng._is_fast()


@pytest.mark.parametrize("missing", ["del np.random.mtrand", "np.random.mtrand = np"])
def test_numpy_that_does_not_show_its_generator_is_asked_by_its_own_functions(missing: str) -> None:
    script = f"""
import numpy as np
{missing}
from hf_lifecycle.state.rng import numpy_rng
assert not numpy_rng._is_fast()
np.random.seed(3)
assert numpy_rng.is_fresh(3)
state = numpy_rng.read()
drawn = np.random.rand()
numpy_rng.write(state)
assert np.random.rand() == drawn
"""
    subprocess.run([sys.executable, "-c", script], check=True)
