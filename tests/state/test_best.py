"""The best metric, and its epoch, are the same whether the run was broken off or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.state.best import BestMetric


def offers(best, metrics, mode="min"):
    return [best.offer(metric, mode) for metric in metrics]


def test_lower_or_higher_is_better_and_equal_is_not():
    assert offers(BestMetric(), [0.5, 0.3, 0.3, 0.4, 0.0, -1.0]) == [True, True, False, False, True, True]
    assert offers(BestMetric(), [0.0, 0.5, 0.5, 0.4, 0.7], "max") == [True, True, False, False, True]


def test_nan_is_never_the_best_and_does_not_block_the_next():
    best = BestMetric()
    assert offers(best, [math.nan, 0.5, math.nan, 0.4]) == [False, True, False, True]
    assert best.value == 0.4


def test_infinity_is_a_metric():
    assert offers(BestMetric(), [math.inf, 1.0, -math.inf, -math.inf]) == [True, True, True, False]


@pytest.mark.parametrize(
    "metric", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5], requires_grad=True)]
)
def test_any_single_number_is_kept_as_a_float(metric):
    best = BestMetric()
    assert best.offer(metric, "min") is True
    assert type(best.value) is float
    assert best.value == 0.5


@pytest.mark.parametrize("metric", ["0.5", None, [0.5], np.zeros(2), torch.zeros(2), True, 1j])
def test_what_is_no_number_is_refused_and_changes_nothing(metric):
    best = BestMetric()
    with pytest.raises(ValueError, match="metric"):
        best.offer(metric, "min")
    assert best.state_dict() == {"best_metric": None, "best_epoch": None, "mode": None}
    assert best.offer(0.5, "max")


def test_modes_are_two_and_do_not_mix_not_even_over_a_resume():
    best = BestMetric()
    with pytest.raises(ValueError, match="mode"):
        best.offer(0.5, "lower")
    best.offer(0.5, "max")
    with pytest.raises(ValueError, match="mode was 'max'"):
        best.offer(0.4, "min")
    resumed = BestMetric()
    resumed.load_state_dict(best.state_dict())
    with pytest.raises(ValueError, match="mode was 'max'"):
        resumed.offer(0.4, "min")


METRICS = [0.9, 0.8, 0.85, 0.7, math.nan, 0.75]


@pytest.mark.parametrize("judges_first", [True, False])
@pytest.mark.parametrize("broken_after", [None, 0, 1, 2, 3, 4])
def test_the_epoch_is_that_of_the_save_next_to_it_also_in_a_broken_run(judges_first, broken_after):
    best, verdicts = BestMetric(), []
    for epoch, metric in enumerate(METRICS):
        if judges_first:
            verdicts.append(best.offer(metric, "min"))
        state = best.state_at(epoch)
        best.saved(epoch)
        if epoch == broken_after:  # at the moment of the save, before a loop that saves first judges
            best = BestMetric()
            best.load_state_dict(state)
            best.adopt(None if math.isnan(metric) else metric, epoch)
            if not judges_first:
                verdicts.append(None)
        elif not judges_first:
            verdicts.append(best.offer(metric, "min"))
    expected = [True, True, False, True, False, False]
    assert [v for v in verdicts if v is not None] == [
        e for i, e in enumerate(expected) if judges_first or i != broken_after
    ]
    assert (best.value, best.epoch) == (0.7, 3)


def test_an_epoch_that_is_given_is_taken():
    best = BestMetric()
    best.offer(0.5, "min", 7)
    best.saved(9)
    assert best.epoch == 7


def test_before_the_save_that_follows_the_epoch_is_not_known_and_a_failed_save_changes_nothing():
    best = BestMetric()
    best.offer(0.5, "min")
    assert best.epoch is None
    assert best.state_at(3)["best_epoch"] == 3
    assert best.epoch is None
    best.saved(4)
    assert best.epoch == 4


def test_states_of_the_original_load_and_other_keys_are_named():
    best = BestMetric()
    best.load_state_dict({"best_metric": np.float64(0.5), "best_epoch": 10})
    assert best.state_dict() == {"best_metric": 0.5, "best_epoch": 10, "mode": None}
    with pytest.raises(StateMismatch) as caught:
        best.load_state_dict({"best_metric": 0.1, "mode": "min", "epoch": 1})
    assert (caught.value.missing, caught.value.unknown) == (("best_epoch",), ("epoch",))
    for wrong in ({"best_metric": "x"}, {"best_epoch": "x"}, {"mode": "best"}):
        with pytest.raises(ValueError):
            best.load_state_dict({"best_metric": 0.1, "best_epoch": 1, "mode": "min"} | wrong)
    assert best.value == 0.5
