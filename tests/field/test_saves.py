"""A save is finished by the save: whoever asks for it, and whatever code of others runs around it."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.verification import problems_of
from tests.field.limits import Limit
from tests.trainer.runs import BrokenOff, Ends, digests, new_trainer, require_same_end

CHANGED_AFTER_THE_SAVE = Limit(
    "a callback changes weights between a save and the next step, in another event than `on_save`",
    "at the first save",
    "not exact: weights changed between the save at step … and the next step, in an event of a callback, so the "
    "checkpoint has the old ones; change them in on_step_begin",
)
SWAPPED_AT_THE_FIRST_SAVE = Limit(
    "a callback swaps weights back in `on_save`, and the run resumes from its first save (later ones are exact)",
    "at the first save",
    "not exact: on_save of a callback changed weights after the save at step …, so the checkpoint has the old ones; a "
    "resume from a later one calls on_save of your callbacks once more. To make this one exact too, change them in "
    "on_step_begin",
)
NOT_SWAPPED_AGAIN = Limit(
    "a callback swaps weights back in `on_save`, from what the checkpoint does not have",
    "at the resume",
    "maybe not exact: on_save of your callbacks changed weights after earlier saves, but not when it was called once "
    "more for the save that is resumed from; if it needs something that is not in the checkpoint, pass that as "
    "LifecycleCallback(objects=...)",
)
IN_PLACE = Limit(
    "a `_save_checkpoint` that never calls Trainer's own, or a `_get_output_dir` elsewhere",
    "at the first save",
    "checkpoints are written in place, as Trainer does, and may be torn by a kill: …",
)


class Asks(TrainerCallback):
    """Calls the trainer's ``_save_checkpoint`` at an event of its choice."""

    def __init__(self, event: str, step: int) -> None:
        self.trainer: Any = None
        self._step, self._done = step, False
        setattr(self, event, self._save)

    def _save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step and not self._done:
            self._done = True
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def _of(place: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    trainer = new_trainer(place, *callbacks, **{"logging_strategy": "no", "save_strategy": "no", **settings})
    for callback in callbacks:
        if isinstance(callback, Asks):
            callback.trainer = trainer
    return trainer


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_substep_end", "on_step_end"])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_save_asked_for_at_any_event_is_a_checkpoint_and_resumes_exactly(
    event: str, background: bool, first: bool, tmp_path: Path
) -> None:
    accumulation = 2 if event == "on_substep_end" else 1
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 6}
    whole = _of(tmp_path / "whole", LifecycleCallback(), **settings)
    whole.train()

    place, ours = tmp_path / "run", LifecycleCallback(async_save=background)
    asks = [Asks(event, 2), Asks(event, 3)]  # the second in the background, where that is asked for
    others = [*asks, ours] if first else [ours, *asks]
    with pytest.raises(BrokenOff):
        _of(place, *others, Ends(5), **settings).train()
    for step in (2, 3):
        assert problems_of(place / f"checkpoint-{step}", full=True) == []
    resumed = _of(place, LifecycleCallback(), **settings)
    resumed.train(resume_from_checkpoint=str(place / "checkpoint-3"))
    assert digests(resumed) == digests(whole)


def test_save_by_a_handler_of_the_error_that_ended_training_is_a_checkpoint(tmp_path: Path) -> None:
    whole = _of(tmp_path / "whole", LifecycleCallback())
    whole.train()
    trainer = _of(tmp_path / "run", LifecycleCallback(), Ends(4))
    with pytest.raises(BrokenOff):
        trainer.train()
    trainer._save_checkpoint(trainer.model, trial=None)
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert Path(found).name == "checkpoint-4"
    resumed = _of(tmp_path / "run", LifecycleCallback())
    resumed.train(resume_from_checkpoint=found)
    assert digests(resumed) == digests(whole)


