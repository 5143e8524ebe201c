"""Runs of one process that know no more of each other than processes would, and the moment at which one is broken off.

What a module of the user's keeps from run to run (an iterator at module level, a cache) stays: nothing can take that
away, and the second unbroken run tells of it.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hf_lifecycle import torch_internals
from hf_lifecycle.accelerator.intercept import forget_singletons
from hf_lifecycle.state.rng import capture_rng, restore_rng

__all__ = ["BrokenOff", "end_workers", "forget_last_attempt", "generators_put_back"]


class BrokenOff(BaseException):
    """Training was broken off. Not an ``Exception``: no one may catch it and go on."""


def forget_last_attempt() -> None:
    """What a new process would not know: accelerate's singletons, and the position of the global generators."""
    gc.collect()
    forget_singletons()
    scramble = random.SystemRandom().getrandbits(32)
    random.seed(scramble)
    np.random.seed(scramble)
    torch.manual_seed(scramble)


@contextmanager
def generators_put_back() -> Iterator[None]:
    """The global generators come out as they went in, whatever the runs within drew."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)


def end_workers(loader: Any) -> None:
    """End persistent workers: left to the garbage collector, torch waits five seconds for each."""
    torch_internals.end_workers(getattr(loader, "base_dataloader", loader))
