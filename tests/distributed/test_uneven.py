"""Ranks with unlike numbers of batches save together where they save equally often; else an error comes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle.errors import UnsupportedTraining
from hf_lifecycle.hosts.accelerate.iteration.uneven import agreed_step

from .launching import launch, told

SCRIPT = "tests.distributed.uneven_script"


@pytest.mark.parametrize(
    ("places", "step"),
    [
        ([[4, 0, False], [4, 0, False]], 4),
        ([[10, 1, True], [8, 1, True]], 10),
        ([[20, 2, True], [20, 3, False]], 20),  # each counts its own steps
        ([[10, 0, False], [8, 1, True]], None),
        ([[20, 2, True], [24, 3, True]], None),
    ],
)
def test_ranks_agree_on_a_step_where_they_are_at_one_place(places: Any, step: int | None) -> None:
    if step is not None:
        assert agreed_step(places) == step
        return
    with pytest.raises(UnsupportedTraining, match=r"unlike numbers of batches: call save\(\) as often") as it:
        agreed_step(places)
    assert f"rank 1 saves at step {places[1][0]}, at the end of epoch {places[1][1] - 1}" in str(it.value)


def _run(folder: Path, name: str, epochs: int, every: int = 0, kind: str = "sgd") -> tuple[int, str, Any]:
    answers = folder / f"{name}-{epochs}"
    answers.mkdir()
    code, output = launch("torchrun", 2, SCRIPT, folder / name, answers, str(epochs), str(every), kind)
    return code, output, told(answers, 2)


@pytest.mark.slow
def test_uneven_ranks_save_together_and_resume_exactly(tmp_path: Path) -> None:
    code, output, whole = _run(tmp_path, "whole", 3)
    assert code == 0, output
    assert {path.name for path in (tmp_path / "whole").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (5, 10, 15)
    }
    _, _, first = _run(tmp_path, "broken", 2)
    code, output, second = _run(tmp_path, "broken", 3)
    assert code == 0, output
    assert "not exact" not in output
    for before, after, one in zip(first, second, whole, strict=True):
        assert after["resumed"] == "checkpoint-10"
        assert before["seen"] + after["seen"] == one["seen"]
        assert after["digests"] == one["digests"]


@pytest.mark.slow
def test_what_uneven_ranks_cannot_do_is_told_at_the_save(tmp_path: Path) -> None:
    """Rank 1 has three batches an epoch, and no save after its last one; rank 0 saves after its fourth."""
    code, output, ranks = _run(tmp_path, "within", 3, every=2)
    assert code != 0
    assert "UnsupportedTraining: " in ranks[0]["error"], output
    assert "save() within join_uneven_inputs: rank 1 has no more batches in this pass" in ranks[0]["error"]
    assert "call save() as often on every rank" in ranks[0]["error"]
    assert ranks[0]["seconds"] < 30
    code, output, ranks = _run(tmp_path, "kept", 2, kind="adam")
    assert code == 0, output
    assert output.count("not exact: the ranks took unlike numbers of steps (5, 3), so what their optimizers keep") == 2
