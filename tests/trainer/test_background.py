"""Saves in the background: the files are stock Trainer's, nothing is missed or torn, and what goes wrong is told."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_lifecycle import LifecycleCallback, SaveFailed, latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import problems_of, staging_folder
from hf_lifecycle.hosts.trainer.saves import background as module
from hf_lifecycle.hosts.trainer.saves import template
from hf_lifecycle.hosts.trainer.saves.whole import DeferredSave
from hf_lifecycle.saving import captured
from hf_lifecycle.saving.files.comparison import Comparison
from hf_lifecycle.saving.snapshots import async_capture as overlap
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from tests.saving.failing import fail_writes

from .runs import BrokenOff, Net, Rows, break_off, digests, images, new_trainer, tiny_vit


@pytest.fixture(autouse=True)
def saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were handed to the writer."""
    steps: list[int] = []
    real = module.Background.hand_over

    def hand_over(background: Any, session: Any, commit: Any) -> None:
        steps.append(session.step)
        real(background, session, commit)

    monkeypatch.setattr(module.Background, "hand_over", hand_over)
    return steps


def content(checkpoint: Path) -> dict[str, bytes]:
    """Every file but ours."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    found = {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not name.startswith("lifecycle/")}


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=32, intermediate_size=16, num_key_value_heads=2, num_local_experts=4)
    )


def _adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    return get_peft_model(_gpt2(), lora)


class Normed(Net):
    """With running statistics, which every forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


class Tokens(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) * (index + 1) % 32
        return {"input_ids": ids, "labels": ids}


