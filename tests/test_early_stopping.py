"""EarlyStopping decides as its peers do, as its options say, and the same after every break."""

from __future__ import annotations

import doctest
import json
import math
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_lifecycle.early_stopping
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.early_stopping_replay import MAX_BYTES
from hf_lifecycle.errors import MetricNotFound, StateFileError, StateMismatch

NAN, INF = math.nan, math.inf
DOCS = Path(__file__).parents[1] / "docs" / "early_stopping.md"


def decisions(stopping, metrics, progress=None):
    positions = progress if progress is not None else [None] * len(metrics)
    return [stopping.step(metric, progress=at) for metric, at in zip(metrics, positions, strict=True)]


def stops_after(metrics, *, progress=None, **settings):
    """How many evaluations there are when it stops; None if it does not."""
    said = decisions(EarlyStopping(**settings), metrics, progress)
    return said.index(True) + 1 if True in said else None


# The rule itself


def test_stops_when_patience_evaluations_brought_no_improvement():
    assert stops_after([0.5, 0.6, 0.6, 0.6], patience=3) == 4
    assert stops_after([0.5, 0.6, 0.6], patience=3) is None


def test_an_improvement_starts_patience_anew():
    assert stops_after([0.5, 0.6, 0.4, 0.6, 0.6], patience=2) == 5


def test_max_mode_mirrors_min_mode():
    series = [random.Random(7).gauss(0, 1) for _ in range(50)]
    low = decisions(EarlyStopping(4, 0.1), series)
    high = decisions(EarlyStopping(4, 0.1, "max"), [-value for value in series])
    assert low == high
    assert True in low


def test_patience_zero_stops_at_the_first_evaluation_that_is_no_improvement():
    assert stops_after([0.5, 0.4, 0.4], patience=0) == 3


def test_patience_none_never_stops_for_lack_of_improvement():
    assert stops_after([0.5] * 1000, patience=None) is None
    assert stops_after([0.5, 0.5, NAN], patience=None) == 3


def test_the_best_that_counted_is_the_reference_not_the_last_value():
    # Each is better than the one before it, none better than the best.
    assert stops_after([0.1, 0.9, 0.8, 0.7], patience=3) == 4


def test_small_gains_add_up_until_they_exceed_min_delta():
    stopping = EarlyStopping(patience=3, min_delta=0.25)
    assert decisions(stopping, [1.0, 0.875, 0.75, 0.625]) == [False] * 4
    assert stopping.best_metric == 0.625
    assert stopping.counter == 0


def test_a_gain_of_exactly_min_delta_does_not_count():
    stopping = EarlyStopping(min_delta=0.25)
    stopping.step(1.0)
    stopping.step(0.75)
    assert not stopping.improved
    stopping.step(math.nextafter(0.75, 0))
    assert stopping.improved


def test_equal_metrics_are_no_improvement():
    assert stops_after([0.5, 0.5, 0.5], patience=2) == 3


def test_zero_is_a_metric():
    stopping = EarlyStopping(patience=2)
    assert decisions(stopping, [0.0, 0.1, 0.2]) == [False, False, True]
    assert stopping.best_metric == 0.0
    negative_zero = EarlyStopping(mode="max")
    decisions(negative_zero, [-1.0, 0.0, -0.5])
    assert negative_zero.best_metric == 0.0


def test_once_stopped_it_stays_stopped_and_nothing_changes():
    stopping = EarlyStopping(patience=1)
    decisions(stopping, [0.5, 0.6])
    state = stopping.state_dict()
    assert decisions(stopping, [0.1, NAN, 0.0]) == [True] * 3
    assert stopping.state_dict() == state


def test_attributes_say_what_happened():
    stopping = EarlyStopping(patience=2)
    assert (stopping.best_metric, stopping.best_progress, stopping.reason) == (None, None, None)
    assert (stopping.counter, stopping.evaluations, stopping.improved, stopping.should_stop) == (0, 0, False, False)
    stopping.step(0.5, progress=100)
    assert (stopping.best_metric, stopping.best_progress, stopping.improved) == (0.5, 100, True)
    stopping.step(0.6, progress=200)
    assert (stopping.counter, stopping.evaluations, stopping.improved) == (1, 2, False)
    assert stopping.reason is None
    stopping.step(0.7, progress=300)
    assert stopping.should_stop
    assert stopping.reason == "no improvement on the best, 0.5, in 2 evaluations"
    assert (stopping.best_metric, stopping.best_progress) == (0.5, 100)


