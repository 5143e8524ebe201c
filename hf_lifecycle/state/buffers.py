"""The buffers of a model that no file of the host's holds as this process has them, and how they are restored.

There are two kinds: those that ``state_dict()`` leaves out, and, on several ranks, those that are not alike on all of
them, of which the host saves one rank's: BatchNorm's, say, whose statistics are of a rank's own rows. (Data parallelism
saves rank 0's; FSDP's sharded files have those of whichever rank was to write them.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import is_shared_out, module_tensors, tensor_digests

__all__ = ["put_back_buffers", "unlike_buffers", "unsaved_buffer_digests"]


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
