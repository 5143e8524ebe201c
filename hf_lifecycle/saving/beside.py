"""What is trained beside the models of a run: saved by name, given back, and proved.

Modules, optimizers and schedulers go by their ``state_dict``; parameters that no module within reach holds, by their
place in an optimizer. A large module that never changes is not stored, only recognised; what may be a leftover of
another run is not stored until it changes. Who looks for them, and where, is the host's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from hf_lifecycle.messages import few
from hf_lifecycle.saving.carrying import is_large, leaves_of, load_state, mark_of_module, obstacle, state_of
from hf_lifecycle.saving.snapshots.live import host_copy
from hf_lifecycle.state.fingerprint import is_shared_out, local_part, sample_digests, tree_digest
from hf_lifecycle.state.proof import parameters_in
from hf_lifecycle.torch_internals import storage_id

__all__ = ["Beside", "changed_by_nobody", "holds_any", "place_of", "sampled"]


class Beside:
    """What was found of one run.

    Args:
        reached_from: Where the host looks, for messages.

    Attributes:
        found: Modules, optimizers and schedulers by name.
        parameters: Those that only an optimizer holds, by name.
    """

    def __init__(self, *, reached_from: str = "the trainer") -> None:
        self.found: dict[str, Any] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.dropped: list[Any] = []  # what was named already
        self._reached_from = reached_from
        self._late: set[str] = set()  # what is known to have been made during training
        self._unsure: set[str] = set()  # what may be of another run
        self._marks: dict[str, Any] = {}  # of these and of large modules, as training found them
        self._changed: set[str] = set()  # of these

    def add(
        self,
        found: Mapping[str, Any],
        unsure: Mapping[str, Any],
        optimizers: Mapping[str, Any] | None = None,
        others: Iterable[Any] = (),
    ) -> None:
        """More was found; what is known stays.

        Args:
            unsure: What may be a leftover, stored once it has changed.
            optimizers: The host's, which may hold tensors, as those found may, that neither these modules do nor those
                among ``others``; None to look for no such.
        """
        if optimizers is not None:
            own = {name: one for name, one in found.items() if isinstance(one, torch.optim.Optimizer)}
            self.parameters |= _held_by_optimizers_alone({**optimizers, **own}, [*others, *found.values()])
        known = {id(one) for one in [*self.found.values(), *self.dropped]}
        self._unsure |= unsure.keys()
        self.found |= {name: one for name, one in {**found, **unsure}.items() if id(one) not in known}

    @property
    def optimizers(self) -> list[Any]:
        return [one for one in self.found.values() if isinstance(one, torch.optim.Optimizer)]

    def trained(self) -> dict[str, torch.Tensor]:
        """Every parameter that may have a gradient."""
        within = {
            f"{name}.{key}": one
            for name, module in self.found.items()
            if isinstance(module, torch.nn.Module)
            for key, one in module.named_parameters()
        }
        return within | self.parameters

    def drop_what_cannot_be_carried(self) -> list[str]:
        """Leave out what has no plain state. Returns a sentence for each."""
        lost = []
        for name, one in list(self.found.items()):
            reason = obstacle(one)
            if reason is not None:
                self.dropped.append(self.found.pop(name))
                lost.append(f"{name} is trained outside the model and cannot be saved: {reason}; pass it as objects=")
        return lost

    def leave_to(self, states: Iterable[Any]) -> None:
        """Leave out optimizers whose tensors are all in these states, which their owners save."""
        if not self.optimizers:
            return
        saved = {place_of(leaf) for state in states for leaf in leaves_of(state) if isinstance(leaf, torch.Tensor)}
        for name, one in list(self.found.items()):
            if isinstance(one, torch.optim.Optimizer):
                own = {place_of(leaf) for leaf in leaves_of(one.state_dict()) if isinstance(leaf, torch.Tensor)}
                if own and own <= saved:
                    self.dropped.append(self.found.pop(name))

    def made_late(self, found: Mapping[str, Any], *, before: str) -> str | None:
        """A sentence that names, once, what is trained, could be carried, and was not there when training began."""
        known = {id(one) for one in [*self.found.values(), *self.dropped]}
        late = [
            name
            for name, one in found.items()
            if id(one) not in known
            and name not in self._late
            and (not isinstance(one, torch.nn.Module) or any(each.requires_grad for each in one.parameters()))
            and obstacle(one) is None
        ]
        self._late.update(late)
        if not late:
            return None
        were = "was" if len(late) == 1 else "were"
        return (
            f"{few(late)} {were} made during training, so a resumed run cannot restore its state: create it before "
            f"{before}, or pass it as objects="
        )

    def watch(self) -> None:
        """Training begins: remember the large modules as they are."""
        for name, one in self.found.items():
            if name not in self._marks and self._is_recognised(name, one):
                self._marks[name] = _mark(one)

    def _is_recognised(self, name: str, one: Any) -> bool:
        """Whether it is stored only where it has changed."""
        return name not in self._changed and (name in self._unsure or is_large(one))

    def state_dict(self) -> dict[str, Any]:
        same = {}
        for name, one in self.found.items():
            if self._is_recognised(name, one):
                mark = _mark(one)
                if mark != self._marks.setdefault(name, mark):
                    self._changed.add(name)
                else:
                    same[name] = mark[0]
        states = {name: state_of(one) for name, one in self.found.items() if name not in same}
        return {
            "carried": {name: state for name, state in states.items() if name not in self._unsure},
            "attached": {name: state for name, state in states.items() if name in self._unsure},
            "samples": {name: sample for name, sample in same.items() if name not in self._unsure},
            "parameters": {name: host_copy(one) for name, one in self.parameters.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Give everything its state back. Returns what is not what was saved then."""
        problems = []
        for name, state in saved["carried"].items():
            if name in self.found:
                self._changed.add(name)  # the next save has to hold it too
                problems += load_state(name, self.found[name], state)
            elif any(isinstance(one, torch.Tensor) for one in leaves_of(state)):
                problems.append(
                    f"{name} was saved with the run, and cannot be found from {self._reached_from} now; "
                    "create it before training starts, or pass it as objects="
                )
        for name in saved["attached"].keys() & self.found.keys():
            self._changed.add(name)
            problems += load_state(name, self.found[name], saved["attached"][name])
        for name, sample in saved["samples"].items():
            if name in self.found and mark_of_module(self.found[name])[0] != sample:
                problems.append(
                    f"{name} has other values now than when the run began, which does not train it: give it the same "
                    "values, or pass it as objects="
                )
        for name, value in saved["parameters"].items():
            live = self.parameters.get(name)
            if live is None or live.shape != value.shape or live.dtype != value.dtype:
                problems.append(
                    f"{name} was trained outside the model, and cannot be found now; create it before "
                    "training starts, or pass it as objects="
                )
                continue
            with torch.no_grad():
                live.copy_(value)
        return problems


