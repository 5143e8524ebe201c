"""Passes over loaders in a custom training loop go on after a resume where they were, with the numbers they had."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.errors import UnsupportedTraining
from tests.accelerator.tiny import new_script
from tests.field.limits import Limit
from tests.field.loop_programs import Beside, Data, Loop, Program, Run
from tests.resume.harness import forget_last_attempt

SAVED_WITHIN = Limit(
    "a save in the body of a batch, after which another iterator is asked for batches in the same body, as where "
    "iterators take turns",
    "at a save",
    "not exact: save() at … was called in the body of a batch of …, and … is iterated further in the same body: a run "
    "that is resumed from that checkpoint starts with the next batch of … and skips the rest of this body; call save() "
    "at the end of the body of the outer loop",
    "a warning",
)
AFTER_SAVE = Limit(
    "a loop over batches after a save that counts as the end of the epoch",
    "at a save",
    "not exact: batches() after save() in one epoch: a save outside the loop over batches counts as the end of the "
    "epoch, so a run that is resumed from that checkpoint skips these batches; call save() at the end of the epoch's "
    "body, or call save(epoch_is_over=False), after which a resumed run repeats the code between the two loops",
    "a warning",
)
STILL_OPEN = Limit(
    "a save at the end of an epoch's body, in a batch of an iterator that is open over epochs",
    "at a save",
    "not exact: save() at … was called in the body of a batch of …, whose iterator was still open at the end of the "
    "epoch, and a run that is resumed from that checkpoint continues that iterator in this epoch; use "
    "save(epoch_is_over=True), or close() the iterator first",
    "a warning",
)
ENUMERATED = Limit(
    "gradients accumulated by hand by the numbers of Python's `enumerate`, in a loop resumed within an epoch",
    "at the resume",
    "not exact: …: since the resume, the optimizer steps after other batches of the epoch than before: …; number the "
    'batches with "for number, batch in manager.enumerate(loader)", which continues the count after a resume',
)

LAZY = Limit(
    "an iterator over a second loader that a loop makes within the body of a batch and keeps over several, in a loop "
    "resumed while it was open",
    "at the resume",
    "…: an iterator that was created in the body of a batch was open at the save, and it is unknown whether the "
    "iterator created here continues it or starts from the beginning: create it before the loop over batches, or "
    "close() it before save()",
    "an error",
)
ENDLESS = Limit(
    "a generator over a loader's passes that lives over epochs, resumed from the first save at an epoch's end",
    "at the resume",
    "maybe not exact: …: an iterator over it was open at the end of the epoch, and another starts here; to continue "
    "it, create it before the loop over epochs; else close() it before save()",
)
CACHED = Limit(
    "`itertools.cycle(manager.batches(loader))` in a loop resumed after its first round",
    "at the resume",
    "not exact: the loop over … ended because the iterator over … had no batches left; in the run that was saved, "
    "the loop continued. itertools.cycle replays the batches of its first pass, and a resumed run does not have "
    'them: use a generator that does "while True: yield from manager.batches(loader)"',
    "an error",
)
LEFT = Limit(
    "a loop over batches that is left by `break` in the body in which it was saved",
    "at a save",
    "not exact: save() at step … was called just before the loop over … was left by break, and a run that is resumed "
    "from that checkpoint continues with the next batch of the loop; call save() after the loop",
)

DRAINED = Limit(
    "a generator function around `manager.batches(second)` whose rest is trained on after the loop over batches",
    "at the end",
    "maybe not exact: …: the rest of a generator was trained on after the loop over batches, and a run that is "
    "resumed from a later save of this epoch starts that generator from its beginning: use "
    "iter(manager.batches(loader)) instead of the generator",
)

Numbered = Callable[[TrainingStateManager, Any], Iterable[tuple[int, Any]]]
StepsOn = Callable[[int], bool]


def with_python(manager: TrainingStateManager, loader: Any) -> Iterable[tuple[int, Any]]:
    return enumerate(manager.batches(loader))


def with_manager(manager: TrainingStateManager, loader: Any) -> Iterable[tuple[int, Any]]:
    return manager.enumerate(loader)


def accumulated(folder: Path, numbered: Numbered, steps_on: StepsOn, stop: int = 0) -> tuple[float, list[int]]:
    """Two epochs of 12 batches with ``steps_on`` deciding by a batch's number; saved, and left, at step ``stop``.

    Returns:
        The weight, and the numbers within the pass of the batches that had a step.
    """
    forget_last_attempt()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = DataLoader(torch.arange(22.0).reshape(-1, 1), batch_size=2, shuffle=True)
    manager = TrainingStateManager(accelerator, folder, signals=())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    manager.resume()
    where = []
    for _ in manager.epochs(2):
        for number, batch in numbered(manager, loader):
            accelerator.backward(model(batch).sin().sum() / 3)
            if steps_on(number):
                optimizer.step()
                optimizer.zero_grad()
                where.append(manager.progress.batch - 1)
                if manager.progress.step == stop:
                    manager.save()
                    manager.close()
                    return model.weight.item(), where
    manager.close()
    return model.weight.item(), where


def every_third(number: int) -> bool:
    return number % 3 == 0


def every_third_and_the_last(number: int) -> bool:
    return number % 3 == 2 or number == 10


@pytest.mark.parametrize("stop", [1, 2, 6])
@pytest.mark.parametrize("steps_on", [every_third, every_third_and_the_last])
def test_numbers_of_the_manager_go_on_after_a_resume(
    steps_on: StepsOn, stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = accumulated(tmp_path / "whole", with_manager, steps_on)
    accumulated(tmp_path / "broken", with_manager, steps_on, stop)
    weight, where = accumulated(tmp_path / "broken", with_manager, steps_on)
    assert (weight, where) == (whole[0], whole[1][stop:])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("steps_on", "stop"),
    # After one step of the run, two, one of the second epoch; and before the last of the second epoch, off the beat.
    [(every_third, 1), (every_third, 2), (every_third, 5), (every_third_and_the_last, 6)],
)
def test_numbers_of_python_that_begin_anew_are_reported(
    steps_on: StepsOn, stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = accumulated(tmp_path / "whole", with_python, steps_on)
    accumulated(tmp_path / "broken", with_python, steps_on, stop)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    _, where = accumulated(tmp_path / "broken", with_python, steps_on)
    assert where != whole[1][stop:]
    before, told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert before.startswith("maybe not exact: enumerate() around batches() starts at 0 again")
    ENUMERATED.require_told(told)


def test_steps_on_every_batch_and_by_accelerate_are_not_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps_on in (lambda number: True, lambda number: number % 3 == 2):  # the second begins anew in time
        folder = tmp_path / str(steps_on(0))
        accumulated(folder, with_python, steps_on, 2)
        accumulated(folder, with_python, steps_on)
    assert "the optimizer steps after other batches" not in caplog.text


DATA = st.builds(Data, st.sampled_from(["shuffled", "sequential", "weighted"]), st.integers(2, 6))
# Made anew for each loop, or before the loop over epochs.
FEEDS = {False: ("next", "cycle", "forever", "chain", "restart", "remade"), True: ("next", "cycle", "chain", "restart")}
ENDING = ("next", "cycle", "chain", "restart")  # of which what is left may be trained on


@st.composite
def loops(draw: st.DrawFn, lasting: tuple[int, ...]) -> Loop:
    """A loop over the first of the loaders, or any that does not last over epochs, the others used in its bodies."""
    free = draw(st.permutations([number for number in range(3) if number not in lasting]))
    over, *others = free
    zipped = draw(st.sampled_from([(), tuple(others[:1]), tuple(others)]))
    beside = [_beside(draw, number, once=True) for number in lasting]
    within = None
    for number in others[len(zipped) :]:
        if within is None and draw(st.booleans()):
            within = (number, draw(st.integers(0, 2)))
        else:
            beside.append(_beside(draw, number, once=False))
    return Loop(over, zipped, tuple(beside), within, draw(st.integers(0, 5)), draw(st.booleans()))


def _beside(draw: st.DrawFn, number: int, *, once: bool) -> Beside:
    how = draw(st.sampled_from(FEEDS[once]))
    return Beside(number, how, once, draw(st.integers(1, 2)), how in ENDING and draw(st.booleans()))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Loops over three loaders in an order of its own; those made before the epochs are asked in one of them alone."""
    lasting = draw(st.sampled_from([(), (), (2,)]))
    first = draw(loops(lasting))
    more = draw(st.lists(loops(()).filter(lambda loop: not {*lasting} & used(loop)), max_size=1))
    data = tuple(draw(DATA) for _ in range(3))
    return Program(data, (first, *more), 3, draw(st.integers(1, 3)), draw(st.booleans()))


