"""Digests of live state: what must be equal, bit for bit, after a resume.

A tensor's digest is XXH3-128 over its dtype, its shape and its bytes in C order; a plain value's is XXH3-128 over its
type and exact representation. It proves equality against accidents; it is not a defence against an adversary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import xxhash

from hf_lifecycle.state.described import description, description_digest

__all__ = [
    "FrozenDigests",
    "digest_of",
    "is_shared_out",
    "leaf_digests",
    "local_part",
    "module_tensors",
    "part_like",
    "tensor_digest",
    "tree_digest",
]

_SAMPLE = 512  # elements that tell whether a frozen tensor was changed behind its version counter


def tensor_digest(tensor: torch.Tensor) -> str:
    """The digest of a dense tensor, 32 hexadecimal digits. The tensor may be on any device but ``meta``.

    Of a tensor that is distributed over processes it is that of this process's part.
    """
    plain = local_part(tensor).detach().resolve_conj().resolve_neg().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of it: a DTensor (whose module costs seconds to import), or under ZeRO-3."""
    return hasattr(tensor, "to_local") or hasattr(tensor, "ds_tensor")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor or of a parameter under ZeRO-3; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is not None:
        tensor = to_local()
    part: torch.Tensor = getattr(tensor, "ds_tensor", tensor)
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


def leaf_digests(tree: Any, name: str, *, of_tensor: Callable[[torch.Tensor], str] = tensor_digest) -> dict[str, str]:
    """The digest of every leaf of nested dicts, lists and tuples, by path such as ``optimizer.state.0.exp_avg``.

    Values that are neither tensors nor plain (functions, objects) count by their type alone.
    """
    return {
        path: of_tensor(leaf) if isinstance(leaf, torch.Tensor) else _value_digest(leaf)
        for path, leaf in _leaves(tree, name)
    }


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
    """Digests of a module's tensors, where one on an accelerator that needs no gradient is digested once.

    Such a tensor is digested again when its storage, its version counter or a sample of its elements changed. In host
    memory every tensor is digested whole: writes through ``.data`` move no counter, and may miss every sample.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], str]] = {}

    def of(self, module: torch.nn.Module) -> dict[str, str]:
        """The digests of :func:`module_tensors`."""
        return {name: self._digest(name, tensor) for name, tensor in module_tensors(module).items()}

    def frozen(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, str | torch.Tensor]:
        """The digests of those that need no gradient; where one lies in host memory, itself, to be digested later."""
        frozen = {name: one for name, one in parameters.items() if not one.requires_grad}
        return {
            name: one.detach() if one.device.type == "cpu" else self._digest(name, one) for name, one in frozen.items()
        }

    def _digest(self, name: str, tensor: torch.Tensor) -> str:
        is_frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        if not is_frozen or tensor.device.type == "cpu":
            return tensor_digest(tensor)
        tensor = local_part(tensor)
        flat = tensor.detach().reshape(-1)
        sample = tensor_digest(flat[:: max(1, flat.numel() // _SAMPLE)])
        mark = (tensor.data_ptr(), tensor._version, tensor.shape, sample)
        known = self._known.get(name)
        if known is None or known[0] != mark:
            known = self._known[name] = (mark, tensor_digest(tensor))
        return known[1]
