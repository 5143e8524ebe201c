"""What a rank keeps that no file of the host's has: digests of samples of its copy, and buffers that are its own.

Under data parallelism every rank has the same parameters and the same optimizer's state, and the host saves those of
rank 0. So rank 0's digests prove what each rank has loaded, and a rank of its own keeps only what would tell if it had
not been alike: the digest of some elements of each tensor, marked as such. Buffers may differ, and are digested whole.

Buffers that no file of the host's holds are of two kinds: those that ``state_dict()`` leaves out, and, on several
ranks, those that are not alike on all of them, of which the host saves one rank's: BatchNorm's, say, whose statistics
are of a rank's own rows. (Data parallelism saves rank 0's; FSDP's sharded files have those of whichever rank was to
write them.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import is_shared_out, leaf_digests, module_tensors, sample_digests, tensor_digests

__all__ = [
    "is_replica",
    "optimizer_samples",
    "put_back_buffers",
    "tensor_samples",
    "unlike_buffers",
    "unlike_rank_0",
    "unsaved_buffer_digests",
    "whole_digests",
]

_MARK = "~"  # before the digest of a sample
# What has the whole model and the whole optimizer on every rank. Any other kind may hold parts.
_REPLICATED = frozenset({"MULTI_CPU", "MULTI_GPU", "MULTI_HPU", "MULTI_MLU", "MULTI_NPU", "MULTI_XPU"})


def is_replica(ranks: Ranks, distributed_type: Any, model: torch.nn.Module) -> bool:
    """Whether this rank trains a copy of what rank 0 trains; a model with tensors shared out over ranks is none."""
    if ranks.is_main or getattr(distributed_type, "value", None) not in _REPLICATED:
        return False
    return not any(hasattr(parameter, "to_local") for parameter in model.parameters())


def tensor_samples(model: torch.nn.Module) -> dict[str, str]:
    """The digests of samples of the parameters, and of the whole buffers."""
    return _marked_samples(dict(model.named_parameters())) | tensor_digests(dict(model.named_buffers()))


def optimizer_samples(state: Any, name: str) -> dict[str, str]:
    """The digests of samples of an optimizer's tensors, and of its values, as ``leaf_digests`` names them."""
    return leaf_digests(state, name, of_tensors=_marked_samples)


def _marked_samples(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: _MARK + digest for name, digest in sample_digests(tensors).items()}


def whole_digests(saved: Mapping[str, Any], of_rank_0: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a rank saved, digests by kind and name, with rank 0's in the place of those of samples, if there are any."""
    samples = _samples(saved)
    if not any(samples.values()):
        return saved
    first = of_rank_0()
    whole = {kind: {name: first[kind][name] for name in own if name in first[kind]} for kind, own in samples.items()}
    return {**saved, **{kind: {**saved[kind], **found} for kind, found in whole.items()}}


def unlike_rank_0(saved: Mapping[str, Any], live: Callable[[], Mapping[str, Any]], rank: int) -> list[str]:
    """A sentence for each tensor that was loaded from rank 0's files and that this rank had otherwise at the save.

    ``live`` gives of what was loaded what ``saved`` has, and is asked only where there are samples.
    """
    samples = _samples(saved)
    if not any(samples.values()):
        return []
    now = live()
    unlike = [name for kind, own in samples.items() for name in own if own[name] != now[kind].get(name)]
    return [f"{name} was not the same on rank 0 and rank {rank} when it was saved" for name in unlike]


def _samples(saved: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {
        kind: {name: digest for name, digest in saved[kind].items() if digest.startswith(_MARK)}
        for kind in ("model", "optimizer")
    }


def unsaved_buffer_digests(model: torch.nn.Module) -> dict[str, str]:
    """The digests of the buffers that ``state_dict()`` leaves out."""
    kept = model.state_dict().keys()
    return tensor_digests({name: buffer for name, buffer in model.named_buffers() if name not in kept})


def unlike_buffers(model: torch.nn.Module, ranks: Ranks, *, what: str) -> list[str]:
    """The names of the buffers that are not alike on all ranks; the same answer on each of them.

    Raises:
        RankUnreachable: A rank did not come in time.
    """
    if ranks.world_size == 1:
        return []
    buffers = {name: buffer for name, buffer in model.named_buffers() if not is_shared_out(buffer)}
    if not buffers:
        return []
    own = list(tensor_digests(buffers).values())
    of_main = ranks.broadcast(own, what=what)
    bits = sum(1 << place for place, (here, there) in enumerate(zip(own, of_main, strict=True)) if here != there)
    unlike = ranks.gather(bits, what=what)
    return [name for place, name in enumerate(buffers) if any(one >> place & 1 for one in unlike)]


def put_back_buffers(model: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Set the tensors of ``model`` that are in ``saved``; one that the model lacks is left to its digest to report."""
    present = module_tensors(model)
    for name in saved.keys() & present.keys():
        live, value = present[name], saved[name]
        if (live.shape, live.dtype) == (value.shape, value.dtype):
            with torch.no_grad():
                live.copy_(value)
        elif not isinstance(
            live, torch.nn.Parameter
        ):  # training put another tensor in its place, such as a cache that grows
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value.to(live.device))