def used(loop: Loop) -> set[int]:
    inner = set() if loop.within is None else {loop.within[0]}
    return {loop.over, *loop.zipped, *inner, *(one.loader for one in loop.beside)}


def broken(program: Program, deaths: Iterable[int], whole: Run) -> Run:
    """The program as it ends, killed after so many of the bodies of ``whole``, and resumed each time."""
    begun, kept = 0, None
    for death in (*deaths, 0):
        run = Run(program, None, max(death - begun, 0))
        run.kept = kept
        run.train()
        assert run.trail == whole.trail[begun : death or None]
        begun, kept = begun + (run.saved[-1] if run.saved else 0), run.kept or kept
    return run


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_random_programs_train_on_the_same_batches_after_a_break(program: Program, breaks: tuple[int, int]) -> None:
    whole = Run(program, None)
    assert whole.train()
    first = whole.saved[0] if whole.saved else len(whole.trail)
    assume(first < len(whole.trail))
    deaths = sorted({first + one % (len(whole.trail) - first) for one in breaks})
    broken(program, deaths, whole)


TWO = (Data("shuffled", 6), Data("weighted", 4))


@pytest.mark.parametrize(
    "loop",
    [
        Loop(0, zipped=(1,)),
        Loop(0, beside=(Beside(1, "next"),)),
        Loop(1, beside=(Beside(0, "next", once=True),)),
        Loop(0, beside=(Beside(1, "cycle", once=True),)),
        Loop(0, beside=(Beside(1, "chain"),), leave_at=5),
    ],
    ids=lambda loop: "zip" if loop.zipped else f"{loop.beside[0].how}-{loop.beside[0].once}",
)
def test_second_iterators_go_on_from_a_checkpoint(loop: Loop, tmp_path: Path) -> None:
    program = Program(TWO, (loop,), 3, 3, saves_epochs=True)
    whole = Run(program, tmp_path / "whole")
    assert whole.train()
    killed = Run(program, tmp_path / "broken", 8 if loop.zipped else 10)
    assert not killed.train()
    rest = Run(program, tmp_path / "broken")
    assert rest.train()
    first = killed.saved[-1] - len(whole.trail)  # what a program notes is carried too
    assert rest.trail[first:] == whole.trail[first:]
    assert torch.equal(rest.model.weight, whole.model.weight)


