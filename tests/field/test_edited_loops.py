"""A script with a custom loop that was edited between two starts: other code, another model, other settings are named.

Nothing is named where the program is the same, wherever it calls ``resume()``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader

from hf_lifecycle import ResumeMismatch, TrainingStateManager, latest_checkpoint
from tests.field.limits import Limit
from tests.field.test_edited_program import OTHER_CODE, OTHER_MODEL
from tests.field.test_other_data import OTHER_PARTS
from tests.resume.harness import forget_last_attempt

SOURCE = """
import torch

file_of_rows, share = PATH, DROPOUT

class Rows(torch.utils.data.Dataset):
    def __init__(self, transform=float):
        self.transform = transform
        self.path, self.scale = file_of_rows, 1.0
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.full((4,), float(self.transform(index)) * ROW * self.scale)

def shifted(value):
    return value + TRANSFORM

def stacked(rows):
    return torch.stack(rows) * COLLATE

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.dropout = torch.nn.Dropout(share)
    @torch.no_grad()
    def norm(self):
        return NORM
    def forward(self, x):
        return self.layer(self.dropout(x)) * FORWARD

class Descent(torch.optim.SGD):
    def step(self, closure=None):
        for _ in range(STEPS):
            super().step()

class Average:
    value = 0.0
    def update(self, loss):
        self.value = AVERAGE * self.value + loss
    def state_dict(self):
        return {"value": self.value}
    def load_state_dict(self, state):
        self.value = state["value"]

def factor(epoch):
    return FACTOR ** epoch
