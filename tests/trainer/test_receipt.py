"""Each resume leaves a receipt: what was verified, restored, proved and repaired, and what differs."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.store import problems_of
from hf_lifecycle.checkpoint.inspection.receipt import KEPT, last_receipt_of, read_receipts, write_receipt
from hf_lifecycle.cli.app import app

from .runs import images, new_trainer, saved_run, tiny_vit


class Average:
    """An object of the user's."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": torch.zeros(2)}

    def load_state_dict(self, state: Any) -> None:
        assert set(state) == {"value"}


def test_receipt_of_an_exact_resume_tells_all_and_leaves_the_checkpoint_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how: dict[str, Any] = {"train": images(), "evaluated": images()}
    checkpoint = saved_run(tmp_path, callback=LifecycleCallback(objects={"ema": Average()}), model=tiny_vit(), **how)
    assert read_receipts(tmp_path) == []
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(objects={"ema": Average()}), model=tiny_vit(), **how).train(
            resume_from_checkpoint=latest_checkpoint(tmp_path)
        )
    (receipt,) = read_receipts(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "lifecycle.jsonl").read_text().splitlines()]
    begun = {event["event"]: event["attempt"] for event in events if "attempt" in event}
    assert (receipt["attempt"], receipt["saved_by"]) == (begun["resumed"], begun["started"])
    assert (receipt["checkpoint"], receipt["step"], receipt["exact"]) == ("checkpoint-4", 4, True)
    assert receipt["verified"]["files"] > 5
    assert receipt["verified"]["bytes"] > 10_000
    assert {"position", "early stopping", "randomness", "objects: ema"} <= set(receipt["restored"])
    assert receipt["proved"]["model tensors"] > 10
    assert any("attention" in name for name in receipt["repaired"]), "what Trainer loses of a ViT"
    assert (receipt["differences"], receipt["why_not_exact"]) == ([], [])
    assert f"receipt: {tmp_path / '.lifecycle' / 'receipts' / receipt['attempt']}.json" in caplog.text
    assert problems_of(checkpoint, full=True) == []
    listed = CliRunner().invoke(app, ["list", str(tmp_path)]).output
    shown = CliRunner().invoke(app, ["show", str(checkpoint)]).output
    for text in (listed, shown):
        assert "checkpoint-4, step 4" in text
        assert "every byte of" in text
    assert last_receipt_of(tmp_path / "checkpoint-6", begun["resumed"]) is None


def test_receipt_of_an_inexact_resume_says_why(tmp_path: Path) -> None:
    saved_run(tmp_path)
    trainer = new_trainer(tmp_path, LifecycleCallback(strict=False), max_grad_norm=0.5)
    trainer.train(resume_from_checkpoint=True)
    (receipt,) = read_receipts(tmp_path)
    assert receipt["exact"] is False
    assert any("max_grad_norm" in reason for reason in receipt["why_not_exact"])
    assert {"grade": "breaks exactness", "what": "max_grad_norm: 1.0 -> 0.5 (breaks exactness)"} in receipt[
        "differences"
    ]
    assert "not exact" in CliRunner().invoke(app, ["list", str(tmp_path)]).output


def a_receipt(attempt: str) -> dict[str, Any]:
    return {"format": 1, "attempt": attempt, "checkpoint": "checkpoint-4", "saved_by": "other", "time": "2026-01-31"}


def test_the_last_receipts_are_kept_and_what_is_no_receipt_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(KEPT + 3):
        file = write_receipt(tmp_path, a_receipt(f"{number:02}"))
        assert file is not None
        os.utime(file, (number, number))
    folder = tmp_path / ".lifecycle" / "receipts"
    assert sorted(path.name for path in folder.iterdir()) == [f"{number:02}.json" for number in range(3, KEPT + 3)]
    (folder / "torn.json").write_text('{"format": 1')
    (folder / "newer.json").write_text('{"format": 2}')
    (folder / "odd.json").write_text('{"format": 1, "time": "1970", "verified": 3, "why_not_exact": [null]}')
    (folder / "link.json").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.json")
    assert len(read_receipts(tmp_path)) == KEPT + 1
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert read_receipts(tmp_path) == []
    assert write_receipt(tmp_path, a_receipt("x")) is None
    assert "the receipt of this resume could not be written" in caplog.text
