"""Real signals to a loop of one's own: the step is saved, the process ends as it would have, the next one goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of
from hf_lifecycle.saving.files import direct
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from tests.processes import in_child, to_group
from tests.trainer.runs import Net, Rows
from tests.trainer.test_save_failures import files_of_at_most, resource

Where = tuple[str, int]


def through_another(batches: Any) -> Iterator[Any]:
    """As a progress bar does: a generator around the loop."""
    yield from batches


def train(
    directory: Path,
    where: Where = ("", -1),
    number: float = signal.SIGTERM,
    *,
    workers: int = 0,
    save: Callable[[TrainingStateManager], object] = TrainingStateManager.save,
    **how: Any,
) -> dict[str, Any]:
    """The same program each time: 3 epochs of 4 steps of 2 batches, an evaluation after each, a save every 3 steps.

    With data workers the whole process group gets the signal.
    """

    def meet(place: str, count: int) -> None:
        if where == (place, count) and not resumed:
            lose_seconds = time.sleep if isinstance(number, float) else None
            send = lose_seconds or (to_group if workers else partial(os.kill, os.getpid()))
            send(number)

    set_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    loader = torch.utils.data.DataLoader(Rows(32), batch_size=4, shuffle=True, num_workers=workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    manager = TrainingStateManager(accelerator, directory, **how)
    resumed = manager.resume()
    losses, evaluations, batch_number = [], [], 0
    for epoch in manager.epochs(3):
        for batch in through_another(manager.batches(loader)):
            batch_number += 1
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                meet("batch", batch_number)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
            if accelerator.sync_gradients and manager.progress.step % 3 == 0:
                meet("save", manager.progress.step)
                save(manager)
        with manager.evaluating():
            for batch in torch.utils.data.DataLoader(Rows(8, seed=3), batch_size=4, num_workers=workers):
                meet("evaluation", epoch)
                evaluations.append(float(model(**batch)["loss"]))
    manager.close()
    digests = {name: tensor_digest(tensor) for name, tensor in module_tensors(model).items()}
    return {
        "digests": digests,
        "losses": losses,
        "evaluations": evaluations,
        "step": manager.progress.step,
        "preempted": manager.progress.preempted,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program ends with that gets no signal. Workers change nothing in it."""
    ended, found = in_child(lambda: train(tmp_path_factory.mktemp("whole")))
    assert ended == 0
    return cast("dict[str, Any]", found)


@pytest.mark.parametrize(
    ("where", "number", "status", "step", "epoch", "workers", "waits"),
    [
        (("batch", 2), signal.SIGTERM, -15, 1, 0, 0, True),  # of the second batch: its step is the first
        (("batch", 3), signal.SIGINT, 130, 2, 0, 0, True),  # in the middle of an accumulation: it is finished first
        (("save", 6), signal.SIGTERM, -15, 6, 1, 0, True),
        (("save", 6), signal.SIGTERM, -15, 6, 1, 0, False),  # what is being written is waited for
        (("evaluation", 0), signal.SIGTERM, -15, 4, 1, 0, False),  # the epoch is over: the next one is gone on with
        (("batch", 24), signal.SIGTERM, -15, 12, 2, 0, False),
        (("batch", 3), signal.SIGTERM, -15, 2, 0, 1, True),  # to the whole group, as the next one
        (("evaluation", 0), signal.SIGTERM, -15, 4, 1, 1, True),
    ],
)
def test_signal_saves_the_loop_and_the_same_program_ends_as_if_it_had_not_come(
    where: Where,
    number: signal.Signals,
    status: int,
    step: int,
    epoch: int,
    workers: int,
    waits: bool,
    whole: dict[str, Any],
    tmp_path: Path,
) -> None:
    place = tmp_path / "run"
    how: dict[str, Any] = {"workers": workers, "save": partial(TrainingStateManager.save, wait=waits)}
    assert in_child(lambda: train(place, where, number, **how))[0] == status
    newest = checkpoints_in(place)[0]
    assert newest[0] == step
    assert problems_of(newest[1], full=True) == []
    events = [json.loads(line) for line in (place / "lifecycle.jsonl").read_text().splitlines()]
    assert [event["why"] for event in events if event["event"] == "preempted"] == [number.name]
    assert "ended" not in [event["event"] for event in events]
    ended, again = in_child(lambda: train(place, **how))
    assert ended == 0
    assert again["digests"] == whole["digests"]
    assert again["losses"] == whole["losses"][2 * step :]
    assert again["evaluations"] == whole["evaluations"][2 * epoch :]


