"""Whatever a user's code keeps and changes while it trains is what it was after a resume, or a warning names it.

The kinds are tried one by one on what finds and puts back values, through the form in which a file has them, and all
together in trainings.
"""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import itertools
import json
import logging
import pathlib
import queue
import random
import tempfile
import threading
import types
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
import torch
import tqdm
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import DynamicCache, Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, TrainingStateManager
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.checkpoint.files.tree import decode, encode
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from hf_lifecycle.state.values import attributes
from hf_lifecycle.state.values.additions import EarlierLooks
from hf_lifecycle.state.values.attributes import look
from hf_lifecycle.state.values.changes import ChangedValues
from hf_lifecycle.state.values.places import Place
from tests.field.limits import Limit
from tests.trainer.runs import Net, Rows, break_off, digests, new_trainer

CANNOT_BE_SAVED = Limit(
    what="An attribute or variable that training changes and that has no plain form: an iterator such as "
    "`itertools.cycle`, a generator function, an `lru_cache` around a random draw, a DataFrame, a function made within "
    "another",
    when="at the first save",
    line=(
        "not exact: … changes during training and cannot be saved, so a resumed run starts with the initial state: "
        "keep it in plain values, or in an object with state_dict() and load_state_dict() that you pass as objects="
    ),
)

Point = collections.namedtuple("Point", ["n", "seen"])


class Slots:
    """Its attributes are in slots."""

    __slots__ = ("__own", "late", "n")

    def __init__(self) -> None:
        self.n, self.__own = 0, 1.0

    def step(self) -> float:
        self.n += 1
        self.__own *= 1.5
        self.late = [self.n, *getattr(self, "late", [])]
        return self.n + self.__own + len(self.late)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    n: int = 0


class Rates(list):  # type: ignore[type-arg]
    """A list with an attribute."""

    total = 0.0


