"""Digests of live state: what must be equal, bit for bit, after a resume.

A tensor's digest is XXH3-128 over its dtype, its shape and its bytes in C order; a plain value's is XXH3-128 over its
type and exact representation. It proves equality against accidents; it is not a defence against an adversary.

A checksum of every byte, computed on the device where a tensor lies, tells whether one that nobody should write to was
written to, without its bytes crossing to host memory: at the device's memory bandwidth. Each 32-bit word is multiplied
by an odd number of its own, modulo 2**32: another word anywhere gives another product. The products are summed modulo
2**64; two sets of words that differ have one sum by accident only. It is no digest, and stays within a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import xxhash

from hf_lifecycle.processes.cores import on_cores
from hf_lifecycle.state.gathering import gathered, is_dense, is_on_accelerator
from hf_lifecycle.state.values.described import description, description_digest
from hf_lifecycle.torch_internals import version_counter

__all__ = [
    "Digests",
    "FrozenDigests",
    "checksums",
    "digest_of",
    "digests_on_cores",
    "is_shared_out",
    "leaf_digests",
    "local_part",
    "module_tensors",
    "part_like",
    "quick_digests",
    "sample_digests",
    "tensor_digest",
    "tensor_digests",
    "tree_digest",
]

Key = TypeVar("Key")

_WORDS = 1 << 24  # at once: 64 MiB, and as much again for the products
_ODD = -1640531535  # 2**32 divided by the golden ratio, as a signed number: neighbours get numbers far apart


def checksums(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, int]:
    """The checksum of each dense tensor; sparse and quantised ones, and those of a subclass, are left out."""
    sums: dict[torch.device, dict[Key, torch.Tensor]] = {}
    factors: dict[torch.device, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not is_dense(tensor):
            continue
        words = _words(tensor.detach())
        longest = min(_WORDS, words.numel())
        known = factors.get(tensor.device)
        if known is None or known.numel() < longest:
            numbers = torch.arange(1, longest + 1, dtype=torch.int32, device=tensor.device)
            factors[tensor.device] = known = numbers.mul_(_ODD).bitwise_or_(1)
        sums.setdefault(tensor.device, {})[key] = _sum(words, known)
    return {
        key: number
        for found in sums.values()
        for key, number in zip(found, torch.stack(list(found.values())).tolist(), strict=True)  # one copy for a device
    }


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as 32-bit numbers, the last one filled up with zeros."""
    bytes_ = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if bytes_.numel() % 4 or bytes_.data_ptr() % 4:
        bytes_ = torch.nn.functional.pad(bytes_, (0, -bytes_.numel() % 4)).clone()
    return bytes_.view(torch.int32)