@pytest.mark.parametrize("name", ["best_metric", "counter", "should_stop", "reason", "improved", "evaluations"])
def test_what_happened_cannot_be_assigned(name):
    with pytest.raises(AttributeError):
        setattr(EarlyStopping(), name, 1)


def test_settings_rebuild_the_object():
    stopping = EarlyStopping(7, 0.1, "max", patience_unit="steps", baseline=0.2, restore_best=True)
    assert EarlyStopping(**stopping.settings).settings == stopping.settings
    assert repr(stopping).startswith("EarlyStopping(patience_unit='steps', patience=7, min_delta=0.1, mode='max'")


# What the peers do


def test_as_transformers_callback_without_threshold():
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    for seed in range(20):
        rng = random.Random(seed)
        series = [round(rng.gauss(0, 1), 1) for _ in range(40)]
        patience = rng.randint(1, 6)
        args = TrainingArguments(
            output_dir="unused", metric_for_best_model="loss", greater_is_better=False, use_cpu=True
        )
        callback, state, theirs = EarlyStoppingCallback(patience), TrainerState(), []
        for metric in series:
            control = TrainerControl()
            callback.on_evaluate(args, state, control, {"eval_loss": metric})
            theirs.append(control.should_training_stop)
            if state.best_metric is None or metric < state.best_metric:  # Trainer does this after the callbacks
                state.best_metric = metric
        first = theirs.index(True) + 1 if True in theirs else None
        assert stops_after(series, patience=patience) == first


def test_as_lightning_and_torchtnt_patience_counts_checks_without_improvement():
    # Their check: count up when not improved, stop when count >= patience.
    assert stops_after([1.0, 1.0], patience=1) == 2


def test_as_lightning_non_finite_metric_stops_at_once():
    for value in (NAN, INF, -INF):
        stopping = EarlyStopping(patience=5)
        assert decisions(stopping, [0.5, value]) == [False, True]
        assert stopping.best_metric == 0.5
        assert "not finite" in stopping.reason


def test_as_lightning_thresholds_are_strict():
    assert stops_after([0.5, 0.2, 0.19], stopping_threshold=0.2) == 3
    assert stops_after([0.5, 0.9, 0.91], divergence_threshold=0.9) == 3
    assert stops_after([0.5, 0.9, 0.91], stopping_threshold=0.9, mode="max") == 3
    assert stops_after([0.5, 0.2, 0.19], divergence_threshold=0.2, mode="max") == 3


def test_the_metric_that_reaches_the_stopping_threshold_is_the_best():
    stopping = EarlyStopping(stopping_threshold=0.2)
    decisions(stopping, [0.5, 0.1])
    assert stopping.best_metric == 0.1
    assert stopping.reason == "the metric, 0.1, is better than the stopping threshold, 0.2"


def test_a_diverged_metric_is_never_the_best():
    stopping = EarlyStopping(divergence_threshold=10)
    assert stopping.step(11.0)
    assert stopping.best_metric is None
    assert stopping.reason == "the metric, 11, is worse than the divergence threshold, 10"


def test_as_torchtnt_relative_min_delta_is_a_fraction_of_the_best():
    stopping = EarlyStopping(min_delta=0.25, min_delta_mode="relative")
    stopping.step(8.0)
    assert stopping.to_beat == 6.0
    stopping.step(6.0)
    assert not stopping.improved
    stopping.step(5.0)
    assert stopping.improved
    assert stopping.to_beat == 3.75


def test_relative_min_delta_is_as_strict_for_negative_metrics():
    lower = EarlyStopping(min_delta=0.25, min_delta_mode="relative")
    lower.step(-8.0)
    assert lower.to_beat == -10.0
    higher = EarlyStopping(min_delta=0.25, min_delta_mode="relative", mode="max")
    higher.step(-8.0)
    assert higher.to_beat == -6.0


def test_as_keras_baseline_must_be_beaten_before_anything_counts():
    assert stops_after([0.9, 0.8, 0.7], patience=3, baseline=0.5) == 3
    stopping = EarlyStopping(patience=3, baseline=0.5)
    assert decisions(stopping, [0.9, 0.8, 0.4]) == [False] * 3
    assert (stopping.best_metric, stopping.counter) == (0.4, 0)