class Shares(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__


class Steps(int):
    pass


class Masks(np.ndarray):
    pass


class Parts(enum.Flag):
    HEAD = 1
    BODY = 2


class Counter:
    """What a script has in any place."""

    def __init__(self) -> None:
        self.n = 0

    def step(self) -> int:
        self.n += 1
        return self.n


class Doubled(Counter):
    def step(self) -> int:
        return 2 * super().step()


class Modes:
    """Calls one of its methods, which it changes."""

    def __init__(self) -> None:
        self.now, self.calls = self.slow, 0

    def slow(self) -> float:
        return 1.0

    def fast(self) -> float:
        return 3.0


class Link:
    def __init__(self, n: int, before: Any) -> None:
        self.n, self.before = n, before


class Raises:
    """Answers nothing that it is not known to be asked."""

    def __init__(self) -> None:
        self.__dict__["n"] = 0

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("not to be asked")

    __eq__ = __hash__ = __repr__ = __len__ = __iter__ = __bool__ = __reduce_ex__ = __getattr__ = _refuse  # type: ignore[assignment]


class RaisingDict(dict):  # type: ignore[type-arg]
    __iter__ = items = keys = values = __len__ = Raises._refuse  # type: ignore[assignment]


class RaisingList(list):  # type: ignore[type-arg]
    __iter__ = __len__ = __getitem__ = Raises._refuse  # type: ignore[assignment]


class Scene:
    """What holds a value in ``kept``, at a step."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.at = 0

    def replace(self, value: Any) -> Any:
        self.kept = value
        return value


def _slow() -> float:
    return 1.0


def _fast() -> float:
    return 3.0


def _numbers() -> Iterator[float]:
    n = 0.0
    while True:
        n += 1
        yield n


def _hides(held: Any) -> Iterator[Any]:
    while True:
        yield held


def _tally(tallied: dict[str, int], key: str) -> int:
    tallied[key] = tallied.get(key, 0) + 1
    return tallied[key]


def _cached_draw() -> Callable[[int], float]:
    @functools.lru_cache
    def drawn(index: int) -> float:
        return 1 + float(torch.rand(()))

    return drawn


def _item(scene: Scene, key: Any = 0) -> Any:
    scene.kept[key] += 1
    return scene.kept[key]


def _set(scene: Scene, value: Any) -> Any:
    scene.kept[0] = value
    return scene.kept[0]


def _appended(scene: Scene, value: Any) -> int:
    scene.kept.append(value)
    return len(scene.kept)


def _drawn_until_it_is_empty(scene: Scene) -> Any:
    value = next(scene.kept, None)
    if value is None:
        scene.kept = iter([random.random() for _ in range(3)])
    return value


def _put(scene: Scene) -> Any:
    scene.kept.put(1.0)
    return scene.kept.qsize()


def _swapped(scene: Scene, other: Any) -> Any:
    value = scene.kept()
    if scene.at == 1:
        scene.kept = other
    return value


def _another_class(scene: Scene) -> Any:
    if scene.at == 1:
        scene.kept.__class__ = Doubled
    return scene.kept.step()


def _another_mode(scene: Scene) -> float:
    scene.kept.now = scene.kept.fast if scene.at == 1 else scene.kept.now
    return float(scene.kept.now())


def _made_when_it_is_used(scene: Scene, make: Callable[[], Any]) -> Any:
    scene.kept = scene.kept if scene.kept is not None else make()
    return scene.kept


def _by_the_thread(scene: Scene) -> int:
    scene.kept.n = getattr(scene.kept, "n", 0) + 1
    return int(scene.kept.n)


def _in_context(scene: Scene) -> int:
    scene.kept.set(scene.kept.get() + 1)
    return int(scene.kept.get())


def _added_up(scene: Scene) -> float:
    loss = (scene.at + torch.ones((), requires_grad=True)) * 1.5
    scene.kept.append(loss)
    return float(torch.stack(scene.kept).detach().sum())


def _counted_by_object(scene: Scene, key: Any = Parts.HEAD) -> int:
    scene.kept[key] = scene.kept.get(key, 0) + 1
    return int(scene.kept[key])


def _beside_a_module(scene: Scene) -> Any:
    scene.kept["teacher"] = WEIGHTLESS
    return _item(scene, "calls")


def _innermost(scene: Scene) -> Any:
    inner = functools.reduce(lambda held, n: held[n], reversed(range(15)), scene.kept)
    return _item(_of(inner))


def _rates(scene: Scene) -> float:
    scene.kept.append(0.5)
    scene.kept.total += sum(scene.kept)
    return float(scene.kept.total)


def _draws_sobol(scene: Scene) -> Any:
    return scene.kept.draw(1).tolist()


def _cached_keys(scene: Scene) -> float:
    keys, _ = scene.kept.update(torch.full((1, 1, 1, 1), float(scene.at)), torch.ones(1, 1, 1, 1), 0)
    return float(keys.sum())


def _in_a_file() -> Any:
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, "float32", "w+", shape=(3,))


def _next_day(scene: Scene) -> Any:
    return scene.replace(scene.kept + datetime.timedelta(hours=7))


Kind = tuple[Callable[[], Any], Callable[[Scene], Any]]
EXACT: dict[str, Kind] = {
    "named tuple": (lambda: Point(0, [1]), lambda s: s.replace(s.kept._replace(n=s.kept.n + 1)).n),
    "named tuple in a list": (lambda: [Point(0, ())], lambda s: s.kept.append(s.kept.pop()._replace(n=s.at)) or s.at),
    "slots": (Slots, lambda s: s.kept.step()),
    "slots in a list": (lambda: [Slots()], lambda s: s.kept[0].step()),
    "frozen dataclass": (Frozen, lambda s: s.replace(dataclasses.replace(s.kept, n=s.kept.n + 1)).n),
    "bytearray": (lambda: bytearray(3), _item),
    "array": (lambda: array.array("d", [0.5, 1.0]), _item),
    "Decimal": (lambda: decimal.Decimal("0.1"), lambda s: s.replace(s.kept * 3)),
    "Fraction": (lambda: fractions.Fraction(1, 3), lambda s: s.replace(s.kept * 3)),
    "complex": (lambda: 1j, lambda s: s.replace(s.kept * (1 + 1j))),
    "range": (lambda: range(1), lambda s: len(s.replace(range(len(s.kept) + 1)))),
    "slice": (lambda: slice(0, 1), lambda s: s.replace(slice(0, s.kept.stop + 1)).stop),
    "datetime": (lambda: datetime.datetime(2020, 1, 1), _next_day),
    "datetime with a zone": (lambda: datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc), _next_day),
    "date": (lambda: datetime.date(2020, 1, 1), lambda s: s.replace(s.kept + datetime.timedelta(days=1))),
    "timedelta": (lambda: datetime.timedelta(0), _next_day),
    "path": (lambda: pathlib.PurePosixPath("a"), lambda s: s.replace(s.kept / "b")),
    "dtype": (lambda: torch.float32, lambda s: s.replace(torch.float64 if s.at else torch.float32)),
    "size": (lambda: torch.Size([1]), lambda s: s.replace(torch.Size([*s.kept, 2]))),
    "records": (lambda: np.zeros(2, [("n", "i4"), ("w", "f8")]), lambda s: _item(_of(s.kept["n"]))),
    "array of objects": (lambda: np.array([0, None], dtype=object), _item),
    "array of text": (
        lambda: np.array(["a"], "U30"),
        lambda s: s.kept.__setitem__(0, s.kept[0] + "x") or len(s.kept[0]),
    ),
    "array of dates": (lambda: np.array(["2020-01-01"], "M8[D]"), _item),
    "array of a class": (lambda: np.zeros(3).view(Masks), _item),
    "list of a class": (Rates, _rates),
    "dict of a class": (lambda: Shares(a=0), lambda s: _item(s, "a")),
    "int of a class": (lambda: Steps(0), lambda s: s.replace(Steps(s.kept + 1))),
    "flag": (lambda: Parts.HEAD, lambda s: s.replace(s.kept | Parts.BODY if s.at else s.kept)),
    "keys of an enum": (dict, _counted_by_object),
    "weak values": (lambda: weakref.WeakValueDictionary(a=COUNTER), lambda s: s.kept["a"].step()),
    "weak reference": (lambda: weakref.ref(COUNTER), lambda s: s.kept().step()),
    "queue": (queue.Queue, _put),
    "thread's own": (threading.local, _by_the_thread),
    "variable of a context": (lambda: contextvars.ContextVar("n", default=0), _in_context),
    "partial": (lambda: functools.partial(_tally, {}, "a"), lambda s: s.kept()),
    "bound method": (lambda: Counter().step, lambda s: s.kept()),
    "losses with a graph": (list, _added_up),
    "text in memory": (io.StringIO, lambda s: s.kept.write("x") and s.kept.tell()),
    "count": (lambda: itertools.count(1), lambda s: next(s.kept)),
    "count by halves": (lambda: itertools.count(1, 0.5), lambda s: next(s.kept)),
    "count in a closure": (lambda: (lambda c: lambda: next(c))(itertools.count(1)), lambda s: s.kept()),
    "iterator of a list": (lambda: iter([3, 1, 4, 1, 5, 9, 2, 6, 5]), lambda s: next(s.kept)),
    "iterator of a range": (lambda: iter(range(9)), lambda s: next(s.kept)),
    "iterator that is made again": (lambda: iter([0.5]), _drawn_until_it_is_empty),
    "function": (lambda: _slow, lambda s: _swapped(s, _fast)),
    "function in a list": (lambda: [_slow], lambda s: _appended(s, _fast) and sum(one() for one in s.kept)),
    "functions that rotate": (
        lambda: collections.deque([_slow, _fast]),
        lambda s: s.kept.rotate(s.at) or s.kept[0](),
    ),
    "its own method": (Modes, _another_mode),
    "class": (lambda: Counter, lambda s: s.replace(Doubled if s.at else Counter)().step()),
    "class of an object": (Counter, _another_class),
    "object of another class": (Counter, lambda s: (s.replace(Doubled()) if s.at == 1 else s.kept).step()),
    "object made on use": (lambda: None, lambda s: _made_when_it_is_used(s, Counter).step()),
    "objects in a list": (list, lambda s: _appended(s, Counter()) + s.kept[0].step()),
    "objects in a dict": (dict, lambda s: s.kept.setdefault("a", Counter()).step()),
    "linked objects": (lambda: None, lambda s: s.replace(Link(s.at, s.kept)).n + (s.kept.before is None)),
    "random numbers of a class": (lambda: DICE(3), lambda s: s.kept.random()),
    "bits of random numbers": (lambda: np.random.PCG64(3), lambda s: np.random.Generator(s.kept).random()),
    "defaultdict made on use": (
        lambda: None,
        lambda s: _counted_by_object(_of(_made_when_it_is_used(s, lambda: collections.defaultdict(int)))),
    ),
    "deque made on use": (
        lambda: None,
        lambda s: _appended(_of(_made_when_it_is_used(s, lambda: collections.deque(maxlen=2))), 1.0),
    ),
    "number beside a new module": (lambda: {"calls": 0, "teacher": None}, _beside_a_module),
    "nested deeply": (lambda: functools.reduce(lambda inner, n: {n: inner}, range(15), [0]), _innermost),
    "numbers that fill a space": (lambda: torch.quasirandom.SobolEngine(2, scramble=True, seed=1), _draws_sobol),
    "distribution": (
        lambda: torch.distributions.Normal(torch.zeros(1), torch.ones(1)),
        lambda s: float(s.replace(torch.distributions.Normal(s.kept.loc + 1, s.kept.scale)).loc),
    ),
    "what answers nothing": (Raises, lambda s: _item(_of(s.kept.__dict__), "n")),
    "dict that raises": (lambda: RaisingDict(a=0), lambda s: _item(s, "a")),
    "list that raises": (RaisingList, lambda s: list.append(s.kept, 1.0) or list.__len__(s.kept)),
}
DICE = type("Dice", (random.Random,), {})
COUNTER = Counter()


def _of(value: Any) -> Scene:
    scene = Scene()
    scene.kept = value
    return scene


TOLD: dict[str, Kind] = {
    "cycle": (lambda: itertools.cycle([1.0, 2.0, 4.0, 8.0, 16.0]), lambda s: next(s.kept)),
    "cycle of a loader": (lambda: itertools.cycle(DataLoader(range(1, 9), 1)), lambda s: int(next(s.kept))),
    "iterator of a loader": (lambda: iter(DataLoader(range(1, 9), 1)), lambda s: int(next(s.kept))),
    "iterator of a dict": (lambda: iter(dict.fromkeys(range(9))), lambda s: next(s.kept)),
    "enumerate": (lambda: enumerate([1.0] * 9), lambda s: next(s.kept)[0]),
    "zip": (lambda: zip(range(9), range(9), strict=True), lambda s: next(s.kept)[0]),
    "map": (lambda: map(float, range(9)), lambda s: next(s.kept)),
    "chain": (lambda: itertools.chain(range(9), range(9)), lambda s: next(s.kept)),
    "islice": (lambda: itertools.islice(itertools.count(), 99), lambda s: next(s.kept)),
    "generator function": (_numbers, lambda s: next(s.kept)),
    "generator expression": (lambda: (float(n) for n in range(9)), lambda s: next(s.kept)),
    "cache of a draw": (_cached_draw, lambda s: s.kept(s.at % 3)),
    "function made within another": (lambda: _slow, lambda s: _swapped(s, lambda: 4.0)),
    "masked array": (lambda: np.ma.zeros(3), _item),
    "queue in C": (queue.SimpleQueue, _put),
    "weak keys": (weakref.WeakKeyDictionary, lambda s: _counted_by_object(s, COUNTER)),
    "keys that are objects": (lambda: {COUNTER: 0}, lambda s: _item(s, COUNTER)),
    "objects linked too far": (lambda: None, lambda s: [s.replace(Link(n, s.kept)) for n in range(200)].clear()),
    "exceptions": (list, lambda s: _appended(s, ValueError())),
    "set of objects": (set, lambda s: s.kept.add(Counter()) or len(s.kept)),
    "tensor of a class": (lambda: torch.zeros(2).as_subclass(OWN_TENSOR), lambda s: float(s.kept.add_(1).sum())),
    "array in a file": (_in_a_file, _item),
    "children of a seed": (lambda: np.random.SeedSequence(1), lambda s: int(s.kept.spawn(1)[0].generate_state(1)[0])),
    "rows of a dataset": (
        lambda: datasets.Dataset.from_dict({"n": [1]}),
        lambda s: len(s.replace(s.kept.add_item({"n": s.at}))),
    ),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda s: float(s.replace(s.kept * 2).to_dense().sum())),
}
WEIGHTLESS = torch.nn.Identity()
WEIGHTS = [torch.nn.Parameter(torch.ones(2))]
OWN_TENSOR: Any = type("OwnTensor", (torch.Tensor,), {})
HARMLESS: dict[str, Kind] = {
    "mock": (MagicMock, lambda s: s.kept.noted(s.at)),
    "lock": (threading.Lock, lambda s: s.kept.acquire(blocking=False)),
    "event": (lambda: None, lambda s: s.replace(threading.Event())),
    "logger": (lambda: None, lambda s: s.replace(logging.getLogger(__name__))),
    "bar": (lambda: tqdm.tqdm(disable=True), lambda s: s.kept.update()),
    "file that is written": (lambda: None, lambda s: s.replace(io.BufferedWriter(io.BytesIO()))),  # type: ignore[arg-type]
    "array in a file that is not changed": (_in_a_file, lambda s: float(s.kept.sum())),
    "dataset": (lambda: datasets.Dataset.from_dict({"n": [1]}), lambda s: len(s.kept)),
    "cache of what is computed": (lambda: functools.lru_cache(abs), lambda s: s.kept(-s.at)),
    "outputs of layers": (dict, lambda s: s.kept.update(a=torch.ones(1 << 19, requires_grad=True) * s.at)),
    "last outputs": (lambda: None, lambda s: s.replace(torch.ones(3, requires_grad=True) * s.at)),
    "parameters": (lambda: None, lambda s: s.replace(list(torch.nn.Linear(1, 1).parameters()))),
    "model": (lambda: None, lambda s: s.replace(torch.nn.Linear(1, 1))),
    "module": (lambda: None, lambda s: s.replace(types)),
    "group of an optimizer": (lambda: None, lambda s: s.replace(torch.optim.SGD(WEIGHTS, lr=0.1).param_groups[0])),
    "state of an optimizer": (lambda: None, lambda s: s.replace({WEIGHTS[0]: {"step": s.at}})),
    "generator that only hides": (lambda: _hides(WEIGHTS), lambda s: next(s.kept)),
    "thread": (lambda: None, lambda s: s.replace(threading.current_thread())),
}


class Told(list[str]):
    def __call__(self, path: str, sentence: str) -> None:
        self.append(sentence)


def _run(kind: Kind, steps: range, saved: Any = None) -> tuple[list[Any], Any, Told]:
    """What the value gave at each step, what a file would have of it then, and what was told."""
    make, change = kind
    COUNTER.n = 0
    random.seed(3)
    scene, told = Scene(), Told()
    scene.kept = make()
    values = ChangedValues(lambda: look([("scene.kept", scene.kept, Place(scene, "kept", "scene"))]), told)
    values.take_first()
    if saved is not None:
        assert values.put_back(copy.deepcopy(saved)) == []
    given = []
    for scene.at in steps:
        given.append(copy.deepcopy(change(scene)))
        if scene.at in (0, 2):
            random.seed(5)  # as a resumed run puts it back
            saved = values.state_dict()
    nodes, blobs = encode({"values": saved})
    return given, decode(json.loads(json.dumps(nodes)), blobs)["values"], told


@pytest.mark.parametrize("name", EXACT)
def test_value_goes_on(name: str) -> None:
    unbroken, _, _ = _run(EXACT[name], range(6))
    first, saved, told = _run(EXACT[name], range(3))
    rest, _, _ = _run(EXACT[name], range(3, 6), saved)
    assert told == []
    assert first + rest == unbroken
    assert len({str(one) for one in unbroken}) > 1, "nothing has changed"


def test_keys_of_a_memory_that_is_filled_as_it_is_used_are_named_at_the_resume() -> None:
    def values_of(scene: Scene) -> ChangedValues:
        values = ChangedValues(lambda: look([("scene.kept", scene.kept, Place(scene, "kept", "scene"))]), Told())
        values.take_first()
        return values

    scene, resumed = Scene(), Scene()
    scene.kept, resumed.kept = DynamicCache(), DynamicCache()
    values = values_of(scene)
    _cached_keys(scene)
    assert "scene.kept.layers[0].keys" in values_of(resumed).put_back(values.state_dict())


@pytest.mark.parametrize("name", TOLD)
def test_what_cannot_be_saved_is_named_once(name: str) -> None:
    _, saved, told = _run(TOLD[name], range(3))
    assert saved == {}
    [sentence] = told
    assert sentence.startswith("scene.kept (")
    CANNOT_BE_SAVED.require_told(f"not exact: {sentence}")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_cannot_matter_is_not_named(name: str) -> None:
    make, change = HARMLESS[name]
    assert _run((make, lambda s: [change(s)].clear()), range(3))[2] == []


@pytest.mark.parametrize("zone", [None, datetime.timezone.utc])
def test_what_was_read_from_a_clock_is_not_saved(zone: Any) -> None:
    _, saved, told = _run((lambda: None, lambda s: s.replace(datetime.datetime.now(zone))), range(3))
    assert saved == {}
    assert told == []


def _number(value: Any) -> float:
    return zlib.crc32(repr(value).encode()) / 2**32


class Keeps:
    """Keeps one value of each kind, and makes a number of what they give."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        COUNTER.n = 0
        self.scenes, self.changes = [], [change for _, change in kinds.values()]
        for make, _ in kinds.values():
            scene = Scene()
            scene.kept = make()
            self.scenes.append(scene)

    def factor(self) -> float:
        total = 1.0
        for scene, change in zip(self.scenes, self.changes, strict=True):
            total += _number(change(scene)) / len(self.scenes)
            scene.at += 1
        return total


class KeepingTrainer(Trainer):
    keeps: Keeps

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.keeps.factor()


def _trainer(folder: Path, kinds: dict[str, Kind]) -> KeepingTrainer:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Net()
    trainer = new_trainer(folder, LifecycleCallback(), model=model, kind=KeepingTrainer)
    assert isinstance(trainer, KeepingTrainer)
    trainer.keeps = Keeps(kinds)
    return trainer


def test_trainer_that_keeps_one_of_each_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = _trainer(tmp_path / "whole", EXACT)
    whole.train()
    break_off(_trainer(tmp_path / "broken", EXACT))
    resumed = _trainer(tmp_path / "broken", EXACT)
    resumed.train(resume_from_checkpoint=True)
    assert "not exact" not in caplog.text
    assert digests(resumed) == digests(whole)


def test_what_a_trainer_keeps_and_loses_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {name: kind for name, kind in TOLD.items() if name != "keys that are objects"}  # which are found here
    _trainer(tmp_path, kinds).train()
    assert caplog.text.count("not exact") == 1
    assert f"and {len(kinds) - 3} more change during training and cannot be saved" in caplog.text


def test_trainer_that_keeps_what_cannot_matter_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {name: (make, functools.partial(_quietly, change)) for name, (make, change) in HARMLESS.items()}
    del kinds["model"]  # one that is made while training runs is named as such
    _trainer(tmp_path, kinds).train()
    assert "not exact" not in caplog.text


def test_training_continues_where_what_a_program_keeps_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> Any:
        raise AttributeError("no such attribute")

    monkeypatch.undo()  # of what makes it an error in tests
    monkeypatch.setattr(attributes, "mark_of", failing)
    break_off(new_trainer(tmp_path, LifecycleCallback()), step=5)
    resumed = new_trainer(tmp_path, LifecycleCallback())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == resumed.state.max_steps
    assert caplog.text.count("cannot be looked at (AttributeError: no such attribute)") == 1


@pytest.mark.parametrize("fails", ["one object", "everything"])
def test_what_can_be_looked_at_late_has_not_changed_by_that(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Keeping(TrainerCallback):
        def __init__(self) -> None:
            self.words = ["kept", "as it was"]

    failed: list[bool] = []
    marked, walked = attributes.mark_of, attributes._walked

    def once(look: Callable[..., Any], *args: Any) -> Any:
        if not failed and (fails == "everything" or args[0] == ["kept", "as it was"]):
            failed.append(True)
            raise AttributeError(f"not yet: {fails}")
        return look(*args)

    monkeypatch.undo()  # of what makes it an error in tests
    monkeypatch.setattr(attributes, "mark_of", functools.partial(once, marked) if fails == "one object" else marked)
    monkeypatch.setattr(attributes, "_walked", functools.partial(once, walked) if fails == "everything" else walked)
    new_trainer(tmp_path, Keeping(), LifecycleCallback()).train()
    assert failed
    assert caplog.text.count("not exact") == 1
    saved = read_tree(rank_file(tmp_path / "checkpoint-6", 0), kind=TRAINER)["parts"]["attributes"]
    assert saved == {"values": {}, "trained": {}}


def _quietly(change: Callable[[Scene], Any], scene: Scene) -> None:
    change(scene)


class KeepingNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.keeps = Keeps(EXACT)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().forward(x, labels)
        return outputs | {"loss": outputs["loss"] * self.keeps.factor()}


def _loop(folder: Path, break_at: int = 0) -> dict[str, str]:
    set_seed(7)
    accelerator = Accelerator(cpu=True)
    model = KeepingNet()
    made = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2), DataLoader(Rows(), 4, shuffle=True))
    model, optimizer, loader = made
    manager = TrainingStateManager(accelerator, folder)
    manager.resume()
    try:
        for _ in manager.epochs(2):
            for batch in manager.batches(loader):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                if manager.progress.step == break_at:
                    manager.save()
                    return {}
    finally:
        manager.close()
    return {name: tensor_digest(one) for name, one in module_tensors(model).items()}


