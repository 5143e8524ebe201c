"""Real signals to real processes: the step is saved, the process ends as it would have, and nothing shows afterwards.

The processes are forked from this one, so that torch is imported once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.store import problems_of
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.hosts.trainer.host import path_given_to_train
from hf_lifecycle.saving.files import direct
from tests.processes import in_child, to_group

from .runs import Rows, break_off, digests, new_trainer
from .test_save_failures import files_of_at_most, resource

SETTINGS: dict[str, Any] = {
    "max_steps": 11,  # 4 steps to an epoch
    "save_steps": 6,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 7,
}
EPOCHS: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
WORKERS: dict[str, Any] = {**SETTINGS, "dataloader_num_workers": 1}
PERSISTENT: dict[str, Any] = {**WORKERS, "dataloader_persistent_workers": True}
BEST: dict[str, Any] = {**SETTINGS, "save_strategy": "best", "metric_for_best_model": "loss", "eval_steps": 4}


class Signalled(Trainer):
    """Sends itself, or its whole process group, a signal when it is at the given place of the given step."""

    where: tuple[str, int] = ("", -1)
    send: Callable[[], None] = staticmethod(lambda: None)

    def _meet(self, place: str) -> None:
        if self.where == (place, self.state.global_step) and path_given_to_train() is None:
            type(self).where = ("", -1)
            type(self).send()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._meet("step")
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._meet("evaluation")
        return super().prediction_step(*args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        super()._save(*args, **kwargs)
        self._meet("save")


def train(
    place: Path, *, callback: LifecycleCallback | None = None, kind: type[Signalled] = Signalled, **settings: Any
) -> dict[str, Any]:
    """The same command each time: start, or go on. Returns what the run ended with."""
    trainer = new_trainer(place, callback or LifecycleCallback(), kind=kind, **settings)
    trainer.train(resume_from_checkpoint=latest_checkpoint(place))
    rows = [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]
    return {"digests": digests(trainer), "log": rows, "step": trainer.state.global_step}


def signalled(place: Path, where: tuple[str, int], number: signal.Signals, *, group: bool = False, **how: Any) -> int:
    """Train in a process that gets the signal; how it ended."""

    def work() -> None:
        Signalled.where = where
        Signalled.send = staticmethod(lambda: to_group(number) if group else os.kill(os.getpid(), number))
        train(place, **how)

    return in_child(work)[0]


def events(place: Path) -> list[tuple[str, int]]:
    lines = (place / "lifecycle.jsonl").read_text().splitlines()
    return [(line["event"], line.get("step")) for line in map(json.loads, lines)]


CASES = {
    # (settings, where the signal comes, signal, how the process ends, the steps saved)
    "in a step": (SETTINGS, ("step", 2), signal.SIGTERM, -15, [3]),
    "in a step at which a save is due": (SETTINGS, ("step", 5), signal.SIGTERM, -15, [6]),
    "in an epoch's last step": (SETTINGS, ("step", 3), signal.SIGINT, 130, [4]),
    "in an evaluation": (SETTINGS, ("evaluation", 7), signal.SIGTERM, -15, [6, 7]),
    "in a save": (SETTINGS, ("save", 6), signal.SIGTERM, -15, [6]),
    "in the last step": (SETTINGS, ("step", 10), signal.SIGTERM, -15, [6, 11]),
    "in the last save": (SETTINGS, ("save", 11), signal.SIGTERM, -15, [6, 11]),
    "in an epoch of a run that does all at its epochs' ends": (EPOCHS, ("step", 1), signal.SIGTERM, -15, [2]),
    "in such a run's evaluation": (EPOCHS, ("evaluation", 4), signal.SIGINT, 130, [4]),
    "in a run that saves the best": (BEST, ("step", 4), signal.SIGTERM, -15, [4, 5]),
    "in an evaluation that decides about the save": (BEST, ("evaluation", 4), signal.SIGTERM, -15, [4]),
    "in a run that saves nothing": ({**SETTINGS, "save_strategy": "no"}, ("step", 5), signal.SIGTERM, -15, [6]),
    # To the whole process group, workers included.
    "of a group, in a step": (WORKERS, ("step", 1), signal.SIGTERM, -15, [2]),
    "of a group, in an evaluation": (WORKERS, ("evaluation", 7), signal.SIGTERM, -15, [6, 7]),
    "of a group with persistent workers": (PERSISTENT, ("evaluation", 7), signal.SIGTERM, -15, [6, 7]),
}


_wholes: dict[int, Any] = {}


def never_interrupted(place: Path, settings: dict[str, Any]) -> Any:
    """What the run ends with that gets no signal; trained once for all cases. Workers change nothing in it."""
    settings = SETTINGS if settings in (WORKERS, PERSISTENT) else settings
    if id(settings) not in _wholes:
        ended, _wholes[id(settings)] = in_child(lambda: train(place, **settings))
        assert ended == 0
    return _wholes[id(settings)]


@pytest.mark.parametrize("name", CASES)
def test_signal_saves_the_step_and_ends_the_process_and_the_same_command_ends_as_if_it_had_not_come(
    name: str, tmp_path: Path
) -> None:
    settings, where, number, status, saved = CASES[name]
    whole, place = never_interrupted(tmp_path / "whole", settings), tmp_path / "run"
    assert signalled(place, where, number, group="group" in name, **settings) == status
    assert sorted(int(path.name[11:]) for path in place.glob("checkpoint-*")) == saved
    assert all(problems_of(path, full=True) == [] for path in place.glob("checkpoint-*"))
    assert ("preempted", saved[-1]) in events(place)
    assert in_child(lambda: train(place, **settings)) == (0, whole)


def test_second_ctrl_c_ends_at_once_and_two_of_one_press_do_not(tmp_path: Path) -> None:
    def press(times: int, apart: float) -> int:
        def send() -> None:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(apart)

        def work() -> None:
            Signalled.where, Signalled.send = ("step", 2), staticmethod(send)
            train(tmp_path, **SETTINGS)

        return in_child(work)[0]

    assert press(2, apart=1.1) == 130
    assert latest_checkpoint(tmp_path) is None, "the second ends the step that the first left to its end"
    assert press(2, apart=0.0) == 130
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_training_returns_where_asked_to_and_the_handlers_of_others_are_called_and_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []

    def work() -> Any:
        signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
        numbers = iter((signal.SIGUSR1, signal.SIGTERM))
        answers = []
        for step in (2, 3):
            Signalled.where = ("step", step)
            Signalled.send = staticmethod(lambda: os.kill(os.getpid(), next(numbers)))
            callback = LifecycleCallback(signals=("SIGUSR1", "SIGTERM"), on_preempt="return")
            trainer = new_trainer(tmp_path / str(step), callback, kind=Signalled, **SETTINGS)
            output = trainer.train()
            answers.append((callback.preempted, output.global_step))
        assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
        return heard, answers

    assert in_child(work) == (0, ([signal.SIGUSR1], [("SIGUSR1", 3), ("SIGTERM", 4)]))


@pytest.mark.parametrize(("on_preempt", "status"), [("raise", -15), ("return", 0)])
def test_time_limit_saves_the_step_after_a_slow_one_and_the_same_command_goes_on(
    on_preempt: Any, status: int, tmp_path: Path
) -> None:
    def work() -> Any:
        # Another step as slow as that one, and a save of a tenth of the limit, would not fit into the 7 s left.
        Signalled.where, Signalled.send = ("step", 2), staticmethod(lambda: time.sleep(3))
        callback = LifecycleCallback(time_limit=10, on_preempt=on_preempt)
        return train(tmp_path / "run", callback=callback, **SETTINGS)["step"], callback.preempted

    whole, place = never_interrupted(tmp_path / "whole", SETTINGS), tmp_path / "run"
    assert in_child(work) == (status, None if status else (3, "time limit"))
    assert [path.name for path in place.glob("checkpoint-*")] == ["checkpoint-3"]
    assert ("preempted", 3) in events(place)
    assert in_child(lambda: train(place, **SETTINGS)) == (0, whole)


def test_time_limit_that_is_near_when_training_ends_by_itself_ends_nothing(tmp_path: Path) -> None:
    def work() -> Any:
        Signalled.where, Signalled.send = ("step", 10), staticmethod(lambda: time.sleep(3))
        callback = LifecycleCallback(time_limit=10)
        return train(tmp_path, callback=callback, **SETTINGS)["step"], callback.preempted

    assert in_child(work) == (0, (11, None))


def test_signal_to_a_run_that_has_ended_is_not_lost(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def again() -> None:
        trainer = new_trainer(tmp_path, LifecycleCallback(), **SETTINGS)
        trainer.add_callback(Late)
        trainer.train(resume_from_checkpoint=latest_checkpoint(tmp_path))

    assert in_child(lambda: train(tmp_path, **SETTINGS))[0] == 0
    assert in_child(again)[0] == -15


def test_signal_that_comes_while_the_last_copy_is_waited_for_is_not_lost(tmp_path: Path) -> None:
    def work() -> None:
        RunDirectory.finish_copies = lambda _: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]
        train(tmp_path, **SETTINGS)
        os._exit(3)

    assert in_child(work)[0] == -15


def test_handler_of_another_gets_the_signal_once_when_all_is_saved(tmp_path: Path) -> None:
    def work() -> None:
        def handler(number: int, frame: Any) -> None:
            assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
            os._exit(7)

        signal.signal(signal.SIGTERM, handler)
        Signalled.where, Signalled.send = ("step", 2), staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(tmp_path, **SETTINGS)

    assert in_child(work)[0] == 7


def test_shell_sees_143_and_the_person_is_told_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        logging.basicConfig(stream=sys.stderr, force=True)
        Signalled.where, Signalled.send = ("step", 2), staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(tmp_path, **SETTINGS)

    assert 128 - in_child(work)[0] == 143  # as a shell counts it
    assert "SIGTERM: saving step 3, then ending; run the same command to resume" in capfd.readouterr().err


def test_training_that_was_broken_off_leaves_handlers_that_pass_every_signal_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    break_off(new_trainer(tmp_path, LifecycleCallback()), step=2)
    assert signal.getsignal(signal.SIGINT) != before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    break_off(new_trainer(tmp_path, LifecycleCallback()), step=4, resume=True)
    new_trainer(tmp_path, LifecycleCallback())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nothing_is_set_outside_the_main_thread_nor_for_what_is_ignored(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))

    def run() -> None:
        new_trainer(tmp_path / "a", Look(), LifecycleCallback(), max_steps=1).train()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(signal.SIG_DFL, signal.default_int_handler)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        new_trainer(tmp_path / "b", Look(), LifecycleCallback(signals=("SIGINT",)), max_steps=1).train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[1] == (signal.SIG_DFL, signal.SIG_IGN)


class SignalsItsGroup(Rows):
    """Sends everyone in the process group a signal while the trainer waits for a batch that is not made yet."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(rows=64)
        self.number = number
        self.items = 0

    def __getitem__(self, index: int) -> Any:
        assert get_worker_info() is not None
        self.items += 1
        time.sleep(0.05)
        if self.items == 22 and path_given_to_train() is None:
            os.killpg(0, self.number)
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_data_workers_live_on_when_their_whole_group_gets_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    def work() -> None:
        callback = LifecycleCallback(signals=(number.name,))
        train(tmp_path, callback=callback, train=SignalsItsGroup(number), max_steps=11, dataloader_num_workers=1)

    assert in_child(work)[0] == (130 if number == signal.SIGINT else -number)
    assert latest_checkpoint(tmp_path) in [str(tmp_path / f"checkpoint-{step}") for step in (3, 4, 5, 6)]


