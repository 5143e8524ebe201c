"""What a custom training loop trains beside the prepared models resumes exactly, or is named."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest
from tests.field.limits import Limit
from tests.field.test_outside import WithOnline
from tests.resume.harness import forget_last_attempt
from tests.trainer.runs import Net, Rows

MADE_LATE = Limit(
    what="A module or optimizer that a loop creates while it runs, and attaches to a prepared model",
    when="at a save",
    line=(
        "not exact: … made during training, so a resumed run cannot restore its state: create it before "
        "resume(), or pass it as objects="
    ),
)
GONE = Limit(
    what="A tensor that only an optimizer of a loop held, and that the resumed program does not have",
    when="at the resume",
    line=(
        "optimizer 0, parameter … was trained outside the model, and cannot be found now; create it before training "
        "starts, or pass it as objects="
    ),
    outcome="an error",
)
UNREACHED = Limit(
    what="A module that only a variable of the program holds, and that changes while a loop runs (an average of the "
    "weights, a criterion's buffers)",
    when="at the first save",
    line=(
        "not exact: … changes during training, but was not passed to accelerator.prepare(), so a resumed run starts "
        'with its initial state: pass it as objects={"name": it}, or make it part of a prepared model'
    ),
)
UNPREPARED = Limit(
    what="An optimizer that was not prepared and trains what was not prepared either",
    when="at the first save",
    line=(
        "not exact: … steps, but was not passed to accelerator.prepare(), so a resumed run starts with its initial "
        "state: prepare it, or pass it and what it trains as objects="
    ),
)
SEVERAL = Limit(
    what="Several schedulers or optimizers of one kind that were not prepared, on one optimizer or model",
    when="before training",
    line="not exact: several … of … are not prepared, and none of them is saved: pass them as objects=",
)
TOO_LATE = Limit(
    what="A scheduler or an optimizer that was not prepared and is made after `resume()`",
    when="at the resume",
    line=(
        "not exact: … of … was saved with the run, and is not found at resume(), so the run continues with the "
        "initial state: create it before resume()"
    ),
)
OF_A_FILE = Limit(
    what="`save_state` with the states of some modules in `custom_state`, while others change",
    when="at a save",
    line=(
        "not exact: … changes during training, but was not passed to accelerator.prepare(), so a resumed run starts "
        'with its initial state: pass objects={"name": it} to the manager, or put its state_dict() into custom_state'
    ),
)
UNSEEN = Limit(
    what="Parameters of a loop's model that something changes, and that no optimizer holds",
    when="at the first save",
    line=(
        "not exact: … parameters of the model (…) change at a step, and no known optimizer has them: if what "
        "changes them keeps state, pass it as objects="
    ),
)


class Loop:
    """A program: what it makes before the loop, one batch, and what must be the same after a break."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model: Any = Net()
        self.extra: Any = None
        self.build()
        self.optimizer: Any = torch.optim.AdamW(self.trained(), lr=1e-2)

    def build(self) -> None:
        """More than a model."""

    def trained(self) -> list[Any]:
        return list(self.model.parameters())

    def loss(self, out: Any, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = out["loss"]
        return loss

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        accelerator.backward(self.loss(self.model(**batch), batch))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, number: int) -> None:
        """Before the batches of an epoch."""

    def outside(self) -> Any:
        return None


def run(
    program: Callable[[], Any],
    folder: Path,
    *,
    stop: int = 0,
    save: tuple[int, ...] = (2, 3, 7),
    at_epoch_end: bool = False,
    wait: bool = True,
    **settings: Any,
) -> Any:
    """Three epochs of four batches; ``stop``: left after that step."""
    forget_last_attempt()
    accelerator = Accelerator(cpu=True)
    made = program()
    loader: Any = getattr(made, "loader", None)
    if loader is None:
        loader = DataLoader(Rows(16), batch_size=4, shuffle=True)
    objects = made.objects() if hasattr(made, "objects") else {}
    manager = TrainingStateManager(accelerator, folder, objects=objects, seed=3, signals=(), **settings)
    made.model, made.optimizer, loader = accelerator.prepare(made.model, made.optimizer, loader)
    if hasattr(made, "prepare"):
        made.prepare(accelerator)
    try:
        manager.resume()
        for epoch in manager.epochs(3):
            made.epoch(epoch)
            for batch in manager.batches(loader):
                made.train(accelerator, batch)
                if manager.progress.step in save:
                    manager.save(wait=wait)
                if manager.progress.step == stop:
                    return made
            if at_epoch_end:
                manager.save(wait=wait)
        return made
    finally:
        manager.close()


