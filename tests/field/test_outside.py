"""What is trained outside the model resumes exactly, or is named before training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.state.fingerprint import tree_digest
from tests.field.limits import Limit
from tests.trainer.runs import Net, break_off, digests, new_trainer, require_same_end

MADE_LATE = Limit(
    what="A module, optimizer or scheduler that is made while training runs, outside the model",
    when="at a save",
    line=(
        "not exact: … made during training, so a resumed run cannot restore its state: create it before "
        "train(), or pass it as objects="
    ),
)
NO_PLAIN_STATE = Limit(
    what="A module or optimizer outside the model whose state is not plain",
    when="before training",
    line="not exact: … is trained outside the model and cannot be saved: …; pass it as objects=",
)
GONE = Limit(
    what="A module that was trained outside the model, and that the resumed program does not have",
    when="at the resume",
    line=(
        "… was saved with the run, and cannot be found from the trainer now; create it before training starts, or "
        "pass it as objects="
    ),
    outcome="an error",
)


ONLY_MODEL = Limit(
    what="`save_only_model=True`",
    when="before training",
    line="not exact: save_only_model=True: checkpoints hold no optimizer, so no resume can be exact; set it to "
    "False, or resume with LifecycleCallback(strict=False) and a new optimizer",
)


NOT_LOADABLE = Limit(
    what="Classes or NumPy scalars in the state of an optimizer or a scheduler",
    when="at the first save",
    line=(
        "not exact: … contains …, which cannot be loaded at a resume (nor from a checkpoint of Trainer alone): keep "
        "only plain numbers and tensors in its state, or pass the class to torch.serialization.add_safe_globals() in "
        "your script"
    ),
)
PROJECTED = Limit(
    what="Prefix tuning with a projection",
    when="before training",
    line=(
        "not exact: adapter …: peft saves a prefix with a projection in a form that it cannot load, so a resume "
        "will fail: set prefix_projection=False"
    ),
)
RANKS_DECIDED = Limit(
    what="AdaLoRA, once it has decided its ranks",
    when="before training",
    line=(
        "not exact: adapter …: from step … on, when AdaLoRA has decided its ranks, peft cannot load its file into a "
        "new model, so a resume will fail: resume from a checkpoint before that step"
    ),
)
TRAINED_AT_ONCE = Limit(
    what="Several adapters of PEFT that are trained at once",
    when="before training",
    line=(
        "not exact: adapters … are trained at once, and Trainer activates one of them when it resumes, so a resume "
        "will be refused: activate all of them again in create_optimizer() of a subclass"
    ),
)
UNSEEN = Limit(
    what="Parameters that something changes at a step, and that no optimizer within reach holds",
    when="at the first save",
    line=(
        "not exact: … parameters of the model (…) change at a step, and no known optimizer has them: if what "
        "changes them keeps state, pass it as objects="
    ),
)


def seeded(make: Callable[[], Any], seed: int = 5) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Criterion(Trainer):
    """A head of the loss is trained, and nobody sets its gradients to zero; two weights are only the optimizer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = {"loss": [seeded(lambda: nn.Linear(1, 1))]}
        self.weights = nn.Parameter(torch.ones(2))

    def create_optimizer(self, model: Any = None) -> Any:
        every = [*self.model.parameters(), *self.parts["loss"][0].parameters(), self.weights]
        self.optimizer = torch.optim.AdamW(every, lr=1e-2)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        out = model(**inputs)
        scaled = self.parts["loss"][0](out["logits"].reshape(-1, 1)).squeeze(-1)
        loss = self.weights[0] * nn.functional.mse_loss(scaled, inputs["labels"]) + self.weights[1] * out["loss"]
        return (loss, out) if return_outputs else loss

    def outside(self) -> Any:
        return [*self.parts["loss"][0].state_dict().values(), self.weights]