def test_just_in_time_checkpoint_of_transformers_is_kept(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.trainer_jit_checkpoint")

    class Requests(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                module.CheckpointManager(trainer).execute_jit_checkpoint()
                control.should_training_stop = True

    trainer = _of(tmp_path / "run", Requests(), LifecycleCallback())
    trainer.train()
    assert not (tmp_path / "run" / "checkpoint-3" / "checkpoint-is-incomplete.txt").exists()
    assert problems_of(tmp_path / "run" / "checkpoint-3", full=True) == []
    whole, resumed = _of(tmp_path / "whole", LifecycleCallback()), _of(tmp_path / "run", LifecycleCallback())
    whole.train()
    resumed.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "run"))
    assert digests(resumed) == digests(whole)


class Around(Trainer):
    """Uses its checkpoints right after they were saved, and writes beside them; none of it is known to us."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        folder.mkdir(exist_ok=True)
        (folder / "before.txt").write_text("before")
        super()._save_checkpoint(model, trial)
        (folder / "after.txt").write_text("after")
        shutil.copytree(folder, Path(self.args.output_dir, "uploaded", folder.name))
        Path(self.args.output_dir, "export").mkdir(exist_ok=True)
        Path(self.args.output_dir, "export", "step.txt").write_text(str(self.state.global_step))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        Path(self.args.output_dir, "card.md").write_text(f"step {self.state.global_step}")


def test_code_of_a_subclass_finds_the_checkpoint_and_what_it_writes_stays(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(), kind=Around)
    trainer.train()
    stock = new_trainer(tmp_path / "stock", kind=Around)
    stock.train()
    for step in (2, 4, 6):
        names = {path.name for path in (tmp_path / "stock" / "uploaded" / f"checkpoint-{step}").iterdir()}
        assert names <= {path.name for path in (tmp_path / "uploaded" / f"checkpoint-{step}").iterdir()}
        assert {"before.txt", "after.txt"} <= {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert problems_of(tmp_path / f"checkpoint-{step}", full=True) == []
        assert problems_of(tmp_path / "uploaded" / f"checkpoint-{step}", full=True) == []
    assert (tmp_path / "card.md").read_text() == (tmp_path / "stock" / "card.md").read_text()
    assert (tmp_path / "export" / "step.txt").read_text() == "6"


class After(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        assert Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", "optimizer.pt").is_file()


class Before(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Path(self.args.output_dir, "card.md").write_text("as TRL writes one")
        super()._save_checkpoint(model, trial)


@pytest.mark.parametrize(("kind", "waits"), [(After, True), (Before, False)])
def test_save_in_the_background_blocks_only_for_code_that_follows_it(
    kind: type[Trainer], waits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_trainer(tmp_path, LifecycleCallback(), kind=kind).train()
    assert caplog.text.count(f"right after it: {kind.__name__}._save_checkpoint") == waits
    assert "no background saves" not in caplog.text


class NeverCallsTrainers(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))


def test_save_that_never_calls_trainers_own_is_reported_and_resumes_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = new_trainer(tmp_path / "whole", LifecycleCallback(), kind=NeverCallsTrainers)
    whole.train()
    IN_PLACE.require_told(caplog.text)
    assert caplog.text.count("written in place") == 1
    with pytest.raises(BrokenOff):
        new_trainer(tmp_path / "run", LifecycleCallback(), Ends(5), kind=NeverCallsTrainers).train()
    resumed = new_trainer(tmp_path / "run", LifecycleCallback(), kind=NeverCallsTrainers)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert digests(resumed) == digests(whole)


class SwapsBack(TrainerCallback):
    """Puts other weights into the model for each save, and training's own back when it hears of it."""

    own: dict[str, torch.Tensor] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % 2 == 0:
            self.own = {name: one.detach().clone() for name, one in model.named_parameters()}
            with torch.no_grad():
                for one in model.parameters():
                    one.mul_(0.5)
            self.saved = {name: one.detach().clone() for name, one in model.named_parameters()}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.own is not None:
            with torch.no_grad():
                for name, one in model.named_parameters():
                    one.copy_(self.own[name])