def state(made: Any) -> dict[str, str]:
    """The digests of the model, the optimizer, and what is beside them."""
    found = {name: tensor_digest(one) for name, one in module_tensors(made.model).items()}
    flags = {name: one.requires_grad for name, one in made.model.named_parameters()}
    beside = {"outside": made.outside(), "flags": flags}
    return found | leaf_digests(made.optimizer.state_dict(), "optimizer") | leaf_digests(beside, "")


def require_exact(program: Callable[[], Any], folder: Path, **settings: Any) -> None:
    """Broken off in the midst of two epochs, and after the end of one, the program ends as it does without a break."""
    whole = state(run(program, folder / "whole", at_epoch_end=True, **settings))
    for number, (at_epoch_end, *stops) in enumerate([(False, 4, 8), (True, 9)]):
        broken = folder / f"broken-{number}"
        for stop in stops:
            run(program, broken, stop=stop, at_epoch_end=at_epoch_end, **settings)
        assert state(run(program, broken, at_epoch_end=at_epoch_end, **settings)) == whole


class LossWithWeights(Loop):
    """A head of the loss, and two weights, are the optimizer's and no prepared model's."""

    def build(self) -> None:
        self.head = nn.Linear(1, 1)
        self.weights = nn.Parameter(torch.ones(2))
        self.plain = torch.zeros(1, requires_grad=True)

    def trained(self) -> list[Any]:
        return [*self.model.parameters(), *self.head.parameters(), self.weights, self.plain]

    def loss(self, out: Any, batch: Any) -> torch.Tensor:
        scaled = self.head(out["logits"].reshape(-1, 1)).squeeze(-1) + self.plain
        loss: torch.Tensor = self.weights[0] * nn.functional.mse_loss(scaled, batch["labels"])
        return loss + self.weights[1] * out["loss"]

    def outside(self) -> Any:
        return [*self.head.parameters(), self.weights, self.plain]


class HiddenTeacher(Loop):
    """The model keeps a teacher, which follows it, in a list, where it is none of its modules."""

    def build(self) -> None:
        class Student(Net):
            def __init__(self) -> None:
                super().__init__()
                self.kept = {"teacher": [Net().requires_grad_(False)]}

            def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
                out = super().forward(x, labels)
                target = self.kept["teacher"][0](x, labels)["logits"]
                return out | {"loss": out["loss"] + nn.functional.mse_loss(out["logits"], target)}

        self.model = Student()

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        for one, other in zip(self.outside(), self.model.parameters(), strict=True):
            one.data.lerp_(other.data, 0.25)

    def outside(self) -> Any:
        return list(self.model.kept["teacher"][0].parameters())


