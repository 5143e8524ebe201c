"""Saves at odd moments, of odd models, to odd places: exact, or reported; and never the end of a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.verification import problems_of
from hf_lifecycle.engine import background_saves
from hf_lifecycle.saving.snapshots.async_capture import AsyncCapture
from tests.field.limits import Limit
from tests.field.test_saves import SWAPPED_AT_THE_FIRST_SAVE
from tests.trainer.runs import BrokenOff, Ends, Net, digests, new_trainer

AFTER_THE_STEP = Limit(
    "a direct call of `_save_checkpoint` between the optimizer's step and the end of Trainer's step, such as in "
    "`on_optimizer_step`",
    "at a save",
    "not exact: saved after step …, but the optimizer has already made the next step, which a resumed run makes "
    "again; save in on_step_end",
)


CHANGED_AFTER_THE_RESUME = Limit(
    "a callback changes weights in `on_train_begin`, or in `on_epoch_begin` of an epoch that is resumed within",
    "at the resume",
    "not exact: weights changed between the resume and the next step, in on_train_begin or on_epoch_begin of a "
    "callback, which run again at a resume; change them in on_step_begin",
)


class SavesAmid(TrainerCallback):
    """Calls the trainer's ``_save_checkpoint`` at an event."""

    def __init__(self, event: str) -> None:
        self.trainer: Any = None
        setattr(self, event, self._save)

    def _save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (2, 3):
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


