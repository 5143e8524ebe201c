"""The names of torch, of its loaders and of NumPy that are relied on and not promised, and what is made of them.

A few stand where they are used alone: ``state/numpy_rng.py``, ``state/buckets.py`` and ``data_workers.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data

from hf_lifecycle.relied_on import Unpromised

__all__ = [
    "COMPUTES_STATE",
    "LOADER_ITERATORS",
    "LOADS",
    "LOAD_HOOKS",
    "MODULE_HOOKS",
    "MODULE_PARTS",
    "OPTIMIZER_MARKS",
    "PARAMETER_HOOKS",
    "RELIED_ON",
    "STATE_HOOKS",
    "batches_given",
    "buffers_of",
    "children_of",
    "compiled_from",
    "dataset_of",
    "default_store",
    "drops_last",
    "end_workers",
    "forget_iterator",
    "joins_uneven",
    "keeps_workers",
    "of_typed",
    "own_parameters",
    "storage_id",
    "version_counter",
    "version_counters",
]

# Of a module and of a parameter: hooks, in which an optimizer may step.
MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
PARAMETER_HOOKS = ("_post_accumulate_grad_hooks", "_backward_hooks")
# What makes a module's state_dict() something else than its tensors.
COMPUTES_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state")
STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
# What lets a module load other names and shapes than it has.
LOADS = ("load_state_dict", "_load_from_state_dict")
LOAD_HOOKS = "_load_state_dict_pre_hooks"
# What a schedule of torch's leaves on an optimizer, and on its step.
OPTIMIZER_MARKS = ("_opt_called", "_wrapped_by_lr_sched")

# Where a module has its modules, parameters and buffers.
MODULE_PARTS = ("_modules", "_parameters", "_buffers")

RELIED_ON = (
    Unpromised(
        "_version",
        "an in-place write to a tensor is noticed without reading its elements",
        "writes that miss every sampled element are not noticed",
        "none; a digest of every tensor takes as long as a save",
    ),
    Unpromised(
        "_cdata",
        "whether two tensors share a storage",
        "the address of the memory is compared, which storages without memory share",
        "data_ptr() is 0 for every empty storage",
    ),
    Unpromised(
        " ".join(MODULE_PARTS),
        "walks a model fast, since training stops for it during a save, and with every name of a shared tensor",
        "a module that two others share has only one of its names",
        "named_modules() and the like take four times as long",
    ),
    Unpromised(
        " ".join(dict.fromkeys((*MODULE_HOOKS, *PARAMETER_HOOKS))),
        "finds state in a user's hooks, such as an optimizer that steps in the backward pass",
        "state in hooks starts from its initial value at a resume",
        "hooks can be registered, not listed",
    ),
    Unpromised(
        " ".join((COMPUTES_STATE[1], *STATE_HOOKS)),
        "whether files may contain something else than a model's tensors",
        "the comparison of each written file with the tensors finds it",
        "hooks can be registered, not listed",
    ),
    Unpromised(
        " ".join((LOADS[1], LOAD_HOOKS)),
        "whether a model takes other names and shapes than it has when it is loaded",
        "such a model is refused before it is loaded",
        "hooks can be registered, not listed",
    ),
    Unpromised(
        "_orig_mod",
        "the model inside torch.compile",
        "the names of its tensors have a prefix, and a resume by another script is refused",
        "there is none that works for every wrapper",
    ),
    Unpromised(
        "_join_config",
        "whether ranks may have unlike numbers of batches, so that one may come to no save of another's",
        "such a save ends with an error when the time limit of the ranks has passed, and not at once",
        "Join does not tell whether it is entered",
    ),
    Unpromised(
        "_BaseDataLoaderIter _SingleProcessDataLoaderIter _MultiProcessingDataLoaderIter _dataset _persistent_workers "
        "_num_yielded _iterator _shutdown_workers",
        "finds the iterator of a loader, its position and its workers; restarts persistent workers",
        "a loader that a program iterates directly is not named in a warning",
        "the class of iter(loader) is not public",
    ),
    Unpromised(
        "_drop_last",
        "whether accelerate fills up the last batch of an epoch when one process dispatches the batches",
        "a warning is logged also if it does not",
        "drop_last of the batch sampler, which accelerate ignores for a user's own one",
    ),
    Unpromised(
        "_untyped_storage _size _pickle_storage_type",
        "writes the archive that torch.save would write",
        "the comparison with the first file finds a difference, and there are no background saves",
        "TypedStorage.untyped() and the like log deprecation warnings",
    ),
    Unpromised(
        " ".join(OPTIMIZER_MARKS),
        "a schedule is stepped outside its training, without its warning about the order of steps",
        "the schedule warns",
        "none",
    ),
    Unpromised(
        "_get_default_store",
        "exchanges between ranks with time limits, which use no device",
        "the store of the default group is used",
        "ProcessGroup.get_group_store(), which older versions lack; a separate store needs an address, which not "
        "every launcher provides",
    ),
    Unpromised(
        "_build_params_for_reducer _build_debug_param_to_name_mapping _ddp_init_helper _has_rebuilt_buckets "
        "_get_active_ddp_module _comm_hooks _register_comm_hook _remove_autograd_hooks _set_static_graph",
        "DistributedDataParallel rebuilds its buckets at a save, as a resumed process does",
        "with more than two processes sums may be rounded differently; a warning says so",
        "none",
    ),
    Unpromised(
        "_worker_loop _set_worker_signal_handlers",
        "data workers survive the signal that ends training, until the save is done",
        "a signal to the whole process group ends them, and so the step in progress",
        "worker_init_fn runs before torch's handlers are set",
    ),
    Unpromised(
        "_rand _bit_generator",
        "NumPy's global generator is read and written in microseconds; checked when the module is imported",
        "numpy.random.get_state() and set_state() are called, 35 µs each",
        "get_state() and set_state()",
    ),
)

_LOADERS: Any = torch.utils.data.dataloader
LOADER_ITERATORS: tuple[type, ...] = tuple(
    kind
    for name in ("_BaseDataLoaderIter", "_SingleProcessDataLoaderIter", "_MultiProcessingDataLoaderIter")
    if isinstance(kind := getattr(_LOADERS, name, None), type)
)


def version_counter(tensor: torch.Tensor) -> int:
    """What changes when a tensor is written to in place; -1 where none is kept, as in inference mode."""
    try:
        return tensor._version
    except (RuntimeError, AttributeError):  # to ask first takes as long again
        return -1


def version_counters(tensors: Collection[torch.Tensor]) -> list[int]:
    """The :func:`version_counter` each, in less time."""
    try:
        return [one._version for one in tensors]
    except (RuntimeError, AttributeError):
        return [version_counter(one) for one in tensors]


def storage_id(of: torch.Tensor | torch.UntypedStorage) -> int:
    """What tells a storage from others, for as long as it is alive."""
    storage = of.untyped_storage() if isinstance(of, torch.Tensor) else of
    return getattr(storage, "_cdata", None) or storage.data_ptr()


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """The modules in a module, by each name."""
    held = getattr(module, MODULE_PARTS[0], None)
    return dict(module.named_children()) if held is None else held


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The parameters of a module itself, by each name."""
    held = getattr(module, MODULE_PARTS[1], None)
    return dict(module.named_parameters(recurse=False)) if held is None else held


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers of a module itself, by each name."""
    held = getattr(module, MODULE_PARTS[2], None)
    return dict(module.named_buffers(recurse=False)) if held is None else held


def compiled_from(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model inside ``torch.compile``; None where it is not compiled."""
    return getattr(model, "_orig_mod", None)


