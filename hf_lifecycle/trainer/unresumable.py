"""What Trainer saves and cannot load again, and what changes the model unseen: found while there is time to act."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_lifecycle.state.fingerprint import tensor_digest
from hf_lifecycle.trainer.carrying import without_tensors

__all__ = ["adapters_trainer_cannot_load", "changed_by_nobody", "sampled", "unloadable"]

_EXAMPLES = 3
_SAMPLE = 512  # elements


def unloadable(file: str, state: Any) -> str | None:
    """Why Trainer, which loads with ``weights_only=True``, will not load this state from ``file``; None if it will."""
    content = io.BytesIO()
    try:
        torch.save(without_tensors(state), content)
        content.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(content)
    except (AttributeError, pickle.PickleError, ValueError, TypeError, RuntimeError):  # it cannot be told this way
        return None
    if not names:
        return None
    return (
        f"{file} names {', '.join(sorted(names)[:_EXAMPLES])}, which no resume will load, Trainer's own neither: "
        "keep plain numbers and tensors in its state"
    )


def adapters_trainer_cannot_load(model: torch.nn.Module) -> list[str]:
    """A sentence for each adapter of PEFT whose file does not fit the model that it was saved from."""
    return [
        f"adapter {name!r}: the file of a prefix with a projection does not fit the model it was saved from, so "
        "Trainer's resume fails: set prefix_projection=False"
        for name, config in (getattr(model, "peft_config", None) or {}).items()
        if getattr(config, "prefix_projection", False)
    ]


def sampled(model: torch.nn.Module, optimizers: Iterable[Any]) -> dict[str, str]:
    """Digests of samples of the parameters that need a gradient and that none of these optimizers holds."""
    groups = [group for one in optimizers for group in getattr(one, "param_groups", [])]
    held = {id(one) for group in groups for one in group["params"]}
    return {
        name: tensor_digest(flat[:: max(1, flat.numel() // _SAMPLE)])
        for name, one in model.named_parameters()
        if one.requires_grad and id(one) not in held and not hasattr(one, "to_local")
        for flat in [one.detach().reshape(-1)]
    }


def changed_by_nobody(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """A sentence that names the parameters that a step has changed, if it did."""
    changed = [name for name in before if before[name] != after.get(name, before[name])]
    if not changed:
        return None
    return (
        f"{len(changed)} parameters of the model ({', '.join(changed[:_EXAMPLES])}) change at a step, and no optimizer "
        "that was found holds them: if what changes them has a state, pass it as objects="
    )
