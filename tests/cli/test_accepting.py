"""accept: what a person edited is shown, and accepted once they say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer.runs import flip
from typer.testing import CliRunner, Result

from hf_lifecycle.checkpoint.directory.manifest import MANIFEST
from hf_lifecycle.cli.app import app


def edit(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))


def answer(checkpoint: Path, text: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["accept", str(checkpoint), *options], input=text, env={"COLUMNS": "80"})


def test_accept_shows_what_differs_and_asks(invoke: Any, run: Path) -> None:
    checkpoint = run / "checkpoint-8"
    edit(checkpoint, best_metric=0.125)
    before = (checkpoint / MANIFEST).read_bytes()
    for text in ("n\n", ""):
        declined = answer(checkpoint, text)
        assert declined.exit_code == 1
        assert (checkpoint / MANIFEST).read_bytes() == before
    assert "not accepted" not in declined.stdout  # before the answer
    assert "trainer_state.json" in declined.stdout
    assert "best_metric" in declined.stdout
    assert "0.125" in declined.stdout
    accepted = answer(checkpoint, "y\n")
    assert accepted.exit_code == 0, accepted.output
    assert "accepted" in accepted.stdout
    assert invoke("verify", run).exit_code == 0
    shown = invoke("show", checkpoint)
    assert shown.exit_code == 0
    assert "edited by hand" in shown.stdout
    assert json.loads(invoke("show", checkpoint, "--json").stdout)["accepted"][0]["files"] == ["trainer_state.json"]
    assert "accepted" in invoke("list", run).stdout


def test_accept_without_asking(invoke: Any, run: Path) -> None:
    edit(run / "checkpoint-8", best_metric=0.125)
    assert invoke("accept", run / "checkpoint-8", "--yes").exit_code == 0
    again = invoke("accept", run / "checkpoint-8")
    assert again.exit_code == 0
    assert "nothing to accept" in again.stdout


def test_json_shows_and_accepts_only_with_yes(invoke: Any, run: Path) -> None:
    edit(run / "checkpoint-8", best_metric=0.125)
    shown = invoke("accept", run / "checkpoint-8", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["accepted"]) == (1, False)
    found = json.loads(invoke("accept", run / "checkpoint-8", "--json", "--yes").stdout)
    assert found["accepted"]
    (changed,) = found["edits"]
    assert changed["path"] == "trainer_state.json"
    assert changed["was"]["xxh3_128"] != changed["now"]["xxh3_128"]
    assert (changed["values"]["global_step"], changed["values"]["best_metric"]) == ("8", "0.125")


def test_keys_that_changed_are_shown_where_a_copy_of_before_exists(invoke: Any, run: Path) -> None:
    state = run / "checkpoint-8" / "trainer_state.json"
    state.with_name("trainer_state.json.bak").write_bytes(state.read_bytes())
    edit(run / "checkpoint-8", max_steps=12, note="by hand")
    (changed,) = json.loads(invoke("accept", run / "checkpoint-8", "--json").stdout)["edits"]
    assert changed["old_copy"] == str(state) + ".bak"
    assert changed["changes"] == ["max_steps: 8 -> 12", "note: - -> 'by hand'"]
    text = answer(run / "checkpoint-8", "n\n").stdout
    assert "max_steps: 8 -> 12" in text


def test_damaged_tensors_are_refused_whatever_else_was_edited(invoke: Any, run: Path) -> None:
    checkpoint = run / "checkpoint-8"
    before = (checkpoint / MANIFEST).read_bytes()
    edit(checkpoint, best_metric=0.125)
    flip(checkpoint / "model.safetensors", -1)
    assert "damaged" in invoke("verify", checkpoint).stdout
    result = invoke("accept", checkpoint, "--yes")
    assert result.exit_code == 1
    assert "refused" in result.stdout
    assert "model.safetensors" in result.stdout
    assert (checkpoint / MANIFEST).read_bytes() == before


def test_checkpoint_without_manifest_has_nothing_to_accept(invoke: Any, run: Path) -> None:
    (run / "checkpoint-8" / MANIFEST).unlink()
    result = invoke("accept", run / "checkpoint-8", "--yes")
    assert result.exit_code == 2
    assert "no manifest" in result.stderr


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_edited_checkpoint_is_called_so_with_the_way_on(invoke: Any, run: Path, command: str) -> None:
    edit(run / "checkpoint-8", note="by hand")
    result = invoke(command, run if command == "list" else run / "checkpoint-8")
    assert result.exit_code == 1
    assert "edited" in result.stdout
    assert "damaged" not in result.stdout
    assert "hf-lifecycle accept" in " ".join(result.stdout.split())


def test_copy_outside_a_run_gets_neither_log_nor_lock(invoke: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    copy = (run / "checkpoint-8").rename(tmp_path / "alone" / "checkpoint-8")
    edit(copy, best_metric=0.125)
    assert invoke("accept", copy, "--yes").exit_code == 0
    assert [path.name for path in copy.parent.iterdir()] == ["checkpoint-8"]