def test_baseline_that_was_never_beaten_is_the_reason():
    stopping = EarlyStopping(patience=2, baseline=0.5, min_delta=0.1)
    decisions(stopping, [0.9, 0.45])
    assert stopping.best_metric is None
    assert stopping.reason == "no improvement on the baseline, 0.5, by more than 0.1 in 2 evaluations"


def test_as_keras_first_evaluations_are_only_watched():
    stopping = EarlyStopping(patience=1, start_after=3, divergence_threshold=5)
    assert decisions(stopping, [0.1, NAN, 9.0]) == [False] * 3
    assert (stopping.best_metric, stopping.counter, stopping.evaluations) == (None, 0, 3)
    assert decisions(stopping, [0.5, 0.6]) == [False, True]
    assert stopping.best_metric == 0.5


def test_as_composer_patience_runs_over_training_time_from_the_best():
    settings = {"patience": 100, "patience_unit": "steps"}
    assert stops_after([0.5, 0.6, 0.6, 0.6], progress=[50, 75, 149, 150], **settings) == 4


def test_unlike_ignite_default_a_gain_within_min_delta_leaves_the_best_alone():
    stopping = EarlyStopping(min_delta=0.5)
    decisions(stopping, [1.0, 0.75])
    assert stopping.best_metric == 1.0


# NaN and infinity without check_finite


def test_nan_is_no_improvement_and_never_best():
    stopping = EarlyStopping(patience=3, check_finite=False)
    assert decisions(stopping, [NAN, NAN]) == [False, False]
    assert stopping.best_metric is None
    assert not stopping.step(0.5)
    assert stopping.best_metric == 0.5
    assert decisions(stopping, [NAN, NAN, NAN]) == [False, False, True]
    assert stopping.best_metric == 0.5


def test_nothing_but_nan_stops_with_a_reason():
    stopping = EarlyStopping(patience=2, check_finite=False, min_delta=0.1)
    assert decisions(stopping, [NAN, NAN]) == [False, True]
    assert stopping.reason == "no improvement by more than 0.1 in 2 evaluations"


def test_the_bad_infinity_is_no_improvement_and_anything_beats_it():
    stopping = EarlyStopping(patience=3, check_finite=False, min_delta=0.1, min_delta_mode="relative")
    decisions(stopping, [INF, 1e300])
    assert stopping.best_metric == 1e300


def test_nothing_beats_the_good_infinity():
    stopping = EarlyStopping(patience=2, check_finite=False, min_delta=0.1, min_delta_mode="relative")
    assert decisions(stopping, [-INF, 1.0, -INF]) == [False, False, True]
    assert stopping.best_metric == -INF


# Units of patience


@pytest.mark.parametrize("unit", ["steps", "samples", "seconds"])
def test_patience_in_units_of_training_counts_from_the_best(unit):
    settings = {"patience": 30, "patience_unit": unit}
    assert stops_after([0.5, 0.4, 0.6, 0.6], progress=[10, 20, 49, 50], **settings) == 4
    assert stops_after([0.5, 0.4, 0.6, 0.3, 0.6], progress=[10, 20, 49, 50, 79], **settings) is None


@pytest.mark.parametrize("unit", ["steps", "samples"])
def test_progress_must_be_given_for_steps_and_samples(unit):
    stopping = EarlyStopping(patience_unit=unit)
    with pytest.raises(ValueError, match="progress must be given"):
        stopping.step(0.5)
    assert stopping.evaluations == 0


def test_patience_in_steps_without_a_best_runs_from_the_first_evaluation():
    settings = {"patience": 100, "patience_unit": "steps", "baseline": 0.1}
    assert stops_after([0.5, 0.5, 0.5], progress=[10_000, 10_099, 10_100], **settings) == 3


def test_patience_in_steps_runs_from_the_last_watched_evaluation():
    settings = {"patience": 100, "patience_unit": "steps", "baseline": 0.1, "start_after": 2}
    assert stops_after([0.5] * 4, progress=[100, 200, 299, 300], **settings) == 4


def test_reason_names_unit_and_wait():
    stopping = EarlyStopping(1, patience_unit="steps")
    decisions(stopping, [0.5, 0.6], [7, 8])
    assert stopping.reason == "no improvement on the best, 0.5, in 1 step"


