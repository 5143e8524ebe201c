"""Whether the files of ``torch.save`` in a checkpoint can be loaded again, asked when they are written.

A host loads them with ``weights_only=True``, which takes tensors and plain values, and refuses a class. Promise: a file
that names one is reported at the save that first has it, once. Not promised: that a file can be read which was not
written by ``torch.save``.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.messages import few
from hf_lifecycle.saving.carrying import without_tensors
from hf_lifecycle.saving.files.archive import TorchArchive

__all__ = ["Loadable"]

logger = logging.getLogger("hf_lifecycle")

_UNTOLD = (AttributeError, EOFError, KeyError, OSError, pickle.PickleError, RuntimeError, TypeError, ValueError)


class Loadable:
    """The files of one training that were looked at.

    Args:
        host: Who loads them.
        admitted: The classes that it takes beside torch's own.
    """

    def __init__(self, host: str, admitted: Sequence[Any] = ()) -> None:
        self._host = host
        # By name: torch's own list of them is one for all threads, and this may run on a writer's.
        self._admitted = {f"{one.__module__}.{one.__name__}" for one in admitted}
        self._told: set[str] = set()

    def look_at_files(self, folder: Path, *patterns: str) -> None:
        """Look at those files of ``folder`` that ``torch.save`` has just written. Tensors are not read."""
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            self._look(path.name, path)

    def look_at_archive(self, name: str, archive: TorchArchive) -> None:
        """Look at what is written, or is to be, as the file ``name``. Tensors are not read."""
        if archive.is_plain or name in self._told:
            return
        content = io.BytesIO()
        try:
            torch.save(without_tensors(archive.tree), content)
        except _UNTOLD:
            return
        content.seek(0)
        self._look(name, content)

    def _look(self, name: str, source: Any) -> None:
        if name in self._told:
            return
        try:
            found = set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - self._admitted
        except _UNTOLD:  # it cannot be told this way
            return
        if found:
            self._told.add(name)
            logger.warning(
                "not exact: %s contains %s, which cannot be loaded at a resume (nor from a checkpoint of %s alone): "
                "keep only plain numbers and tensors in its state, or pass the class to "
                "torch.serialization.add_safe_globals() in your script",
                name,
                few(sorted(found)),
                self._host,
            )
