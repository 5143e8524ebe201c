"""The place that torchdata's ``StatefulDataLoader`` keeps of its own, put aside where another keeps one.

Promise: a loader that is begun anew loses nothing. Accelerate asks such a loader for its state when it prepares it, and
the iterator that is made for that has fetched ahead already. A sampler that begins where its last iterator was is put
back to its first state, or, where torchdata did not note that, is run to the end of the pass that was begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Any

from hf_lifecycle.data.streams import HeldStream

__all__ = ["STATEFUL", "begin_anew", "begin_anew_unless_within"]

STATEFUL = "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader"


def begin_anew(base: Any) -> None:
    """Let the next pass begin at its beginning, whatever state was loaded; another loader is left as it is."""
    begun = getattr(base, "_initial_iter_for_state_dict", False)
    if begun:
        _return_what_was_fetched(base)
    if begun or getattr(base, "next_iter_state", None) is not None:
        base.load_state_dict({})  # an empty state drops the iterator that was begun, and no more
        base.next_iter_state = None


def begin_anew_unless_within(base: Any) -> None:
    """The same, for a loader that others iterate: where its state says that a pass was interrupted, that is theirs.

    A pass that is entered through a state draws other numbers of torch's generator than one that is not.
    """
    state = getattr(base, "next_iter_state", None)
    if state is None or state.get("_iterator_finished") or not _given(state):
        begin_anew(base)


def _given(state: Mapping[str, Any]) -> int:
    """How many batches of the pass had been given."""
    with_workers = state.get("_snapshot", {}).get("_snapshot_step", 0) + state.get("_steps_since_snapshot", 0)
    return int(state.get("_num_yielded", with_workers))


def _return_what_was_fetched(base: Any) -> None:
    if not base.num_workers or base._iterator is None:  # nothing is fetched ahead in this process
        return
    begun = base._iterator
    sampler = base.sampler if base.batch_sampler is None else base.batch_sampler
    state = begun.state_dict()["_snapshot"]["_main_snapshot"].get("_sampler_iter_state") or {}
    inner: Any = getattr(sampler, "sampler", None)
    if state.get("sampler_state") is not None and callable(getattr(inner, "load_state_dict", None)):
        inner.load_state_dict(state["sampler_state"])
    elif hasattr(sampler, "__len__"):
        # Nobody knows how it was. At the end of the pass that was begun, it is where another begins.
        with HeldStream(("a pass that is not used",)):
            deque(islice(begun._sampler_iter, len(sampler) + 1), maxlen=0)