@pytest.mark.parametrize("unit", ["evaluations", "steps", "seconds"])
def test_progress_must_not_go_backwards(unit):
    stopping = EarlyStopping(patience_unit=unit)
    stopping.step(0.5, progress=10)
    with pytest.raises(ValueError, match="progress must not go backwards"):
        stopping.step(0.4, progress=9)
    assert stopping.best_metric == 0.5
    assert not stopping.step(0.4, progress=10)


class ManualClock(EarlyStopping):
    """The real thing under a clock that the test turns."""

    now = 1000.0

    def _now(self):
        return self.now


def test_seconds_run_on_a_clock_of_their_own():
    stopping = ManualClock(patience=60, patience_unit="seconds")
    stopping.step(0.5)
    stopping.now += 59.5
    assert not stopping.step(0.6)
    stopping.now += 0.5
    assert stopping.step(0.6)
    assert stopping.reason == "no improvement on the best, 0.5, in 60 seconds"


def test_seconds_while_the_process_was_dead_do_not_count():
    first = ManualClock(patience=60, patience_unit="seconds")
    first.step(0.5)
    first.now += 40
    saved = json.loads(json.dumps(first.state_dict()))
    assert saved["elapsed_seconds"] == 40
    second = ManualClock(patience=60, patience_unit="seconds")
    second.now = 5.0  # a monotonic clock starts anywhere
    second.load_state_dict(saved)
    second.now += 19
    assert not second.step(0.6)
    second.now += 1
    assert second.step(0.6)


def test_the_real_clock_moves_forward():
    stopping = EarlyStopping(patience=0, patience_unit="seconds")
    assert not stopping.step(0.5)
    assert stopping.step(0.5)
    assert stopping.state_dict()["elapsed_seconds"] > 0


def test_state_holds_no_clock_in_other_units():
    stopping = EarlyStopping()
    stopping.step(0.5)
    assert stopping.state_dict()["elapsed_seconds"] is None
    assert stopping.state_dict() == stopping.state_dict()


# Metrics


@pytest.mark.parametrize(
    "metric",
    [
        *(0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), Fraction(1, 2)),
        *(torch.tensor(0.5), torch.tensor([[0.5]]), torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)),
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_metrics(metric):
    stopping = EarlyStopping()
    stopping.step(metric)
    assert stopping.best_metric == 0.5
    assert type(stopping.best_metric) is float


def test_integers_are_metrics():
    for metric in (3, np.int64(3), torch.tensor(3)):
        stopping = EarlyStopping()
        stopping.step(metric)
        assert type(stopping.best_metric) is float