class ClosureLoss(Trainer):
    """The loss is a function with a module in its closure, and another in a callback follows the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.held = held = seeded(lambda: nn.Linear(1, 1))
        average = seeded(Net, 7)

        def loss(out: Any, labels: Any, **_: Any) -> Any:
            return nn.functional.mse_loss(held(out["logits"].reshape(-1, 1)).squeeze(-1), labels)

        class Following(TrainerCallback):
            def __init__(self) -> None:
                self.average = average.requires_grad_(False)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                for one, other in zip(average.parameters(), model.parameters(), strict=True):
                    one.data.lerp_(other.data, 0.25)

        super().__init__(*args, **kwargs)
        self.criterion = loss
        self.average = average
        self.callback_handler.callbacks.insert(0, Following())
        del self.held
        self.held_by = [held]

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.AdamW([*self.model.parameters(), *self.held_by[0].parameters()], lr=1e-2)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        out = model(**inputs)
        loss = self.criterion(out, inputs["labels"])
        return (loss, out) if return_outputs else loss

    def outside(self) -> Any:
        return [*self.held_by[0].state_dict().values(), *self.average.state_dict().values()]


class WithOnline(nn.Module):
    """An average of a model's weights that counts its updates, and holds the model as well."""

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.online, self.average = online, copy.deepcopy(online).requires_grad_(False)
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("since", torch.tensor(0), persistent=False)

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        self.since += 1
        for one, other in zip(self.average.parameters(), self.online.parameters(), strict=True):
            one.lerp_(other, 1 / (1 + float(self.updates + self.since)))


class AverageWithOnline(Trainer):
    """A callback updates such an average, which nothing but the callback holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        class Follows(TrainerCallback):
            def __init__(self, model: nn.Module) -> None:
                self.average = WithOnline(model)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.average.update()

        self.callback_handler.callbacks.insert(0, Follows(self.model))

    def outside(self) -> Any:
        average = self.callback_handler.callbacks[0].average
        return [*average.state_dict().values(), average.since]


class InHooks(Trainer):
    """Every parameter has an optimizer of its own, which steps in the backward pass."""

    def create_optimizer(self, model: Any = None) -> Any:
        kept = []
        for one in self.model.parameters():
            optimizer = torch.optim.AdamW([one], lr=1e-2)

            def step(parameter: Any, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            one.register_post_accumulate_grad_hook(step)
            kept.append(optimizer)
        self.outside = lambda: [one.state_dict() for one in kept]  # a closure; no attribute holds them
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
        return self.optimizer


class LargeReference(Criterion):
    """A large reference model that is replaced by the policy in the midst of training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = seeded(lambda: nn.Linear(1, 3 << 20)).requires_grad_(False)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            self.reference.weight.data.mul_(0.5)
        return super().training_step(*args, **kwargs)

    def outside(self) -> Any:
        return [*super().outside(), *self.reference.state_dict().values()]


class Stepping(torch.optim.Optimizer):
    """Steps another optimizer, whose state is in no ``state_dict`` of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.inner = torch.optim.AdamW(self.param_groups, lr=1e-2)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Hidden(Trainer):
    """The model keeps a teacher in a list, where it is none of its modules; the optimizer wraps another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.kept = [seeded(Net, 7).requires_grad_(False)]

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = Stepping(self.model.parameters())
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for one, other in zip(self.model.kept[0].parameters(), self.model.parameters(), strict=True):
            one.data.lerp_(other.data, 0.25)
        return super().training_step(*args, **kwargs)

    def outside(self) -> Any:
        inner = getattr(self.optimizer, "optimizer", self.optimizer).inner
        return [self.model.kept[0].state_dict(), inner.state_dict()]


average: Any = None  # of the weights, in a variable of this module


class Averages(TrainerCallback):
    """What it follows the weights with is in no attribute: only its methods name it, as a helper's do."""

    def __init__(self) -> None:
        self.helper = Helper()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for one, other in zip(average.parameters(), model.parameters(), strict=True):
            one.data.lerp_(other.data, 0.25)
        self.helper.step()