class InHooks(Loop):
    """Every parameter of the first layer has an optimizer of its own, which steps in the backward pass."""

    def build(self) -> None:
        self.inner = []
        for one in self.model.layers[0].parameters():
            optimizer = torch.optim.AdamW([one], lr=1e-2)

            def step(parameter: Any, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            one.register_post_accumulate_grad_hook(step)
            self.inner.append(optimizer)

    def trained(self) -> list[Any]:
        return list(self.model.layers[2].parameters())

    def outside(self) -> Any:
        return [one.state_dict() for one in self.inner]


class AverageInHook(Loop):
    """An average of the weights is moved by a hook on the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.average = average = torch.optim.swa_utils.AveragedModel(self.model)
        model = self.model
        self.optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))

    def outside(self) -> Any:
        return self.average.state_dict()


class AverageWithOnline(Loop):
    """An average that counts its updates and holds the model as well is moved by such a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.average = average = WithOnline(self.model)
        self.optimizer.register_step_post_hook(lambda *_: average.update())

    def outside(self) -> Any:
        return [self.average.state_dict(), self.average.since]


class Ascent(torch.optim.Optimizer):
    """Steps another optimizer, whose state is in no ``state_dict`` of its own."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.inner = torch.optim.AdamW(self.param_groups, lr=1e-2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Owning(Ascent):
    """Its ``state_dict`` is that of the other optimizer."""

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups


class Wrapping(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = Ascent(self.trained())

    def outside(self) -> Any:
        return self.optimizer.optimizer.inner.state_dict()


@pytest.mark.parametrize(
    "program", [LossWithWeights, HiddenTeacher, InHooks, AverageInHook, AverageWithOnline, Wrapping]
)
def test_what_is_trained_beside_the_prepared_models_resumes_exactly(program: Any, tmp_path: Path) -> None:
    require_exact(program, tmp_path)


@pytest.mark.parametrize("program", [LossWithWeights, InHooks])
def test_background_saves_have_it_too(program: Any, tmp_path: Path) -> None:
    require_exact(program, tmp_path, wait=False)


def saved_part(folder: Path, name: str) -> Any:
    from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
    from hf_lifecycle.checkpoint.files.statefile import read_tree

    return read_tree(rank_file(folder, 0), kind=LOOP)["parts"][name]


def test_ordinary_loop_keeps_nothing(tmp_path: Path) -> None:
    run(Loop, tmp_path)
    assert saved_part(tmp_path / "checkpoint-7", "outside") == {
        "carried": {},
        "attached": {},
        "samples": {},
        "parameters": {},
    }


def test_what_the_user_names_is_left_to_that(tmp_path: Path) -> None:
    class Named(LossWithWeights):
        def objects(self) -> dict[str, Any]:
            return {"head": self.head}

    run(Named, tmp_path)
    assert len(saved_part(tmp_path / "checkpoint-7", "outside")["parameters"]) == 2
    require_exact(Named, tmp_path / "again")


def test_optimizer_whose_state_the_outer_one_saves_is_not_saved_twice(tmp_path: Path) -> None:
    class Inside(Wrapping):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = Owning(self.trained())

    require_exact(Inside, tmp_path / "again")
    run(Inside, tmp_path)
    assert not saved_part(tmp_path / "checkpoint-7", "outside")["carried"]


def test_tensor_that_is_gone_is_refused(tmp_path: Path) -> None:
    class Shorter(LossWithWeights):
        def build(self) -> None:
            super().build()
            self.plain = torch.zeros((), requires_grad=True)

    run(LossWithWeights, tmp_path, stop=4)
    with pytest.raises(ResumeMismatch) as refusal:
        run(Shorter, tmp_path)
    GONE.require_told(str(refusal.value))


@pytest.mark.parametrize("at", [1, 5], ids=["before the first save", "after it"])
def test_module_that_is_made_in_the_loop_is_named(at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Late(Loop):
        calls = 0

        def train(self, accelerator: Accelerator, batch: Any) -> None:
            Late.calls += 1
            if Late.calls == at:
                self.model.probe = [nn.Linear(1, 1)]
                self.extra = True
            super().train(accelerator, batch)

    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        run(Late, tmp_path)
    MADE_LATE.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


class Thawed(Loop):
    """The first layer is trained from the second epoch on, or from a step within an epoch."""

    at_step = 0

    def build(self) -> None:
        self.model.layers[0].requires_grad_(False)
        self.steps = 0

    def epoch(self, number: int) -> None:
        if number == 1 and not self.at_step:
            self.model.layers[0].requires_grad_(True)

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        self.steps += 1
        if self.steps == self.at_step:
            self.model.layers[0].requires_grad_(True)


class ThawedWithin(Thawed):
    at_step = 3


class Refrozen(Loop):
    """Every epoch begins with a layer frozen, which is trained from its third step on, and ends as the model began."""

    def epoch(self, number: int) -> None:
        self.model.layers[0].requires_grad_(False)
        self.steps = 0

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        self.steps += 1
        if self.steps == 3:
            self.model.layers[0].requires_grad_(True)


class Annealed(Loop):
    """A dropout is turned down, a module counts and keeps a plain tensor, a scale is doubled with each epoch."""

    def build(self) -> None:
        class Counting(Net):
            def __init__(self) -> None:
                super().__init__()
                self.calls, self.scale, self.phase = 0, 1.0, "made"
                self.seen: dict[str, Any] = {"mean": torch.zeros(8), "labels": []}

            def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
                out = super().forward(x, labels)
                self.calls += 1
                self.seen["mean"].lerp_(self.layers[0](x).detach().mean(0), 0.5)
                self.seen["labels"].append(float(labels[0]))
                weight = self.scale / (1 + self.calls) + float(self.seen["mean"].sum()) + len(self.seen["labels"])
                return out | {"loss": out["loss"] * weight}

        self.model = Counting()

    def epoch(self, number: int) -> None:
        self.model.scale *= 2
        self.model.phase = "begun"

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        self.model.layers[1].p *= 0.8
        self.model.phase = "training"

    def outside(self) -> Any:
        model = self.model
        return [model.calls, model.scale, model.phase, model.seen, model.layers[1].p]


class LeftInEvaluation(Loop):
    """A layer is set to evaluation within the first epoch, and stays so."""

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        self.model.layers[1].eval()


class CountingHook(Loop):
    """A hook of the model scales what comes out by what it has counted; the optimizer counts and decides by it."""

    def __init__(self) -> None:
        super().__init__()
        counts = {"calls": 0}
        self.counts = counts

        def scale(module: Any, given: Any, out: Any) -> Any:
            counts["calls"] += 1
            return out * (1 + counts["calls"])

        self.model.layers[2].register_forward_hook(scale)

        class Every(torch.optim.SGD):
            taken = 0

            def step(self, closure: Any = None) -> Any:  # type: ignore[override]
                self.taken += 1
                return super().step() if self.taken % 2 else None

        self.optimizer = Every(self.trained(), lr=1e-3)

    def outside(self) -> Any:
        return [self.counts, self.optimizer.optimizer.taken]


class InGroups(Loop):
    """The program keeps a number in a group of the optimizer, and turns the rate down by it."""

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        group = self.optimizer.param_groups[0]
        group["count"] = group.get("count", 0) + 1
        group["lr"] *= 1 / group["count"]


class StagedRows(Rows):
    """Scales its rows by the stage that the program sets."""

    stage = 1.0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return {**row, "x": row["x"] * self.stage}


class Curriculum(Loop):
    """The dataset's stage is raised as each epoch begins."""

    workers = 0

    def build(self) -> None:
        self.rows = StagedRows(16)
        self.rows.stage = 1.0
        self.loader = DataLoader(self.rows, batch_size=4, shuffle=True, num_workers=self.workers)

    def epoch(self, number: int) -> None:
        self.rows.stage *= 1.5


class CurriculumInWorkers(Curriculum):
    workers = 1


class CountingObject(Loop):
    """A module that is given as an object counts, beside its parameters."""

    def build(self) -> None:
        class Counting(nn.Linear):
            count = 0

        self.scale: Any = Counting(1, 1)

    def objects(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def loss(self, out: Any, batch: Any) -> torch.Tensor:
        self.scale.count += 1
        loss: torch.Tensor = out["loss"] * self.scale.count
        return loss

    def outside(self) -> Any:
        return self.scale.count


VALUES = [
    Thawed,
    ThawedWithin,
    Refrozen,
    Annealed,
    LeftInEvaluation,
    CountingHook,
    InGroups,
    CountingObject,
    Curriculum,
    CurriculumInWorkers,
]


@pytest.mark.parametrize("program", VALUES)
def test_values_and_flags_that_a_loop_changes_go_on(program: Any, tmp_path: Path) -> None:
    require_exact(program, tmp_path)


def test_text_that_the_program_sets_before_its_first_batch_is_its_own(tmp_path: Path) -> None:
    class Named(Loop):
        place = "first"

        def epoch(self, number: int) -> None:
            self.model.place = self.place

    class Elsewhere(Named):
        place = "second"

    run(Named, tmp_path, stop=3)
    assert run(Elsewhere, tmp_path).model.place == "second"


def test_number_of_a_dataset_that_changes_within_a_pass_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Counts(Curriculum):
        def build(self) -> None:
            class Counted(StagedRows):
                def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
                    self.stage += 0.1
                    return super().__getitem__(index)

            self.rows = Counted(16)
            self.loader = DataLoader(self.rows, batch_size=4)

    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        run(Counts, tmp_path)
    assert "not exact: loader 0.dataset.stage changes during training" in caplog.text
    assert caplog.text.count("not exact") == 1


def test_ordinary_loop_keeps_no_values(tmp_path: Path) -> None:
    run(Loop, tmp_path)
    assert saved_part(tmp_path / "checkpoint-7", "attributes") == {"values": {}, "data": {}, "trained": {}, "modes": {}}


class Unprepared(Loop):
    """A scheduler, and an optimizer for one layer with a scheduler of its own, that are not prepared."""

    def build(self) -> None:
        self.second = torch.optim.AdamW(self.model.layers[0].parameters(), lr=1e-2)
        self.rates = torch.optim.lr_scheduler.ExponentialLR(self.second, 0.7)

    def trained(self) -> list[Any]:
        return list(self.model.layers[2].parameters())

    def prepare(self, accelerator: Accelerator) -> None:
        warm = torch.optim.lr_scheduler.LinearLR(self.optimizer.optimizer, total_iters=3)
        falling = torch.optim.lr_scheduler.StepLR(self.optimizer.optimizer, 2, 0.5)
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(self.optimizer.optimizer, [warm, falling], [3])

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        self.second.step()
        self.second.zero_grad()
        self.rates.step()
        self.scheduler.step()

    def outside(self) -> Any:
        return [self.second.state_dict(), self.rates.state_dict(), self.scheduler.state_dict()]


class Milestones(Unprepared):
    """A schedule that was not prepared keeps a ``Counter``, within another one too."""

    def prepare(self, accelerator: Accelerator) -> None:
        kinds = torch.optim.lr_scheduler
        falling = [kinds.MultiStepLR(self.optimizer.optimizer, [at, at + 3], 0.5) for at in (2, 4)]
        self.scheduler = kinds.ChainedScheduler(falling)

    def outside(self) -> Any:
        held = [one.milestones for one in self.scheduler._schedulers]
        assert all(type(one) is Counter for one in held)
        return super().outside()


class MadeInTheLoop(Unprepared):
    """The scheduler is made after ``resume()``."""

    def prepare(self, accelerator: Accelerator) -> None:
        """Nothing yet."""

    def epoch(self, number: int) -> None:
        if not hasattr(self, "scheduler"):
            super().prepare(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("program", [Unprepared, Milestones])
def test_what_was_not_prepared_and_is_attached_to_what_was_resumes_exactly(
    program: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        require_exact(program, tmp_path)
    assert "not exact" not in caplog.text


def test_scheduler_that_is_made_after_resume_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(MadeInTheLoop, tmp_path, stop=4)
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        run(MadeInTheLoop, tmp_path)
    TOO_LATE.require_told(caplog.text)
    assert (
        "the program changes optimizer 0.param_groups[0].lr between resume() and" in caplog.text
    )  # which making it does
    assert caplog.text.count("not exact") == 2


def test_scheduler_that_does_not_step_is_not_saved(tmp_path: Path) -> None:
    class Left(Loop):
        def prepare(self, accelerator: Accelerator) -> None:
            self.left = torch.optim.lr_scheduler.StepLR(self.optimizer.optimizer, 2)

    run(Left, tmp_path)
    assert not saved_part(tmp_path / "checkpoint-7", "outside")["attached"]


def following(model: Any) -> Iterator[Any]:
    """Only a variable in here holds the average of the weights; what a generator holds nobody can look into."""
    average = torch.optim.swa_utils.AveragedModel(model)
    while True:
        yield average
        average.update_parameters(model)


class Averaged(Loop):
    def build(self) -> None:
        self.follow = following(self.model)
        next(self.follow)

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        next(self.follow)


class AveragedLater(Averaged):
    """It is made within the first step."""

    def build(self) -> None:
        self.follow = following(self.model)


class AveragedAndGiven(Loop):
    def build(self) -> None:
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        self.average.update_parameters(self.model)

    def outside(self) -> Any:
        return self.average.state_dict()

    def objects(self) -> dict[str, Any]:
        return {"average": self.average}


class AveragedByItsHolder(AveragedAndGiven):
    """An object of the program's own class holds the average, and the model."""

    def objects(self) -> dict[str, Any]:
        return {}


class Shadow:
    """An average of the weights in a dict, which holds the model; a count decides how far it follows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.count = 0
        self.shadow = {name: one.detach().clone() for name, one in model.named_parameters()}

    def update(self) -> None:
        self.count += 1
        for name, one in self.model.named_parameters():
            self.shadow[name] = self.shadow[name].lerp(one.detach(), 1 / (1 + self.count))


class Schedule:
    """Sets the rate of an optimizer by a count of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.taken = optimizer, 0

    def step(self) -> None:
        self.taken += 1
        self.optimizer.param_groups[0]["lr"] = 1e-2 / self.taken


class StatefulSchedule(Schedule):
    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class WithObjects(Loop):
    """Holds nothing that the manager could find but by what holds the model and the optimizer."""

    kind: type[Schedule] = Schedule

    def prepare(self, accelerator: Accelerator) -> None:
        self.hidden = _kept(Shadow(self.model), self.kind(self.optimizer))

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        for one in next(self.hidden):
            one.update() if isinstance(one, Shadow) else one.step()

    def outside(self) -> Any:
        shadow, schedule = next(self.hidden)
        return [shadow.shadow, shadow.count, schedule.taken]


class WithStatefulObjects(WithObjects):
    """Another object has a state that is a whole checkpoint, and an average with a state of its own."""

    kind = StatefulSchedule

    def prepare(self, accelerator: Accelerator) -> None:
        super().prepare(accelerator)
        model, optimizer = self.model, self.optimizer

        class Checkpoints(StatefulSchedule):
            def state_dict(self) -> dict[str, Any]:
                return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

        class Both:
            def __init__(self) -> None:
                self.model, self.checkpoints, self.own = model, Checkpoints(None), StatefulSchedule(None)

        self.both = _kept(Both())

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        next(self.both)[0].own.taken += 1

    def outside(self) -> Any:
        return [*super().outside(), next(self.both)[0].own.taken]


def test_object_whose_state_is_a_checkpoint_is_not_saved_twice(tmp_path: Path) -> None:
    run(WithStatefulObjects, tmp_path)
    part = saved_part(tmp_path / "checkpoint-7", "outside")
    assert list(part["attached"]) == ["Both of model 0.own"]


def _kept(*objects: Any) -> Iterator[Any]:
    while True:
        yield objects


def test_number_that_such_an_object_is_given_after_resume_stays(tmp_path: Path) -> None:
    def numbered(attempt: int) -> type[Loop]:
        def epoch(self: Any, number: int) -> None:
            self.attempt = attempt

        return type("Numbered", (Loop,), {"attempt": 0, "epoch": epoch})

    run(numbered(1), tmp_path, stop=4)
    run(numbered(2), tmp_path, stop=6)
    assert run(numbered(3), tmp_path, stop=6).attempt == 3


class ByHand(Loop):
    """One layer is moved without an optimizer."""

    def trained(self) -> list[Any]:
        return list(self.model.layers[2].parameters())

    @torch.no_grad()
    def train(self, accelerator: Accelerator, batch: Any) -> None:
        with torch.enable_grad():
            super().train(accelerator, batch)
        for one in self.model.layers[0].parameters():
            one -= 0.01 * one.grad
            one.grad = None


class TwoSchedules(Loop):
    def prepare(self, accelerator: Accelerator) -> None:
        self.both = [torch.optim.lr_scheduler.StepLR(self.optimizer.optimizer, size) for size in (2, 3)]


class Separate(Loop):
    """A criterion and its optimizer are held by nothing that the manager can look into."""

    def build(self) -> None:
        head = nn.Linear(1, 1)
        self.hidden = _kept(head, torch.optim.SGD(head.parameters(), lr=1e-3))

    def loss(self, out: Any, batch: Any) -> torch.Tensor:
        head, _ = next(self.hidden)
        return nn.functional.mse_loss(head(out["logits"].reshape(-1, 1)).squeeze(-1), batch["labels"])

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        _, second = next(self.hidden)
        second.step()
        second.zero_grad()


class SeparateAndGiven(Separate):
    def build(self) -> None:
        super().build()
        self.head, self.second = next(self.hidden)

    def objects(self) -> dict[str, Any]:
        return {"head": self.head, "second": self.second}

    def outside(self) -> Any:
        return [self.head.state_dict(), self.second.state_dict()]


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        (Averaged, [UNREACHED]),
        (AveragedLater, [UNREACHED]),
        (ByHand, [UNSEEN]),
        (TwoSchedules, [SEVERAL]),
        (Separate, [UNREACHED, UNPREPARED]),
    ],
)
def test_what_cannot_be_carried_is_named_once(
    program: Any, limits: list[Limit], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        run(program, tmp_path)
    for limit in limits:
        limit.require_told(caplog.text)
    assert caplog.text.count("not exact") == len(limits)


class NewEachBatch(Loop):
    """An optimizer and a copy of the model are made for every batch; a frozen teacher stands by."""

    def build(self) -> None:
        self.teacher = Net().requires_grad_(False)

    def train(self, accelerator: Accelerator, batch: Any) -> None:
        super().train(accelerator, batch)
        adversary = torch.zeros(4, requires_grad=True)
        inner = torch.optim.SGD([adversary], lr=1e-2)
        for _ in range(2):
            (adversary + 1).sum().backward()
            inner.step()
        self.teacher(**batch)


ALL_IS_SAVED = [
    *(Loop, AveragedAndGiven, SeparateAndGiven, NewEachBatch, LossWithWeights, Annealed),
    *(WithObjects, WithStatefulObjects, AveragedByItsHolder),  # objects of the program that hold what is prepared
]


@pytest.mark.parametrize("program", ALL_IS_SAVED)
def test_loop_in_which_all_is_saved_says_nothing(
    program: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        require_exact(program, tmp_path)
    assert "not exact" not in caplog.text


def run_file(program: Callable[[], Any], file: Path, *, stop: int = 0, custom: bool = False) -> Any:
    """Three epochs without an accelerator, saved to one file after each; ``stop``: left after that epoch."""
    made = program()
    given = {"model": made.model, "optimizer": made.optimizer}
    if hasattr(made, "objects"):
        given |= made.objects()
    manager = TrainingStateManager(objects={} if custom else given)
    first = manager.load_state(file)["epoch"] + 1 if file.exists() else 0
    if not first:
        torch.manual_seed(9)
    accelerator: Any = type("Plain", (), {"backward": staticmethod(lambda loss: loss.backward())})
    for epoch in range(int(first), 3):
        made.epoch(epoch)
        for batch in DataLoader(Rows(16), batch_size=4, shuffle=True):  # type: ignore[arg-type]
            made.train(accelerator, batch)
        states = {name: one.state_dict() for name, one in given.items()} if custom else None
        manager.save_state(file, epoch=epoch, step=4 * epoch, custom_state=states)
        if epoch + 1 == stop:
            break
    manager.close()
    return made


class WithRates(Loop):
    """A scheduler is given, a second optimizer's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.second = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def objects(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def train(self, accelerator: Any, batch: Any) -> None:
        super().train(accelerator, batch)
        self.rates.step()
        self.second.step()

    def outside(self) -> Any:
        return [self.rates.state_dict(), self.second.state_dict()]


class WithMilestones(WithRates):
    """Both schedules keep a ``Counter``."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 9], 0.5)
        self.second = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3], 0.5)


OF_FILES = [
    Loop,
    LossWithWeights,
    HiddenTeacher,
    InHooks,
    AverageInHook,
    AveragedAndGiven,
    Thawed,
    ThawedWithin,
    LeftInEvaluation,
    WithRates,
    WithMilestones,
]


@pytest.mark.parametrize("program", OF_FILES)
def test_loop_without_an_accelerator_goes_on_exactly_from_one_file(
    program: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        whole = run_file(program, tmp_path / "whole.safetensors")
        for stop in (1, 2):
            run_file(program, tmp_path / "broken.safetensors", stop=stop)
        resumed = run_file(program, tmp_path / "broken.safetensors")
    assert state(resumed) == state(whole)
    assert "not exact" not in caplog.text


def test_module_that_custom_state_lacks_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        run_file(AveragedAndGiven, tmp_path / "all.pt", custom=True)
        assert "not exact" not in caplog.text
        run_file(Averaged, tmp_path / "some.pt", custom=True)
    OF_A_FILE.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


def test_objects_of_a_file_that_are_not_given_are_refused(tmp_path: Path) -> None:
    run_file(AveragedAndGiven, tmp_path / "one.pt", stop=1)
    with pytest.raises(ResumeMismatch, match="'average' was saved, but is not given now"):
        run_file(Averaged, tmp_path / "one.pt")


def test_optimizer_that_is_made_anew_in_each_epoch_and_not_prepared_counts_as_training_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "hf_lifecycle")
    accelerator = Accelerator(cpu=True)
    manager = TrainingStateManager(accelerator, tmp_path)
    model = torch.nn.Linear(4, 1)
    prepared = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = torch.utils.data.TensorDataset(torch.randn(8, 4))
    model, prepared, loader = accelerator.prepare(model, prepared, torch.utils.data.DataLoader(rows, batch_size=4))
    manager.resume()
    for _ in manager.epochs(2):
        optimizer = torch.optim.AdamW(model.parameters())
        for (batch,) in manager.batches(loader):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            manager.save()
    manager.close()
    assert manager.progress.step == 4
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert caplog.text.count("an AdamW steps, but was not passed to accelerator.prepare()") == 1
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()  # the manager listens no more
