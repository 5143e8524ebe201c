"""The small files beside the weights that their owner, a tokenizer or a processor, writes again at each save.

Promise: what it writes at a save is what Trainer would have let it write then, whatever that is made of. It is asked
where it took little time at the first save. Of one that takes longer, such as a tokenizer of 50,000 words, what its
files are made of is compared; not promised: that a change which lies too deep for that is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

__all__ = ["Owned", "own_configuration", "tokenizer_of", "watching_owner"]

_SOON = 0.005  # seconds of work for which a save may stop training besides; waiting for a busy machine is none
_WRITERS = ("save_pretrained", "to_json_file", "to_json_string", "to_diff_dict")


def tokenizer_of(trainer: Any) -> Any:
    """What Trainer saves beside the model: its processing class, or the tokenizer of its collator."""
    return trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)


def own_configuration(model: Any) -> str | None:
    """Which configuration of a model has a way of its own to be written, and so may hold more than its values."""
    configs = (getattr(model, name, None) for name in ("config", "generation_config"))
    for config in configs if isinstance(model, PreTrainedModel) else ():
        for kind in type(config).__mro__:
            own = [name for name in _WRITERS if name in vars(kind)]
            if own and kind.__module__.partition(".")[0] != "transformers":
                return f"{kind.__name__} overrides {own[0]}"
    return None


class Owned:
    """The files of the trainer's tokenizer or processor, as the first save showed them.

    Attributes:
        files: Their paths in the checkpoint; empty where the owner is not asked again.
    """

    def __init__(self) -> None:
        self.files: frozenset[str] = frozenset()

    def write(self, trainer: Any, folder: str) -> None:
        """Let the owner write into ``folder``, if it is one that is asked."""
        if self.files:
            tokenizer_of(trainer).save_pretrained(folder)


@contextmanager
def watching_owner(trainer: Any, files_of: Callable[[Path], Iterator[str]]) -> Iterator[Owned]:
    """See which files the tokenizer or the processor writes while Trainer saves."""
    owner, owned = tokenizer_of(trainer), Owned()
    attributes = getattr(owner, "__dict__", None)
    kind: Any = type(owner)
    own = getattr(kind, "save_pretrained", None)
    if own is None or attributes is None or "save_pretrained" in attributes:
        yield owned
        return

    def watched(one: Any, folder: Any, *given: Any, **named: Any) -> Any:
        if one is not owner:
            return own(one, folder, *given, **named)
        before, began = frozenset(files_of(Path(folder))), time.thread_time()
        result = own(one, folder, *given, **named)
        if not (given or named) and time.thread_time() - began <= _SOON:
            owned.files = frozenset(files_of(Path(folder))) - before
        return result

    # Of the class: a processor writes what is in its own attributes into its file.
    of_class = vars(kind).get("save_pretrained")
    kind.save_pretrained = watched
    try:
        yield owned
    finally:
        if of_class is None:
            del kind.save_pretrained
        else:
            kind.save_pretrained = of_class