@pytest.mark.parametrize(
    "metric",
    [
        *(True, np.True_, torch.tensor(True), "0.5", None, [0.5], {"eval_loss": 0.5}, 1j, 10**400),
        *(np.array([0.5, 0.6]), torch.zeros(2), torch.zeros(0)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_number_is_refused_by_name_and_changes_nothing(metric):
    stopping = EarlyStopping()
    stopping.step(0.5)
    before = stopping.state_dict()
    with pytest.raises(ValueError, match=r"^metric must "):
        stopping.step(metric)
    assert stopping.state_dict() == before


# Arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [("patience", value) for value in (-1, 2.5, "5", True, NAN, INF)]
    + [("min_delta", value) for value in (-0.1, NAN, INF, "0", None, True)]
    + [("mode", value) for value in ("minimum", None, 1, ["min"])]
    + [("min_delta_mode", value) for value in ("rel", None)]
    + [("start_after", value) for value in (-1, 1.5, None)]
    + [("baseline", value) for value in ("0.5", NAN, INF, True)]
    + [("stopping_threshold", value) for value in ("0.5", NAN)]
    + [("divergence_threshold", value) for value in ("0.5", NAN)]
    + [("check_finite", value) for value in (1, None, "yes")]
    + [("restore_best", value) for value in (1, None)]
    + [("patience_unit", value) for value in ("epochs", None, "step")],
)
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be "):
        EarlyStopping(**{argument: value})


def test_patience_in_seconds_may_be_a_fraction():
    assert EarlyStopping(0.5, patience_unit="seconds").patience == 0.5


@pytest.mark.parametrize("value", [-1, NAN, INF, "3", True])
def test_wrong_progress_is_named(value):
    with pytest.raises(ValueError, match=r"^progress must be "):
        EarlyStopping().step(0.5, progress=value)


@pytest.mark.parametrize(("mode", "good", "bad"), [("min", 5.0, 1.0), ("max", 1.0, 5.0)])
def test_thresholds_that_would_stop_every_run_are_refused(mode, good, bad):
    with pytest.raises(ValueError, match="divergence_threshold must not be better than stopping_threshold"):
        EarlyStopping(mode=mode, stopping_threshold=good, divergence_threshold=bad)


# State


def random_case(seed):
    rng = random.Random(seed)
    unit = rng.choice(["evaluations", "steps", "samples", "seconds"])
    settings = {
        "patience": rng.choice([None, 0, 1, 3, 10]) if unit == "evaluations" else rng.choice([None, 0, 100, 700]),
        "min_delta": rng.choice([0.0, 0.05, 0.3]),
        "mode": rng.choice(["min", "max"]),
        "min_delta_mode": rng.choice(["absolute", "relative"]),
        "start_after": rng.choice([0, 0, 3]),
        "baseline": rng.choice([None, None, 0.0]),
        "stopping_threshold": None,
        "divergence_threshold": rng.choice([None, None, 100.0]),
        "check_finite": rng.random() < 0.3,
        "patience_unit": unit,
    }
    if settings["mode"] == "max" and settings["divergence_threshold"] is not None:
        settings["divergence_threshold"] = -100.0
    progress, metrics = 0, []
    for _ in range(25):
        progress += rng.randint(0, 200)
        metric = rng.choice([NAN, INF, -INF]) if rng.random() < 0.08 else round(rng.gauss(0, 1), 1)
        metrics.append((metric, progress))
    return settings, metrics


@pytest.mark.parametrize("seed", range(100))
def test_breaking_off_anywhere_changes_no_decision(seed):
    settings, series = random_case(seed)
    whole = EarlyStopping(**settings)
    states, said = [whole.state_dict()], []
    for metric, progress in series:
        said.append(whole.step(metric, progress=progress))
        states.append(whole.state_dict())
    for broken_at, saved in enumerate(states):
        resumed = EarlyStopping(**settings)
        resumed.load_state_dict(json.loads(json.dumps(saved)))
        rest = [resumed.step(metric, progress=progress) for metric, progress in series[broken_at:]]
        assert rest == said[broken_at:]
        final, expected = resumed.state_dict(), dict(states[-1])
        if settings["patience_unit"] == "seconds":
            final.pop("elapsed_seconds")
            expected.pop("elapsed_seconds")
        assert repr(final) == repr(expected)  # repr, because NaN is not equal to itself


def test_state_is_plain_json_and_holds_no_option():
    stopping = EarlyStopping(patience=3, min_delta=0.1, baseline=0.9)
    decisions(stopping, [np.float32(0.5), torch.tensor(0.6)], [np.int64(10), torch.tensor(20)])
    state = stopping.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert not set(state) & set(stopping.settings)
    assert state == {
        "best_metric": 0.5,
        "best_progress": 10,
        "counter": 1,
        "evaluations": 2,
        "improved": False,
        "metric": torch.tensor(0.6).item(),
        "progress": 20,
        "reason": None,
        "should_stop": False,
        "waiting_since": 10,
        "progress_unit": "evaluations",
        "elapsed_seconds": None,
    }


def test_state_survives_torch_save_with_weights_only(tmp_path):
    stopping = EarlyStopping(patience=2)
    decisions(stopping, [0.5, 0.6])
    torch.save(stopping.state_dict(), tmp_path / "early_stop_state.pt")
    resumed = EarlyStopping(patience=2)
    resumed.load_state_dict(torch.load(tmp_path / "early_stop_state.pt", weights_only=True))
    assert resumed.step(0.7)


def test_options_of_the_later_constructor_are_kept():
    old = EarlyStopping(patience=2)
    decisions(old, [0.5, 0.6])
    new = EarlyStopping(patience=4, min_delta=0.1)
    new.load_state_dict(old.state_dict())
    assert (new.patience, new.min_delta) == (4, 0.1)
    assert decisions(new, [0.45, 0.45, 0.45]) == [False, False, True]


LIMITS = [
    *({"patience": patience} for patience in (0, 1, 3, 100, None)),
    *({"patience": 9, "stopping_threshold": good} for good in (0.55, 0.45)),
    *({"patience": 9, "divergence_threshold": bad} for bad in (0.85, 0.75)),
    *({"patience": patience, "check_finite": False} for patience in (2, 9)),
    {"patience": 3, "start_after": 3},
]


@pytest.mark.parametrize("before", LIMITS, ids=str)
@pytest.mark.parametrize("after", LIMITS, ids=str)
def test_a_stop_is_decided_again_under_the_limits_of_now(before, after):
    """Where those of now go on at the stop, the run is as if they had been given from the start."""
    metrics = [0.9, 0.5, 0.8, 0.7, 0.9, NAN, 0.4, 0.3, 0.6, 0.6]
    old, new, whole = EarlyStopping(**before), EarlyStopping(**after), EarlyStopping(**after)
    stopped_at = next((at for at, metric in enumerate(metrics) if old.step(metric, progress=10 * at)), len(metrics) - 1)
    went_on = [whole.step(metric, progress=10 * at) for at, metric in enumerate(metrics[: stopped_at + 1])]
    new.load_state_dict(old.state_dict())
    if old.should_stop and not any(went_on) and before.get("start_after", 0) == after.get("start_after", 0):
        assert new.state_dict() == whole.state_dict()
    elif before == after:
        assert new.state_dict() == old.state_dict()


def test_a_longer_patience_goes_on_after_a_stop():
    old = EarlyStopping(patience=1)
    decisions(old, [0.5, 0.6])
    new = EarlyStopping(patience=3)
    new.load_state_dict(old.state_dict())
    assert (new.should_stop, new.reason, new.best_metric, new.counter) == (False, None, 0.5, 1)
    assert decisions(new, [0.7, 0.7]) == [False, True]


def test_positions_in_another_unit_are_dropped_and_patience_starts_anew():
    old = EarlyStopping(patience=5)
    decisions(old, [0.5, 0.6])
    new = EarlyStopping(patience=100, patience_unit="steps")
    new.load_state_dict(old.state_dict())
    assert (new.best_metric, new.best_progress, new.counter) == (0.5, None, 1)
    assert decisions(new, [0.6, 0.6, 0.6], [9000, 9099, 9100]) == [False, False, True]


@pytest.mark.parametrize("best", [0.5, torch.tensor(0.5), np.float64(0.5)], ids=["float", "tensor", "numpy"])
def test_state_of_the_original_project_loads(best):
    stopping = EarlyStopping(patience=3)
    stopping.load_state_dict({"best_metric": best, "counter": 2, "should_stop": False})
    assert (stopping.best_metric, stopping.counter, stopping.evaluations) == (0.5, 2, 3)
    assert stopping.reason is None
    assert stopping.step(0.5)


@pytest.mark.parametrize(("patience", "stops"), [(5, True), (50, False)])
def test_original_state_that_had_stopped_stays_so_under_the_same_patience(patience, stops):
    stopping = EarlyStopping(patience=patience)
    stopping.load_state_dict({"best_metric": 0.5, "counter": 5, "should_stop": True})
    assert stopping.should_stop == stops
    assert (stopping.reason is not None) == stops
    assert stopping.step(0.1) == stops


def test_state_from_before_the_last_metric_was_saved_loads():
    old = EarlyStopping(patience=1)
    decisions(old, [0.5, 0.6])
    state = old.state_dict()
    del state["metric"]
    new = EarlyStopping(patience=1)
    new.load_state_dict(state)
    assert new.should_stop
    assert new.reason == old.reason


def test_original_state_before_the_first_evaluation_loads():
    stopping = EarlyStopping()
    stopping.load_state_dict({"best_metric": None, "counter": 0, "should_stop": False})
    assert stopping.state_dict() == EarlyStopping().state_dict()


def test_original_state_with_nan_as_best_has_no_best():
    stopping = EarlyStopping()
    stopping.load_state_dict({"best_metric": NAN, "counter": 1, "should_stop": False})
    stopping.step(0.5)
    assert stopping.best_metric == 0.5


def test_missing_and_unknown_keys_are_named_and_nothing_is_taken():
    stopping = EarlyStopping()
    stopping.step(0.5)
    before = stopping.state_dict()
    broken = dict(before, surprise=1)
    del broken["counter"]
    with pytest.raises(StateMismatch) as caught:
        stopping.load_state_dict(broken)
    assert caught.value.missing == ("counter",)
    assert caught.value.unknown == ("surprise",)
    assert stopping.state_dict() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("best_metric", "0.1"), ("best_metric", True), ("counter", -1), ("counter", 1.5), ("counter", None)),
        *(("evaluations", -1), ("improved", 1), ("should_stop", "no"), ("should_stop", None), ("reason", 3)),
        *(("progress", "x"), ("progress", NAN), ("best_progress", []), ("waiting_since", -1), ("elapsed_seconds", NAN)),
    ],
)
def test_wrong_values_in_a_state_are_named_and_nothing_is_taken(key, value):
    stopping = EarlyStopping(patience_unit="seconds", patience=60)
    stopping.step(0.5, progress=1)
    before = dict(stopping.state_dict(), elapsed_seconds=None)
    with pytest.raises(ValueError, match=key):
        stopping.load_state_dict(dict(stopping.state_dict(), **{key: value}))
    assert dict(stopping.state_dict(), elapsed_seconds=None) == before