def joins_uneven(model: Any) -> bool:
    """Whether a model is within torch's ``Join``, where ranks may have unlike numbers of batches."""
    return bool(getattr(getattr(model, "_join_config", None), "enable", False))


def of_typed(storage: torch.storage.TypedStorage) -> tuple[torch.UntypedStorage, int, Any]:
    """The storage within, how many elements it has, and the class that an archive of torch's names."""
    typed: Any = storage
    return typed._untyped_storage, typed._size(), getattr(torch, typed._pickle_storage_type())


def default_store() -> Any:
    """The store by which the processes of ``torch.distributed`` have met."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    world: Any = dist.group.WORLD
    return world.get_group_store() if get is None else get()


def batches_given(iterator: Any) -> Any:
    """How many batches a loader's iterator has given."""
    return vars(iterator).get("_num_yielded")


def dataset_of(iterator: Any) -> Any:
    """What a loader's iterator reads."""
    return getattr(iterator, "_dataset", None)


def keeps_workers(iterator: Any) -> bool:
    """Whether a loader's iterator is kept for the next pass, with its workers."""
    return bool(getattr(iterator, "_persistent_workers", False))


def drops_last(loader: Any) -> bool:
    """Whether a loader of accelerate's that deals batches out from one process leaves an incomplete last one out."""
    return bool(getattr(loader, "_drop_last", False))


def forget_iterator(loader: Any) -> None:
    """Let the next pass over a loader start its data workers anew."""
    loader._iterator = None


def end_workers(loader: Any) -> None:
    """End persistent workers: left to the garbage collector, torch waits five seconds for each."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