def test_time_limit_saves_the_loop_after_a_slow_step_and_the_same_program_goes_on(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    slow = partial(train, tmp_path / "run", ("batch", 5), 3.0, time_limit=10)
    assert in_child(slow)[0] == -15
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [3]
    ended, again = in_child(lambda: train(tmp_path / "run"))
    assert (ended, again["digests"], again["losses"]) == (0, whole["digests"], whole["losses"][6:])


def test_step_whose_save_failed_is_saved_when_a_signal_comes(whole: dict[str, Any], tmp_path: Path) -> None:
    def save(manager: TrainingStateManager) -> None:
        with files_of_at_most(4000), pytest.raises(Exception, match="File too large"):
            manager.save()
        os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(lambda: train(tmp_path / "run", save=save))[0] == -15
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [3]
    ended, again = in_child(lambda: train(tmp_path / "run"))
    assert (ended, again["digests"], again["losses"]) == (0, whole["digests"], whole["losses"][6:])


def test_loop_that_cannot_be_saved_ends_all_the_same_and_says_what_there_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def save(manager: TrainingStateManager) -> None:
        manager.save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def work() -> None:
        logging.basicConfig(stream=sys.stderr, force=True)
        train(tmp_path, ("batch", 7), save=save)

    assert in_child(work)[0] == 1
    said = capfd.readouterr().err
    assert "SIGTERM: saving step 4" in said
    assert said.count("checkpoint-4: not saved: ") == 1
    assert "the newest checkpoint is checkpoint-3" in said
    assert "File too large" in said


def test_place_whose_save_in_the_background_failed_is_saved_again_when_the_signal_is_heeded(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    def full(descriptor: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> None:
        direct.write_whole = full
        train(tmp_path / "run", ("save", 6), save=partial(TrainingStateManager.save, wait=False))

    assert in_child(work)[0] == -15
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [6, 3]
    assert problems_of(tmp_path / "run" / "checkpoint-6", full=True) == []
    assert in_child(lambda: train(tmp_path / "run"))[1]["digests"] == whole["digests"]


def test_loops_end_where_they_are_to_return_and_handlers_are_put_back(tmp_path: Path) -> None:
    def work() -> Any:
        heard: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        before = signal.getsignal(signal.SIGUSR1)
        found = train(tmp_path, ("batch", 4), signal.SIGUSR1, signals=("SIGUSR1",), on_preempt="return")
        assert signal.getsignal(signal.SIGUSR1) == before
        return heard, found["preempted"], found["step"], len(found["losses"])

    assert in_child(work) == (0, ([signal.SIGUSR1], "SIGUSR1", 2, 4))
    assert checkpoints_in(tmp_path)[0][0] == 2


def test_signal_that_comes_when_the_loop_is_over_is_not_lost(tmp_path: Path) -> None:
    def work() -> None:
        accelerator = Accelerator(cpu=True)
        manager = TrainingStateManager(accelerator, tmp_path)
        assert manager._run is not None
        manager._run.loop.at_end.append(lambda: os.kill(os.getpid(), signal.SIGTERM))
        for _ in manager.epochs(1):
            pass
        os._exit(3)

    assert in_child(work)[0] == -15


def test_loop_that_was_left_passes_signals_on_and_wrong_names_are_refused(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def broken() -> Any:
        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(torch.utils.data.DataLoader(Rows(), batch_size=4))
        manager = TrainingStateManager(accelerator, tmp_path)
        epochs = manager.epochs(1)
        next(epochs)
        batches = manager.batches(loader)
        next(batches)
        assert signal.getsignal(signal.SIGINT) != before
        return manager, epochs, batches

    kept = broken()  # open generators, whose loop has been left
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    kept[0].close()
    with pytest.raises(ValueError, match="'SIGNONE': not a signal"):
        TrainingStateManager(Accelerator(cpu=True), tmp_path, signals=("SIGNONE",))
    with pytest.raises(ValueError, match="on_preempt must be"):
        TrainingStateManager(Accelerator(cpu=True), tmp_path, on_preempt="exit")
