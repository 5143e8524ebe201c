"""How often gradients are accumulated, so that an optimizer step has the same batch on any number of processes.

The number of rows of a step is ``batch size of a process x gradient_accumulation_steps x processes``. An elastic run
(``elastic=True``) keeps the first, since a micro-batch is what its random numbers belong to.
"""

from __future__ import annotations

from typing import Any

from hf_lifecycle.argument_checks import given, read_finite

__all__ = ["elastic_arguments"]


def elastic_arguments(target: Any, *, global_batch_size: int, batch_size: int | None = None) -> Any:
    """Set ``gradient_accumulation_steps`` so that all processes together take ``global_batch_size`` rows for a step.

    Args:
        target: ``TrainingArguments``, before Trainer is made of them, or an ``Accelerator``, before the loop begins.
        global_batch_size: Rows of an optimizer step.
        batch_size: Rows of a batch of one process; for an ``Accelerator``, whose loaders it does not know.

    Returns:
        ``target``.

    Raises:
        ValueError: The processes cannot share ``global_batch_size`` rows evenly; the message names sizes that fit.
        TypeError: ``target`` is neither.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = elastic_arguments(Accelerator(cpu=True), global_batch_size=32, batch_size=8)
        >>> accelerator.gradient_accumulation_steps
        4
    """
    rows = int(read_finite("global_batch_size", global_batch_size, minimum=1, whole=True))
    if hasattr(target, "per_device_train_batch_size"):
        if batch_size is not None:
            raise ValueError("batch_size: TrainingArguments have it as per_device_train_batch_size")
        each, processes = int(target.train_batch_size), int(target.world_size)
    elif hasattr(target, "gradient_accumulation_steps") and hasattr(target, "num_processes"):
        if batch_size is None:
            raise ValueError("batch_size: how many rows a batch of one process has is not known; give it")
        each, processes = int(read_finite("batch_size", batch_size, minimum=1, whole=True)), int(target.num_processes)
    else:
        raise TypeError(f"the first argument must be TrainingArguments or an Accelerator, got {given(target)}")
    at_once = each * processes
    if rows % at_once:
        fits = [str(count) for count in range(1, rows // each + 1) if rows % (each * count) == 0]
        below, above = rows - rows % at_once, rows - rows % at_once + at_once
        sizes = " or ".join(str(size) for size in (below, above) if size)
        raise ValueError(
            f"global_batch_size={rows}: {processes} processes with {each} rows each take {at_once} at once, which does "
            f"not divide it; use {sizes}" + (f", or {', '.join(fits)} processes" if fits else "")
        )
    target.gradient_accumulation_steps = rows // at_once
    return target
