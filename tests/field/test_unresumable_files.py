"""What a checkpoint's files lack for a resume, or hold and no resume will load, is reported when they are saved."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, TrainingStateManager, latest_checkpoint
from hf_lifecycle.errors import ResumeMismatch
from tests.field.limits import Limit
from tests.trainer.runs import Net, Rows, break_off, digests, new_trainer

NO_OPTIMIZER = Limit(
    "a custom `_save_optimizer_and_scheduler` that writes no optimizer or no scheduler",
    "at the first save",
    "not exact: checkpoint-… has no optimizer.pt, since … does not write it, so a resume will be refused: call "
    "super() there, or resume with LifecycleCallback(strict=False) and a new optimizer",
)
PART_OF_WEIGHTS = Limit(
    "a custom `save_model` or `_save` that leaves out trained weights",
    "at the first save",
    "not exact: the weights in checkpoint-… lack … trained tensors of the model (…), since … does not write them, so "
    'a resume will be refused: write them too, or pass their owner as objects={"name": it}',
)
LATE_CLASS = Limit(
    "a class or NumPy scalar that appears in the state of an optimizer or a scheduler after the first save",
    "at a save",
    "not exact: … contains …, which cannot be loaded at a resume (nor from a checkpoint of … alone): keep only plain "
    "numbers and tensors in its state, or pass the class to torch.serialization.add_safe_globals() in your script",
)


class Partly(Net):
    """What Trainer asks of a model when it has loaded a part of its weights."""

    _keys_to_ignore_on_save = None


def partly() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Partly()


class NoOptimizer(Trainer):
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        pass


class NoScheduler(Trainer):
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        (Path(output_dir) / "scheduler.pt").unlink(missing_ok=True)


class HeadAlone(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = {name: one for name, one in self.model.state_dict().items() if name.startswith("layers.2")}
        super()._save(output_dir, state_dict=state)


class HeadModel(Trainer):
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = {name: one for name, one in self.model.state_dict().items() if name.startswith("layers.2")}
        self._save(output_dir, state_dict=state)


class OwnFiles(NoOptimizer):
    """Writes and loads its optimizer and weights by itself."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        both = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
        torch.save(both, Path(output_dir) / "both.bin")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            both = torch.load(Path(checkpoint) / "both.bin", weights_only=True)
            self.optimizer.load_state_dict(both["optimizer"])
            self.lr_scheduler.load_state_dict(both["scheduler"])


