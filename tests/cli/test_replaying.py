"""replay: the answer is EarlyStopping's own, from the newest log there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle import EarlyStopping


def test_replay_tells_what_early_stopping_tells(invoke: Any, original: Path) -> None:
    expected = EarlyStopping.replay(original / "checkpoint-8", patience=0, min_delta=0.1)
    result = invoke("replay", original, "--patience", 0, "--min-delta", 0.1, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (report["stopped_at"], report["best_step"]) == (expected.stopped_at, expected.best_step)
    assert report["stopped_at"] is not None
    assert f"would have stopped at step {expected.stopped_at}" in invoke(
        "replay", original, "--patience", 0, "--min-delta", 0.1
    ).stdout  # fmt: skip


@pytest.mark.parametrize("target", ["", "checkpoint-8", "checkpoint-8/trainer_state.json"])
def test_replay_takes_a_directory_a_checkpoint_or_a_file(invoke: Any, original: Path, target: str) -> None:
    report = json.loads(invoke("replay", original / target, "--patience", 3, "--json").stdout)
    assert (report["evaluations"], report["stopped_at"], report["mode"]) == (4, None, "min")


def test_replay_passes_over_a_damaged_checkpoint(invoke: Any, run: Path) -> None:
    (run / "checkpoint-8" / "trainer_state.json").unlink()
    report = json.loads(invoke("replay", run, "--patience", 3, "--json").stdout)
    assert report["history"].endswith("checkpoint-6")


def test_plot_is_a_picture(invoke: Any, original: Path, tmp_path: Path) -> None:
    assert invoke("replay", original, "--patience", 1, "--plot", tmp_path / "stop.png").exit_code == 0
    assert (tmp_path / "stop.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ["--patience", "3", "--metric", "[/nope]"],
        ["--patience", "x"],
        ["--patience", "3", "--mode", "up"],
        ["--patience", "3", "--min-delta", "-1"],
        ["--patience", "3", "--min-delta", "nan"],
        ["--patience", "3", "--plot", "picture.nosuchformat"],
        [],
    ],
)
def test_wrong_settings_are_wrong_use(invoke: Any, original: Path, options: list[str]) -> None:
    result = invoke("replay", original, *options)
    assert result.exit_code == 2
    assert result.stderr


def test_log_that_is_none_is_bad(invoke: Any, tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("b.json", "[1]"), ("c.json", '{"log_history": 3}')):
        (tmp_path / name).write_text(text)
        assert invoke("replay", tmp_path / name, "--patience", 1).exit_code == 1
    assert invoke("replay", tmp_path / "none.json", "--patience", 1).exit_code == 2
