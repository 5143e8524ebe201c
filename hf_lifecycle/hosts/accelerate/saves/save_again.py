"""A save below which the body continues to change what it holds is made again when the body is done.

A resumed run begins with the next batch, or the next epoch: what stands below ``save()`` it does not come to. Promise:
where the program changes after a save what that save holds, or leaves the loop in whose body it stands, the checkpoint
is replaced by one of the body's end, before the next batch is asked for, and one warning says so. The checkpoint that
``save()`` returns is complete and of that moment; a process that dies before the body's end has that one.

What a checkpoint holds is compared by digests. Not promised: that a write through ``.data`` is seen after
``save(wait=False)`` where there are more than 16 MB of tensors, and it misses every element that is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_lifecycle.engine.load_proof import LoadProof
from hf_lifecycle.errors import LifecycleError, RankUnreachable
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.saves.rank_state import Carried
from hf_lifecycle.messages import few
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import Digests, leaf_digests, quick_digests, tensor_digests

__all__ = ["SaveAgain"]

logger = logging.getLogger("hf_lifecycle")

_TRAINED = ("model", "optimizer", "scheduler", "scaler")
_LAST = "call save() at the end of the loop's body"


@dataclass(slots=True)
class _Save:
    """The last save, until the body is done in which it was made.

    Attributes:
        epoch_is_over: Whether that is the body of an epoch, else of a batch.
        is_captured: Whether a snapshot has the tensors.
        before_step: Whether no optimizer had stepped on the batch at hand.
        marks: What it holds, by digests.
        again: Makes it; None where the program saves by itself, with ``accelerator.save_state``.
    """

    epoch_is_over: bool
    step: int
    is_captured: bool
    before_step: bool
    marks: Mapping[str, str]
    again: Callable[[], object] | None = None


class SaveAgain:
    """Of one run."""

    def __init__(self, ranks: Ranks, loop: Loop, proof: LoadProof, carried: Carried) -> None:
        self._ranks = ranks
        self._loop = loop
        self._proof = proof
        self._carried = carried
        self._save: _Save | None = None
        self._has_told = False
        loop.at_body_end.append(self._at_body_end)
        loop.at_epoch.append(self._at_epoch)

    def captured(self, state: Mapping[str, Any], *, epoch_is_over: bool, is_captured: bool) -> None:
        """A save has everything as it is now, and what :meth:`Carried.state` gave."""
        if self._save is not None and self._save.again is not None:  # the program saves beside, and that one is mended
            return
        self._save = None
        if epoch_is_over or self._loop.steps.in_body():
            marks = self._marks(state, is_captured=is_captured)
            self._save = _Save(epoch_is_over, self._loop.steps.count, is_captured, self._loop.is_before_step(), marks)

    @contextmanager
    def trying_to_save(self, again: Callable[[], object]) -> Iterator[None]:
        """Around a save of the manager's, which ``again`` would make once more. One that comes to nothing is not."""
        self.forget()
        try:
            yield
        except BaseException:
            self.forget()
            raise
        if self._save is not None:
            self._save.again = again

    def forget(self) -> None:
        """What comes is no more of the body in which a save was made."""
        self._save = None

    def leave(self) -> None:
        """The outermost loop is over. One that was left in the body of a save has no end to save it again."""
        save, self._save = self._save, None
        if save is not None and (changed := self._changed(save)):
            logger.warning(
                "not exact: the program changes %s after save() at step %d and then leaves the loop, so a run that "
                "is resumed from that checkpoint does not have the change: %s",
                few(changed),
                save.step,
                _LAST,
            )

    def _at_body_end(self) -> None:
        save = self._save
        of_batch = save is not None and not save.epoch_is_over
        if save is not None and of_batch and (save.before_step or save.step == self._loop.steps.count):
            self._compare(save)
        self.forget()

    def _at_epoch(self) -> None:
        save = self._save
        if save is not None and save.again is not None and not save.epoch_is_over and self._loop.epoch_is_over():
            self._make(save.again, ["the position in the data (the loop was left)"])
        elif save is not None:
            self._compare(save)
        self.forget()

    def _compare(self, save: _Save) -> None:
        told = self._ranks.gather(self._changed(save), what="what was changed after a save in the same body")
        changed = list(dict.fromkeys(name for names in told for name in names))
        if changed and save.again is not None:
            self._make(save.again, changed)
        elif changed:
            self._tell(
                f"the program changes {few(changed)} after accelerator.save_state(), in the same body of the loop, "
                "so the checkpoint does not contain that: call it at the end of the body"
            )

    def _changed(self, save: _Save) -> list[str]:
        """The names of what differs now, except in a user's objects that change by themselves, such as a clock."""
        weights = dict if save.is_captured else self._proof.state_dict
        state = self._carried.state(weights, epoch_is_over=save.epoch_is_over)
        now = self._marks(state, is_captured=save.is_captured)
        changed = [name for name in {**save.marks, **now} if save.marks.get(name) != now.get(name)]
        owners = [name for name in state["objects"] if any(one.startswith(f"{name}.") for one in changed)]
        first, second = (_marks(self._carried.objects_now(owners), quick_digests) for _ in range(2))
        return [name for name in changed if first.get(name) == second.get(name)]

    def _marks(self, state: Mapping[str, Any], *, is_captured: bool) -> dict[str, str]:
        """The digests of all that :meth:`Carried.state` gave, by name, but for where training is."""
        kinds = self._proof.quick_digests() if is_captured else state["weights"]
        of_tensors = quick_digests if is_captured else tensor_digests
        attributes, outside = state["attributes"], state["outside"]
        held = {
            "best metric": state["best"],
            **{path: one["value"] for part in ("values", "data") for path, one in attributes[part].items()},
            **{f"{path}.requires_grad": flag for path, flag in attributes["trained"].items()},
            **{f"{path}.training": flag for path, flag in attributes["modes"].items()},
            **{name: one for part in outside.values() for name, one in part.items()},
            **state["objects"],
        }
        weights = {name: digest for kind in _TRAINED for name, digest in kinds[kind].items()}
        return weights | _marks(held, of_tensors)

    def _make(self, again: Callable[[], object], changed: list[str]) -> None:
        self._tell(
            f"save() at step {self._loop.steps.count} is repeated at the end of the loop's body, since the program "
            f"changes {few(changed)} after it; if the process is killed in between, the change is lost: {_LAST}, "
            "which also saves once instead of twice"
        )
        self._loop.return_to_saved()
        try:
            again()
        except RankUnreachable:
            raise
        except LifecycleError as error:  # of every rank; what save() returned is there all the same
            logger.warning("not exact: the save at step %d could not be repeated: %s", self._loop.steps.count, error)

    def _tell(self, what: str) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning("maybe not exact: %s", what)


def _marks(held: Mapping[str, Any], of_tensors: Digests) -> dict[str, str]:
    """The digests of everything in these trees."""
    each = [leaf_digests(one, name, of_tensors=of_tensors) for name, one in held.items()]
    return {name: digest for digests in each for name, digest in digests.items()}