@pytest.mark.parametrize(
    ("event", "told"), [("on_optimizer_step", True), ("on_pre_optimizer_step", False), ("on_step_end", False)]
)
@pytest.mark.parametrize("background", [True, False])
def test_save_between_the_optimizers_step_and_the_steps_end_is_reported(
    event: str, told: bool, background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = SavesAmid(event)
    trainer = new_trainer(tmp_path, saves, LifecycleCallback(async_save=background), save_strategy="no")
    saves.trainer = trainer
    trainer.train()
    assert problems_of(tmp_path / "checkpoint-3", full=True) == []
    if told:
        AFTER_THE_STEP.require_told(caplog.text)
    assert caplog.text.count("which a resumed run makes again") == 2 * told


class ReadsByAttribute(TrainerCallback):
    """Its ``on_save`` belongs to the object, not to the class."""

    def __init__(self) -> None:
        self.found: list[bool] = []
        self.on_save = self._look

    def _look(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(Path(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt").is_file())


def test_callback_whose_on_save_is_set_on_the_object_finds_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reads = ReadsByAttribute()
    new_trainer(tmp_path, LifecycleCallback(), reads).train()
    assert reads.found == [True, True, True]
    assert caplog.text.count("right after it: ReadsByAttribute.on_save") == 1


class SavesTheAverage(Trainer):
    """Lets Trainer save another model than the one that it trains."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trained, self.model = self.model, copy.deepcopy(self.model)
        with torch.no_grad():
            for one in self.model.parameters():
                one.mul_(0.5)
        try:
            super()._save_checkpoint(self.model, trial)
        finally:
            self.model = trained


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("background", [True, False])
def test_trainer_that_saves_an_average_in_place_of_its_model_resumes_exactly(
    background: bool, step: int, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    whole = new_trainer(tmp_path / "whole", LifecycleCallback(), kind=SavesTheAverage)
    whole.train()
    seen: dict[str, torch.Tensor] = {}

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == step:
                seen.update({name: one.detach().clone() for name, one in model.named_parameters()})

    place = tmp_path / "run"
    with pytest.raises(BrokenOff):
        new_trainer(place, Notes(), LifecycleCallback(async_save=background), Ends(5), kind=SavesTheAverage).train()
    written = load_file(place / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(written[name], one * 0.5) for name, one in seen.items())  # as stock's
    resumed = new_trainer(place, LifecycleCallback(), kind=SavesTheAverage)
    resumed.train(resume_from_checkpoint=str(place / f"checkpoint-{step}"))
    assert digests(resumed) == digests(whole)


class MovesAway(TrainerCallback):
    """Lets later checkpoints go elsewhere."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            args.output_dir += "/later"


class ElsewhereAtTheSave(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        before = self.args.output_dir
        self.args.output_dir = f"{before}/later"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = before


class ElsewhereByMethod(Trainer):
    def _get_output_dir(self, trial: Any) -> str:
        return f"{self.args.output_dir}/later"


@pytest.mark.parametrize("kind", [Trainer, ElsewhereAtTheSave, ElsewhereByMethod])
@pytest.mark.parametrize("background", [True, False])
def test_checkpoints_that_go_to_another_folder_end_no_training_and_resume_exactly(
    kind: type[Trainer], background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def others() -> list[TrainerCallback]:
        return [MovesAway()] if kind is Trainer else []

    whole = new_trainer(tmp_path / "whole", *others(), LifecycleCallback(), kind=kind)
    whole.train()
    assert "written in place" in caplog.text
    assert "does not exist after the save" not in caplog.text
    place = tmp_path / "run"
    with pytest.raises(BrokenOff):
        new_trainer(place, *others(), LifecycleCallback(async_save=background), Ends(5), kind=kind).train()
    found = latest_checkpoint(place / "later")
    assert found is not None
    assert Path(found).name == "checkpoint-4"
    resumed = new_trainer(place, *others(), LifecycleCallback(), kind=kind)
    resumed.train(resume_from_checkpoint=found)
    assert digests(resumed) == digests(whole)


class Shrinks(TrainerCallback):
    """Makes all weights smaller at an event, by writes that no version counter tells of."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._shrink)

    def _shrink(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for one in model.parameters():
            one.data.mul_(0.9)


@pytest.mark.parametrize("background", [True, False])
def test_weights_changed_through_data_after_a_save_are_reported_and_changed_again_at_a_resume(
    background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = new_trainer(tmp_path, Shrinks("on_save"), LifecycleCallback(async_save=background))
    whole.train()
    SWAPPED_AT_THE_FIRST_SAVE.require_told(caplog.text)
    resumed = new_trainer(tmp_path, Shrinks("on_save"), LifecycleCallback(async_save=background))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert digests(resumed) == digests(whole)


@pytest.mark.parametrize(
    ("event", "step", "save", "told"),
    [
        ("on_epoch_begin", 2, "steps", True),
        ("on_epoch_begin", 4, "steps", True),  # the end of that epoch is still due, and so its begin is heard again
        ("on_epoch_end", 4, "steps", False),
        ("on_epoch_begin", 4, "epoch", False),
        ("on_train_begin", 2, "steps", True),
        ("on_train_begin", 4, "epoch", True),
    ],
)
def test_weights_changed_by_an_event_that_a_resumed_run_hears_again_are_reported(
    event: str, step: int, save: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trainer() -> Trainer:
        return new_trainer(tmp_path, LifecycleCallback(async_save=False), Shrinks(event), save_strategy=save)

    whole = trainer()
    whole.train()
    # What comes after a save at an epoch's end is heard again: what is changed there is no difference.
    assert "between the save" not in caplog.text
    caplog.clear()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert (digests(resumed) != digests(whole)) == told
    assert CHANGED_AFTER_THE_RESUME.is_told_in(caplog.text) == told


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 60, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def _adapted() -> Any:
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=2, eos_token_id=3))
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


class MergesToEvaluate(Trainer):
    def evaluate(self, *given: Any, **named: Any) -> Any:
        self.model.merge_adapter()
        try:
            return super().evaluate(*given, **named)
        finally:
            self.model.unmerge_adapter()


class MergesToSave(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.model.merge_adapter()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.model.unmerge_adapter()


class MergedBetweenSteps(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.unmerge_adapter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.merge_adapter()


@pytest.mark.parametrize("kind", [MergesToEvaluate, MergesToSave, Trainer])
def test_adapter_that_was_merged_and_unmerged_resumes_exactly(kind: type[Trainer], tmp_path: Path) -> None:
    def trainer(*callbacks: TrainerCallback) -> Trainer:
        others = [MergedBetweenSteps()] if kind is Trainer else []
        settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
        given = {"model": _adapted(), "train": Tokens(), "evaluated": Tokens(), "kind": kind}
        return new_trainer(tmp_path, *others, LifecycleCallback(), *callbacks, **given, **settings)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert digests(resumed) == digests(whole)


def test_adapter_that_is_merged_only_for_its_save_costs_the_background_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"model": _adapted(), "train": Tokens(), "kind": MergesToSave}
    new_trainer(tmp_path, LifecycleCallback(), **given).train()
    assert "the checkpoints are the same: frozen weights or buffers under an adapter change" in caplog.text
    assert "not exact" not in caplog.text


class Conjugate(torch.nn.Module):
    """Has a buffer that is a view of another with a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("view", torch.ones(4, dtype=torch.complex64).conj(), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.net(x, labels)


def test_tensor_that_cannot_be_copied_as_memory_costs_the_background_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_trainer(tmp_path, LifecycleCallback(), model=Conjugate()).train()
    assert caplog.text.count("no background saves") == 1
    assert problems_of(tmp_path / "checkpoint-6", full=True) == []


@pytest.mark.parametrize("name", ["prepare", "take"])
def test_whatever_fails_in_preparing_a_background_save_costs_the_background_and_nothing_else(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(AsyncCapture):
        pass

    def fails(*_: Any, **__: Any) -> None:
        raise IndexError("of no kind that was thought of")

    setattr(Broken, name, fails)
    monkeypatch.setattr(background_saves, "AsyncCapture", Broken)
    new_trainer(tmp_path, LifecycleCallback()).train()
    assert caplog.text.count("the checkpoints are the same: IndexError: of no kind") == 1
    for step in (2, 4, 6):
        assert problems_of(tmp_path / f"checkpoint-{step}", full=True) == []
