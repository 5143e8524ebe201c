"""The objects of a loop without an accelerator: their states, and what is found from them, in the loop's single file.

Modules, optimizers, schedulers and others that the manager was given go by their ``state_dict``; what they keep beside
it is found as it is in a loop on accelerate. Where a loop stores states itself, in ``custom_state``, modules that
change and are not among them are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.hosts.accelerate.run_state.attributes import Attributes
from hf_lifecycle.hosts.accelerate.run_state.outside import Outside
from hf_lifecycle.saving.carrying import leaves_of, load_state, state_of
from hf_lifecycle.state.objects import Stateful, absent_objects, check_objects
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.values.functions import Variable

__all__ = ["GivenObjects"]

_PROVED = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_OF_A_COPY = "a copy of a manager does not have its objects: create a TrainingStateManager(objects=...)"
_KEYS = ("states", "outside", "attributes")


class _Given(Prepared):
    """What would have been prepared: the objects, by the user's names."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        super().__init__(None, objects)
        self._all = dict(objects)

    @property
    def all(self) -> list[Any]:
        return list(self._all.values())

    def models(self) -> dict[str, torch.nn.Module]:
        return {name: unwrapped(one) for name, one in self._all.items() if isinstance(one, torch.nn.Module)}

    def whole_models(self) -> dict[str, torch.nn.Module]:
        return self.models()

    def optimizers(self) -> dict[str, Any]:
        return {name: one for name, one in self._all.items() if isinstance(one, torch.optim.Optimizer)}

    def names_of_optimizers(self) -> dict[int, str]:
        return {id(one): name for name, one in self.optimizers().items()}

    def schedulers(self) -> dict[str, Any]:
        kind = torch.optim.lr_scheduler.LRScheduler
        return {name: one for name, one in self._all.items() if isinstance(one, kind)}

    def data(self) -> dict[str, Any]:
        return {}

    def shared(self) -> dict[str, Any]:
        return {}

    def orders(self) -> dict[str, Any]:
        return {}

    def numbers(self) -> list[Variable]:
        return []

    def holders(self) -> dict[str, Any]:
        return {}

    def objects(self) -> dict[str, Any]:
        return dict(self._all)

    def known(self) -> list[Any]:
        return [*self._all.values(), *self.models().values()]


class GivenObjects:
    """The objects of one manager."""

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        check_objects(objects)
        self._objects = dict(objects)
        self._saves = 0
        given = _Given(self._objects)
        self._outside = Outside(
            given,
            lambda: self._saves,
            reached_from="the objects that the manager was given",
            way_on='pass objects={"name": it} to the manager, or put its state_dict() into custom_state',
        )
        self._attributes = Attributes(given, lambda: 0)
        if self._objects:
            self._attributes.watch()
            self._outside.begin()

    def __reduce__(self) -> Any:
        return (_ObjectsOfAnother if self._objects else type(self)), ({},)

    def state_dict(self, custom_state: Any) -> dict[str, Any]:
        """What is stored; nothing where the manager was given nothing.

        Args:
            custom_state: What the program stores itself.
        """
        stored = [leaf for leaf in leaves_of(custom_state) if isinstance(leaf, torch.Tensor)]
        if stored:
            self._outside.look_beside(stored)
        if not self._objects:
            return {}
        self._saves += 1
        return {
            "states": {name: _state_of(one) for name, one in self._objects.items()},
            "outside": self._outside.state_dict(),
            "attributes": self._attributes.state_dict(),
        }

    def obstacles(self, saved: Mapping[str, Any]) -> list[str]:
        """Why nothing of what was saved can be given back, a sentence for each reason.

        Raises:
            StateMismatch: Keys are missing or unknown.
        """
        if saved:
            missing, unknown = [key for key in _KEYS if key not in saved], [key for key in saved if key not in _KEYS]
            if missing or unknown:
                raise StateMismatch("the objects of a training state", missing, unknown)
        return absent_objects(self._objects, saved.get("states", {}))

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Give everything its state back. Returns what is not what was saved then."""
        if not saved:
            return []
        problems = []
        for name, one in self._objects.items():
            if isinstance(one, _PROVED):
                problems += load_state(name, one, saved["states"][name])
            else:
                one.load_state_dict(saved["states"][name]["state"])
        problems += self._outside.load_state_dict(saved["outside"])
        self._attributes.load_state_dict(saved["attributes"], inside=False)
        return problems

    def close(self) -> None:
        """Watch no more."""
        self._outside.close()


class _ObjectsOfAnother(GivenObjects):
    """Those of a copied manager, which has not seen what changed in them."""

    def state_dict(self, custom_state: Any) -> dict[str, Any]:  # noqa: ARG002
        raise ValueError(_OF_A_COPY)

    def obstacles(self, saved: Mapping[str, Any]) -> list[str]:  # noqa: ARG002
        return [_OF_A_COPY]


def _state_of(one: Any) -> dict[str, Any]:
    return state_of(one) if isinstance(one, _PROVED) else {"state": dict(one.state_dict())}
