"""A user's objects can be copied, pickled and sent away as if we were not there, and the copies are plain ones."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from html import escape
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback

from hf_lifecycle import DamagedCheckpoint, EarlyStopping, LifecycleCallback, ResumeMismatch, TrainingStateManager
from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.copies import Hook
from hf_lifecycle.hosts.accelerate.stopping import bind_to_ranks
from hf_lifecycle.hosts.trainer.after_event import after_other_callbacks
from hf_lifecycle.processes.ranks import Ranks
from tests.accelerator.tiny import Counter, Script, new_script
from tests.resume.cases.tiny import Regressor
from tests.resume.cases.tiny import Rows as RowsOfLoop
from tests.resume.harness import forget_last_attempt
from tests.trainer.runs import Net, break_off, digests, new_trainer


def _pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))


COPIES: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": _pickled}
LEAVES = (type, ModuleType, str, bytes, torch.Tensor)
STEPS = {"on_train_begin": 0, "on_train_end": 6}
EVENTS = ("on_train_begin", "on_step_begin", "on_step_end", "on_evaluate", "on_save", "on_train_end")


class InOrder(Trainer):
    """Draws nothing: trains on the rows in their order, so that it does the same with us and without."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class Copier(TrainerCallback):
    """Makes copies within a training."""

    def __init__(self, event: str, step: int | None, make: Callable[[Any], Any]) -> None:
        self.trainer: Any = None
        self.times = 0
        self.made: Any = None
        self._step, self._make = step, make
        setattr(self, event, self._at_event)

    def _at_event(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step is None or (state.global_step == self._step and self.made is None):
            self.made = self._make(self.trainer)
            self.times += 1

    def __getstate__(self) -> dict[str, Any]:
        return {"made": True}


def _trainer(directory: Path, *callbacks: TrainerCallback, **settings: Any) -> Any:
    forget_last_attempt()
    model = Net()
    torch.nn.init.constant_(model.layers[0].weight, 0.1)
    torch.nn.init.zeros_(model.layers[0].bias)
    torch.nn.init.constant_(model.layers[2].weight, 0.1)
    torch.nn.init.zeros_(model.layers[2].bias)
    model.layers[1].p = 0.0
    more = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **settings}
    return new_trainer(directory, *callbacks, model=model, kind=InOrder, **more)


def _parts(trainer: Any) -> dict[str, Any]:
    handler = trainer.callback_handler
    return {
        "trainer": trainer,
        "args": trainer.args,
        "state": trainer.state,
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "scheduler": trainer.lr_scheduler,
        "callbacks": handler.callbacks,
        "handler": handler,
        "loader": handler.train_dataloader,
        "accelerator": trainer.accelerator,
    }


def _what_can_be_copied(trainer: Any) -> dict[str, bool]:
    """Each part of a trainer, with whether it can be."""
    can = {}
    for name, part in _parts(trainer).items():
        for how, make in COPIES.items():
            try:
                make(part)
                can[f"{how} of {name}"] = True
            except (TypeError, pickle.PicklingError, AttributeError, RuntimeError, NotImplementedError):
                can[f"{how} of {name}"] = False
    return can


def _strangers(one: Any) -> set[str]:
    """The classes of ours that a copy reaches; not through the accelerator, of which there is one for all copies."""
    found, seen, left = set(), {id(LifecycleCallback)}, [one]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (Accelerator, *LEAVES)):
            continue
        seen.add(id(value))
        if type(value).__module__.startswith("hf_lifecycle"):
            found.add(type(value).__qualname__)
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
        else:
            left += [item for item in (getattr(value, "__self__", None), getattr(value, "__func__", None)) if item]
            left += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell.cell_contents]
            left += list(getattr(value, "__dict__", {}).values())
    return found


def _with_us(directory: Path, *callbacks: TrainerCallback, **settings: Any) -> Any:
    return _trainer(directory, *callbacks, LifecycleCallback(patience=9), **settings)


def _at(event: str, step: int, make: Callable[[Any], Any], begin: Callable[..., Any], directory: Path) -> Any:
    """What ``make`` makes of a trainer within its training, with the trainer; before it and after it, where told so."""
    copier = Copier(event, step, make)
    if event == "before":
        trainer = begin(directory)
        return make(trainer), trainer
    copier.trainer = trainer = begin(directory, copier)
    trainer.train()
    return make(trainer) if event == "after" else copier.made, trainer


MOMENTS = [("before", 0), *((event, STEPS.get(event, 4)) for event in EVENTS), ("after", 0)]
FEW = [moment for moment in MOMENTS if moment[0] in ("before", "on_step_end", "on_save", "after")]


