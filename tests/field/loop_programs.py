"""Random custom training loops: how a program opens, advances, abandons and reopens passes over its loaders.

A :class:`Program` is plain data, so that a failing one can be read and run again. :func:`run` trains it; everything is
made afresh each time, as a script that is started again makes it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, WeightedRandomSampler

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.state.rng.states import RngState, capture_rng
from tests.resume.harness import BrokenOff, forget_last_attempt

Kind = Literal["shuffled", "sequential", "weighted"]
How = Literal["next", "cycle", "forever", "chain", "restart", "remade", "lazy"]
Feed = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class Data:
    """A loader: its order, and its batches an epoch."""

    kind: Kind
    batches: int

    def make(self, first: int) -> DataLoader:
        rows = torch.arange(first, first + 2.0 * self.batches).reshape(-1, 1)
        if self.kind == "weighted":
            return DataLoader(rows, 2, sampler=WeightedRandomSampler(torch.arange(1.0, 1 + len(rows)), len(rows)))
        return DataLoader(rows, 2, shuffle=self.kind == "shuffled")


@dataclass(frozen=True, slots=True)
class Beside:
    """A loader that is advanced in the bodies of another's loop.

    Attributes:
        loader: Which.
        how: By ``next`` until it is empty; begun again when it is, by a handler, a generator, or an object that makes
            its iterator when it is first asked; two passes in a chain; begun again every third body, as it is or with a
            generator around it.
        once: Made before the loop over epochs, else before each loop over batches.
        every: Asked in every so many bodies.
        drained: Whether what is left of it is trained on after the loop, or after the epochs if it was made before.
    """

    loader: int
    how: How
    once: bool = False
    every: int = 1
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop over batches.

    Attributes:
        over: Which loader.
        zipped: Loaders zipped with it.
        beside: Loaders advanced in its bodies.
        within: A loader with a loop of its own in each body, and how many of its batches it takes; 0: all.
        leave_at: The batch at which it is left; 0: none.
        evaluates: Whether every other body ends with an evaluation.
    """

    over: int
    zipped: tuple[int, ...] = ()
    beside: tuple[Beside, ...] = ()
    within: tuple[int, int] | None = None
    leave_at: int = 0
    evaluates: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """Epochs of loops one after another.

    Attributes:
        data: The loaders.
        loops: Of each epoch.
        epochs: How many.
        save_every: Bodies from save to save.
        saves_epochs: Whether each epoch's end is saved too.
    """

    data: tuple[Data, ...]
    loops: tuple[Loop, ...]
    epochs: int = 2
    save_every: int = 2
    saves_epochs: bool = False


