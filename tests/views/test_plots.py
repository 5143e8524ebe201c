"""The picture of a replay shows what the replay says, and touches nothing global."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.views.plots import plot_replay

LONG = [0.42 + 1.6 * math.exp(-i / 5) + 0.01 * math.sin(5 * i) for i in range(1, 41)]


def replay_of(values, **settings):
    rows = [{"eval_loss": value, "step": 100 * step} for step, value in enumerate(values, start=1)]
    return EarlyStopping.replay(rows, **settings)


def line(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure):
    return "\n".join(text.get_text() for text in figure.texts)


def test_metric_best_band_and_stop_are_drawn_where_they_were():
    replay = replay_of([0.9, 0.5, 0.45, 0.6, 0.7, 0.4], patience=2, min_delta=0.1)
    figure = replay.plot()
    axes = figure.axes[0]
    assert list(line(axes, "eval_loss").get_xdata()) == [100, 200, 300, 400]
    assert list(line(axes, "eval_loss").get_ydata()) == [0.9, 0.5, 0.45, 0.6]
    assert list(line(axes, "the rest of the run").get_ydata()) == [0.6, 0.7, 0.4]
    assert list(line(axes, "best that counted").get_ydata()) == [0.9, 0.5, 0.5, 0.5]
    assert list(line(axes, "stop at step 400").get_xdata()) == [400, 400]
    (band,) = [patch for patch in axes.collections if patch.get_label() == "within min_delta: not counted"]
    corners = band.get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (0.4, 0.9)


def test_headline_and_settings_are_written_out():
    figure = replay_of([0.9, 0.5, 0.6, 0.7, 0.4], patience=2, min_delta=0.01, start_after=1).plot()
    assert "Stop at step 400 of 500, before a better 0.4 at step 500" in texts(figure)
    assert "patience 2 evaluations, min_delta 0.01, first 1 only watched" in texts(figure)
    assert "no improvement on the best, 0.5, by more than 0.01 in 2 evaluations" in texts(figure)


def test_headline_says_what_was_saved_where_nothing_was_missed():
    figure = replay_of([0.9, 0.5, 0.6, 0.7, 0.6], patience=2).plot()
    assert "Stop at step 400 of 500: 100 steps saved, nothing better missed" in texts(figure)


def test_stop_at_the_last_evaluation_saves_nothing():
    figure = replay_of([0.5, 0.6, 0.7], patience=2).plot()
    assert "Stop at step 300 of 300\n" in texts(figure)
    assert "the rest of the run" not in legend(figure)


def test_a_run_that_was_not_stopped_says_so():
    figure = replay_of([0.9, 0.5, 0.4], patience=None).plot()
    assert "No stop in 3 evaluations" in texts(figure)
    assert "no patience limit" in texts(figure)
    assert not any(label.startswith("stop at") for label in legend(figure))


def test_axes_are_labelled_with_the_direction():
    replay = replay_of([0.1, 0.2], mode="max")
    assert replay.plot().axes[0].get_ylabel() == "eval_loss (higher is better)"
    assert replay.plot().axes[0].get_xlabel() == "optimizer step"


def test_thresholds_baseline_and_non_finite_metrics_are_drawn():
    replay = replay_of(
        [0.9, math.nan, 0.4, math.inf, 0.3],
        check_finite=False,
        baseline=0.5,
        stopping_threshold=0.1,
        divergence_threshold=2.0,
        patience=5,
    )
    figure = replay.plot()
    axes = figure.axes[0]
    assert list(line(axes, "not finite").get_xdata()) == [200, 400]
    limits = {"baseline 0.5": 0.5, "stopping threshold 0.1": 0.1, "divergence threshold 2": 2.0}
    assert {label: set(line(axes, label).get_ydata()) for label in limits} == {key: {at} for key, at in limits.items()}
    assert set(legend(figure)) > {*limits, "not finite"}


def test_hollow_dots_are_the_evaluations_that_did_not_count():
    axes = replay_of([0.9, 0.5, 0.6, 0.4], patience=3).plot().axes[0]
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert {str(dot.get_markerfacecolor()): list(dot.get_xdata()) for dot in dots} == {
        "#0072B2": [100, 200, 400],
        "white": [300],
    }


def test_a_long_curve_gets_a_close_up_of_best_and_stop():
    replay = replay_of(LONG, patience=5, min_delta=0.01)
    figure = replay.plot()
    whole, close = figure.axes
    left, right = close.get_xlim()
    assert left < replay.best_step < replay.stopped_at < right
    assert right - left < (whole.get_xlim()[1] - whole.get_xlim()[0]) / 1.5
    low, high = close.get_ylim()
    assert low < replay.targets[-1] < replay.best_metric < high


def test_a_short_run_gets_no_close_up():
    assert len(replay_of([0.9, 0.5, 0.6], patience=5).plot().axes) == 1


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ([0.5], {}),
        ([math.nan], {}),
        ([math.nan] * 20, {"check_finite": False}),
        ([0.5] * 30, {"patience": 3, "min_delta": 0.1}),
        ([math.inf, -math.inf, 0.5], {"check_finite": False}),
        ([-math.inf] + [0.5] * 20, {"check_finite": False, "min_delta": 0.1, "patience": 4}),
        (LONG, {"baseline": 0.0, "patience": 3}),
        (LONG, {"start_after": 39}),
        (LONG, {"start_after": 100}),
        ([value * 1e300 for value in LONG], {"patience": 5, "min_delta": 0.01, "min_delta_mode": "relative"}),
        ([-value for value in LONG], {"patience": 5, "mode": "max", "min_delta": 0.01}),
    ],
)
def test_every_case_renders_without_a_warning(tmp_path, recwarn, values, settings):
    replay_of(values, **settings).plot().savefig(tmp_path / "plot.png", dpi=40)
    assert [str(warning.message) for warning in recwarn] == []
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_no_global_state_of_matplotlib_is_touched():
    code = (  # copy(), because to look up rcParams["backend"] imports pyplot
        "import sys, matplotlib; before = matplotlib.rcParams.copy();"
        "from hf_lifecycle import EarlyStopping;"
        "EarlyStopping.replay([{'eval_loss': 0.5, 'step': 1}]).plot();"
        "sys.exit('matplotlib.pyplot' in sys.modules or matplotlib.rcParams.copy() != before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    replay = replay_of([0.5])
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what the import system takes for "not there"
    with pytest.raises(ImportError, match=r'pip install "hf-lifecycle\[plot\]"'):
        plot_replay(replay)