@pytest.mark.parametrize(("event", "step"), MOMENTS)
def test_what_can_be_copied_of_a_plain_trainer_can_be_with_us_and_has_nothing_of_the_run(
    event: str, step: int, tmp_path: Path
) -> None:
    def look(trainer: Any) -> tuple[dict[str, bool], dict[str, set[str]]]:
        parts = {name: part for name, part in _parts(trainer).items() if name != "accelerator"}
        return _what_can_be_copied(trainer), {name: _strangers(copy.deepcopy(part)) for name, part in parts.items()}

    (plain, _), _ = _at(event, step, look, _trainer, tmp_path / "plain")
    (ours, found), _ = _at(event, step, look, _with_us, tmp_path / "ours")
    assert ours == plain
    assert sum(ours.values()) >= 24
    of_gate = {"_Checked", "_Check"}  # which belongs to the trainer, and stands before the copy's loading
    unused = {"LifecycleCallback", "Options", "LoadGuard", "Retries", "MethodPatches"}
    assert found.pop("trainer") == of_gate | unused
    assert found.pop("callbacks") == found.pop("handler") == unused
    assert not any(found.values()), found


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
@pytest.mark.parametrize(("event", "step"), FEW)
def test_copy_without_the_callback_trains_as_a_plain_copy(how: str, event: str, step: int, tmp_path: Path) -> None:
    ends = []
    for begin in (_trainer, _with_us):
        copied, original = _at(event, step, COPIES[how], begin, tmp_path / begin.__name__)
        of_original = digests(original) if event != "before" else {}
        handler = copied.callback_handler = copy.copy(copied.callback_handler)
        handler.callbacks = [one for one in handler.callbacks if not isinstance(one, (LifecycleCallback, Copier))]
        copied.args = copy.copy(copied.args)
        copied.args.output_dir = str(tmp_path / begin.__name__ / "copy")
        copied.train()
        folders = sorted(
            path.relative_to(tmp_path / begin.__name__) for path in Path(copied.args.output_dir).rglob("*")
        )
        ends.append((digests(copied), copied.state.best_metric, of_original, folders, vars(copied.args).keys()))
    assert ends[0] == ends[1]


def _ours_of(trainer: Any) -> LifecycleCallback:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, LifecycleCallback))


def _train(trainer: Any, directory: Path, *, stop_at: int | None = None, resume: bool = False) -> dict[str, str]:
    trainer.args.output_dir = str(directory)
    torch.manual_seed(3)
    if stop_at is not None:
        break_off(trainer, step=stop_at)
    else:
        trainer.train(resume_from_checkpoint=resume)
    return digests(trainer)


@pytest.mark.parametrize(("event", "step"), FEW)
def test_copied_callback_is_unused_and_resumes_its_own_run_exactly(event: str, step: int, tmp_path: Path) -> None:
    def copies(trainer: Any) -> list[Any]:
        first = copy.deepcopy(trainer)
        return [first, copy.deepcopy(first), copy.deepcopy(trainer)]

    def begin(directory: Path, *callbacks: TrainerCallback) -> Any:
        stopping = EarlyStopping(patience=2, min_delta=0.5)  # decides to stop
        ours = LifecycleCallback(early_stopping=stopping, objects={"counter": Counter(2)})
        return new_trainer(directory, *callbacks, ours, eval_strategy="steps", eval_steps=2)

    made, original = _at(event, step, copies, begin, tmp_path / "original")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "original").rglob("*"))
    callbacks = [_ours_of(trainer) for trainer in (original, *made)]
    assert len({id(one) for one in callbacks}) == 4
    assert len({repr(one) for one in callbacks}) == 1
    assert {one._repr_html_() for one in callbacks[1:]} == {
        f"<pre>{escape(repr(callbacks[1]))}: in no training yet</pre>"
    }

    whole = _train(made[0], tmp_path / "whole")
    _train(made[1], tmp_path / "resumed", stop_at=4)
    assert _train(made[2], tmp_path / "resumed", resume=True) == whole
    assert made[0].state.global_step == made[2].state.global_step
    assert read_manifest(tmp_path / "whole" / "checkpoint-4").step == 4
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "original").rglob("*")) == before


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_run_that_is_copied_at_every_event_goes_on_exactly(how: str, tmp_path: Path) -> None:
    def begin(directory: Path, *callbacks: TrainerCallback) -> Any:
        return new_trainer(directory, *callbacks, LifecycleCallback(patience=9), eval_strategy="steps", eval_steps=2)

    copiers = [Copier(event, None, lambda trainer: len(_parts(COPIES[how](trainer)))) for event in EVENTS]
    copied, alone = begin(tmp_path / "copied", *copiers), begin(tmp_path / "alone")
    for copier in copiers:
        copier.trainer = copied
    assert _train(copied, tmp_path / "copied") == _train(alone, tmp_path / "alone")
    assert [copier.times for copier in copiers] == [1, 6, 6, 3, 3, 1]