class Helper:
    """Trains what its class holds."""

    head: Any = None
    optimizer: Any = None

    def step(self) -> None:
        Helper.head(torch.ones(1, 2)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class NamedInMethods(Trainer):
    """A callback is made in a function, and its class has a schedule in a closure."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global average
        super().__init__(*args, **kwargs)
        average = seeded(Net, 7).requires_grad_(False)
        Helper.head = seeded(lambda: nn.Linear(2, 1))
        Helper.optimizer = torch.optim.AdamW(Helper.head.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(Helper.optimizer, 2)

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                schedule.step()

        self.callback_handler.callbacks[:0] = [Averages(), Steps()]

    def train(self, **given: Any) -> Any:
        result = super().train(**given)
        held = [average, Helper.head, Helper.optimizer]
        self.ended = tree_digest([one.state_dict() for one in held])  # another trainer makes others
        return result

    def outside(self) -> Any:
        return [self.ended]


def resumed_and_whole(kind: Any, folder: Path, step: int = 4, callback: Any = LifecycleCallback) -> tuple[Any, Any]:
    def make(name: str) -> Any:
        return new_trainer(folder / name, callback(), kind=kind, max_grad_norm=0, logging_steps=1)

    whole = make("whole")
    whole.train()
    break_off(make("broken"), step=step)
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    return resumed, whole


@pytest.mark.parametrize(
    "kind", [Criterion, ClosureLoss, AverageWithOnline, InHooks, LargeReference, Hidden, NamedInMethods]
)
@pytest.mark.parametrize("step", [2, 4])
def test_what_is_trained_outside_the_model_resumes_exactly(kind: Any, step: int, tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole(kind, tmp_path, step)
    assert tree_digest(resumed.outside()) == tree_digest(whole.outside())
    assert digests(resumed) == digests(whole)


def test_what_the_user_names_is_not_carried_twice(tmp_path: Path) -> None:
    from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
    from hf_lifecycle.checkpoint.files.statefile import read_tree

    trainer = new_trainer(tmp_path, kind=Criterion)
    trainer.add_callback(LifecycleCallback(objects={"head": trainer.parts["loss"][0]}))
    trainer.train()
    saved = read_tree(rank_file(tmp_path / "checkpoint-6", 0), kind=TRAINER)
    assert list(saved["objects"]) == ["head"]
    assert not saved["parts"]["outside"]["carried"]
    assert len(saved["parts"]["outside"]["parameters"]) == 1


def test_a_criterion_that_is_gone_is_refused(tmp_path: Path) -> None:
    class Gone(Criterion):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.parts = {"other": self.parts["loss"], "loss": self.parts["loss"]}

    break_off(new_trainer(tmp_path, LifecycleCallback(), kind=Criterion))
    with pytest.raises(ResumeMismatch) as refusal:
        new_trainer(tmp_path, LifecycleCallback(), kind=Gone).train(resume_from_checkpoint=True)
    GONE.require_told(str(refusal.value))


class MadeLate(Trainer):
    """Makes a head at the first batch."""

    head: Any = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.head is None:
            self.head = nn.Linear(1, 1)
        return super().compute_loss(*args, **kwargs)


class MadeLater(Trainer):
    """Makes a schedule and an average after the first save."""

    makes_at = 3

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == self.makes_at:
            self.annealing = torch.optim.swa_utils.SWALR(self.optimizer.optimizer, swa_lr=1e-3)
            self.average = torch.optim.swa_utils.AveragedModel(self.model)
        return super().training_step(*args, **kwargs)


class MadeLatest(MadeLater):
    """Makes them after the second save."""

    makes_at = 5


class Strange(Trainer):
    """Has a module whose state is an object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        class Odd(nn.Linear):
            def get_extra_state(self) -> Any:
                return object()

            def set_extra_state(self, state: Any) -> None:
                pass

        self.odd = Odd(1, 1)


class StrangeLater(Trainer):
    """An optimizer in a hook has objects in its state from its first step on."""

    def create_optimizer(self, model: Any = None) -> Any:
        class Odd(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:  # type: ignore[override]
                for one in self.param_groups[0]["params"]:
                    self.state[one]["odd"] = object()
                return super().step(closure)

        first, *others = self.model.parameters()
        self.odd = Odd([first], lr=1e-2)
        first.register_post_accumulate_grad_hook(lambda _: self.odd.step())
        self.optimizer = torch.optim.SGD(others, lr=1e-2)
        return self.optimizer


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(kind, MADE_LATE) for kind in (MadeLate, MadeLater, MadeLatest)]
    + [(StrangeLater, NO_PLAIN_STATE), (Strange, NO_PLAIN_STATE)],
)
def test_what_cannot_be_carried_is_named(
    kind: Any, limit: Limit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(), kind=kind).train()
    limit.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