@pytest.mark.parametrize("state", [None, [], "state"])
def test_a_state_that_is_no_dict_is_refused(state):
    with pytest.raises(ValueError, match="state must be a dict"):
        EarlyStopping().load_state_dict(state)


# Replay


def log_of(values, *, every=10, metric="eval_loss"):
    rows = []
    for index, value in enumerate(values, start=1):
        rows.append({"loss": 9.0, "learning_rate": 1e-3, "epoch": index / 2, "step": index * every})
        rows.append({metric: value, "eval_runtime": 0.1, "epoch": index / 2, "step": index * every})
    return [*rows, {"train_runtime": 3.0, "train_loss": 1.0, "epoch": len(values) / 2, "step": len(values) * every}]


SERIES = [0.9, 0.5, 0.6, 0.6, 0.3, 0.4]


def test_replay_says_where_the_run_would_have_stopped():
    result = EarlyStopping.replay(log_of(SERIES), patience=2)
    assert (result.stopped_at, result.epoch) == (40, 2.0)
    assert (result.best_metric, result.best_step, result.evaluations) == (0.5, 20, 4)
    assert result.reason == "no improvement on the best, 0.5, in 2 evaluations"
    assert result.steps == (10, 20, 30, 40, 50, 60)
    assert result.values == tuple(SERIES)
    assert result.bests == (0.9, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert result.targets == result.bests
    assert result.saved_steps == 20
    assert result.missed == (50, 0.3)
    assert str(result) == (
        "eval_loss: would have stopped at step 40 of 60 (no improvement on the best, 0.5, in 2 evaluations); "
        "best 0.5 at step 20; a better 0.3 came at step 50"
    )


def test_replay_says_when_the_run_would_not_have_stopped():
    result = EarlyStopping.replay(log_of(SERIES), patience=3)
    assert (result.stopped_at, result.epoch, result.reason, result.missed) == (None, None, None, None)
    assert (result.best_metric, result.best_step, result.evaluations, result.saved_steps) == (0.3, 50, 6, 0)
    assert "would not have stopped in 6 evaluations" in str(result)


def test_replay_agrees_with_live_decisions():
    for seed in range(30):
        settings, series = random_case(seed)
        settings["patience_unit"] = "steps"
        live = EarlyStopping(**settings)
        said = [live.step(metric, progress=step) for metric, step in series]
        rows = [{"eval_loss": metric, "step": step} for metric, step in series]
        result = EarlyStopping.replay(rows, **settings)
        assert result.stopped_at == (series[said.index(True)][1] if True in said else None)
        assert result.best_step == live.best_progress
        assert result.reason == live.reason


def test_replay_counts_patience_in_steps():
    assert EarlyStopping.replay(log_of(SERIES), patience=20, patience_unit="steps").stopped_at == 40
    assert EarlyStopping.replay(log_of(SERIES), patience=21, patience_unit="steps").stopped_at is None


def test_replay_counts_patience_in_a_column_of_the_log():
    rows = [dict(row, seen=row["step"] * 8) for row in log_of(SERIES)]
    result = EarlyStopping.replay(rows, progress="seen", patience=160, patience_unit="samples")
    assert result.stopped_at == 40
    with pytest.raises(ValueError, match="progress must name the column"):
        EarlyStopping.replay(rows, patience=160, patience_unit="samples")
    with pytest.raises(ValueError, match="row 1 of the log has no 'clock'"):
        EarlyStopping.replay(rows, progress="clock", patience=160, patience_unit="seconds")


def test_replay_takes_the_metric_with_or_without_its_prefix():
    rows = log_of(SERIES, metric="eval_accuracy")
    result = EarlyStopping.replay(rows, metric="accuracy", mode="max", patience=3)
    assert result.metric == "eval_accuracy"
    assert result.stopped_at == 40
    assert EarlyStopping.replay(rows, metric="loss", patience=1).metric == "loss"


def test_replay_reads_every_form_of_a_history(tmp_path):
    state = {"log_history": log_of([*SERIES, NAN]), "global_step": 70}
    checkpoint = tmp_path / "checkpoint-70"
    checkpoint.mkdir()
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(state))
    forms = [state["log_history"], state, file, str(file), checkpoint, str(checkpoint)]
    assert {EarlyStopping.replay(form, patience=9).stopped_at for form in forms} == {70}


