"""Other data under a custom loop that is resumed between two epochs, where no batch made ahead tells of it.

Nothing is named where the data is the same, nor of loaders that the program makes anew in each epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hf_lifecycle.checkpoint.inspection.receipt import read_receipts
from tests.accelerator.tiny import new_script
from tests.field.limits import Limit
from tests.resume.cases.tiny import Rows

OTHER_PARTS = Limit(
    what="The dataset, the sampler, the batch sampler or the `collate_fn` of a loader that a loop prepares is of "
    "another class than when the run began, or a plain value of dataset or `collate_fn` is another one",
    when="at the resume",
    line=(
        "maybe not exact: the … of … was … when the run started, and is … now: the resume is exact only if both make "
        "the same batches"
    ),
)


class _Flipped(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: one.flip(-1) if one.dim() else one for name, one in super().__getitem__(index).items()}


def _collate(rows: list[Any]) -> Any:
    return torch.utils.data.default_collate(rows)


@pytest.mark.parametrize(
    ("loader", "told"),
    [
        ({}, ""),
        ({"dataset": Rows(seed=2)}, "not exact: the training data has other rows than when the run started (load"),
        ({"dataset": _Flipped()}, "maybe not exact: the dataset of loader 0 was Rows when the run started, and is _Fl"),
        ({"shuffle": False}, "maybe not exact: the sampler of loader 0 was RandomSampler when the run "),
        ({"collate_fn": _collate}, "maybe not exact: the collate_fn of loader 0 was default_collate when the run s"),
    ],
)
@pytest.mark.parametrize("prepared_late", [False, True])
def test_other_data_is_named_on_a_resume_between_two_epochs(
    loader: dict[str, Any], told: str, prepared_late: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: dict[str, Any] = {"dataset": Rows(), "shuffle": True, "batch_size": 4}
    new_script(tmp_path).run(save_at=(6,), stop_at=6).manager.close()
    for step in (12, 18):  # the second checkpoint is of the run that went on with other data
        caplog.clear()
        again = new_script(tmp_path)
        again.accelerator._dataloaders.clear()
        for late in (False, True):
            if late == prepared_late:
                again.loader = again.accelerator.prepare(DataLoader(**{**made, **loader}))
            if not late:
                again.manager.resume()
        is_named_at_resume = told in caplog.text
        again.run(epochs=step // 6, save_at=(step,)).manager.close()
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)
        if told.startswith("maybe"):
            OTHER_PARTS.require_told(caplog.text)
        assert is_named_at_resume != prepared_late or not told
        if not prepared_late:
            (receipt,) = (one for one in read_receipts(tmp_path) if one["step"] == step - 6)
            assert receipt["exact"] is (not told)


def test_loaders_of_other_data_in_each_epoch_are_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for stop in (6, 24):
        script = new_script(tmp_path)
        script.manager.resume()
        for epoch in script.manager.epochs(4):
            loader = script.accelerator.prepare(DataLoader(Rows(seed=epoch), shuffle=epoch < 2, batch_size=4))
            for batch in script.manager.batches(loader):
                script.train(batch)
            script.manager.save()
            if script.manager.progress.step == stop:
                break
        script.manager.close()
    assert caplog.text == ""