class Composite(torch.optim.Optimizer):
    """Two optimizers in one, made without ``Optimizer.__init__``, with a nested state of several kinds."""

    def __init__(self, parameters: list[Any]) -> None:
        self.a, self.b = torch.optim.AdamW(parameters[:2], lr=1e-2), torch.optim.SGD(parameters[2:], lr=1e-2)
        self.defaults: dict[str, Any] = {}
        self.param_groups = self.a.param_groups + self.b.param_groups
        self.state: Any = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.a.zero_grad(set_to_none)
        self.b.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.a.step()
        self.b.step()

    def state_dict(self) -> dict[str, Any]:
        return {"a": self.a.state_dict(), "b": self.b.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.a.load_state_dict(state["a"])
        self.b.load_state_dict(state["b"])
        self.param_groups = self.a.param_groups + self.b.param_groups


class Nested(torch.optim.Optimizer):
    """Keeps lists of float32 matrices, nested dicts, words and None for parameters of another dtype."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.param_groups[0]["params"]:
            state, gradient = self.state[one], one.grad.float()
            if not state:
                state |= {"lists": [torch.zeros_like(gradient), None], "within": {"on": True, "how": "a word"}}
                state["within"]["deep"] = [{"v": torch.zeros_like(gradient)}]
            state["lists"][0].lerp_(gradient, 0.1)
            state["within"]["deep"][0]["v"].lerp_(gradient * gradient, 0.1)
            one.sub_((0.01 * state["lists"][0] / (state["within"]["deep"][0]["v"].sqrt() + 1e-3)).to(one.dtype))


class Narrow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x.to(torch.bfloat16), labels.to(torch.bfloat16))


def tensor_rate(parameters: list[Any]) -> Any:
    return torch.optim.AdamW(parameters, lr=torch.tensor(1e-2))


@pytest.mark.parametrize("made", [Composite, Nested, tensor_rate])
def test_optimizers_of_other_kinds_resume_exactly(made: Any, tmp_path: Path) -> None:
    def trainer(name: str) -> Any:
        model = seeded(Narrow if made is Nested else Net)
        optimizers = (made(list(model.parameters())), None)
        return new_trainer(
            tmp_path / name, LifecycleCallback(), model=model, with_trainer={"optimizers": optimizers}, max_grad_norm=0
        )

    require_same_end(trainer)


def test_a_message_about_many_tensors_is_at_most_ten_lines() -> None:
    from hf_lifecycle.state.proof import describe_differing

    names = [f"layers.{number}.weight" for number in range(500)]
    told = str(ResumeMismatch("checkpoint-4", [*describe_differing("model", names)] * 9, "resume from another"))
    assert len(told.splitlines()) <= 10
    assert "497 more" in told
    assert "layers.2.weight" in told


def test_checkpoints_of_the_model_alone_resume_with_a_new_optimizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), save_only_model=True))
    ONLY_MODEL.require_told(caplog.text)
    with pytest.raises(ResumeMismatch, match="so optimizer and scheduler start from their initial state") as refusal:
        new_trainer(tmp_path, LifecycleCallback(), save_only_model=True).train(resume_from_checkpoint=True)
    assert len(refusal.value.problems) == 1
    resumed = new_trainer(tmp_path, LifecycleCallback(strict=False), save_only_model=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def _prompted(unfrozen: bool) -> Any:
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    if unfrozen:
        made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
        made.base_model.model.transformer.ln_f.weight.requires_grad_(True)
        return made
    encoder = peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, encoder)


@pytest.mark.parametrize("unfrozen", [False, True])
@pytest.mark.parametrize("best", [False, True])
def test_parameters_that_the_file_of_an_adapter_lacks_resume_exactly(
    unfrozen: bool, best: bool, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    rows = [{"input_ids": torch.arange(8) + row, "labels": torch.arange(8) + row} for row in range(16)]
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True} if best else {}

    def trainer(name: str) -> Any:
        model = seeded(lambda: _prompted(unfrozen))
        return new_trainer(
            tmp_path / name, LifecycleCallback(), model=model, train=rows, evaluated=rows[:4], **settings
        )

    require_same_end(trainer, step=5)


class Normed(nn.Module):
    """BatchNorm, whose statistics change where its weights are frozen, after a layer that gets an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.last(self.norm(self.first(x))).squeeze(-1)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


@pytest.mark.parametrize("step", [2, 5])
def test_statistics_of_a_frozen_model_under_an_adapter_resume_exactly(step: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer(name: str) -> Any:
        adapter = peft.LoraConfig(r=2, target_modules=["first"])
        model = seeded(lambda: peft.get_peft_model(Normed(), adapter))
        return new_trainer(tmp_path / name, LifecycleCallback(), model=model, with_trainer={}, label_names=["labels"])

    require_same_end(trainer, step=step)


class NumpySchedule(torch.optim.lr_scheduler.LambdaLR):
    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        self.seen = np.float64(1)


class Unseen(Trainer):
    """A generator, which nobody can look into, steps for one parameter."""

    def create_optimizer(self, model: Any = None) -> Any:
        first, *others = self.model.parameters()

        def steps(parameter: Any) -> Any:
            hidden = torch.optim.Adam([parameter], lr=1e-2)
            while True:
                yield hidden.step()

        self.steps = steps(first)
        self.optimizer = torch.optim.SGD(others, lr=1e-2)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        next(self.steps)
        return loss


def test_a_state_that_trainer_cannot_load_is_named_at_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    both = (optimizer, NumpySchedule(optimizer, lambda step: 1.0))
    new_trainer(tmp_path, LifecycleCallback(), model=model, with_trainer={"optimizers": both}).train()
    NOT_LOADABLE.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


def test_parameters_that_change_unseen_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new_trainer(tmp_path, LifecycleCallback(), kind=Unseen).train()
    UNSEEN.require_told(caplog.text)


@pytest.mark.parametrize(
    ("kind", "limit"), [("prefix", PROJECTED), ("ranks", RANKS_DECIDED), ("several", TRAINED_AT_ONCE)]
)
def test_an_adapter_that_trainer_cannot_load_is_named_before_training(
    kind: str, limit: Limit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    target: dict[str, Any] = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    config = {
        "prefix": lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
        ),
        "ranks": lambda: peft.AdaLoraConfig(**target, init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8),
        "several": lambda: peft.LoraConfig(**target, r=2),
    }[kind]()
    model = peft.get_peft_model(base, config)
    if kind == "several":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    trainer = new_trainer(tmp_path, LifecycleCallback(), model=model, train=rows)
    break_off(trainer, at="on_step_begin", step=0)
    limit.require_told(caplog.text)


class Activates(TrainerCallback):
    """Adds a second adapter of PEFT to the active one."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.base_model.set_adapter(["default", "second"])


class OverAllAdapters(Trainer):
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        trained = [one for name, one in self.model.named_parameters() if "lora" in name]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        return self.optimizer


def test_adapters_that_are_activated_in_mid_run_are_active_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(name: str) -> Trainer:
        torch.manual_seed(7)
        base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=1, n_positions=64))
        config = peft.LoraConfig(target_modules=["c_attn"], r=2, lora_dropout=0.2, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        model.add_adapter("second", config)
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
        callbacks = (Activates(), LifecycleCallback())
        return new_trainer(tmp_path / name, *callbacks, model=model, train=rows, kind=OverAllAdapters)

    require_same_end(make, step=4)
    assert "not exact" not in caplog.text