class Counter(logging.Handler):
    """Counts what is told. A callback that held pytest's own fixture would hold all tests, as a user's objects."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "not exact" in record.getMessage()


@contextlib.contextmanager
def counted() -> Iterator[None]:
    logger, counter = logging.getLogger("hf_lifecycle"), Counter()
    logger.addHandler(counter)
    try:
        yield
    finally:
        logger.removeHandler(counter)


def count() -> int:
    (counter,) = (one for one in logging.getLogger("hf_lifecycle").handlers if isinstance(one, Counter))
    return counter.count


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "not exact" in each.getMessage()]


@pytest.mark.parametrize("kind", [NoOptimizer, NoScheduler])
def test_file_that_an_override_does_not_write_is_told_at_the_first_save(
    kind: type[Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), model=partly(), kind=kind))
    (line,) = told(caplog)
    if kind is NoOptimizer:
        assert "checkpoint-2 has no optimizer.pt or scheduler.pt, since NoOptimizer does not write it" in line
        NO_OPTIMIZER.require_told(line.replace(" or scheduler.pt", ""))
    else:
        assert "checkpoint-2 has no scheduler.pt" in line
    with pytest.raises(ResumeMismatch):
        new_trainer(tmp_path, LifecycleCallback(), model=partly(), kind=kind).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", [HeadAlone, HeadModel])
def test_weights_that_an_override_leaves_out_are_told_at_the_first_save(
    kind: type[Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), model=partly(), kind=kind))
    (line,) = told(caplog)
    PART_OF_WEIGHTS.require_told(line)
    assert "lack 2 trained tensors of the model (layers.0.weight, layers.0.bias)" in line
    with pytest.raises(ResumeMismatch):
        new_trainer(tmp_path, LifecycleCallback(), model=partly(), kind=kind).train(resume_from_checkpoint=True)


def test_weights_that_are_passed_as_objects_are_resumed_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(name: str) -> Trainer:
        model = partly()
        callback = LifecycleCallback(objects={"body": model.layers[0]})
        return new_trainer(tmp_path / name, callback, model=model, kind=HeadAlone)

    unbroken = make("unbroken")
    unbroken.train()
    break_off(make("broken"))
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "broken"))
    assert digests(resumed) == digests(unbroken)
    assert told(caplog) == []


def test_frozen_weights_that_are_left_out_are_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def frozen() -> nn.Module:
        model = partly()
        model.layers[0].requires_grad_(False)
        return model

    break_off(new_trainer(tmp_path, LifecycleCallback(), model=frozen(), kind=HeadAlone))
    new_trainer(tmp_path, LifecycleCallback(), model=frozen(), kind=HeadAlone).train(resume_from_checkpoint=True)
    assert told(caplog) == []


def test_trainer_that_loads_what_it_writes_is_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), kind=OwnFiles))
    new_trainer(tmp_path, LifecycleCallback(), kind=OwnFiles).train(resume_from_checkpoint=True)
    assert told(caplog) == []


class Late(torch.optim.SGD):
    """Puts a value into its state at a step, or into a group."""

    value: Any = None
    place = "state"
    first = 4

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken >= self.first:
            group = self.param_groups[0]
            (self.state[group["params"][0]] if self.place == "state" else group)["late"] = self.value
        return result


class Odd:
    """No plain value."""


@pytest.mark.parametrize(
    ("value", "place", "first", "in_background"),
    [
        (np.float64(0.5), "state", 1, True),
        (np.float64(0.5), "state", 3, True),
        (np.int64(3), "group", 3, True),
        (Odd(), "state", 3, True),
        (np.float64(0.5), "group", 3, False),
    ],
)
def test_class_that_no_resume_will_load_is_told_at_the_save_that_first_has_it_and_once(
    value: Any, place: str, first: int, in_background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("Late", (Late,), {"value": value, "place": place, "first": first})
    given = {"optimizer_cls_and_kwargs": (kind, {"lr": 0.01, "momentum": 0.9})}
    seen: dict[int, int] = {}

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2 == 1:  # the save before is waited for by the one that follows, and no later
                seen[state.global_step] = count()

    callback = LifecycleCallback(async_save=in_background)
    trainer = new_trainer(tmp_path, callback, model=partly(), with_trainer=given, max_steps=8)
    trainer.add_callback(Counts())
    own = trainer._save_checkpoint

    def waited(*given: Any, **named: Any) -> None:
        own(*given, **named)
        next(part for part in callback._parts if part.key == "staging").settle()  # type: ignore[attr-defined]

    trainer._save_checkpoint = waited
    with counted():
        trainer.train()
    assert seen == {1: 0, 3: int(first == 1), 5: 1, 7: 1}, told(caplog)
    LATE_CLASS.require_told("".join(told(caplog)))


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("late", ["optimizer", "scheduler"])
def test_class_in_a_file_of_a_loop_is_told_at_the_save_that_first_has_it_and_once(
    late: str, wait: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(until: int) -> list[int]:
        accelerator = Accelerator(cpu=True)
        model = Net()
        kind = type("Late", (Late,), {"value": np.float64(0.5) if late == "optimizer" else 0.5, "first": 3})
        optimizer = kind(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        loader = DataLoader(Rows(), batch_size=4)
        manager = TrainingStateManager(accelerator, tmp_path)
        model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
        counts = []
        try:
            manager.resume()
            for _ in manager.epochs(2, max_steps=until):
                for batch in manager.batches(loader):
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    if late == "scheduler" and manager.progress.step == 3:
                        scheduler.scheduler.late = np.float64(1)
                    scheduler.step()
                    optimizer.zero_grad()
                    if manager.progress.step:
                        manager.save(wait=wait)
                        manager._loop._saves.finish()
                    counts.append(len([line for line in told(caplog) if f"{late}.bin contains" in line]))
        finally:
            manager.close()
        return counts

    assert run(5) == [0, 0, 1, 1, 1]
    with pytest.raises(Exception, match="numpy"):
        run(8)
