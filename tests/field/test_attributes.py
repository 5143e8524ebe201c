"""Plain values that a user's code changes while it trains are what they were, or it is said that they are not."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.libraries import put_into_libraries
from tests.field.limits import Limit
from tests.field.renaming import renamed
from tests.trainer.runs import Net, Rows, break_off, digests, new_trainer, require_same_end

CHANGING_DATA = Limit(
    what="A value of a dataset or collator without `state_dict()` that changes from batch to batch; of an order, or "
    "with workers, one that changes within an epoch",
    when="at the first save",
    line=(
        "maybe not exact: … changes during training, and batches are prepared in advance: if they depend on it, give "
        "its object state_dict() and load_state_dict()"
    ),
)
TOO_LARGE = Limit(
    what="An attribute that training changes, of more than 10000 values or with a tensor of more than 1 GB",
    when="at a save",
    line=(
        "not exact: … changes during training and is not saved, so a resumed run starts with its initial value: it "
        "has more than … values"
    ),
)
ENVIRONMENT = Limit(
    what="An environment variable that your code changes while it trains",
    when="at the first save",
    line=(
        "not exact: the environment variable … changes during training and is not saved: keep its value in an "
        "attribute of a callback or of the trainer"
    ),
)
SHARING = Limit(
    what="A `state_dict()` of the model or of an optimizer that is kept without a copy, and used later",
    when="at a save",
    line=(
        "not exact: … shares the memory of weights or of an optimizer's state, as what state_dict() gives and what "
        "load_state_dict() is given does, so it changes with each step, and a resumed run has a copy that does not: "
        "keep copy.deepcopy() of a state, and load one"
    ),
    outcome="a warning",
)
AMID_A_STEP = Limit(
    what="A long list or large tensor in an attribute that training changes, at a save in the middle of a step",
    when="at a save",
    line="not exact: … is saved as it is in the middle of a step, and a resumed run repeats that step from its start",
)


class Phase(enum.Enum):
    WARM = 1
    MAIN = 2


class Annealed(Trainer):
    """Weights its loss by a count of its own, and by the members of a phase."""

    calls = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = 0.0
        self.phase = Phase.WARM
        self.recent: deque[float] = deque(maxlen=3)
        self.own_rng = random.Random(3)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        self.weight += 0.1
        if self.weight > 0.45:
            self.phase = Phase.MAIN
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.recent.append(float(loss.detach()))
        factor = self.weight * self.phase.value * (1 + self.own_rng.random()) * (1 + 0.01 * self.calls)
        return loss * factor * (1 + sum(self.recent))


class Stages(TrainerCallback):
    """Turns a dropout down, and freezes a layer, by counts of its own; what it is called at is given."""

    def __init__(self, event: str = "on_step_end") -> None:
        self.seen: Counter[str] = Counter()
        self.numbers = np.random.default_rng(5)
        self.scale = torch.ones(3)
        setattr(self, event, self._stage)

    def _stage(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen["steps"] += 1
        self.scale.mul_(0.9)
        model.layers[1].p = float(0.5 * self.scale[0] + 0.1 * self.numbers.random() / self.seen["steps"])
        for one in model.layers[0].parameters():
            one.requires_grad_(self.seen["steps"] != 3 and self.seen["steps"] != 4)


class Average:
    """A moving average as people write it: no module, and a state that it gives and takes."""

    def __init__(self, model: Any) -> None:
        self.shadow = {name: one.detach().clone() for name, one in model.named_parameters()}

    def update(self, model: Any) -> None:
        for name, one in model.named_parameters():
            self.shadow[name].lerp_(one.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, one in state.items():
            self.shadow[name].copy_(one)


class Averaging(TrainerCallback):
    """Pulls the weights to their average, of one of the kinds that people write, at the begin of each step."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.average: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        made = Average(model)
        self.average = made if self._kind == "object" else made.shadow

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        shadow = self.average.shadow if self._kind == "object" else self.average
        with torch.no_grad():
            for name, one in model.named_parameters():
                one.lerp_(shadow[name], 0.2)
                shadow[name].lerp_(one, 0.3)