class Again:
    """Goes round a loader, by an iterator that is made when it is first asked."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make
        self._iterator: Iterator[Any] | None = None

    def __call__(self, number: int) -> Any:
        if self._iterator is None:
            self._iterator = self._make()
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = self._make()
            return next(self._iterator)


class Run:
    """One start of the program.

    Args:
        program: What is run.
        folder: Where checkpoints go; None: :attr:`kept` has the last one, without weights and files.
        die_after: The body after which it breaks off; 0: none.

    Attributes:
        trail: What was trained on, one entry a body.
        saved: How long ``trail`` was at each save.
        kept: Where the loop was at the last save, and the RNG state.
    """

    def __init__(self, program: Program, folder: Path | None, die_after: int = 0, **settings: Any) -> None:
        forget_last_attempt()
        torch.manual_seed(0)
        self.program = program
        self.trail: list[Any] = []
        self.saved: list[int] = []
        self.kept: tuple[dict[str, Any], RngState] | None = None
        self._in_memory = folder is None
        self._die_after = die_after
        self._accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.manager = TrainingStateManager(self._accelerator, folder, signals=(), keep_last=1, **settings)
        loaders = [one.make(100 * number) for number, one in enumerate(program.data)]
        self.model, self._optimizer, *self.loaders = self._accelerator.prepare(self.model, optimizer, *loaders)
        self._evaluation = DataLoader(torch.arange(4.0).reshape(-1, 1), 2, shuffle=True)

    def train(self) -> bool:
        """To the end, or to the death. Whether it came to its end."""
        try:
            self._resume()
            feeds = [{one.loader: self._feed(one) for one in loop.beside if one.once} for loop in self.program.loops]
            for _ in self.manager.epochs(self.program.epochs):
                for loop, lasting in zip(self.program.loops, feeds, strict=True):
                    self._loop(loop, lasting)
                if self.program.saves_epochs:
                    self._save()
            for loop, lasting in zip(self.program.loops, feeds, strict=True):
                self._drain(loop, lasting, once=True)
            return True
        except BrokenOff:
            return False
        finally:
            self.manager.close()

    def _feed(self, one: Beside) -> Feed:
        def make() -> Iterator[Any]:
            return iter(self.manager.batches(self.loaders[one.loader]))

        def forever() -> Iterator[Any]:
            while True:
                yield from self.manager.batches(self.loaders[one.loader])

        if one.how == "lazy":
            return Again(make)
        if one.how == "forever":
            endless = forever()
            return lambda number: next(endless)
        if one.how == "chain":
            chained = itertools.chain(make(), make())
            return lambda number: next(chained, None)
        made = self._around(make) if one.how == "remade" else make
        held = made()

        def ask(number: int) -> Any:
            nonlocal held
            if one.how in ("restart", "remade") and number > 0 and number % 3 == 0:
                held = made()
            if one.how != "cycle" or number < 0:
                return next(held, None)
            try:
                return next(held)
            except StopIteration:
                held = make()
                return next(held)

        return ask

    @staticmethod
    def _around(make: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
        def generator() -> Iterator[Any]:
            yield from make()

        return generator

    def _loop(self, loop: Loop, lasting: dict[int, Feed]) -> None:
        feeds = {one.loader: lasting[one.loader] if one.once else self._feed(one) for one in loop.beside}
        numbered: Any = self.manager.enumerate(self.loaders[loop.over])
        if loop.zipped:
            others = [self.manager.batches(self.loaders[number]) for number in loop.zipped]
            numbered = ((one[0][0], [one[0][1], *one[1:]]) for one in zip(numbered, *others, strict=False))
        for number, batch in numbered:
            if loop.leave_at and number >= loop.leave_at:
                break
            given = [feeds[one.loader](number) for one in loop.beside if number % one.every == 0]
            if loop.within is not None:
                inner, limit = loop.within
                for count, other in enumerate(self.manager.batches(self.loaders[inner])):
                    if limit and count == limit:
                        break
                    given.append(other)
            self._train([batch, *given] if isinstance(batch, torch.Tensor) else [*batch, *given], loop)
        numbered.close()
        self._drain(loop, feeds, once=False)

    def _drain(self, loop: Loop, feeds: dict[int, Feed], *, once: bool) -> None:
        """Train on what is left of the iterators that are made once, or before each loop."""
        for one in loop.beside:
            while one.drained and one.once is once and (other := feeds[one.loader](-1)) is not None:
                self._train([other], loop)

    def _train(self, batches: list[Any], loop: Loop) -> None:
        together = torch.cat([one for one in batches if one is not None])
        drawn = torch.rand(1)
        self._accelerator.backward((self.model(together) + drawn).mean())
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.trail.append((together.flatten().tolist(), drawn.item()))
        step = self.manager.progress.step
        if loop.evaluates and step % 2 == 0:
            with self.manager.evaluating():
                for rows in self._evaluation:
                    torch.rand(len(rows))
        if step % self.program.save_every == 0:
            self._save()
        if len(self.trail) == self._die_after:
            raise BrokenOff

    def _resume(self) -> None:
        if not self._in_memory:
            self.manager.resume()
        elif self.kept is not None:
            position, rng = self.kept
            self.manager._loop.loop.load_state_dict(copy.deepcopy(position), rng)

    def _save(self) -> None:
        self.saved.append(len(self.trail))
        if not self._in_memory:
            self.manager.save()
            return
        loop = self.manager._loop.loop
        obstacle = loop.obstacle_to_saving()
        assert obstacle is None, obstacle
        is_over, rng = loop.epoch_is_over(), capture_rng()
        self.kept = copy.deepcopy(loop.state_dict(epoch_is_over=is_over)), rng
        loop.was_captured(rng, epoch_is_over=is_over)
