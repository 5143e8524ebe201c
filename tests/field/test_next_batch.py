"""A resumed run whose next batch is another than the run would have had says so before it trains on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.data.batch_marks import mark_of
from tests.accelerator.tiny import new_script
from tests.field.limits import Limit
from tests.resume.cases.tiny import Rows as LoopRows
from tests.trainer.runs import Rows, Stream, break_off, new_trainer

ANOTHER_BATCH = Limit(
    what="Batches that depend on what no save has: an environment variable, a file that changes, a cache in workers",
    when="at the resume",
    line=(
        "not exact: …the next batch differs from the one that the run would have trained on: its rows depend on "
        "something that has changed since the save. Let dataset, collator and sampler depend only on the epoch and "
        "on plain values of their own, or give them state_dict() and load_state_dict()"
    ),
)
SCALE = "SCALE_OF_A_TEST"


def _scale() -> float:
    return float(os.environ.get(SCALE, "1"))


class ScaledRows(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: one * _scale() for name, one in super().__getitem__(index).items()}


class ScaledStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        return ({name: one * _scale() for name, one in row.items()} for row in super().__iter__())


@pytest.mark.parametrize(
    ("kind", "workers", "scale"),
    [
        pytest.param(ScaledRows, 0, "2", id="rows"),
        pytest.param(ScaledRows, 2, "2", id="rows by workers"),
        pytest.param(ScaledRows, 2, "1", id="the same rows by workers"),
        pytest.param(ScaledStream, 0, "2", id="a stream"),
        pytest.param(ScaledStream, 2, "2", id="a stream by workers"),
        pytest.param(ScaledStream, 2, "1", id="the same stream by workers"),
    ],
)
def test_next_batch_is_compared(
    kind: Any, workers: int, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def make() -> Any:
        # From the middle of the second epoch, where workers were ahead by several batches.
        return new_trainer(tmp_path, LifecycleCallback(), train=kind(32), max_steps=12, dataloader_num_workers=workers)

    monkeypatch.setenv(SCALE, "1")
    break_off(make(), step=10)
    monkeypatch.setenv(SCALE, scale)
    break_off(make(), at="on_step_end", step=11, resume=True)
    assert ANOTHER_BATCH.is_told_in(caplog.text) is (scale == "2")
    assert caplog.text.count("the next batch") == (scale == "2")


@pytest.mark.parametrize("scale", ["1", "2"], ids=["the same", "another"])
def test_next_batch_of_a_loop_is_compared(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = LoopRows.__getitem__
    monkeypatch.setattr(
        LoopRows, "__getitem__", lambda self, index: {name: one * _scale() for name, one in row(self, index).items()}
    )
    monkeypatch.setenv(SCALE, "1")
    new_script(tmp_path).run(save_at=[8], stop_at=9).manager.close()
    monkeypatch.setenv(SCALE, scale)
    resumed = new_script(tmp_path)
    resumed.manager.resume()
    resumed.run().manager.close()
    assert ANOTHER_BATCH.is_told_in(caplog.text) is (scale == "2")


@pytest.mark.parametrize(
    "one",
    [
        torch.arange(9000.0).reshape(30, 300),
        torch.arange(9000.0).reshape(30, 300).t(),
        torch.arange(9.0).bfloat16(),
        torch.arange(9.0).to(torch.complex64).conj(),
        torch.tensor(3),
        torch.arange(9000.0).numpy(),
        np.arange(9)[::2],
        {"a": [torch.tensor([True, False])]},
    ],
    ids=[
        "large",
        "large and transposed",
        "bfloat16",
        "conjugate",
        "a scalar",
        "an array",
        "a part of an array",
        "nested",
    ],
)
def test_mark_is_of_the_values(one: Any) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {"a": [~value["a"][0]]}
        return value + 1

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {"a": [value["a"][0].clone()]}
        return value.clone() if isinstance(value, torch.Tensor) else value.copy()

    assert mark_of(one) == mark_of(copied(one)) != mark_of(changed(one))


def test_mark_of_what_has_no_values_is_one() -> None:
    odd = [torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), np.array(["a", None]), "text", object(), 3.5]
    assert mark_of(odd) == mark_of([])