@pytest.mark.parametrize("background", [True, False])
def test_weights_swapped_back_at_on_save_leave_a_checkpoint_of_one_moment_and_resume_exactly(
    background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    swaps = SwapsBack()
    whole = new_trainer(tmp_path, swaps, LifecycleCallback(async_save=background), max_steps=8)
    whole.train()
    written = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(written[name], one) for name, one in swaps.saved.items())
    SWAPPED_AT_THE_FIRST_SAVE.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1
    caplog.clear()
    for step in (6, 8):  # the run had ended with the second
        resumed = new_trainer(tmp_path, SwapsBack(), LifecycleCallback(async_save=background), max_steps=8)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert digests(resumed) == digests(whole)
    assert "not exact" not in caplog.text


def test_weights_swapped_back_at_saves_of_epochs_resume_exactly(tmp_path: Path) -> None:
    class Each(SwapsBack):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)

    settings = {"save_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1}
    whole = new_trainer(tmp_path, Each(), LifecycleCallback(), **settings)
    whole.train()
    *_, second, _ = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    resumed = new_trainer(tmp_path, Each(), LifecycleCallback(), **settings)
    resumed.train(resume_from_checkpoint=str(second))
    assert digests(resumed) == digests(whole)


def test_on_save_that_does_not_swap_back_at_the_resume_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_trainer(tmp_path, SwapsBack(), LifecycleCallback()).train()
    caplog.clear()
    new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    NOT_SWAPPED_AGAIN.require_told(caplog.text)


def test_weights_changed_in_another_event_after_the_save_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Shrinks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                for one in model.parameters():
                    one.mul_(0.5)

    _of(tmp_path, Asks("on_step_end", 3), Shrinks(), LifecycleCallback()).train()
    CHANGED_AFTER_THE_SAVE.require_told(caplog.text)


def test_output_dir_is_never_another_while_code_of_others_runs(tmp_path: Path) -> None:
    seen: set[str] = set()

    class Looks(Trainer):
        def _look(self) -> None:
            seen.add(str(self.args.output_dir))

        def save_model(self, *given: Any, **named: Any) -> None:
            self._look()
            super().save_model(*given, **named)

        def _save_rng_state(self, output_dir: str) -> None:
            self._look()
            super()._save_rng_state(output_dir)

    new_trainer(tmp_path, LifecycleCallback(), kind=Looks).train()
    assert seen == {str(tmp_path)}
    arguments = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.output_dir == str(tmp_path)


def test_copy_of_a_trainer_saves_by_itself(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Copies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                copies.append(copy.copy(trainer))

    trainer = new_trainer(tmp_path / "run", Copies(), LifecycleCallback(async_save=False))
    trainer.train()
    twin = copies[0]
    twin.args = copy.copy(trainer.args)
    twin.args.output_dir = str(tmp_path / "twin")
    twin._save_checkpoint(twin.model, trial=None)
    assert (tmp_path / "twin" / "checkpoint-6" / "trainer_state.json").is_file()
    state = json.loads((tmp_path / "twin" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert not os.path.exists(tmp_path / "twin" / ".lifecycle")


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_keeps_the_trainer_when_training_is_over(breaks: bool, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(), *([Ends(5)] if breaks else []))
    with contextlib.suppress(BrokenOff):
        trainer.train()
    known = weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.optimizer)
    del trainer
    gc.collect()
    assert [one() for one in known] == [None, None, None]


class Comparable(Trainer):
    """A trainer without a hash, as of a data class."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Comparable) and self.args.output_dir == other.args.output_dir

    __hash__ = None  # type: ignore[assignment]


def test_trainer_without_a_hash_trains_and_resumes(tmp_path: Path) -> None:
    require_same_end(lambda name: new_trainer(tmp_path / name, LifecycleCallback(), kind=Comparable))