"""
NUMBERS = {"ROW": 1, "TRANSFORM": 1, "COLLATE": 1, "DROPOUT": 0.0, "NORM": 1, "FORWARD": 1, "STEPS": 1}
NUMBERS |= {"AVERAGE": 0.5, "FACTOR": 0.9, "PATH": "'rows.txt'"}
EDITS = {
    "ROW": ("Rows.__getitem__", OTHER_CODE),
    "TRANSFORM": ("shifted", OTHER_CODE),
    "COLLATE": ("stacked", OTHER_CODE),
    "NORM": ("Net.norm", OTHER_CODE),
    "FORWARD": ("Net.forward", OTHER_CODE),
    "STEPS": ("Descent.step", OTHER_CODE),
    "AVERAGE": ("Average.update", OTHER_CODE),
    "FACTOR": ("factor", OTHER_CODE),
    "DROPOUT": ("model 0.dropout.p: 0.0 -> 0.3", OTHER_MODEL),
    "PATH": ("dataset.path of loader 0 was 'rows.txt' when the run started, and is '3' now", OTHER_PARTS),
}


def _source(edit: str) -> dict[str, Any]:
    """What a script defines, with one number edited."""
    other = {"PATH": "'3'", "DROPOUT": 0.3}.get(edit, 3)
    numbers = {**NUMBERS, edit: other} if edit else NUMBERS
    scope: dict[str, Any] = {"__name__": "__main__"}
    text = SOURCE
    for name, value in numbers.items():
        text = text.replace(name, str(value))
    exec(text, scope)
    return scope


def _train(
    folder: Path,
    *,
    edit: str = "",
    epochs: int,
    resumes: str = "always",
    optimizer: Callable[[Any], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    before_loop: Callable[[Any, Any, Any], object] = lambda *_: None,
    prepares: bool = True,
    size: int = 2,
    scales_at: int | None = None,
) -> torch.Tensor:
    """Train so many epochs, each of which ends with a save.

    Args:
        resumes: "always", if there is something, or "late".
        prepares: Whether the loader is prepared.
        size: Of a batch.
        scales_at: The epoch from which the rows are scaled.
    """
    forget_last_attempt()
    torch.manual_seed(0)
    made = _source(edit)
    accelerator, average = Accelerator(cpu=True), made["Average"]()
    net = made["Net"]()
    own = (optimizer or (lambda model: made["Descent"](model.parameters(), lr=0.01)))(net)
    loader = DataLoader(made["Rows"](made["shifted"]), size, shuffle=True, collate_fn=made["stacked"])
    manager = TrainingStateManager(accelerator, folder, objects={"average": average}, signals=())
    schedule = schedule or (lambda one: LambdaLR(one, made["factor"]))
    model, own, scheduler = accelerator.prepare(net, own, schedule(own))
    if prepares:
        loader = accelerator.prepare(loader)

    def step(batch: Any) -> None:
        accelerator.backward(model(batch).mean())
        own.step()
        own.zero_grad()

    if resumes == "late":
        for batch in loader:
            step(batch)
    if resumes != "if there is one" or latest_checkpoint(folder) is not None:
        manager.resume()
    before_loop(net, own.optimizer, loader.dataset)
    for epoch in manager.epochs(epochs):
        if epoch == scales_at:
            loader.dataset.scale = 0.5
        for batch in manager.batches(loader):
            step(batch)
        scheduler.step()
        manager.save()
    manager.close()
    return net.layer.weight.detach()


@pytest.mark.parametrize("edit", ["", *EDITS])
@pytest.mark.parametrize("resumes", ["always", "if there is one", "late"])
def test_edit_is_named_and_nothing_is_without_one(
    edit: str, resumes: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train(tmp_path, epochs=1, resumes=resumes)
    caplog.clear()
    _train(tmp_path, edit=edit, epochs=2, resumes=resumes)
    if edit:
        what, limit = EDITS[edit]
        assert what in caplog.text
        limit.require_told(caplog.text)
    assert len(caplog.records) == bool(edit), caplog.text


@pytest.mark.parametrize("edit", ["", "ROW", "TRANSFORM", "COLLATE", "PATH"])
def test_edit_of_what_makes_batches_of_a_loader_that_is_not_prepared_is_named(
    edit: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for resumed in (False, True):
        assert caplog.text == ""
        _train(tmp_path, edit=edit if resumed else "", epochs=1 + resumed, prepares=False)
    if edit:
        what, limit = EDITS[edit]
        assert what.replace("loader 0", "loader") in caplog.text
        limit.require_told(caplog.text)
    assert len(caplog.records) == bool(edit), caplog.text


@pytest.mark.parametrize("prepares", [True, False])
def test_other_size_of_batches_is_refused_whether_the_loader_is_prepared_or_not(prepares: bool, tmp_path: Path) -> None:
    _train(tmp_path, epochs=1, prepares=prepares)
    with pytest.raises(ResumeMismatch, match=f"loader{' 0' if prepares else ''}, batch_size: 2 -> 4"):
        _train(tmp_path, epochs=2, prepares=prepares, size=4)


def test_what_is_set_in_the_data_of_a_loader_that_is_not_prepared_is_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _train(tmp_path / "whole", epochs=4, prepares=False, scales_at=1)
    _train(tmp_path / "broken", epochs=2, prepares=False, scales_at=1)
    assert torch.equal(whole, _train(tmp_path / "broken", epochs=4, prepares=False, scales_at=1))
    assert caplog.text == ""


def _set(model: Any, optimizer: Any, dataset: Any) -> None:
    """What a program may set after ``resume()``."""
    model.dropout.p = 0.0
    dataset.path = "another"
    optimizer.param_groups[0]["weight_decay"] = 0.1


@pytest.mark.parametrize("resumes", ["always", "if there is one", "late"])
def test_what_a_program_sets_between_resume_and_its_loop_is_no_edit(
    resumes: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epochs in (1, 2):
        _train(tmp_path, epochs=epochs, resumes=resumes, before_loop=_set)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("optimizer", "schedule", "told"),
    [
        ({"lr": 0.01}, {"step_size": 2}, ""),
        ({"lr": 0.02}, {"step_size": 2}, "no effect: lr of optimizer 0 0.01 -> 0.02"),
        ({"lr": 0.01, "momentum": 0.5}, {"step_size": 2}, "no effect: momentum of optimizer 0 0 -> 0.5"),
        ({"lr": 0.01}, {"step_size": 3}, "no effect: step_size of scheduler 0 2 -> 3"),
    ],
)
@pytest.mark.parametrize("resumes", ["always", "if there is one", "late"])
def test_changed_settings_are_named_wherever_the_loop_is_resumed(
    optimizer: dict[str, Any],
    schedule: dict[str, Any],
    told: str,
    resumes: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for epochs, first, second in ((1, {"lr": 0.01}, {"step_size": 2}), (2, optimizer, schedule)):
        caplog.clear()
        _train(
            tmp_path,
            epochs=epochs,
            resumes=resumes,
            optimizer=lambda model, given=first: torch.optim.SGD(model.parameters(), **given),
            schedule=lambda one, given=second: StepLR(one, **given),
        )
    assert told in caplog.text
    assert len(caplog.records) == bool(told), caplog.text


LOOP = """
def loss_of(output):
    return output.mean() * LOSS

