"""Plain values that a loop's program keeps in its models, optimizers and hooks and changes as it trains are restored.

A dropout that is turned down, a counter in a module, a layer that is thawed or set to evaluation, a dict in the closure
of a hook: none of it has a ``state_dict``. What training has changed is part of every save. It is restored at
``resume()``; and again when the rest of a pass begins, since the program repeats what it does before a pass. Text that
the program sets before its first batch and then leaves alone stays as the program has it, such as a path of this
process. Of a dataset or a collator, what the program sets between two passes is carried too; what changes in the course
of a pass is named, since batches are made ahead of training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from hf_lifecycle.data.generators import find_generators
from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.libraries import put_into_libraries
from hf_lifecycle.messages import few
from hf_lifecycle.state.modules import modules_of, parameters_of
from hf_lifecycle.state.proof import parameters_in
from hf_lifecycle.state.reachable import attributes_of, hooks_of, reachable
from hf_lifecycle.state.values.additions import (
    Seed,
    seeds_of_libraries,
    seeds_of_optimizer,
    seeds_of_sampler,
    seeds_of_stateless,
    seeds_put_on,
)
from hf_lifecycle.state.values.attributes import Look, look
from hf_lifecycle.state.values.changes import ChangedFlags, ChangedValues, begins_anew, is_changed, made_ahead
from hf_lifecycle.state.values.functions import Variable
from hf_lifecycle.state.values.marks import has_only_grown
from hf_lifecycle.state.values.places import Place
from hf_lifecycle.state.values.trees import PLAIN_SCALARS
from hf_lifecycle.state.wiring import Wiring

__all__ = ["Attributes"]

logger = logging.getLogger("hf_lifecycle")


class Attributes:
    """Carries plain values and flags of one run."""

    def __init__(self, prepared: Prepared, epoch: Callable[[], int]) -> None:
        self._prepared = prepared
        self._epoch = epoch
        self._told: set[str] = set()
        self._values = ChangedValues(self._look, self._tell_once)
        self._data = ChangedValues(self._look_at_data, self._tell_once, of_data=lambda _: True)
        self._data_at_pass: Mapping[str, Any] = {}  # their marks, when the last pass began
        self._at_workers: dict[str, Any] = {}  # the marks of data that workers which last were started with
        self._flags = {
            "trained": ChangedFlags("requires_grad", self._parameters),
            "modes": ChangedFlags("training", self._modules),
        }
        self._wiring = Wiring(prepared.models)
        self._data_at_first: frozenset[str] | None = None  # what is made in the loop has no stable name
        self._looked_at: list[Any] | None = None  # what was prepared then
        self._program: list[Variable] = []
        self._put_into_libraries: Mapping[str, Any] = {}
        self._again: Mapping[str, Any] | None = None  # to be restored once more, when the rest of a pass begins
        self._begun_in: int | None = None  # the epoch whose first batch was seen last

    def watch(self) -> None:
        """Everything is as it is at first, of what has been prepared since the last call."""
        prepared = [*self._prepared.all, *self._prepared.holders().values()]
        if self._looked_at is not None and list(map(id, prepared)) == list(map(id, self._looked_at)):
            return
        self._looked_at = prepared
        if self._data_at_first is None:
            self._prepared.plain.look()
            self._program = self._prepared.numbers()
            self._put_into_libraries = put_into_libraries()
            self._data_at_first = frozenset({**self._prepared.data(), **self._prepared.orders()})
        self._values.take_first()
        self._data.take_first()
        self._wiring.take_first()
        for one in self._flags.values():
            one.take_first()

    def begin_pass(self, inside: bool) -> None:
        """A pass is about to begin, or (``inside``) the rest of one."""
        if inside and self._again is not None:
            saved, self._again = self._again, None
            values = saved["values"].items()
            late = {path: one for path, one in values if one["late"] or not self._is_set_anew(path, one)}
            self._name_lost(self._put_back({**saved, "values": late}))
        self._data_at_pass = self._look_at_data().marks
        self._name_what_workers_lack()
        epoch = self._epoch()
        if epoch == self._begun_in:
            return
        if self._begun_in is None:
            self._values.take_begin()
        self._begun_in = epoch
        self._values.notice()
        for one in self._flags.values():
            one.notice()

    def _name_what_workers_lack(self) -> None:
        """What the program has set since workers were started that last, and that a resumed run starts anew."""
        lasting = tuple(f"{name}." for name in self._prepared.with_lasting_workers())
        marks = {path: mark for path, mark in self._data_at_pass.items() if path.startswith(lasting)} if lasting else {}
        for path in [path for path, mark in marks.items() if path in self._at_workers]:
            if ".sampler" not in path and is_changed(self._at_workers, path, marks[path]):
                self._tell_once(
                    path,
                    f"{path} changes during training, but persistent data workers keep its value from when they were "
                    "started, and a resumed run starts them with the present value; use persistent_workers=False",
                )
        self._at_workers = {**marks, **self._at_workers}

    def state_dict(self) -> dict[str, Any]:
        self.watch()
        wiring = self._wiring.changed()
        if wiring is not None:
            logger.warning("maybe not exact: %s", wiring)
        return {
            "values": self._values.state_dict(),
            "data": self._data_set_between_passes(),
            **{key: one.state_dict() for key, one in self._flags.items()},
        }

    def _data_set_between_passes(self) -> dict[str, Any]:
        """What the program has set before the pass began. What changes in the course of it is ahead of training."""
        seen = self._data.notice()
        own = self._data.state_dict(seen=seen).items()
        values = {path: one for path, one in own if self._prepared.plain.is_asked(path)}
        within = {path for path in values if self._is_ahead(path, seen.marks[path])}
        doubts = [path for path in sorted(within - self._told) if self._decides(path, seen.marks[path])]
        if doubts:
            self._told.update(doubts)
            logger.warning("maybe not exact: %s", made_ahead(doubts))
        return {path: one for path, one in values.items() if path not in within}

    def _is_ahead(self, path: str, mark: Any) -> bool:
        """Whether a value has changed since the pass began. A cache that has grown has what it had."""
        before = self._data_at_pass.get(path)
        return is_changed(self._data_at_pass, path, mark) and not has_only_grown(before, mark)

    def _decides(self, path: str, mark: Any) -> bool:
        """Whether it may decide what batches are like."""
        return type(mark) in PLAIN_SCALARS or not self._is_of_stream(path)

    def _is_of_stream(self, path: str) -> bool:
        """Whether it is of an iterable dataset, which is read again from its begin, and makes it anew."""
        owner = next((one for name, one in self._prepared.data().items() if path.startswith(name)), None)
        return isinstance(owner, torch.utils.data.IterableDataset)

    def load_state_dict(self, saved: Mapping[str, Any], *, inside: bool) -> None:
        """Put back what was saved. ``inside``: in the midst of a pass."""
        self.watch()
        lost = self._put_back(saved)
        if not inside:  # else the program may make their places until the rest of the pass begins
            self._name_lost(lost)
        if self._values.known:
            logger.debug("restored to their saved values: %s", few(sorted(self._values.known)))
        self._again = saved if inside else None

    def _name_lost(self, paths: list[str]) -> None:
        if paths:
            logger.warning("not exact: %s", begins_anew(paths))

    def _is_set_anew(self, path: str, one: Mapping[str, Any]) -> bool:
        """Whether the program sets it in each process, where it was set before the first batch and left alone since."""
        of_holder = any(path.startswith(f"{name}.") for name in self._prepared.holders())
        return type(one["value"]) in (PLAIN_SCALARS if of_holder else (str,))

    def _put_back(self, saved: Mapping[str, Any]) -> list[str]:
        lost = self._values.put_back(saved["values"]) + self._data.put_back(saved["data"])
        for key, one in self._flags.items():
            one.load_state_dict(saved[key])
        return lost

    def _roots(self) -> dict[str, torch.nn.Module]:
        """Models, and modules among what the user carries: their state_dict has no plain values."""
        objects = self._prepared.objects().items()
        return self._prepared.models() | {name: one for name, one in objects if isinstance(one, torch.nn.Module)}

    def _parameters(self) -> dict[str, Any]:
        roots = self._roots().items()
        return {f"{name}.{key}": one for name, root in roots for key, one in parameters_of(root).items()}

    def _modules(self) -> dict[str, Any]:
        return {f"{name}.{key}": one for name, root in self._roots().items() for key, one in modules_of(root)}

    def _look(self) -> Look:
        entered = {id(one) for one in self._roots().values()}
        objects = reachable(self._prepared.objects()).values()
        known = [*self._prepared.known(), *objects, *self._prepared.data().values(), *self.seeded()]
        holders = self._parameters() | self._prepared.wrappers()
        return look(self._seeds(), [one for one in known if id(one) not in entered], self._held(), holders)

    def _held(self) -> Iterator[Any]:
        """The parameters of what is prepared or carried."""
        yield from self._parameters().values()
        yield from parameters_in(self._prepared.optimizers().values())

    def _look_at_data(self) -> Look:
        known = self._data_at_first or ()
        data = {name: one for name, one in self._prepared.data().items() if name in known}
        seeds: list[Seed] = [(name, one, None) for name, one in data.items()]
        for name, sampler in self._prepared.orders().items():
            if name in known:
                seeds += seeds_of_sampler(sampler, name)
        return look(seeds, [*self._prepared.known(), *self.seeded()])

    def seeded(self) -> list[Any]:
        """Generators that are seeded with every batch or epoch, and are no values."""
        roots = [*self._prepared.data().values(), *self._prepared.orders().values()]
        return [one for root in roots for one in find_generators(root, "", make=False).values() if one is not None]

    def _seeds(self) -> Iterator[Seed]:
        for name, root in self._roots().items():
            yield name, root, None
            yield from ((key, hooks, None) for key, hooks in hooks_of(root, name).items())
        for name, optimizer in self._prepared.optimizers().items():
            yield from seeds_of_optimizer(optimizer, name)
        for name, one in {**self._parameters(), **self._prepared.wrappers()}.items():
            yield from seeds_put_on(one, name)
        for name, one in self._prepared.shared().items():
            yield from seeds_put_on(one, name, named=True)
        yield from seeds_of_libraries(self._put_into_libraries)
        for name, one in {**self._prepared.schedulers(), **self._prepared.objects()}.items():
            yield from seeds_of_stateless(one, name)
        for name, one in self._prepared.holders().items():  # by what it holds: its own state may be a whole checkpoint
            yield from ((f"{name}.{key}", held, Place(one, key, name)) for key, held in attributes_of(one).items())
        for name, scheduler in self._prepared.schedulers().items():
            yield f"{name}.lr_lambdas", getattr(scheduler, "lr_lambdas", None), None
        for one in self._program:
            place = Place(one.holder, one.key, "program")
            try:
                yield f"program.{one.name}", place.get(), place
            except KeyError:  # deleted since
                continue

    def _tell_once(self, path: str, sentence: str) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning("not exact: %s", sentence)
