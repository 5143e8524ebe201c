"""The buckets in which data parallelism sums gradients, and that a resumed run has the same ones.

``DistributedDataParallel`` lays its buckets out anew after a process's first step, in the order in which gradients
came. With more than two processes the place of a value in its bucket decides in which order the processes' parts of it
are added, and so how the sum is rounded. A resumed run takes its first step with the first layout, which the run that
was not interrupted has left behind. So a save begins the layout anew, and both take the next step alike.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_lifecycle.copies import Hook

__all__ = ["Buckets"]

logger = logging.getLogger(__name__)

_NEEDED = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "reducer")


class Buckets:
    """Finds the wrappers of the models that are watched, and lays their buckets out anew."""

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()

    def watch(self, model: torch.nn.Module) -> None:
        """Find the wrapper of ``model`` when it next runs in it."""
        if model in self._watched or not dist.is_initialized():
            return
        self._watched.add(model)
        if isinstance(model, DistributedDataParallel):
            self._add(model)
            return

        def find(module: torch.nn.Module, inputs: Any) -> None:  # noqa: ARG001
            wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
            if wrapper is not None and wrapper.module is module:
                self._add(wrapper)
                handle.remove()

        handle = model.register_forward_pre_hook(Hook(find))

    def _add(self, wrapper: DistributedDataParallel) -> None:
        self._wrappers.add(wrapper)
        for _, state in getattr(wrapper, "_comm_hooks", ()):
            kind = type(state)
            if not (state is None or isinstance(state, dist.ProcessGroup) or kind.__name__.startswith("_")):
                logger.warning(
                    "not exact: the communication hook of DistributedDataParallel has a state (%s) that no checkpoint "
                    "contains, so a resumed run starts it anew; use a hook without one, such as fp16_compress_hook",
                    kind.__qualname__,
                )

    def begin_anew(self) -> None:
        """Let the next step lay the buckets out as a new process does. No gradients may be in flight.

        Two processes or one need nothing.
        """
        for wrapper in list(self._wrappers):
            if dist.get_world_size(wrapper.process_group) > 2:
                _lay_out(wrapper)


def _lay_out(model: Any) -> None:
    if not all(hasattr(model, name) for name in _NEEDED):
        logger.warning(
            "not exact: this version of torch cannot rebuild the gradient buckets of DDP at a resume, so "
            "sums may be rounded differently"
        )
        return
    hooks = list(getattr(model, "_comm_hooks", []))
    model.reducer._remove_autograd_hooks()
    del model.reducer, model.logger  # first: two sets of buckets would take the gradients' memory twice
    parameters, expect_sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, expect_sparse, names, model.static_graph)
    model._has_rebuilt_buckets = False
    if model.static_graph:
        model.reducer._set_static_graph()
        model.logger._set_static_graph()
    for hook, state in hooks:
        dist._register_comm_hook(model.reducer, state, hook)  # type: ignore[attr-defined]
