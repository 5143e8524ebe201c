"""Optimizer steps that a custom loop takes outside the bodies of the manager's batches are reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from tests.accelerator.tiny import new_script
from tests.field.limits import Limit
from tests.resume.harness import forget_last_attempt

OUTSIDE = Limit(
    "a loop that is saved by the manager and goes through the loader itself, or through a list of its batches",
    "at a save",
    "not exact: the optimizer steps outside a loop over manager.batches(), so a save cannot know which batches were "
    'trained on: train on each batch inside "for batch in manager.batches(loader)": do not collect the batches in a '
    "list, do not train one batch late, and do not iterate the loader directly",
)
LATE = Limit(
    "a loop that asks for the next batch before it trains on the last one, as a prefetcher does",
    "at the end",
    "not exact: each batch is trained on after the next one was fetched, so a resumed run skips one batch: train on "
    "each batch inside …",
)
LEFT_OUT = Limit(
    "`save()` on a batch that no optimizer has stepped on",
    "at a save",
    "maybe not exact: save() on a batch without an optimizer step: a resumed run continues with the next batch. "
    "That is right if the program skips this batch, such as for a NaN loss; otherwise call save() after "
    "optimizer.step(), or, if you accumulate gradients by hand, after the step that uses them",
)

Step = Callable[[Any], None]
Program = Callable[[TrainingStateManager, Any, Step], None]


def run(folder: Path, program: Program, every: int = 1) -> None:
    """Train as ``program`` does, on eight batches an epoch."""
    forget_last_attempt()
    set_seed(5)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    loader = DataLoader(torch.arange(16.0).reshape(-1, 1), 2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-4), loader)
    manager = TrainingStateManager(accelerator, folder, signals=())
    manager.resume()
    taken = 0

    def step(batch: Any) -> None:
        nonlocal taken
        taken += 1
        accelerator.backward(model(batch).mean())
        if taken % every == 0:
            optimizer.step()
            optimizer.zero_grad()

    program(manager, loader, step)
    manager.close()


def the_loader_itself(manager: TrainingStateManager, loader: Any, step: Step) -> None:
    for batch in loader:
        step(batch)
    manager.save()


def the_loader_itself_in_epochs(manager: TrainingStateManager, loader: Any, step: Step) -> None:
    for _ in manager.epochs(2):
        for batch in loader:
            step(batch)
        manager.save()


def a_list(manager: TrainingStateManager, loader: Any, step: Step) -> None:
    for _ in manager.epochs(2):
        for number, batch in enumerate(list(manager.batches(loader))):
            step(batch)
            if number == 3:
                manager.save()
                return


def prefetched(manager: TrainingStateManager, loader: Any, step: Step) -> None:
    for _ in manager.epochs(2):
        batches = iter(manager.batches(loader))
        following = next(batches, None)
        while following is not None:
            batch, following = following, next(batches, None)
            step(batch)


def ordinary(manager: TrainingStateManager, loader: Any, step: Step) -> None:
    for batch in loader:  # to find a learning rate
        step(batch)
    for _ in manager.epochs(2):
        for batch in manager.batches(loader):
            step(batch)
            if manager.progress.step % 3 == 0:
                manager.save()
        manager.save()


def with_leftovers(manager: TrainingStateManager, loader: Any, step: Step) -> None:
    for _ in manager.epochs(2):
        for number, batch in manager.enumerate(loader):
            step(batch)
            if number == 6:
                break
        step(torch.ones(2, 1))
        manager.save()


@pytest.mark.parametrize(
    ("program", "limit"),
    [(the_loader_itself, OUTSIDE), (the_loader_itself_in_epochs, OUTSIDE), (a_list, OUTSIDE), (prefetched, LATE)],
)
def test_steps_outside_are_reported_once(
    program: Program, limit: Limit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, program)
    limit.require_told(caplog.text)
    assert caplog.text.count("train on each batch inside") == 1


@pytest.mark.parametrize(("program", "every"), [(ordinary, 1), (with_leftovers, 2), (with_leftovers, 4)])
def test_a_step_after_the_loop_is_not_reported(
    program: Program, every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, program, every)
    assert "train on each batch inside" not in caplog.text


STANDS_STILL = (
    "manager.progress.step stays at 0, so a loop that waits for it to grow never ends: the optimizer steps outside a "
    "loop over manager.batches(), where steps are not counted: iterate manager.batches(loader), or "
    "manager.batches(range(steps)) if there is no loader"
)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_loop_until_a_step_that_no_batch_of_the_manager_counts_is_named_at_its_third_round(
    *, resumes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget_last_attempt()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-4))
    manager = TrainingStateManager(accelerator, tmp_path, signals=())
    if resumes:
        manager.resume()
    rounds = 0
    while manager.progress.step < 4:
        assert caplog.text.count(STANDS_STILL) == (rounds > 1)
        if rounds == 6:
            break
        rounds += 1
        accelerator.backward(model(torch.rand(2, 1)).mean())
        optimizer.step()
        optimizer.zero_grad()
    assert rounds == 6
    manager.close()
    assert manager.progress.step == 0
    optimizer.step()
    assert caplog.text.count(STANDS_STILL) == 1


@pytest.mark.parametrize("program", [ordinary, with_leftovers])
def test_a_step_that_is_counted_is_not_said_to_stand_still(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, program)
    assert "manager.progress.step stays" not in caplog.text


def _without_a_loader(folder: Path, *, stop_at: int = 0) -> dict[str, str]:
    """Trains on what the program draws, for ten steps."""
    script = new_script(folder, generators=3)
    script.manager.resume()
    for _ in script.manager.batches(range(10)):
        script.train({"x": torch.randn(4, 8), "labels": torch.randn(4)})
        if script.manager.progress.step % 2 == 0:
            script.manager.save()
        if script.manager.progress.step == stop_at:
            break
    assert script.manager.progress.step == (stop_at or 10)
    script.manager.close()
    return script.digests()


def test_a_loop_without_a_loader_goes_through_a_range_and_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _without_a_loader(tmp_path / "whole")
    _without_a_loader(tmp_path / "broken", stop_at=5)
    assert _without_a_loader(tmp_path / "broken") == whole
    assert "exact" not in caplog.text


def test_steps_are_counted_where_only_objects_train(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    manager = TrainingStateManager(Accelerator(cpu=True), tmp_path, signals=(), objects={"m": model, "o": optimizer})
    counted = []
    for batch in manager.batches(DataLoader(torch.ones(6, 1), 2)):
        model(batch).mean().backward()
        optimizer.step()
        counted.append(manager.progress.step)
        manager.save()
    manager.close()
    assert counted == [1, 2, 3]
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [f"checkpoint-{step}" for step in counted]


def test_steps_that_a_load_takes_are_none_of_the_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch lets an optimizer step, with a learning rate of 0, to make the state that it loads into."""
    _without_a_loader(tmp_path, stop_at=4)
    script = new_script(tmp_path, generators=3)

    def makes_state(*_: Any) -> None:
        for _ in range(2):
            script.optimizer.step()

    script.accelerator.register_load_state_pre_hook(makes_state)
    assert script.manager.progress.step == 0
    script.manager.resume()
    assert script.manager.progress.step == 4
    script.manager.save()
    script.manager.close()
    assert "manager.progress.step stays" not in caplog.text
    assert "steps outside a loop" not in caplog.text