def _sum(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for piece in torch.split(words, _WORDS):
        total = total * _ODD + (piece * factors[: piece.numel()]).sum(dtype=torch.int64)
    return total


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_SAMPLE = 512  # elements of a tensor
_FEW = 16 << 20  # bytes that take little time to be digested

Digests = Callable[[Mapping[str, torch.Tensor]], Mapping[str, str]]


def tensor_digest(tensor: torch.Tensor) -> str:
    """The digest of a dense tensor, 32 hexadecimal digits. The tensor may be on any device but ``meta``.

    Of a tensor that is distributed over processes it is that of this process's part.
    """
    plain = local_part(tensor).detach().resolve_conj().resolve_neg().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The :func:`tensor_digest` of each, by as few copies from an accelerator as there may be."""
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    near = gathered(parts)
    return {name: tensor_digest(near.get(name, part)) for name, part in parts.items()}


def digests_on_cores(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """As :func:`tensor_digests`, those in host memory by several threads."""
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    near = {name: part for name, part in parts.items() if not is_on_accelerator(part)}
    made = on_cores(lambda part, _: tensor_digest(part), list(near.values()), [part.nbytes for part in near.values()])
    found = dict(zip(near, made, strict=True))
    found |= tensor_digests({name: part for name, part in parts.items() if name not in near})
    return {name: found[name] for name in tensors}


def sample_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The digests of some elements of each, strided over all of it."""
    flat = {name: local_part(tensor).detach().reshape(-1) for name, tensor in tensors.items()}
    return tensor_digests({name: one[:: max(1, one.numel() // _SAMPLE)] for name, one in flat.items()})


def quick_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For a comparison a moment later: of more than 16 MB, of some elements of each, with its version counter."""
    if sum(one.nbytes for one in tensors.values()) <= _FEW:
        return tensor_digests(tensors)
    return {
        name: f"{one} {version_counter(local_part(tensors[name]))}" for name, one in sample_digests(tensors).items()
    }


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of it: a DTensor (whose module costs seconds to import), or under ZeRO-3."""
    # What a plain tensor lacks is looked for last by torch's own code, which takes ten times as long.
    return (type(tensor) not in _PLAIN and hasattr(tensor, "to_local")) or "ds_tensor" in tensor.__dict__


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor or of a parameter under ZeRO-3; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is not None:
        tensor = to_local()
    part: torch.Tensor = tensor.__dict__.get("ds_tensor", tensor)
    return part


def part_like(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A DTensor like ``whole`` of which this process has ``part``; where ``whole`` is none, ``part`` itself."""
    if not hasattr(whole, "to_local"):
        return part
    like: Any = whole.detach()
    where = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    made: torch.Tensor = type(like).from_local(part, like.device_mesh, like.placements, **where)
    return made


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, buffers outside ``state_dict()`` included; shared ones once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def leaf_digests(tree: Any, name: str, *, of_tensors: Digests = tensor_digests) -> dict[str, str]:
    """The digest of every leaf of nested dicts, lists and tuples, by path such as ``optimizer.state.0.exp_avg``.

    Values that are neither tensors nor plain (functions, objects) count by their type alone.
    """
    leaves = dict(_leaves(tree, name))
    digests = of_tensors({path: leaf for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)})
    return {path: digests[path] if path in digests else _value_digest(leaf) for path, leaf in leaves.items()}


def tree_digest(tree: Any) -> str:
    """One digest of all leaves of a tree with their paths."""
    return xxhash.xxh3_128_hexdigest(repr(leaf_digests(tree, "")).encode())


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key if isinstance(key, (str, int)) else description(key)}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{number}")
    else:
        yield path, tree


def _value_digest(leaf: Any) -> str:
    if getattr(getattr(leaf, "dtype", None), "hasobject", False):  # whose bytes are addresses
        return description_digest(leaf)
    if hasattr(leaf, "dtype") and hasattr(leaf, "tobytes"):  # NumPy arrays and scalars
        return xxhash.xxh3_128_hexdigest(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    exact = repr(leaf) if isinstance(leaf, (bool, int, float, complex, str, bytes, type(None))) else ""
    return xxhash.xxh3_128_hexdigest(f"{type(leaf).__qualname__}:{exact}".encode())


def digest_of(known: str | torch.Tensor) -> str:
    """A digest, taken now where there is only the tensor."""
    return known if isinstance(known, str) else tensor_digest(known)


class FrozenDigests:
    """Digests of the tensors of modules, where one on an accelerator that needs no gradient is digested once.

    Such a tensor is digested again when its storage, its version counter or the checksum of its bytes, which the device
    computes, changed: writes through ``.data`` move no counter. In host memory every tensor is digested whole.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], str]] = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The digests of all of these."""
        found = self._of_frozen({name: one for name, one in tensors.items() if _is_frozen_far(one)})
        found |= digests_on_cores({name: one for name, one in tensors.items() if name not in found})
        return {name: found[name] for name in tensors}

    def frozen(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, str | torch.Tensor]:
        """The digests of those that need no gradient; where one lies in host memory, itself, to be digested later."""
        far = self._of_frozen({name: one for name, one in parameters.items() if _is_frozen_far(one)})
        return {name: far.get(name, one.detach()) for name, one in parameters.items() if not one.requires_grad}

    def _of_frozen(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        sums = checksums(parts)  # of a tensor that has none, the mark is another each time
        marks = {
            n: (one.data_ptr(), version_counter(one), one.shape, sums.get(n, object())) for n, one in parts.items()
        }
        new = {name: one for name, one in parts.items() if self._known.get(name, ((),))[0] != marks[name]}
        self._known |= {name: (marks[name], digest) for name, digest in tensor_digests(new).items()}
        return {name: self._known[name][1] for name in tensors}


def _is_frozen_far(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad and is_on_accelerator(tensor)