def test_replay_reads_what_trainer_writes(tmp_path):
    from transformers import TrainerState

    state = TrainerState(log_history=log_of(SERIES))
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert EarlyStopping.replay(tmp_path, patience=2).stopped_at == 40


def test_replay_names_the_metrics_there_are():
    with pytest.raises(MetricNotFound) as caught:
        EarlyStopping.replay(log_of(SERIES), metric="f1")
    assert caught.value.monitor == "f1"
    assert "eval_loss" in caught.value.available
    assert "step" not in caught.value.available


def test_replay_of_an_empty_log_finds_no_metric():
    with pytest.raises(MetricNotFound):
        EarlyStopping.replay([])


def test_replay_of_a_missing_file_says_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        EarlyStopping.replay(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="pass a checkpoint directory"):
        EarlyStopping.replay(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"3", b'{"global_step": 3}', b'{"log_history": 3}', b"[1, 2]"),
        *(b'[{"eval_loss": "low", "step": 1}]', b'[{"eval_loss": null, "step": 1}]', b'[{"eval_loss": 0.5}]'),
        *(b'[{"eval_loss": 0.5, "step": 1.5}]', b'[{"eval_loss": 0.5, "step": -1}]'),
        b'[{"eval_loss": 0.5, "step": 5}, {"eval_loss": 0.5, "step": 4}]',
        b'[{"eval_loss": ' + b"9" * 5000 + b', "step": 1}]',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_replay_of_a_bad_file_names_it(tmp_path, content):
    file = tmp_path / "trainer_state.json"
    file.write_bytes(content)
    with pytest.raises(StateFileError, match=r"trainer_state\.json: ") as caught:
        EarlyStopping.replay(file)
    assert caught.value.path == file