def test_model_of_a_loop_that_keeps_one_of_each_resumes_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _loop(tmp_path / "whole")
    _loop(tmp_path / "broken", break_at=3)
    assert _loop(tmp_path / "broken") == whole
    assert "not exact" not in caplog.text


def _flat(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs["logits"].pow(2).mean()


def _steep(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return 3 * _flat(outputs, labels)


class SwitchesLoss(TrainerCallback):
    """Gives the trainer another loss at the second step."""

    trainer: Trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer.compute_loss_func = _steep


def test_loss_that_a_callback_has_switched_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(folder: Path) -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Unlabelled()
        switches = SwitchesLoss()
        given = {"compute_loss_func": _flat}
        switches.trainer = new_trainer(folder, switches, LifecycleCallback(), model=model, with_trainer=given)
        return switches.trainer

    whole = make(tmp_path / "whole")
    whole.train()
    break_off(make(tmp_path / "broken"))
    resumed = make(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.compute_loss_func is _steep
    assert digests(resumed) == digests(whole)
    assert "not exact" not in caplog.text


class Unlabelled(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(x).squeeze(-1)}


def test_looks_after_another_see_what_was_changed_in_libraries_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look is as thorough as one without an earlier one, whatever was as it was until then."""
    earlier = EarlierLooks()
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(1, 1))
    counts = {"calls": 0}

    def counted(self: Any, given: Any) -> Any:
        counts["calls"] += 1
        return given

    def found() -> attributes.Look:
        seeds = [("model", model, None), ("Dropout", torch.nn.Dropout, None)]
        again, anew = look(seeds, earlier=earlier), look(seeds)
        assert (again.marks, again.holders.keys(), again.entered.keys()) == (
            anew.marks,
            anew.holders.keys(),
            anew.entered.keys(),
        )
        return again

    first = found()
    assert first.marks["model.0.p"] == 0.5
    assert first.marks == found().marks
    model[0].p = 0.25
    assert found().marks["model.0.p"] == 0.25
    model[1].emphasis = 3
    assert found().marks["model.1.emphasis"] == 3
    del model[1].emphasis
    model[1].weighting = 3
    assert "model.1.emphasis" not in found().marks
    monkeypatch.setattr(torch.nn.Dropout, "forward", counted)
    before = found().marks
    assert any(path.startswith("Dropout.forward") for path in before)
    counts["calls"] += 1
    assert found().marks != before