def untouched(loader):
    for batch in loader:
        yield batch

def train(accelerator, manager, model, optimizer, loader, epochs):
    for epoch in manager.epochs(epochs * AROUND // AROUND):
        for batch in manager.batches(loader):
            accelerator.backward(loss_of(model(batch)) * BODY)
            optimizer.step()
            optimizer.zero_grad()
        for batch in untouched(manager.batches(loader)):
            accelerator.backward(model(batch).mean() * SECOND)
            optimizer.step()
            optimizer.zero_grad()
        manager.save()
"""


def _loop(scope: dict[str, Any], folder: Path, *given: Any, **named: Any) -> None:
    """Run ``train`` of a program, from the newest checkpoint there."""
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(4, 1)
    manager = TrainingStateManager(accelerator, folder, signals=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prepared = accelerator.prepare(model, optimizer, DataLoader(torch.ones(8, 4), 2))
    manager.resume()
    scope["train"](accelerator, manager, *prepared, *given, **named)
    manager.close()


BODY = Limit(
    what="The body of the loop over batches, or a function that is called in a loop of the same function, was edited "
    "since the run began",
    when="at the resume",
    line=(
        "maybe not exact: code was edited since the run started: …; the run continues with the new code, and is exact "
        "only if that computes the same"
    ),
)


@pytest.mark.parametrize(
    ("edit", "told"),
    [("", ""), ("AROUND", ""), ("LOSS", "loss_of"), ("BODY", "the body of the loop in train"), ("SECOND", "")],
)
def test_edited_body_of_a_loop_is_named(edit: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epochs in (1, 2, 3):
        forget_last_attempt()
        scope: dict[str, Any] = {"__name__": "__main__"}
        text = LOOP
        for name in ("AROUND", "LOSS", "BODY", "SECOND"):
            text = text.replace(name, "3" if name == edit and epochs > 1 else "2")
        exec(text, scope)
        caplog.clear()
        _loop(scope, tmp_path, epochs)
        assert (told in caplog.text) is (epochs > 1 or not told)
        assert len(caplog.records) == bool(told and epochs > 1), caplog.text
    if told:
        BODY.require_told(caplog.text)


CALLS = """
def train(accelerator, manager, model, optimizer, loader, epochs, loss, each=lambda *_: None):
    for epoch in manager.epochs(epochs):
        for batch in manager.batches(loader):
            accelerator.backward(loss(model(batch)))
            optimizer.step()
            optimizer.zero_grad()
            each(batch)
        manager.save()
"""


@pytest.mark.parametrize(("edit", "told"), [("", ""), ("loss", "loss"), ("each", "")])
def test_function_without_a_name_is_known_by_its_variable(
    edit: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def first(batch: Any) -> None:
        """Called in the first run alone, where the lambda stands otherwise."""

    for epochs in (1, 2):
        forget_last_attempt()
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(CALLS, scope)
        scale = 3 if edit == "loss" and epochs > 1 else 2
        scope["loss"] = eval(f"lambda output: output.mean() * {scale}", scope)
        caplog.clear()
        more = {"each": first} if edit == "each" and epochs == 1 else {}
        _loop(scope, tmp_path, epochs, scope["loss"], **more)
    assert ("the run started: loss;" in caplog.text) == bool(told)
    assert len(caplog.records) == bool(told), caplog.text
