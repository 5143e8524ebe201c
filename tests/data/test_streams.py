"""Keyed random numbers: what is inside a stream stays inside."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from hf_lifecycle.data.streams import HeldStream, KeyedScope, key_seed, seed_host


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random_sample()), torch.rand(()).item()


def host() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


def test_a_seed_is_128_bits_that_never_change() -> None:
    assert key_seed((0, "batch", 1, 2)) == 0x1C250FC78CE147C857C693B7E5F99560  # a golden value
    assert 0 <= key_seed(()) < 1 << 128


def test_keys_that_look_alike_differ() -> None:
    keys = [(1, 23), (12, 3), ("1", 23), (1, "23"), ("1, 23",), (1, 2, 3), (-1, 23)]
    assert len({key_seed(key) for key in keys}) == len(keys)


def test_a_scope_gives_what_its_key_says_and_puts_back_what_was() -> None:
    scope = KeyedScope()
    seen = []
    for _ in range(2):
        draw()
        before = host()
        seed = scope.open((7, "batch"), 5)
        assert scope.is_open
        assert seed == key_seed((7, "batch"))
        seen.append(draw())
        scope.close()
        assert not scope.is_open
        assert host() == before
    assert seen[0] == seen[1]


def test_a_second_close_changes_nothing() -> None:
    scope = KeyedScope()
    scope.open((1,), 5)
    scope.close()
    draw()
    before = host()
    scope.close()
    assert host() == before


def test_the_cached_gaussian_is_no_way_into_a_scope_or_out_of_it() -> None:
    random.seed(3)
    np.random.seed(3)
    random.gauss(0, 1)
    np.random.randn()
    expected = None
    for prime in (False, True):
        if prime:
            random.gauss(0, 1)
        before = host()
        scope = KeyedScope()
        scope.open((1,), 5)
        inside = (random.gauss(0, 1), float(np.random.randn()))
        scope.close()
        assert host() == before
        assert expected is None or inside == expected
        expected = inside


def test_a_held_stream_goes_on_where_it_was_left() -> None:
    with HeldStream((1, "sampler")):
        whole = [draw() for _ in range(4)]
    stream, parts = HeldStream((1, "sampler")), []
    for _ in range(4):
        draw()
        before = host()
        with stream:
            parts.append(draw())
        assert host() == before
    assert parts == whole


def test_an_error_in_a_held_stream_puts_back_what_was() -> None:
    def fail() -> None:
        with HeldStream((1,)):
            draw()
            raise RuntimeError

    before = host()
    with pytest.raises(RuntimeError):
        fail()
    assert host() == before


def test_seeding_reaches_the_host_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: reached.append(seed))
    seed_host(key_seed((1,)))
    assert reached == []
    first = draw()
    seed_host(key_seed((2,)))
    assert all(a != b for a, b in zip(first, draw(), strict=True))
