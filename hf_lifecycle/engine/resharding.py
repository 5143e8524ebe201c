"""Tensors that were sharded over another number of ranks: proved as whole tensors, and cut for the ranks of now.

With another number of ranks, each has another part of a tensor that FSDP2 shards. So each tensor is gathered, cut as
the ranks that saved had it, and every part is compared with the digest that its rank stored. Promise: each part of each
tensor is compared by one rank. Every rank has to ask for the same tensors in the same order: a gather is a collective,
which takes the memory of one whole tensor.

Not promised: meshes of several dimensions, the flat parameters of FSDP1, and what DeepSpeed shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.checkpoint.files.additions import rank_file
from hf_lifecycle.checkpoint.files.statefile import read_structure
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import Digests, is_shared_out, module_tensors, tensor_digest, tensor_digests

__all__ = ["SavedShards", "gradients_of_all", "is_sharded", "obstacle_to_resharding"]

_DIFFERS = "differs"  # in the place of a digest


def is_sharded(models: Iterable[torch.nn.Module]) -> bool:
    """Whether each rank has a part of some tensor of these."""
    return any(is_shared_out(tensor) for model in models for tensor in module_tensors(model).values())


def obstacle_to_resharding(models: Iterable[torch.nn.Module], world_size: int, distributed_type: Any) -> str | None:
    """Why these models cannot be verified after a load with another number of ranks; None where they can."""
    tensors = [tensor for model in models for tensor in module_tensors(model).values() if is_shared_out(tensor)]
    if not tensors and getattr(distributed_type, "value", None) == "FSDP":
        return "FSDP1 gives each rank a part of flattened parameters, which cannot be verified with other ranks"
    for tensor in tensors:
        placements: Any = getattr(tensor, "placements", ())
        if len(placements) != 1 or not (placements[0].is_shard() or placements[0].is_replicate()):
            return "the model is sharded in another way than over all ranks (FSDP2), and cannot be verified with others"
        if tensor.device_mesh.size() != world_size:  # type: ignore[attr-defined]
            return "the model is sharded over some of the ranks only, and cannot be verified with others"
    return None


class SavedShards:
    """The digests that each rank stored of its parts, as many as this rank has to compare.

    Args:
        kind: The kind of the ranks' files.
        part: Of a rank's file.
        saved_by: How many processes saved.
        given: The digests by kind and name that one of them stored, with which all are compared after.

    Raises:
        StateFileError: A file cannot be read.
        FileNotFoundError: It is missing.
        RankFailed: That is so on another rank.
    """

    def __init__(
        self, ranks: Ranks, checkpoint: Path, kind: str, part: str, *, saved_by: int, given: Mapping[str, Any]
    ) -> None:
        self.gathered = 0
        self._given = given
        self._saved_by = saved_by
        with ranks.agree(what="reading the digests of the ranks that saved"):  # before the first collective
            numbers = range(ranks.rank, saved_by, ranks.world_size)
            trees = {number: read_structure(rank_file(checkpoint, number), kind=kind) for number in numbers}
        self._stored = {number: tree["parts"][part] for number, tree in trees.items()}

    def of(self, kind: str) -> Digests:
        """Digests of tensors for a comparison with those given of ``kind`` (``model``, ``optimizer``).

        A sharded tensor has the digest that is given, where all its parts have theirs.
        """

        def digests(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
            found = tensor_digests({name: one for name, one in tensors.items() if not is_shared_out(one)})
            for name, tensor in tensors.items():
                if name not in found:
                    found[name] = self._of_shards(kind, name, tensor)
            return found

        return digests

    def _of_shards(self, kind: str, name: str, tensor: Any) -> str:
        self.gathered += 1
        with torch.no_grad():
            whole, dim = tensor.detach().full_tensor(), _dimension(tensor)
        for number, stored in self._stored.items():
            if stored[kind].get(name) != tensor_digest(_cut(whole, dim, number, self._saved_by)):
                return _DIFFERS
        digest: str = self._given[kind].get(name, _DIFFERS)
        return digest


def _dimension(tensor: Any) -> int | None:
    """The dimension that a tensor is cut along; None of one of which each rank has all."""
    placement = tensor.placements[0]
    return int(placement.dim) if placement.is_shard() else None


def _cut(whole: torch.Tensor, dim: int | None, rank: int, world_size: int) -> torch.Tensor:
    """The part of one rank, as FSDP2 cuts: all of one size, but for the last ones, which may be smaller or empty."""
    if dim is None:
        return whole
    size = -(-whole.shape[dim] // world_size)
    start = min(rank * size, whole.shape[dim])
    return whole.narrow(dim, start, min(size, whole.shape[dim] - start))


def gradients_of_all(
    saved: Sequence[Mapping[str, torch.Tensor]], live: Mapping[str, torch.Tensor], rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    """Gradients for one rank of now, where those of all ranks that saved are known.

    Of a sharded parameter, its part of the gradient that the parts make. Of any other one, the mean: the ranks' own
    gradients are averaged before a step, which so has the same average.

    Args:
        saved: What each rank stored, by the names of parameters.
    """
    found = {}
    for name in saved[0]:
        each = [one[name] for one in saved]
        if is_shared_out(live[name]) and (dim := _dimension(live[name])) is not None:
            found[name] = _cut(torch.cat(each, dim), dim, rank, world_size).clone()
        else:
            found[name] = torch.stack(each).mean(0)
    return found
