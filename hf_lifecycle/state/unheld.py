"""Parameters of a model that change while no optimizer that is known holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_lifecycle.state.fingerprint import is_shared_out, sample_digests

__all__ = ["changed_by_nobody", "sampled"]

_EXAMPLES = 3


def sampled(model: torch.nn.Module, optimizers: Iterable[Any]) -> dict[str, str]:
    """Digests of samples of the parameters that need a gradient and that none of these optimizers holds."""
    groups = [group for one in optimizers for group in getattr(one, "param_groups", [])]
    held = {id(one) for group in groups for one in group["params"]}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad and id(one) not in held}
    return sample_digests({name: one for name, one in trained.items() if not is_shared_out(one)})


def changed_by_nobody(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """A sentence that names the parameters that a step has changed, if it did."""
    changed = [name for name in before if before[name] != after.get(name, before[name])]
    if not changed:
        return None
    return (
        f"{len(changed)} parameters of the model ({', '.join(changed[:_EXAMPLES])}) change at a step, and no known "
        "optimizer has them: if what changes them keeps state, pass it as objects="
    )
