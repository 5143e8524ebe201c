"""Every generator continues from its state, and a state that is none touches no generator."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.state.rng.states import RngState, capture_rng, restore_rng, rng_sources


def draws():
    host = [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.randn(5).tolist()]
    if torch.accelerator.is_available():
        host.append(torch.rand(3, device=torch.accelerator.current_accelerator()).tolist())
    return host


@pytest.mark.parametrize("keeps_half_a_pair", [False, True])
def test_every_generator_continues_with_its_cached_gaussian(keeps_half_a_pair):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    if keeps_half_a_pair:
        random.gauss(0, 1), np.random.normal()
    state = capture_rng()
    expected = draws()
    restore_rng(state)
    assert draws() == expected
    plain = state.state_dict()
    again, lacking = RngState.from_state_dict(plain)
    restore_rng(again)
    assert (draws(), lacking) == (expected, ())


def test_capturing_and_restoring_draws_nothing():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    RngState.from_state_dict(capture_rng().state_dict())
    restore_rng(capture_rng())
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())


def test_generators_that_this_machine_lacks_are_told_and_host_ones_are_required():
    plain = capture_rng().state_dict()
    state, lacking = RngState.from_state_dict(plain | {"abacus:0": torch.zeros(3, dtype=torch.uint8)})
    assert lacking == ("abacus:0",)
    restore_rng(state)
    del plain["numpy"]
    with pytest.raises(StateMismatch, match="numpy"):
        RngState.from_state_dict(plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"torch": torch.zeros(7, dtype=torch.uint8)},
        {"torch": None},
        {"numpy": {}},
        {"python": {"version": 3, "words": np.zeros(3, np.uint32), "gauss": None}},
        {"python": {"version": 9, "words": np.zeros(625, np.uint32), "gauss": None}},
    ],
)
def test_a_state_that_is_none_is_refused_before_any_generator_is_touched(wrong):
    plain = capture_rng().state_dict()
    random.random(), np.random.rand(), torch.rand(1)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)):
        RngState.from_state_dict(plain | wrong)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())


def test_names_are_those_of_the_generators():
    assert [*rng_sources()][:3] == ["python", "numpy", "torch"]