def test_replay_refuses_a_file_beyond_the_bound(tmp_path):
    file = tmp_path / "trainer_state.json"
    with file.open("wb") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    with pytest.raises(StateFileError, match="larger than"):
        EarlyStopping.replay(file)


@pytest.mark.parametrize("history", [3, None, [1], {"log": []}, {"log_history": "rows"}])
def test_replay_of_something_else_is_refused(history):
    with pytest.raises(ValueError, match="history"):
        EarlyStopping.replay(history)


def test_replay_refuses_wrong_settings():
    with pytest.raises(ValueError, match="patience must be"):
        EarlyStopping.replay(log_of(SERIES), patience=-1)
    with pytest.raises(TypeError, match="patiense"):
        EarlyStopping.replay(log_of(SERIES), patiense=1)


# The module


def test_loads_neither_torch_nor_transformers_nor_matplotlib():
    code = (
        "import sys; from hf_lifecycle import EarlyStopping; EarlyStopping().step(0.5);"
        "EarlyStopping.replay([{'eval_loss': 0.5, 'step': 1}]);"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_docstring_examples_run():
    result = doctest.testmod(hf_lifecycle.early_stopping)
    assert result.attempted > 0
    assert result.failed == 0


def test_documentation_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert (tmp_path / "early_stopping.png").stat().st_size > 10_000
