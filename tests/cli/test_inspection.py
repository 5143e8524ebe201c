"""list, show and verify: what there is, whether it is whole, and that nothing in it is obeyed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from trainer.runs import flip

from hf_lifecycle import latest_checkpoint


def test_list_tells_every_checkpoint_newest_first(invoke: Any, run: Path) -> None:
    result = invoke("list", run, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [row["step"] for row in report["checkpoints"]] == [8, 6, 4, 2]
    assert [row["epoch"] for row in report["checkpoints"]] == [2.0, 1.5, 1.0, 0.5]
    assert report["newest"] == "checkpoint-8"
    assert {row["metric"]["name"] for row in report["checkpoints"]} == {"eval_loss"}
    assert all(row["size"] > 0 and row["whole"] and row["created"] for row in report["checkpoints"])


def test_list_passes_over_a_damaged_checkpoint_and_says_why(invoke: Any, run: Path) -> None:
    (run / "checkpoint-8" / "optimizer.pt").unlink()
    result = invoke("list", run)
    assert result.exit_code == 1
    assert "checkpoint-8 is damaged" in result.stdout
    assert "missing" in result.stdout
    assert "newest intact: checkpoint-6" in result.stdout


def test_list_tells_what_was_moved_aside_and_left_behind(invoke: Any, run: Path) -> None:
    (run / "damaged-checkpoint-3").mkdir()
    (run / ".lifecycle" / "staging" / "checkpoint-10").mkdir()
    (run / ".lifecycle" / "parts" / "checkpoint-10").mkdir(parents=True)
    result = invoke("list", run)
    assert result.exit_code == 0
    assert "damaged-checkpoint-3" in result.stdout
    assert os.path.join("staging", "checkpoint-10") in result.stdout
    assert os.path.join("parts", "checkpoint-10") in result.stdout


def test_list_of_an_empty_directory_is_bad_and_of_none_wrong_use(invoke: Any, tmp_path: Path) -> None:
    assert invoke("list", tmp_path).exit_code == 1
    assert invoke("list", tmp_path / "none").exit_code == 2


def test_list_fits_80_columns(invoke: Any, original: Path) -> None:
    lines = invoke("list", original).stdout.splitlines()
    assert max(len(line) for line in lines if str(original.parent) not in line) <= 80


def test_list_adopts_what_stock_trainer_saved(invoke: Any, run: Path) -> None:
    (run / "checkpoint-8" / "lifecycle" / "manifest.json").unlink()
    row = json.loads(invoke("list", run, "--json").stdout)["checkpoints"][0]
    assert (row["step"], row["whole"], row["manifest"], row["created"]) == (8, True, False, None)


def test_show_tells_progress_metric_sources_and_tensors(invoke: Any, run: Path) -> None:
    report = json.loads(invoke("show", run / "checkpoint-8", "--json").stdout)
    assert (report["step"], report["epoch"], report["world_size"]) == (8, 2.0, 1)
    assert (report["weights"]["tensors"], report["weights"]["elements"]) == (4, 49)
    rank = report["ranks"][0]
    assert rank["rng_sources"] == ["numpy", "python", "torch"]
    assert rank["early_stopping"]["evaluations"] == 4
    assert rank["environment"]["torch"]
    text = invoke("show", run / "checkpoint-8").stdout
    assert "4 tensors, 49 elements (4 F32)" in text
    assert "numpy, python, torch" in text


def test_show_of_a_damaged_checkpoint_shows_what_is_wrong(invoke: Any, run: Path) -> None:
    flip(run / "checkpoint-8" / "lifecycle" / "rank-00000.safetensors", 200)
    result = invoke("show", run / "checkpoint-8")
    assert result.exit_code == 1
    assert "damaged" in result.stdout


def test_verify_finds_one_flipped_bit_in_every_file(invoke: Any, original: Path, run: Path) -> None:
    for path in sorted(path for path in (run / "checkpoint-8").rglob("*") if path.is_file()):
        if path.name == "manifest.json":
            continue
        before = path.read_bytes()
        flip(path, len(before) // 2)
        result = invoke("verify", run / "checkpoint-8")
        assert result.exit_code == 1, path
        assert path.name in "".join(result.stdout.split())
        path.write_bytes(before)
    assert invoke("verify", run).exit_code == 0


def test_verify_quick_reads_no_file(invoke: Any, run: Path) -> None:
    weights = run / "checkpoint-8" / "model.safetensors"
    flip(weights, weights.stat().st_size // 2)
    assert invoke("verify", run, "--quick").exit_code == 0
    assert "presence and sizes" in invoke("verify", run, "--quick").stdout


def test_verify_quick_finds_a_cut_file(invoke: Any, run: Path) -> None:
    os.truncate(run / "checkpoint-6" / "model.safetensors", 100)
    report = json.loads(invoke("verify", run, "--quick", "--json").stdout)
    assert [row["whole"] for row in report["checkpoints"]] == [True, False, True, True]


@pytest.mark.parametrize("command", [["list"], ["verify"], ["verify", "--quick"]])
def test_pipe_in_a_checkpoint_does_not_hang(invoke: Any, run: Path, command: list[str]) -> None:
    (run / "checkpoint-8" / "lifecycle" / "manifest.json").unlink()
    os.mkfifo(run / "checkpoint-8" / "extra.safetensors")
    result = invoke(*command, run)
    assert result.exit_code == 1
    assert "not a regular file" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", ["list", "show", "verify"])
@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[" * 100_000,
        b'{"format": "hf_lifecycle.checkpoint", "version": 99}',
        b'{"format": "hf_lifecycle.checkpoint", "version": 1, "files": [{"path": "../../x"}]}',
        b'\xff\xfe{"',
    ],
)
def test_hostile_manifest_is_told_and_not_obeyed(invoke: Any, run: Path, command: str, manifest: bytes) -> None:
    (run / "checkpoint-8" / "lifecycle" / "manifest.json").write_bytes(manifest)
    result = invoke(command, run / "checkpoint-8" if command == "show" else run)
    assert result.exit_code == 1
    assert "damaged" in result.stdout


@pytest.mark.parametrize("name", ["[bold red]x[/]", "[/x]", "\x1b[2Jx", "a\nb", "x\udc80"])
def test_names_are_shown_as_they_are(invoke: Any, run: Path, name: str) -> None:
    (run / f"damaged-checkpoint-{name.replace('/', '')}").mkdir()
    for target in (run, run / name.replace("/", "")):
        result = invoke("list", target)
        assert "\x1b" not in result.stdout + result.stderr
        if "[bold" in name:
            assert "[bold red]" in result.stdout + result.stderr


def test_metric_name_with_markup_is_shown_as_it_is(invoke: Any, run: Path) -> None:
    path = run / "checkpoint-8" / "lifecycle" / "manifest.json"
    path.write_text(path.read_text().replace('"eval_loss"', '"[/]\\u001b[2J"'))
    for command, target in (("list", run), ("show", run / "checkpoint-8")):
        text = invoke(command, target).stdout
        assert "[/]" in text
        assert "\x1b" not in text


def test_list_tells_what_happened_last(invoke: Any, run: Path) -> None:
    invoke("prune", run, "--keep-last", 3)
    report = json.loads(invoke("list", run, "--json").stdout)
    assert [event["event"] for event in report["events"]].count("committed") == 4
    assert report["events"][-1]["facts"] == {"step": 2, "path": "checkpoint-2", "why": "hf-lifecycle prune"}
    text = invoke("list", run, "--events", 1).stdout
    assert "removed, step 2, hf-lifecycle prune" in text
    assert "committed" not in text


def test_hostile_event_log_is_shown_as_it_is(invoke: Any, run: Path) -> None:
    line = {"time": "2026-01-31T12:00:00+00:00", "event": "[/]\x1b[2J", "step": "x", "seconds": "[bold]", "bytes": True}
    (run / "lifecycle.jsonl").write_text(json.dumps(line) + "\n{torn\n[]\n")
    result = invoke("list", run)
    assert result.exit_code == 0
    assert "[/]" in result.stdout
    assert "\x1b" not in result.stdout


def test_checkpoint_that_was_passed_over_is_in_the_list_with_the_reason(run: Path, invoke: Any) -> None:
    weights = run / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert latest_checkpoint(run) == str(run / "checkpoint-6")
    shown = " ".join(invoke("list", run).stdout.split())
    assert "skipped" in shown
    assert "digest differs" in shown