_OTHER_LETTERS = "a path with letters that are not ASCII"
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "plain module": (Net, Rows, {}),
    _OTHER_LETTERS: (Net, Rows, {}),
    "running statistics": (Normed, Rows, {}),
    "tied weights": (_gpt2, Tokens, {}),
    "bfloat16": (lambda: _gpt2().to(torch.bfloat16), Tokens, {"bf16": True}),
    "renamed keys": (tiny_vit, images, {}),
    "experts in parts": (_mixtral, Tokens, {}),
    "adapter": (_adapter, Tokens, {}),
    "no optimizer": (Net, Rows, {"save_only_model": True}),
    "momentum": (Net, Rows, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "adafactor": (Net, Rows, {"optim": "adafactor"}),
    "plateau": (Net, Rows, {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_files_are_byte_for_byte_what_trainer_would_have_written(name: str, tmp_path: Path, saves: list[int]) -> None:
    make, data, settings = MODELS[name]
    torch.manual_seed(3)
    model = make()
    place = tmp_path / ("Läufe ☃" if name == _OTHER_LETTERS else "")
    beside = place / "beside"

    class Twin(Trainer):
        """Keeps what Trainer itself writes at that very moment, and changes nothing of the save."""

        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            super()._save_checkpoint(*given, **named)
            own, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
            folder = beside / f"checkpoint-{self.state.global_step}"
            Trainer.save_model(self, str(folder), _internal_call=True)
            if not self.args.save_only_model:
                Trainer._save_optimizer_and_scheduler(self, str(folder))
                Trainer._save_rng_state(self, str(folder))
            self.state.best_model_checkpoint = own

    trainer = new_trainer(place / "run", LifecycleCallback(), model=model, train=data(), kind=Twin, **settings)
    trainer.train()
    assert saves == [4, 6]
    for step in (2, 4, 6):
        ours, theirs = (content(one / f"checkpoint-{step}") for one in (place / "run", beside))
        assert ours.keys() - {"trainer_state.json"} == theirs.keys()
        differ = [file for file in theirs if ours[file] != theirs[file] and file != "training_args.bin"]
        assert differ == []
        assert problems_of(place / "run" / f"checkpoint-{step}", full=True) == []


def test_training_goes_on_while_the_first_save_is_compared_and_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: list[int]
) -> None:
    trained_on, real = threading.Event(), Comparison.run

    def run(comparison: Comparison, *given: Any) -> Any:
        assert trained_on.wait(30)
        return real(comparison, *given)

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                there.append(second.exists())
                trained_on.set()

    second = tmp_path / "checkpoint-2"  # by a path that names no checkpoint, no save is waited for
    there: list[bool] = []
    monkeypatch.setattr(Comparison, "run", run)
    new_trainer(tmp_path, Looks(), LifecycleCallback()).train()
    assert there == [False]
    assert saves == [4, 6]
    assert [problems_of(tmp_path / f"checkpoint-{step}", full=True) for step in (2, 4, 6)] == [[]] * 3


@pytest.mark.parametrize(("wrong", "in_background"), [((1,), [6]), ((1, 2), [])])
def test_save_after_a_file_that_is_not_of_the_tensors_is_trainers_own(
    wrong: tuple[int, ...],
    in_background: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saves: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    own, count = safetensors.torch.save_file, 0

    def save_file(tensors: dict[str, torch.Tensor], *given: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        changed = {name: one + (count in wrong) for name, one in tensors.items()}
        own(changed, *given, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    new_trainer(tmp_path, LifecycleCallback()).train()
    assert saves == in_background
    assert count == (2 if in_background else 3)
    assert caplog.text.count("the checkpoints are the same:") == (not in_background)


def test_save_after_one_whose_files_could_not_be_read_is_trainers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: list[int]
) -> None:
    real, read = Comparison.run, []

    def run(comparison: Comparison, *given: Any) -> Any:
        read.append(comparison.name)
        if len(read) == 1:
            raise OSError(5, "Input/output error", comparison.name)
        return real(comparison, *given)

    monkeypatch.setattr(Comparison, "run", run)
    new_trainer(tmp_path, LifecycleCallback(on_save_failure="continue")).train()
    assert saves == [6]
    assert read == ["model.safetensors", "model.safetensors", "optimizer.pt"]
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]


def test_first_save_that_cannot_be_flushed_is_raised_at_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(captured, "flush", flush)
    with pytest.raises(SaveFailed, match=r"checkpoint-2.*Input/output error"):
        new_trainer(tmp_path, LifecycleCallback()).train()
    assert latest_checkpoint(tmp_path) is None
    assert list(staging_folder(tmp_path).iterdir()) == []


def test_file_of_random_numbers_is_written_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, written = Trainer._save_rng_state, []

    def save(trainer: Trainer, output_dir: str) -> None:
        written.append(trainer.state.global_step)
        own(trainer, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", save)
    new_trainer(tmp_path, LifecycleCallback()).train()
    assert written == [2]  # what is in the others is compared above
    assert (tmp_path / "checkpoint-6" / "rng_state.pth").is_file()


def test_file_of_random_numbers_of_a_trainers_own_is_left_to_it(tmp_path: Path, saves: list[int]) -> None:
    class Own(Trainer):
        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(output_dir)
            file = Path(output_dir) / "rng_state.pth"
            torch.save({**torch.load(file, weights_only=False), "step": self.state.global_step}, file)

    new_trainer(tmp_path, LifecycleCallback(), kind=Own).train()
    assert saves == [4, 6]
    for step in (2, 4, 6):
        file = tmp_path / f"checkpoint-{step}" / "rng_state.pth"
        assert torch.load(file, weights_only=False)["step"] == step


def test_shards_are_written_as_trainer_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: list[int]
) -> None:
    from transformers import PreTrainedModel

    model, whole, parts = _gpt2(), PreTrainedModel.save_pretrained, {"max_shard_size": "4KB"}
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *given, **named: whole(*given, **parts, **named))
    trainer = new_trainer(tmp_path / "run", LifecycleCallback(), model=model, train=Tokens())
    trainer.train()
    assert saves == [4, 6]
    whole(model, tmp_path / "stock", **parts)
    ours, stock = content(tmp_path / "run" / "checkpoint-6"), content(tmp_path / "stock")
    assert sum(name.endswith(".safetensors") for name in stock) > 2
    assert {name: ours[name] for name in stock} == stock


def test_trainer_state_and_arguments_are_those_of_a_save_in_the_loop(tmp_path: Path) -> None:
    import json

    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"]}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 2}
    states = {}
    for name, async_save in (("background", True), ("loop", False)):
        place = tmp_path / name
        new_trainer(place, LifecycleCallback(async_save=async_save), **settings).train()
        text = (place / "checkpoint-6" / "trainer_state.json").read_text().replace(str(place), "")
        state = json.loads(text)
        state["stateful_callbacks"]["TrainerControl"].pop("hf_lifecycle")
        for row in state["log_history"]:
            for key in [key for key in row if key.endswith(("_runtime", "_per_second"))]:
                del row[key]
        states[name] = state
        args = torch.load(place / "checkpoint-6" / "training_args.bin", weights_only=False)
        assert (args.output_dir, args.save_total_limit) == (str(place), 2)
        assert sorted(path.name for path in place.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert states["background"] == states["loop"]


def test_stock_trainer_resumes_from_a_background_checkpoint(tmp_path: Path, saves: list[int]) -> None:
    new_trainer(tmp_path, LifecycleCallback(), max_steps=4).train()
    assert saves == [4]
    stock = new_trainer(tmp_path / "stock")
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert stock.state.global_step == 6


class Slowly:
    """Holds back the copying thread, so that training always meets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Snapshot._copy

        def copy(snapshot: Snapshot, *args: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.02)
            real(snapshot, *args)

        monkeypatch.setattr(Snapshot, "_copy", copy)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_copy_that_takes_longer_than_a_step_holds_the_state_of_its_own_step(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: list[int]
) -> None:
    new_trainer(tmp_path / "loop", LifecycleCallback(async_save=False), optim=optim, model=Normed()).train()
    Slowly(monkeypatch)
    new_trainer(tmp_path / "slow", LifecycleCallback(), optim=optim, model=Normed()).train()
    assert saves == [4, 6]
    assert len(read_events(tmp_path / "slow")) > 8
    assert not [event for event in read_events(tmp_path / "slow") if event.event == "failed"]


class Meddles(TrainerCallback):
    """Changes state between the save of a step and the next optimizer step."""

    def __init__(self, what: str, step: int) -> None:
        self._what, self._step = what, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self._step:
            return
        with torch.no_grad():
            if self._what == "parameter":
                next(kwargs["model"].parameters()).mul_(2)
            elif self._what == "optimizer":
                next(iter(kwargs["optimizer"].state.values()))["exp_avg"].mul_(2)
            elif self._what == "group":
                kwargs["optimizer"].param_groups[0]["weight_decay"] = 0.5
            elif self._what == "buffer":
                next(kwargs["model"].buffers()).add_(1)
            elif self._what == "scheduler":
                kwargs["lr_scheduler"].base_lrs[0] *= 2
            elif self._what == "log":
                state.log_history[-1]["loss"] = -1.0
            elif self._what == "object":
                kwargs["model"].mine["weight"].add_(1)


class Mine(dict):  # type: ignore[type-arg]
    def state_dict(self) -> Any:
        return self

    def load_state_dict(self, state: Any) -> None:
        self.update(state)


@pytest.mark.parametrize("what", ["group", "buffer", "scheduler", "log", "object"])
def test_state_changed_right_after_the_save_is_saved_as_it_was(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: list[int]
) -> None:
    def run(place: Path, *meddlers: TrainerCallback) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Normed()
        object.__setattr__(model, "mine", Mine(weight=torch.ones(3)))
        callback = LifecycleCallback(objects={"mine": model.mine})
        break_off(new_trainer(place, *meddlers, callback, model=model), at="on_step_end", step=5)
        return place / "checkpoint-4"

    calm = run(tmp_path / "calm")
    Slowly(monkeypatch)
    meddled = run(tmp_path / "meddled", Meddles(what, 4))
    assert saves == [4, 4]
    ours, theirs = content(calm), content(meddled)
    different = {file for file in theirs if ours[file] != theirs[file]} - {"training_args.bin"}
    assert different <= {"trainer_state.json"}  # the attempt's name
    from hf_lifecycle.checkpoint.files.statefile import read_tree

    trees = [read_tree(place / "lifecycle" / "rank-00000.safetensors", kind="trainer") for place in (calm, meddled)]
    assert trees[0]["parts"]["weights"]["model"] == trees[1]["parts"]["weights"]["model"]
    assert torch.equal(trees[1]["objects"]["mine"]["weight"], torch.ones(3))
    import json

    logs = [json.loads((place / "trainer_state.json").read_text())["log_history"] for place in (calm, meddled)]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


@pytest.mark.parametrize("what", ["parameter", "optimizer"])
def test_torn_snapshot_is_thrown_away_and_the_next_step_saved_in_its_place(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, saves: list[int]
) -> None:
    Slowly(monkeypatch)
    trainer = new_trainer(tmp_path, Meddles(what, 4), LifecycleCallback(), max_steps=8)
    trainer.train()
    assert saves == [4, 5, 6, 8]
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == [f"checkpoint-{step}" for step in (2, 5, 6, 8)]
    assert caplog.text.count("checkpoint-4: not saved: ") == 1
    assert [event.facts["step"] for event in read_events(tmp_path) if event.event == "failed"] == [4]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [2, 4, 6, 8]
    assert list(staging_folder(tmp_path).iterdir()) == []
    for name in names:
        assert problems_of(tmp_path / name, full=True) == []
    whole = digests(trainer)
    resumed = new_trainer(tmp_path, LifecycleCallback(), max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert digests(resumed) == whole


class EndsMeddled(TrainerCallback):
    """Swaps weights when training has ended, as one does with an average.

    Args:
        signal_too: Whether a signal comes then.
    """

    def __init__(self, *, signal_too: bool = False) -> None:
        self._signal_too = signal_too

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            with torch.no_grad():
                next(kwargs["model"].parameters()).mul_(2)
            if self._signal_too:
                os.kill(os.getpid(), signal.SIGTERM)


class StopsAfterStep6(Trainer):
    """Is told to stop when that step has been saved."""

    def _maybe_log_save_evaluate(self, *given: Any, **named: Any) -> None:
        super()._maybe_log_save_evaluate(*given, **named)
        self.control.should_training_stop |= self.state.global_step == 6


def test_last_step_is_saved_whatever_is_done_to_the_weights_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Slowly(monkeypatch)
    new_trainer(tmp_path / "meddled", EndsMeddled(), LifecycleCallback()).train()
    new_trainer(tmp_path / "calm", LifecycleCallback()).train()
    assert "not saved" not in caplog.text
    weights = [(tmp_path / one / "checkpoint-6" / "model.safetensors").read_bytes() for one in ("meddled", "calm")]
    assert weights[0] == weights[1]


def test_last_save_that_was_torn_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Slowly(monkeypatch)
    new_trainer(tmp_path, EndsMeddled(), LifecycleCallback(), kind=StopsAfterStep6, max_steps=12).train()
    assert caplog.text.count("checkpoint-6: not saved: ") == 1
    (said,) = [text for text in caplog.messages if text.startswith("the last save of this training failed")]
    assert "checkpoint-6: its tensors changed" in said


def test_step_whose_snapshot_was_torn_is_saved_again_for_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Slowly(monkeypatch)
    ends, ours = EndsMeddled(signal_too=True), LifecycleCallback(on_preempt="return")
    trainer = new_trainer(tmp_path, ends, ours, kind=StopsAfterStep6, max_steps=12)
    trainer.train()
    assert caplog.text.count("checkpoint-6: not saved: ") == 1
    assert "the last save of this training failed" not in caplog.text
    assert problems_of(tmp_path / "checkpoint-6", full=True) == []


def test_failed_last_save_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch)
    with pytest.raises(SaveFailed, match="checkpoint-4"):
        new_trainer(tmp_path, LifecycleCallback(), max_steps=4).train()


def test_training_goes_on_over_a_failed_save_by_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calm = new_trainer(tmp_path / "calm", LifecycleCallback())
    calm.train()
    fail_writes(monkeypatch)
    trainer = new_trainer(tmp_path / "run", LifecycleCallback(on_save_failure="continue"))
    trainer.train()
    assert digests(trainer) == digests(calm)
    assert sorted(path.name for path in (tmp_path / "run").glob("ch*")) == ["checkpoint-2", "checkpoint-6"]
    assert "training continues" in caplog.text


def test_save_in_the_handler_of_an_interrupt_is_whole_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_late(monkeypatch)
    trainer = break_off(new_trainer(tmp_path, LifecycleCallback()), step=5)
    trainer._save_checkpoint(trainer.model, None)
    assert problems_of(tmp_path / "checkpoint-5", full=True) == []


def _write_late(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DeferredSave.write

    def write(*given: Any) -> None:
        time.sleep(0.3)
        real(*given)

    monkeypatch.setattr(DeferredSave, "write", write)


@pytest.mark.parametrize("kind", [BrokenOff, KeyboardInterrupt, RuntimeError])
def test_exception_leaves_training_when_the_save_in_flight_is_committed(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise kind

    _write_late(monkeypatch)
    with pytest.raises(kind):
        new_trainer(tmp_path, LifecycleCallback(), Breaks()).train()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_best_model_is_loaded_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DeferredSave.write

    def write(*given: Any) -> None:
        time.sleep(0.3)
        real(*given)

    monkeypatch.setattr(DeferredSave, "write", write)
    trainer = new_trainer(
        tmp_path,
        LifecycleCallback(),
        evaluated=Rows(16),
        eval_strategy="steps",
        eval_steps=2,
        label_names=["labels"],
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


class WritesMore(Trainer):
    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        (Path(str(output_dir)) / f"extra-{self.state.global_step}.txt").write_text("mine")


class WritesMoreLast(Trainer):
    def _save_checkpoint(self, *given: Any, **named: Any) -> None:
        super()._save_checkpoint(*given, **named)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        (folder / "extra.txt").write_text(str(self.state.global_step))


def test_trainer_with_a_save_model_of_its_own_saves_itself_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saves: list[int]
) -> None:
    new_trainer(tmp_path, LifecycleCallback(), kind=WritesMore).train()
    assert saves == []
    assert caplog.text.count("WritesMore overrides save_model") == 1
    assert (tmp_path / "checkpoint-6" / "extra-6.txt").exists()


def test_what_a_subclass_writes_beside_trainers_save_is_there(tmp_path: Path, saves: list[int]) -> None:
    new_trainer(tmp_path, LifecycleCallback(), kind=WritesMoreLast).train()
    assert saves == [4, 6]
    assert (tmp_path / "checkpoint-6" / "extra.txt").read_text() == "6"


class Twice(nn.Module):
    """Whose state_dict has computed tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self._register_state_dict_hook(
            lambda module, state, prefix, meta: {name: value * 2 for name, value in state.items()}
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.net(x, labels)


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "computed": ({"model": Twice}, "Twice has a hook on its state_dict"),
    "memory": ({}, "bytes of host memory"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason_why_trainer_saves_is_said_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, saves: list[int]
) -> None:
    made, reason = REASONS[name]
    if name == "memory":
        monkeypatch.setattr(overlap, "available_memory", lambda: 100)
    trainer = new_trainer(tmp_path, LifecycleCallback(), model=made["model"]() if made else None)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert saves == []
    assert caplog.text.count("no background saves: Trainer makes each save") == 1
    assert reason in caplog.text
    assert problems_of(tmp_path / "checkpoint-6", full=True) == []


def test_changed_configuration_makes_a_new_template(tmp_path: Path, saves: list[int]) -> None:
    model = _gpt2()

    class Renames(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                kwargs["model"].config.name_of_mine = "changed"

    new_trainer(tmp_path, Renames(), LifecycleCallback(), model=model, train=Tokens(), max_steps=8).train()
    assert saves == [4, 8]
    assert "changed" not in (tmp_path / "checkpoint-4" / "config.json").read_text()
    for step in (6, 8):
        assert "changed" in (tmp_path / f"checkpoint-{step}" / "config.json").read_text()


def test_nothing_of_trainer_or_optimizer_stays_ours(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback())
    before = set(vars(trainer))
    trainer.train()
    ours = {"_save_checkpoint", "save_model", "_save_optimizer_and_scheduler", "_run_epoch", "_load_best_model"}
    assert not ours & (set(vars(trainer)) - before)
    assert "save_to_json" not in vars(trainer.state)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert len(inner._optimizer_step_pre_hooks) == 0


def test_tools_are_told_in_a_row_that_the_log_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, float]] = []

    class Tool(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            rows.append(dict(logs))

    class Other(Tool):
        pass

    monkeypatch.setattr(Tool, "__module__", "transformers.integrations.mine")
    others: list[dict[str, float]] = []
    monkeypatch.setattr(Other, "on_log", lambda self, a, s, c, logs=None, **kw: others.append(dict(logs)))
    trainer = new_trainer(tmp_path, Tool(), Other(), LifecycleCallback())
    trainer.train()
    told = [row for row in rows if "lifecycle/save_stall_ms" in row]
    assert [row["lifecycle/save_step"] for row in told] == [4, 6]
    assert all(row["lifecycle/save_bytes"] > 1000 for row in told)
    assert not [row for row in [*others, *trainer.state.log_history] if any("lifecycle" in key for key in row)]


@pytest.mark.parametrize("after", [True, False])
def test_callback_finds_the_checkpoint_at_on_save(
    after: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bool] = []

    class Looks(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((tmp_path / f"checkpoint-{state.global_step}").is_dir())

    callbacks = [LifecycleCallback(), Looks()] if after else [Looks(), LifecycleCallback()]
    new_trainer(tmp_path, *callbacks).train()
    assert seen == [True] * 3
    assert caplog.text.count("right after it: Looks.on_save") == 1


def _last_in(folder: str) -> str | None:
    return get_last_checkpoint(folder)


class FindsLast(TrainerCallback):
    """Looks, by a function of the same module, for the last checkpoint in the step after each save."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % args.save_steps == 0:
            self.seen.append(_last_in(args.output_dir))


class FindsByName(FindsLast):
    """Looks for it by its name."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step and state.global_step % args.save_steps == 0:
            self.seen.append(str(path) if path.is_dir() else None)


def _finding_by_closure() -> type[FindsLast]:
    from transformers.trainer_utils import get_last_checkpoint

    class FindsByClosure(FindsLast):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step and state.global_step % args.save_steps == 0:
                self.seen.append(get_last_checkpoint(args.output_dir))

    return FindsByClosure


@pytest.mark.parametrize("kind", [FindsLast, FindsByName, _finding_by_closure()])
def test_code_that_looks_for_a_checkpoint_at_a_step_finds_it(
    kind: type[FindsLast], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looking = kind()
    new_trainer(tmp_path, LifecycleCallback(), looking).train()
    assert looking.seen == [str(tmp_path / f"checkpoint-{step}") for step in (2, 4)]
    assert caplog.text.count(f"right after it: {kind.__name__}.on_step_begin") == 1


def test_template_is_refused_where_a_file_is_not_accounted_for(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    trainer.create_optimizer_and_scheduler(6)
    folder = tmp_path / "checkpoint-1"

    def save() -> None:
        trainer.save_model(str(folder))
        torch.save({"a": 1}, folder / "heads.bin")

    seen = template.observe(trainer, save)
    seen.of_model |= {"heads.bin"}
    with pytest.raises(template.NotLearned, match="heads\\.bin: unknown file"):
        template.template_of(trainer, seen)
