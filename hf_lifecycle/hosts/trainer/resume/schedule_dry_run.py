"""A learning rate schedule, stepped apart from the training: which rates it would have set, and what it would be then.

Promise: neither the scheduler, nor its optimizer, nor the RNG states are changed. A scheduler of any class that has
``step()`` will do. It sees a stand-in for the optimizer, with the settings of every group and no parameters, and a copy
of the arguments. Where it reads the trainer, the model or the data, its rates are not known.

Not kept apart: what its functions and methods change in variables of the program's own.
"""

from __future__ import annotations

import copy
import io
import warnings
from array import array
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
import xxhash
from torch.optim import Optimizer

from hf_lifecycle.engine.made_with import settings_of_schedule
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.rng.states import capture_rng, restore_rng
from hf_lifecycle.state.values.described import described
from hf_lifecycle.torch_internals import OPTIMIZER_MARKS

__all__ = ["DryRun", "rates_with"]

_OUT_OF_REACH = (
    "accelerator",
    "callback_handler",
    "data_collator",
    "eval_dataset",
    "processing_class",
    "train_dataset",
)


def rates_with(digest: str, groups: Iterable[Mapping[str, Any]]) -> str | None:
    """The digest of a row of rates, and one more step's: learning rates, and momentum where a schedule may move it.

    None where a rate is a tensor on an accelerator, for which training would have to wait.
    """
    rates: list[Any] = []
    for group in groups:
        rates += (group["lr"], group.get("momentum") or 0.0, *(group.get("betas") or ()))
    if not {type(one) for one in rates} <= {float, int}:
        if any(isinstance(one, torch.Tensor) and one.device.type != "cpu" for one in rates):
            return None
        rates = [float(one) for one in rates]
    return xxhash.xxh3_128_hexdigest(digest.encode() + array("d", rates).tobytes())


class _StandIn(Optimizer):
    """An optimizer's settings, with nothing to train."""

    _opt_called = True  # as torch's schedulers ask

    def __init__(self, optimizer: Any) -> None:
        super().__init__([torch.zeros(())], {})
        self.defaults = copy.deepcopy(getattr(optimizer, "defaults", {}))
        self.param_groups = [
            {key: [] if key == "params" else copy.deepcopy(value) for key, value in group.items()}
            for group in optimizer.param_groups
        ]

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""

    setattr(step, OPTIMIZER_MARKS[1], True)


class _OutOfReach:
    """What stands for the trainer and what it has: there is nothing to be seen but a copy of the arguments."""

    def __init__(self, **shown: Any) -> None:
        vars(self).update(shown)


class DryRun:
    """A schedule as it is now, on an optimizer as it is now; both are copied.

    Args:
        scheduler: Has ``step()`` without metrics, and ``state_dict()``.
        optimizer: The one that it sets the rates of, wrapped or not.
        trainer: Whose it is; what it has is out of the schedule's reach.

    Attributes:
        optimizer: Stands for the optimizer.
        is_new: Whether the optimizer has made no step.
        settings: What the schedule was made with, if it is new.
    """

    def __init__(self, scheduler: Any, optimizer: Any, trainer: Any = None) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        self.optimizer = _StandIn(inner)
        self.is_new = not getattr(inner, "state", None)
        held = getattr(scheduler, "optimizer", inner)  # under an engine, the one inside of it
        memo: dict[int, Any] = {id(one): self.optimizer for one in (optimizer, inner, held)}
        memo[id(inner.param_groups)] = self.optimizer.param_groups
        memo |= {id(one): new for one, new in zip(inner.param_groups, self.optimizer.param_groups, strict=True)}
        if trainer is not None:
            memo |= _out_of_reach(trainer)
        self.scheduler = copy.deepcopy(scheduler, memo)
        if not self.is_new and hasattr(scheduler, "base_lrs"):  # an engine has loaded its groups before
            for group, rate, first in zip(
                self.optimizer.param_groups, scheduler.get_last_lr(), scheduler.base_lrs, strict=True
            ):
                group.update(lr=rate, initial_lr=first)
        self.settings = settings_of_schedule(self.scheduler)
        self._first = {name: described(value) for name, value in self.scheduler.state_dict().items()}

    @classmethod
    def of(cls, scheduler: Any, optimizer: Any, trainer: Any = None) -> DryRun | None:
        """None where the schedule cannot be copied."""
        try:
            return cls(scheduler, optimizer, trainer)
        except Exception:  # noqa: BLE001 - of any kind, since what it holds is the user's
            return None

    def copy(self) -> DryRun:
        """Another one, as far as this one has come."""
        return DryRun(self.scheduler, self.optimizer)

    def set_rates(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take the learning rates that a schedule began with in ``groups``, which are an optimizer's."""
        own_groups = self.optimizer.param_groups
        for own, other in zip(own_groups, groups, strict=True):
            before, first = own.get("initial_lr"), other.get("initial_lr")
            if before and first is not None and before != first:
                own["lr"], own["initial_lr"] = own["lr"] / before * first, first
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs = [own["initial_lr"] for own in own_groups]

    def rates(self, steps: int) -> str | None:
        """The digest of the rates of the next ``steps`` steps, the present one's first; None if it cannot be told."""
        digest: str | None = ""
        before = capture_rng()
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                for number in range(steps):
                    if number > 0:
                        self.scheduler.step()
                    digest = digest if digest is None else rates_with(digest, self.optimizer.param_groups)
        except Exception:  # noqa: BLE001 - of any kind, since its code is the user's
            return None
        finally:
            restore_rng(before)
        return digest

    def unlike(self, scheduler: Any) -> dict[str, tuple[Any, Any]]:
        """The entries of its state that are others in that of ``scheduler``: this one's value, and the other's."""
        own, other = self.scheduler.state_dict(), scheduler.state_dict()
        both = {name: (own.get(name), other.get(name)) for name in {**own, **other}}
        return {name: (one, two) for name, (one, two) in both.items() if described(one) != described(two)}

    def has_moved(self, name: str) -> bool:
        """Whether a step has changed this entry of its state."""
        return bool(self._first.get(name) != described(self.scheduler.state_dict().get(name)))


def _out_of_reach(trainer: Any) -> dict[int, Any]:
    """What a copy has in the place of the trainer and its parts, by their identities."""
    args = copy.copy(trainer.args)
    model = getattr(trainer, "model", None)
    hidden = [getattr(trainer, name, None) for name in _OUT_OF_REACH]
    if isinstance(model, torch.nn.Module):
        hidden += [model, *unwrapped(model).modules(), *unwrapped(model).parameters()]
    nothing = _OutOfReach()
    memo = {id(one): nothing for one in hidden if one is not None}
    return memo | {id(trainer.args): args, id(trainer): _OutOfReach(args=args)}