def resumed(make: Callable[..., Run], program: Program, die_after: int, **settings: Any) -> Run:
    killed = make(program, None, die_after)
    assert not killed.train()
    rest = make(program, None, **settings)
    rest.kept = killed.kept
    rest.train()
    return rest


def test_iterator_made_in_a_body_that_may_be_another_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    program = Program(TWO, (Loop(0, beside=(Beside(1, "lazy"),)),), 2)
    with pytest.raises(UnsupportedTraining) as refused:
        resumed(Run, program, 3)
    LAZY.require_told(str(refused.value))
    resumed(Run, program, 3, strict=False)
    LAZY.require_told(caplog.text)
    assert Run(program, None).train()


def test_pass_of_a_generator_that_may_go_on_in_the_next_epoch_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    program = Program(TWO, (Loop(0, beside=(Beside(1, "forever", once=True),)),), 3, 99, saves_epochs=True)
    whole = Run(program, None)
    assert whole.train()
    assert (
        "an iterator over it continues from one epoch into the next, but the checkpoint at the end of the epoch"
    ) in caplog.text
    caplog.clear()
    resumed(Run, program, 8)
    ENDLESS.require_told(caplog.text)
    assert resumed(Run, program, 14).trail == whole.trail[12:]  # it was seen to go on


@pytest.mark.parametrize("how", ["remade", "restart"])
@pytest.mark.parametrize("drained", [True, False])
def test_rest_of_a_generator_that_is_trained_on_after_its_loop_is_reported(
    how: Any, drained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    program = Program(TWO, (Loop(0, beside=(Beside(1, how, drained=drained),)),), 1)
    assert Run(program, None).train()
    assert DRAINED.is_told_in(caplog.text) is (drained and how == "remade")


@pytest.mark.parametrize("how", ["cycle", "restart", "remade"])
@pytest.mark.parametrize("drained", [True, False])
@pytest.mark.parametrize("once", [True, False])
def test_iterator_that_begins_again_in_bodies_goes_on_after_a_death_in_any_of_them(
    how: Any, drained: bool, once: bool
) -> None:
    program = Program((TWO[0], Data("weighted", 3)), (Loop(0, beside=(Beside(1, how, once, drained=drained),)),), 2, 1)
    whole = Run(program, None)
    assert whole.train()
    for death in range(1, len(whole.trail)):
        assert resumed(Run, program, death).trail == whole.trail[death:]


class Cached(Run):
    """Goes round the second loader by the batches of its first pass."""

    def _loop(self, loop: Loop, lasting: Any) -> None:
        first, second = (self.manager.batches(one) for one in self.loaders)
        for pair in zip(first, itertools.cycle(second), strict=False):
            self._train(list(pair), loop)


def test_batches_that_a_cycle_has_kept_are_missed_with_an_error() -> None:
    program = Program(TWO, (Loop(0),), 2, 5)
    assert Cached(program, None).train()
    with pytest.raises(RuntimeError) as missed:
        resumed(Cached, program, 5)
    CACHED.require_told(str(missed.value))


class LeftAfterSave(Run):
    """Leaves the loop in the body that it saves."""

    def _loop(self, loop: Loop, lasting: Any) -> None:
        for batch in self.manager.batches(self.loaders[0]):
            self._train([batch], loop)
            if len(self.trail) % 3 == 0:
                break


def test_loop_that_is_left_in_the_body_of_a_save_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert LeftAfterSave(Program(TWO, (Loop(0),), 2, 3), None).train()
    LEFT.require_told(caplog.text)
    caplog.clear()
    assert LeftAfterSave(Program(TWO, (Loop(0),), 1, 2), None).train()
    assert "not exact" not in caplog.text


class Ahead(Run):
    """Takes a batch of the second loader before the loop over the first."""

    def _loop(self, loop: Loop, lasting: Any) -> None:
        others = self.manager.batches(self.loaders[1])
        next(others)
        for batch in self.manager.batches(self.loaders[0]):
            self._train([batch, next(others)], loop)


def test_save_where_a_resumed_run_would_take_another_batch_first_is_named(caplog: pytest.LogCaptureFixture) -> None:
    Ahead(Program((TWO[0], replace(TWO[0], batches=TWO[0].batches + 1)), (Loop(0),)), None).train()
    SAVED_WITHIN.require_told(caplog.text)
    assert "save() at step 2 was called in the body of a batch of loader 1, and loader 0 is iterated" in caplog.text


def test_loop_after_a_save_that_ends_the_epoch_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = new_script(tmp_path)
    for _ in script.manager.epochs(2):
        for _again in range(2):
            for batch in script.manager.batches(script.loader):
                script.train(batch)
            script.manager.save()
    AFTER_SAVE.require_told(caplog.text)
    assert (script.manager.progress.epoch, caplog.text.count("not exact")) == (2, 2)


def test_iterator_that_is_open_at_the_end_of_an_epoch_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_script(tmp_path)
    batches = iter(script.manager.batches(script.loader))
    for _ in script.manager.epochs(2):
        script.train(next(batches))
        script.manager.save()
    STILL_OPEN.require_told(caplog.text)
    assert script.manager.progress.epoch == 2