def _leaves_out(folder: Path, *, stop_at: int = 0, before: bool = False) -> dict[str, str]:
    """Saves on every batch, and leaves each third one out; ``before``: saves before it trains, and leaves none out."""
    script = new_script(folder, generators=3)
    script.manager.resume()
    for _ in script.manager.epochs(2):
        for batch in script.manager.batches(script.loader):
            if before:
                script.manager.save()
                script.train(batch)
            else:
                if script.manager.progress.batch % 3 != 0:
                    script.train(batch)
                script.manager.save()
            if stop_at and script.manager.progress.epoch * 6 + script.manager.progress.batch == stop_at:
                script.manager.close()
                return {}
    script.manager.close()
    return script.digests()


@pytest.mark.parametrize("stop_at", [3, 8])
def test_save_on_a_batch_that_is_left_out_is_made_and_named(
    stop_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _leaves_out(tmp_path / "whole")
    LEFT_OUT.require_told(caplog.text)
    _leaves_out(tmp_path / "broken", stop_at=stop_at)
    assert _leaves_out(tmp_path / "broken") == whole
    assert "is repeated" not in caplog.text


def test_save_before_the_step_is_named_and_made_again_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _leaves_out(tmp_path / "whole", before=True)
    LEFT_OUT.require_told(caplog.text)
    assert "is repeated" in caplog.text
    script = new_script(tmp_path / "broken", generators=3)
    for _ in script.manager.epochs(2):
        for batch in script.manager.batches(script.loader):
            if script.manager.progress.batch == 4:
                break
            script.manager.save()
            script.train(batch)
        break
    script.manager.close()
    assert _leaves_out(tmp_path / "broken", before=True) == whole