class FailsToSave(Signalled):
    """Fails to save the step that a signal came in, so many times; in the training loop or in the background."""

    step, times = 7, 0

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        fails = self.state.global_step == self.step and type(self).times > 0
        type(self).times -= fails
        with files_of_at_most(500 if fails else resource.RLIM_INFINITY):
            super()._save_optimizer_and_scheduler(output_dir)


class InTheBackground(Signalled):
    _save = Trainer._save


def fail_in_background(step: int) -> None:
    """Let the first write of this step's save fail; the disk has no say in it."""
    real = direct.write_whole

    def write(descriptor: int, data: Any) -> None:
        if InTheBackground.where[0] == "" and f"checkpoint-{step}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            direct.write_whole = real
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, data)

    direct.write_whole = write


@pytest.mark.parametrize(
    ("kind", "times", "saved"), [(FailsToSave, 1, [6, 7]), (FailsToSave, 9, [6]), (InTheBackground, 1, [6, 7])]
)
def test_step_whose_save_failed_is_saved_once_more_and_what_is_lost_is_said(
    kind: type[Signalled], times: int, saved: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        logging.basicConfig(stream=sys.stderr, force=True)
        if kind is FailsToSave:
            FailsToSave.times = times
        else:
            fail_in_background(7)
        kind.where, kind.send = ("step", 6), staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(place, callback=LifecycleCallback(on_save_failure="continue"), kind=kind, **SETTINGS)

    whole, place = never_interrupted(tmp_path / "whole", SETTINGS), tmp_path / "run"
    assert in_child(work)[0] == -15, "the machine goes away, whatever was saved"
    assert sorted(int(path.name[11:]) for path in place.glob("checkpoint-*")) == saved
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if "the last save of this training failed" in line]
    assert len(said) == (saved == [6])
    assert all("checkpoint-7: not saved" in line and "newest checkpoint is checkpoint-6" in line for line in said)
    assert events(place).count(("failed", 7)) == (1 if saved == [6, 7] else 2)
    assert in_child(lambda: train(place, **SETTINGS)) == (0, whole)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"signals": "SIGTERM"}, TypeError, "signals must be names"),
        ({"signals": (15,)}, TypeError, "signals must be names"),
        ({"signals": ("SIGTERM", "SIGKILL")}, ValueError, "'SIGKILL': not a signal that can be handled"),
        ({"signals": ("SIGNONE",)}, ValueError, "'SIGNONE': not a signal"),
        ({"signals": ("SIGINT", "SIGINT")}, ValueError, "a name is given twice"),
        ({"on_preempt": "exit"}, ValueError, "on_preempt must be 'raise' or 'return'"),
    ],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LifecycleCallback(**arguments)