def _mark(one: Any) -> tuple[str, tuple[int, ...]]:
    return mark_of_module(one) if isinstance(one, torch.nn.Module) else (tree_digest(one.state_dict()), ())


def holds_any(one: Any, places: Collection[tuple[Any, ...]]) -> bool:
    """Whether the state of an object has tensors that lie at one of these places."""
    if obstacle(one) is not None:
        return False
    return any(isinstance(leaf, torch.Tensor) and place_of(leaf) in places for leaf in leaves_of(one.state_dict()))


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory; of one that is distributed, this process's part."""
    part = local_part(tensor)
    return storage_id(part), part.storage_offset(), part.shape


def _held_by_optimizers_alone(optimizers: Mapping[str, Any], known: Iterable[Any]) -> dict[str, torch.Tensor]:
    """The tensors that these optimizers hold and none of the modules among ``known`` does, by their place.

    Those that are sharded over ranks are left out.
    """
    held = {id(each) for one in known if isinstance(one, torch.nn.Module) for each in one.parameters()}
    alone: dict[str, torch.Tensor] = {}
    for name, optimizer in optimizers.items():
        every = [one for one in parameters_in([optimizer]) if isinstance(one, torch.Tensor)]
        for number, one in enumerate(every):
            if id(one) not in held and not is_shared_out(one):
                held.add(id(one))
                alone[f"{name}, parameter {number}"] = one
    return alone


def sampled(model: torch.nn.Module, optimizers: Iterable[Any]) -> dict[str, str]:
    """Digests of samples of the parameters that need a gradient and that none of these optimizers holds."""
    held = set(map(id, parameters_in(optimizers)))
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad and id(one) not in held}
    return sample_digests({name: one for name, one in trained.items() if not is_shared_out(one)})


def changed_by_nobody(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """A sentence that names the parameters that a step has changed, if it did."""
    changed = [name for name in before if before[name] != after.get(name, before[name])]
    if not changed:
        return None
    return (
        f"{len(changed)} parameters of the model ({', '.join(changed[:3])}) change at a step, and no known "
        "optimizer has them: if what changes them keeps state, pass it as objects="
    )