def test_trainer_that_was_sent_away_before_training_trains_as_it_would_have_here(tmp_path: Path) -> None:
    trainer = _with_us(tmp_path / "here")
    sent = pickle.dumps(trainer)
    here = _train(trainer, tmp_path / "here")
    there = pickle.loads(sent)
    assert _train(there, tmp_path / "there") == here
    assert read_manifest(tmp_path / "there" / "checkpoint-6").step == 6


def test_copy_stands_before_its_checkpoint_before_it_is_loaded(tmp_path: Path) -> None:
    trainer = _with_us(tmp_path)
    trainer.train()
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    copied = copy.deepcopy(trainer)
    before = digests(copied)
    with pytest.raises(DamagedCheckpoint):
        copied.train(resume_from_checkpoint=str(weights.parent))
    assert digests(copied) == before


@pytest.mark.parametrize(("event", "step"), MOMENTS)
def test_copied_arguments_are_as_the_user_gave_them(event: str, step: int, tmp_path: Path) -> None:
    made, trainer = _at(
        event,
        step,
        lambda trainer: [make(trainer.args) for make in COPIES.values()],
        lambda directory, *callbacks: _with_us(directory, *callbacks, save_total_limit=2, eval_on_start=True),
        tmp_path,
    )
    for args in made:
        assert (args.save_total_limit, args.eval_on_start) == (2, True)
        assert vars(args).keys() == vars(trainer.args).keys()


class Keeper(TrainerCallback):
    """Holds a method of its trainer, and replaces another within training."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.held: Any = None
        self.evaluations = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 3:
            return
        self.held, own = self.trainer.get_batch_samples, self.trainer.evaluation_loop

        def counted(*given: Any, **named: Any) -> Any:
            self.evaluations += 1
            return own(*given, **named)

        self.trainer.evaluation_loop = counted
        self.copied = copy.deepcopy(self.trainer)


def test_methods_that_a_user_holds_or_replaces_stay_the_users(tmp_path: Path) -> None:
    keeper = Keeper()
    trainer = _with_us(tmp_path, keeper)
    keeper.trainer = trainer
    trainer.train()
    of_copy = next(one for one in keeper.copied.callback_handler.callbacks if isinstance(one, Keeper))
    assert of_copy.held.__self__ is keeper.copied
    assert keeper.evaluations == 2  # of steps 4 and 6
    trainer.evaluate()
    assert keeper.evaluations == 3


def test_hook_in_a_copied_list_does_nothing() -> None:
    calls: list[int] = []
    hooks = OrderedDict({1: Hook(calls.append)})
    hooks[1](1)
    for make in (copy.deepcopy, _pickled):
        make(hooks)[1](2)
    assert calls == [1]


def _leave_note(models: Any, weights: Any, folder: str) -> None:
    """A save hook of the user's."""
    Path(folder, "note").write_text("saved")


@pytest.mark.parametrize("how", ["copy", "pickle"])  # accelerate's deepcopy gives the same one
def test_copy_of_an_accelerator_is_none_of_the_managers(how: str, tmp_path: Path) -> None:
    accelerator, own = Accelerator(cpu=True), Counter(3)
    accelerator.register_for_checkpointing(own)
    accelerator.register_save_state_pre_hook(_leave_note)
    before = set(vars(accelerator))
    manager = TrainingStateManager(accelerator, tmp_path / "run")
    copied = COPIES[how](accelerator)

    copied.save_state(tmp_path / "copied")
    files = {path.name for path in (tmp_path / "copied").rglob("*")}
    assert files == {"note", "custom_checkpoint_0.pkl", "random_states_0.pkl"}
    copied.load_state(tmp_path / "copied")
    TrainingStateManager(copied, tmp_path / "another run").close()  # the copy has none yet

    accelerator.save_state(tmp_path / "original")
    assert (tmp_path / "original" / "lifecycle").is_dir()
    manager.close()
    assert set(vars(accelerator)) == set(vars(_pickled(accelerator))) == before