CELL = """
import time
from pathlib import Path
from hf_lifecycle import LifecycleCallback, latest_checkpoint
from tests.trainer.runs import Rows, new_trainer

pause = 0.05

class Slow(Rows):
    def __getitem__(self, index):
        time.sleep(pause)
        return super().__getitem__(index)

def train(place):
    trainer = new_trainer(
        Path(place), LifecycleCallback(), train=Slow(), max_steps=80, save_steps=500, logging_steps=1
    )
    trainer.train(resume_from_checkpoint=latest_checkpoint(place))
    return trainer.state.global_step
"""


@pytest.mark.slow
def test_interrupted_cell_of_a_notebook_has_saved_its_step_and_run_again_goes_on(tmp_path: Path) -> None:
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(Path(__file__).parents[2]))

    def run(cell: str, interrupt: bool = False) -> dict[str, Any]:
        request = client.execute(cell)
        while interrupt:
            message = client.get_iopub_msg(timeout=120)
            if "loss" in str(message["content"].get("text", "")):  # the first log row: a step is done
                kernel.interrupt_kernel()
                break
        while (reply := client.get_shell_msg(timeout=120))["parent_header"].get("msg_id") != request:
            pass
        content: dict[str, Any] = reply["content"]
        return content

    try:
        assert run(CELL)["status"] == "ok"
        interrupted = run(f"train({str(tmp_path)!r})", interrupt=True)
        assert (interrupted["status"], interrupted["ename"]) == ("error", "KeyboardInterrupt")
        saved = latest_checkpoint(tmp_path)
        assert saved is not None
        assert 0 < int(saved.rpartition("-")[2]) < 80
        again = run(f"pause = 0; assert train({str(tmp_path)!r}) == 80")
        assert again["status"] == "ok", again
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert {"resumed", "ended"} < {name for name, _ in events(tmp_path)}
