"""What a resumed program does a second time before the rest of a pass begins is named where it changes what was loaded.

A resumed program runs the body of the saved epoch from its top. Noise on the weights, a learning rate that is halved, a
scheduler that steps there: the checkpoint has that change already. Of weights a sample is compared.
"""

from __future__ import annotations

import logging
from typing import Any

from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.messages import few
from hf_lifecycle.state.fingerprint import is_shared_out, module_tensors, tensor_digest

__all__ = ["Repeated"]

logger = logging.getLogger("hf_lifecycle")

_SAMPLE = 256  # elements of a tensor


class Repeated:
    """Compares what was loaded with what the rest of the pass begins with."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._loaded: dict[str, Any] | None = None

    def loaded(self) -> None:
        """Everything is as it was saved."""
        self._loaded = self._marks()

    def begin_pass(self, inside: bool) -> None:
        """A pass is about to begin, or (``inside``) the rest of one."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or not inside:
            return
        now = self._marks()
        changed = [name for name, mark in loaded.items() if now.get(name, mark) != mark]
        if changed:
            logger.warning(
                "not exact: the program changes %s between resume() and the rest of the epoch, although the "
                "checkpoint already contains that change; make a change at the start of each epoch only if "
                "manager.progress.batch is 0",
                few(changed),
            )

    def _marks(self) -> dict[str, Any]:
        marks: dict[str, Any] = {}
        for name, model in self._prepared.whole_models().items():
            for key, tensor in module_tensors(model).items():
                if not (is_shared_out(tensor) or tensor.is_meta):
                    flat = tensor.detach().reshape(-1)
                    marks[f"{name}.{key}"] = tensor_digest(flat[:: max(1, flat.numel() // _SAMPLE)])
        for name, optimizer in self._prepared.optimizers().items():
            for number, group in enumerate(getattr(optimizer, "param_groups", ())):
                numbers = {key: one for key, one in group.items() if type(one) in (int, float)}
                marks |= {f"{name}.param_groups[{number}].{key}": one for key, one in numbers.items()}
        return marks