def _what_a_loop_can_copy(script: Any) -> dict[str, str]:
    """Each part of a loop, with the classes of what its copies are made of, or of the error."""
    parts = {name: getattr(script, name) for name in ("accelerator", "model", "optimizer", "loader")}
    parts |= {"dataset": script.loader.dataset, "sampler": script.loader.batch_sampler}
    told = {}
    for name, part in parts.items():
        for how, make in COPIES.items():
            try:
                made = make(part)
            except (TypeError, NotImplementedError) as error:
                told[f"{how} of {name}"] = type(error).__name__
                continue
            deep = name == "loader" and how != "copy"  # another copy shares what is inside
            order = made.batch_sampler if deep else None
            inner = [made.dataset, made.generator, order, order.sampler, order.sampler.generator] if order else []
            told[f"{how} of {name}"] = " ".join(type(one).__qualname__ for one in [made, *inner])
            if how != "copy" and name != "accelerator":
                assert not _strangers(made)
    return told


@pytest.mark.parametrize("stateful", [False, True])
def test_whatever_can_be_copied_of_a_plain_loop_can_be_with_us(stateful: bool, tmp_path: Path) -> None:
    told: dict[bool, list[dict[str, str]]] = {}
    for ours in (False, True):
        forget_last_attempt()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful))
        manager = TrainingStateManager(accelerator, tmp_path) if ours else None
        model = Regressor()
        prepared = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters()), DataLoader(RowsOfLoop(), 4, shuffle=True)
        )
        script: Any = SimpleNamespace(
            accelerator=accelerator,
            manager=manager,
            **dict(zip(("model", "optimizer", "loader"), prepared, strict=True)),
        )
        told[ours] = [_what_a_loop_can_copy(script)]
        for _ in manager.epochs(1) if manager else range(1):
            for batch in manager.batches(script.loader) if manager else script.loader:
                Script.train(script, batch)
                if len(told[ours]) == 1:
                    told[ours].append(_what_a_loop_can_copy(script))
        if manager is not None:
            manager.save()
            manager.close()
        if not stateful:  # which would keep its iterator, where ours is none
            told[ours].append(_what_a_loop_can_copy(script))
    assert told[True] == told[False]


def test_loop_that_is_copied_goes_on_exactly_and_its_copies_are_of_no_loop(tmp_path: Path) -> None:
    ends = []
    for copying in (True, False):
        script = new_script(tmp_path / str(copying), generators=5)
        copies: list[Any] = []
        for _ in script.manager.epochs(2):
            for batch in script.manager.batches(script.loader):
                script.train(batch)
                if copying:
                    copies += [copy.deepcopy(script.loader), _pickled(script.manager)]
            script.manager.save(wait=False)
        script.manager.is_best(0.5)
        ends.append(script.digests())
        script.manager.close()
        for copied in copies[1::2]:
            with pytest.raises(ValueError, match="copied from another"):
                copied.save()
        for copied in copies[0::2]:
            assert len(list(copied)) == 6
    assert ends[0] == ends[1]
    assert copy.deepcopy(script.manager).best_metric == 0.5


def test_copied_decision_exchanges_nothing_with_other_ranks() -> None:
    decision = EarlyStopping(patience=1)
    bind_to_ranks(decision, Ranks(rank=0, world_size=2))
    assert decision.shared_by is not None
    for make in COPIES.values():
        assert make(decision).shared_by is None
        assert make(decision).settings == decision.settings


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_manager_of_files_says_that_it_has_no_objects(how: str, tmp_path: Path) -> None:
    manager = TrainingStateManager(objects={"counter": Counter(3)})
    manager.save_state(tmp_path / "state.pt", epoch=1, step=2)
    copied = COPIES[how](COPIES[how](manager))
    with pytest.raises(ValueError, match="a copy of a manager"):
        copied.save_state(tmp_path / "copied.pt", epoch=1, step=2)
    with pytest.raises(ResumeMismatch, match="a copy of a manager"):
        copied.load_state(tmp_path / "state.pt")
    assert not (tmp_path / "copied.pt").exists()
    without = COPIES[how](TrainingStateManager())
    without.save_state(tmp_path / "without.pt", epoch=1, step=2)
    assert without.load_state(tmp_path / "without.pt")["step"] == 2
    manager.close()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_handler_does_not_do_what_the_original_has_still_to_do(how: str, tmp_path: Path) -> None:
    trainer, done = _trainer(tmp_path), []
    after_other_callbacks(trainer, "on_epoch_begin", lambda: done.append("original"))
    copied = COPIES[how](trainer.callback_handler)
    copied.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert not done
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert done == ["original"]