class Counting(Net):
    """Scales its loss by how often it was called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += self.training
        outputs = super().forward(x, labels)
        return outputs | {"loss": outputs["loss"] * min(1.0, self.calls / 5)}


_GLOBAL_CALLS = 0


def _loss_with_closure() -> Callable[..., Any]:
    calls = 0

    def loss(outputs: Any, labels: Any, **kwargs: Any) -> Any:
        nonlocal calls
        global _GLOBAL_CALLS
        calls += 1
        _GLOBAL_CALLS += 1
        return outputs["logits"].pow(2).mean() * (calls + 0.1 * _GLOBAL_CALLS)

    return loss


class WithoutLoss(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(x).squeeze(-1), "first": x}


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make()


def _annealed(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    Annealed.calls = 0
    return new_trainer(folder, *callbacks, kind=Annealed, max_steps=8)


def _stages(event: str) -> Callable[..., Trainer]:
    return lambda folder, *callbacks: new_trainer(
        folder, Stages(event), *callbacks, max_steps=8, eval_strategy="steps", eval_steps=1
    )


def _two_alike(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    return new_trainer(folder, Stages("on_step_begin"), *callbacks, Stages("on_log"), max_steps=8, logging_steps=1)


def _averaging(kind: str) -> Callable[..., Trainer]:
    return lambda folder, *callbacks: new_trainer(folder, Averaging(kind), *callbacks, max_steps=8)


def _counting(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    return new_trainer(folder, *callbacks, model=_seeded(Counting), max_steps=8)


def _closure(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    global _GLOBAL_CALLS
    _GLOBAL_CALLS = 0
    given = {"compute_loss_func": _loss_with_closure()}
    return new_trainer(folder, *callbacks, model=_seeded(WithoutLoss), with_trainer=given, max_steps=8)


def _lookahead(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    """Slow weights around the optimizer's step, as the recipe has it."""
    trainer = new_trainer(folder, *callbacks, model=_seeded(Net), max_steps=8)
    trainer.create_optimizer()
    fast = list(trainer.model.parameters())
    slow, calls, step = [one.detach().clone() for one in fast], [0], trainer.optimizer.step

    def with_slow_weights(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        calls[0] += 1
        if calls[0] % 3 == 0:
            with torch.no_grad():
                for one, behind in zip(fast, slow, strict=True):
                    one.copy_(behind.lerp_(one, 0.5))
        return result

    trainer.optimizer.step = with_slow_weights
    return trainer


def _hooks(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    """A scale that a forward hook keeps, and noise that hooks on gradients draw from a generator they share."""
    trainer = new_trainer(folder, *callbacks, model=_seeded(Net), max_steps=8)
    scale, numbers = [0.0], torch.Generator().manual_seed(3)

    def noisy(gradient: torch.Tensor, numbers: torch.Generator = numbers) -> torch.Tensor:
        return gradient + 0.1 * torch.randn(gradient.shape, generator=numbers)

    def scaled(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        scale[0] = 0.9 * scale[0] + 0.1 * float(output.detach().abs().mean())
        return output * (1 + scale[0])

    for one in trainer.model.parameters():
        one.register_hook(noisy)
    trainer.model.layers[2].register_forward_hook(scaled)
    return trainer


class Worst(TrainerCallback):
    """Keeps what it has seen in attributes that its class alone has at first."""

    worst, calls = 0.0, 0

    def on_log(self, args: Any, state: Any, control: Any, optimizer: Any = None, logs: Any = None, **kw: Any) -> None:
        self.calls += 1
        self.worst = max(self.worst, logs.get("loss", 0.0))

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 * self.worst + 0.01 * self.calls


def _class_defaults(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    return new_trainer(folder, Worst(), *callbacks, model=_seeded(Net), max_steps=8, logging_steps=1)


class Numbered(type):
    """Gives the objects of its classes a number, and the classes themselves another."""

    made = 0

    @property
    def number(cls) -> int:
        Numbered.made += 1
        return Numbered.made


class Base:
    asked = 0

    @classmethod
    def ask(cls) -> int:
        Base.asked += 1
        return Base.asked


class Asked(Base, metaclass=Numbered):
    """Has its numbers from its base, and from the class of its class."""


class Scattered(Trainer):
    """Counts on the objects of libraries that a callback gets, and on classes that it only comes to by others."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        holders = [self.control, self.accelerator, self.callback_handler, self.model.layers[2]]
        for one in holders:
            vars(one)["count"] = getattr(one, "count", 0) + 1
        total = sum(getattr(one, "count", 0) for one in holders) + Asked.number + Asked.ask()
        return super().compute_loss(*args, **kwargs) * (1 + 0.01 * total)


def _scattered(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    Numbered.made = Base.asked = 0
    return new_trainer(folder, *callbacks, model=_seeded(Net), kind=Scattered, max_steps=8)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_annealed, id="a trainer"),
        pytest.param(_stages("on_step_begin"), id="on_step_begin"),
        pytest.param(_stages("on_step_end"), id="on_step_end"),
        pytest.param(_stages("on_epoch_begin"), id="on_epoch_begin"),
        pytest.param(_stages("on_evaluate"), id="on_evaluate"),
        pytest.param(_two_alike, id="two callbacks of one class"),
        pytest.param(_averaging("dict"), id="an average in a dict"),
        pytest.param(_counting, id="a model"),
        pytest.param(_closure, id="a closure and a global variable"),
        pytest.param(_lookahead, id="a function around the optimizer's step"),
        pytest.param(_hooks, id="hooks"),
        pytest.param(_class_defaults, id="attributes of a class at first"),
        pytest.param(_scattered, id="objects of libraries, a base class and a metaclass"),
    ],
)
def test_values_that_training_changes_go_on(
    make: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make(tmp_path / "whole", LifecycleCallback())
    whole.train()
    for step in (2, 6):  # the middle of the first epoch, and of the second
        place = tmp_path / f"broken off at {step}"
        break_off(make(place, LifecycleCallback()), step=step)
        resumed = make(place, LifecycleCallback())
        resumed.train(resume_from_checkpoint=True)
        assert digests(resumed) == digests(whole), place
    assert "not exact" not in caplog.text


def test_environment_variable_that_training_changes_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.environ["STAGE_OF_MINE"] = str(state.global_step)
            os.environ["stage_of_another".upper()] = "1"  # no code has this name

    for name in ("STAGE_OF_MINE", "stage_of_another".upper()):
        monkeypatch.setenv(name, "0")  # and removed after the test
    new_trainer(tmp_path, Stage(), LifecycleCallback()).train()
    ENVIRONMENT.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


def test_object_with_a_state_is_carried_by_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Made(Averaging):
        def __init__(self, model: Any) -> None:
            super().__init__("object")
            self.average = Average(model)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pass

    def make(name: str) -> Trainer:
        model = _seeded(Net)
        return new_trainer(tmp_path / name, Made(model), LifecycleCallback(), model=model, max_steps=8)

    require_same_end(make, step=6)
    assert "not exact" not in caplog.text


def test_save_in_the_middle_of_a_step_has_the_values_of_its_begin(tmp_path: Path) -> None:
    class Saves(TrainerCallback):
        trainer: Any = None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def make(folder: Path) -> Trainer:
        saves = Saves()
        trainer = _annealed(folder, saves, LifecycleCallback())
        saves.trainer = trainer
        return trainer

    whole = make(tmp_path / "whole")
    whole.train()
    break_off(make(tmp_path / "broken"), at="on_optimizer_step", step=5)
    resumed = make(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-5"))
    assert digests(resumed) == digests(whole)


def test_what_is_set_anew_in_each_process_stays_as_it_is(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        name = ""
        began = last = spent = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.name, self.began = f"run {time.time_ns()}", time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.last, self.spent = now, self.spent + 1

    first, second = Watch(), Watch()
    break_off(new_trainer(tmp_path, first, LifecycleCallback()), step=4)
    looked: list[tuple[str, float, float, float]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            looked.append((second.name, second.began, second.last, second.spent))

    new_trainer(tmp_path, second, LifecycleCallback(), Look()).train(resume_from_checkpoint=True)
    name, began, last, spent = looked[0]
    assert name != first.name
    assert began > first.began
    assert last == 0
    assert spent == 4


class _Counted(Rows):
    made = 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.made += 1
        return super().__getitem__(index)


def test_number_of_a_dataset_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new_trainer(tmp_path, LifecycleCallback(), train=_Counted()).train()
    CHANGING_DATA.require_told(caplog.text)
    assert caplog.text.count("are prepared in advance") == 1
    assert "train_dataset.made changes" in caplog.text


def test_list_that_grows_without_end_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Keeps(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rows += [0.0] * 6000

    new_trainer(tmp_path, Keeps(), LifecycleCallback()).train()
    TOO_LARGE.require_told(caplog.text)
    assert caplog.text.count("Keeps.rows") == 1


def test_value_whose_place_is_gone_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_off(new_trainer(tmp_path, Stages(), LifecycleCallback()), step=4)
    new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=True)
    assert "not exact: 3 saved values cannot be restored" in caplog.text


def test_ordinary_training_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(patience=3), eval_strategy="steps", eval_steps=2).train()
    saved = read_tree(rank_file(tmp_path / "checkpoint-6", 0), kind=TRAINER)["parts"]["attributes"]
    assert saved == {"values": {}, "trained": {}}


def test_trainer_without_the_method_that_fetches_goes_on_all_the_same(tmp_path: Path) -> None:
    whole = _annealed(tmp_path / "whole", LifecycleCallback())
    whole.train()
    with renamed("get_batch_samples"):
        break_off(_annealed(tmp_path / "broken", LifecycleCallback()), step=6)
        resumed = _annealed(tmp_path / "broken", LifecycleCallback())
        resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)


def test_long_list_that_a_save_amid_a_step_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Keeps(TrainerCallback):
        trainer: Any = None

        def __init__(self) -> None:
            self.rows: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rows += [0.0] * 200
            if state.global_step == 3:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)

    keeps = Keeps()
    keeps.trainer = new_trainer(tmp_path, keeps, LifecycleCallback(), save_strategy="no")
    keeps.trainer.train()
    AMID_A_STEP.require_told(caplog.text)


def test_object_that_answers_no_one_is_passed_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Answers:
        def __getattribute__(self, name: str) -> Any:
            if name != "__class__":
                raise RuntimeError(f"not to be asked for {name}")
            return object.__getattribute__(self, name)

    class Holds(TrainerCallback):
        def __init__(self) -> None:
            self.held = Answers()

    new_trainer(tmp_path, Holds(), LifecycleCallback()).train()
    assert "not exact" not in caplog.text


def test_a_mock_in_a_callback_is_no_reason_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Reporting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run = MagicMock()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.log({"step": state.global_step})

    break_off(new_trainer(tmp_path, Reporting(), LifecycleCallback()))
    new_trainer(tmp_path, Reporting(), LifecycleCallback()).train(resume_from_checkpoint=True)
    assert "not exact" not in caplog.text


class Unbound:
    """As a proxy for what is there only within a request: whoever asks for its class is refused."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("outside of application context")

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise RuntimeError("outside of application context")


class Guarded(TrainerCallback):
    """Keeps such a proxy, and may not be compared."""

    def __init__(self) -> None:
        self.app, self.within = Unbound(), [Unbound(), {"one": Unbound()}]

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other).__module__.startswith("hf_lifecycle"):  # not by the test, which takes its own callback away
            raise RuntimeError("do not compare")
        return self is other


def test_objects_that_may_not_be_asked_for_their_class_or_compared_end_no_training(tmp_path: Path) -> None:
    whole = new_trainer(tmp_path / "whole", Guarded(), LifecycleCallback())
    whole.app = Unbound()  # type: ignore[attr-defined]
    whole.train()
    break_off(new_trainer(tmp_path / "broken", Guarded(), LifecycleCallback()))
    resumed = new_trainer(tmp_path / "broken", Guarded(), LifecycleCallback())
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)


class _Hidden(Trainer):
    """Trains on hidden states: at first use transformers puts hooks on modules, and notes there that it has."""

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        output = model(**inputs, output_hidden_states=True)
        return output.loss + output.hidden_states[1].pow(2).mean()


class _Tokens(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) * (index + 1) % 32
        return {"input_ids": ids, "labels": ids}


def test_what_a_library_notes_on_its_modules_holds_in_its_process_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(name: str) -> Trainer:
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False)
        model = GPT2LMHeadModel(config)
        return new_trainer(tmp_path / name, LifecycleCallback(), model=model, train=_Tokens(), kind=_Hidden)

    require_same_end(make)
    assert "not exact" not in caplog.text


class InLibraries(Trainer):
    """Counts in variables of libraries' modules and in attributes of their classes, and in its own by their names."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        import transformers.trainer_utils as utils

        torch.count_of_mine = getattr(torch, "count_of_mine", 0) + 1  # type: ignore[attr-defined]
        torch.nn.functional.count_of_mine += 1  # type: ignore[attr-defined]
        setattr(Trainer, "count_of_mine", getattr(Trainer, "count_of_mine", 0) + 1)  # noqa: B010
        utils.count_of_mine = getattr(utils, "count_of_mine", 0) + 1
        globals()["COUNT_BY_TEXT"] = globals().get("COUNT_BY_TEXT", 0) + 1
        counts = [torch.count_of_mine, torch.nn.functional.count_of_mine, utils.count_of_mine]  # type: ignore[attr-defined]
        total = sum([*counts, Trainer.count_of_mine, globals()["COUNT_BY_TEXT"]])  # type: ignore[attr-defined]
        return super().compute_loss(*args, **kwargs) * (1 + 0.01 * total)


class OnShared(Trainer):
    """Counts on objects that libraries share, and on the callbacks of a library."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        handler = self.callback_handler
        shared = [self.accelerator.state, self.accelerator.gradient_state, handler.train_dataloader]
        for one in [*shared, handler.callbacks[0]]:
            one.count_of_mine = getattr(one, "count_of_mine", 0) + 1
        total = sum(one.count_of_mine for one in [*shared, handler.callbacks[0]])
        return super().compute_loss(*args, **kwargs) * (1 + 0.01 * total)


class Settling(Trainer):
    """Trains by settings of torch, which a callback changes."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * (1 + torch.get_deterministic_debug_mode() + 0.1 * torch.backends.cudnn.deterministic)


class Settings(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            torch.set_deterministic_debug_mode("warn")
            torch.backends.cudnn.deterministic = True


DROPOUT = torch.nn.functional.dropout
WITH_COUNTS: list[Any] = [torch, torch.nn.functional, Trainer, transformers.trainer_utils]


def _counting_dropout() -> Callable[..., Any]:
    calls = 0

    def dropout(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return DROPOUT(*args, **kwargs) * (1 + 0.01 * calls)

    return dropout


def _forget_what_lies_in_libraries() -> None:
    for one in WITH_COUNTS:
        if "count_of_mine" in vars(one):
            delattr(one, "count_of_mine")
    globals().pop("COUNT_BY_TEXT", None)
    torch.nn.functional.dropout = DROPOUT
    torch.set_deterministic_debug_mode("default")
    torch.backends.cudnn.deterministic = False
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def libraries() -> Iterator[None]:
    """Libraries as they were, after the test."""
    yield
    _forget_what_lies_in_libraries()


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("step", [2, 6], ids=["an epoch's middle", "the second epoch's middle"])
@pytest.mark.parametrize("where", ["in libraries", "on shared objects", "in a patch", "settings of torch"])
def test_what_lies_in_libraries_goes_on(
    where: str, step: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"in libraries": InLibraries, "on shared objects": OnShared, "settings of torch": Settling}

    def make(name: str) -> Trainer:
        _forget_what_lies_in_libraries()
        torch.nn.functional.count_of_mine = 0  # type: ignore[attr-defined]
        if where == "in a patch":  # which torch's own modules call
            torch.nn.functional.dropout = _counting_dropout()  # type: ignore[assignment]
        kind = kinds.get(where, Trainer)
        callbacks = [LifecycleCallback(), *([Settings()] if where == "settings of torch" else [])]
        return new_trainer(tmp_path / name, *callbacks, model=_seeded(Net), kind=kind, max_steps=8)

    require_same_end(make, step=step)
    assert "not exact" not in caplog.text


def test_what_is_put_into_libraries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.AttentionInterface()
    monkeypatch.setitem(attention._global_mapping, "of mine", _loss_with_closure)
    monkeypatch.setattr(transformers.activations, "of_mine", functools.partial(_loss_with_closure), raising=False)
    found = put_into_libraries()
    assert found["transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[of mine]"] is _loss_with_closure
    assert "transformers.activations.of_mine" in found
    # Later looks at the same, in which only what is new is looked through.
    assert put_into_libraries() == found
    monkeypatch.setattr(transformers.activations, "of_mine", len)
    monkeypatch.setattr(transformers.activations, "gelu_of_mine", _loss_with_closure, raising=False)
    monkeypatch.setitem(attention._global_mapping, "sdpa", _loss_with_closure)
    found = put_into_libraries()
    assert found["transformers.activations.gelu_of_mine"] is _loss_with_closure
    assert found["transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[sdpa]"] is _loss_with_closure
    assert "transformers.activations.of_mine" not in found


class Keeping(TrainerCallback):
    """Keeps a state of step 3 and goes back to it at step 7, by copies, or not."""

    def __init__(self, of: str, *, copied: bool) -> None:
        self.of, self.copied = of, copied
        self.kept: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            held = kwargs[self.of].state_dict()
            self.kept = copy.deepcopy(held) if self.copied else held
        if state.global_step == 7:
            kwargs[self.of].load_state_dict(copy.deepcopy(self.kept) if self.copied else self.kept)


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_kept_state_that_is_no_copy_is_named(of: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(name: str) -> Trainer:
        return new_trainer(tmp_path / name, Keeping(of, copied=True), LifecycleCallback(), max_steps=8)

    require_same_end(make, step=6)
    assert "not exact" not in caplog.text
    new_trainer(tmp_path / "not copied", Keeping(of, copied=False), LifecycleCallback(), max_steps=8).train()
    SHARING.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


class Sharing(TrainerCallback):
    """From step 3 on, one container is in two places; or, from there on, it is not any more."""

    def __init__(self, of: str) -> None:
        self.of = of
        self.factors: Any = {} if of == "dict" else []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.trainer.factors = [0.5] if self.of == "parted" else self.factors
        if self.of == "dict":
            self.factors[str(state.global_step)] = 0.1 * state.global_step
        else:
            self.factors.append(0.1 * state.global_step)


class Factored(Trainer):
    """Scales its loss by what it holds."""

    factors: Any = ()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        held = self.factors.values() if isinstance(self.factors, dict) else self.factors
        loss = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        return loss * (1 + sum(held))


@pytest.mark.parametrize("of", ["list", "dict", "parted"])
def test_container_that_training_puts_in_two_places_is_one_again(
    of: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(name: str) -> Trainer:
        callback = Sharing(of)
        trainer = new_trainer(tmp_path / name, callback, LifecycleCallback(), kind=Factored, max_steps=8)
        callback.trainer = trainer
        trainer.factors = callback.factors if of == "parted" else copy.copy(callback.factors)
        return trainer

    resumed, _ = require_same_end(make, step=4)
    callback = next(one for one in resumed.callback_handler.callbacks if isinstance(one, Sharing))
    assert (callback.factors is resumed.factors) is (of != "parted")
    assert "not exact" not in caplog.text
