"""Whether a host can load a checkpoint into what is trained here; told before it loads.

Promise: where the library's own loading would end with an error, or could only load other tensors, what differs is
named first, and nothing is loaded. Only file names and headers are read. A checkpoint without a rank's file is the
library's alone.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.checkpoint.files.additions import LOOP, TRAINER, rank_file
from hf_lifecycle.checkpoint.files.safetensors_file import read_header
from hf_lifecycle.checkpoint.files.statefile import kind_of
from hf_lifecycle.engine.resume_report import reading_unverified
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.messages import few
from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.torch_internals import LOAD_HOOKS, LOADS

__all__ = ["kinds_of", "require_readable", "unlike_groups", "unlike_kinds", "unlike_shapes", "unlike_tensors"]

_HOSTS = {TRAINER: "Trainer", LOOP: "a custom loop"}
_PLAIN = "without FSDP and DeepSpeed"
_FSDP = "under FSDP with state_dict_type={}"
_ZERO = "under DeepSpeed with ZeRO-3", "under DeepSpeed without ZeRO-3"
_LAYOUTS = (  # of the files of a model
    (_ZERO[0], "*/zero_pp_rank_*_model_states.pt"),
    (_ZERO[1], "*/mp_rank_*_model_states.pt"),
    (_FSDP.format("SHARDED_STATE_DICT"), "pytorch_model_fsdp_*/.metadata"),
    (_FSDP.format("FULL_STATE_DICT"), "pytorch_model_fsdp.bin"),
    (_FSDP.format("LOCAL_STATE_DICT"), "pytorch_model_fsdp_rank*.bin"),
)
_STARTED = "started with torchrun or accelerate launch, also on one process, without which both are off"
_GROUP = re.compile(r"(.+)\.param_groups\.(\d+)\.params\.\d+")  # what the digest of a parameter's number is called
_STATE = re.compile(r"(.+)\.state\.\d+\.([^.]+)")  # and that of a value of a parameter's state
_SETTING = re.compile(r"(.+)\.param_groups\.\d+\.(?!params\.)([^.]+)")  # and that of a setting, or of a part of one
_WRAPPERS = ("module.", "_orig_mod.")  # before the names in a file
_ANEW = "start from step 0 in another output_dir"


def require_readable(checkpoint: Path, accelerator: Any, *, kind: str) -> None:
    """Raise ``ResumeMismatch`` where what trains here, whose rank's files are of ``kind``, cannot read what saved."""
    file = rank_file(checkpoint, 0)
    if not file.is_file():
        return
    with reading_unverified(checkpoint):
        other = kind_of(file)
    if other != kind:
        problem = f"it was saved by {_HOSTS.get(other, other)}, and this is {_HOSTS[kind]}"
        raise ResumeMismatch(checkpoint, [problem], f"resume it by what saved it, or {_ANEW}")
    present = _layout_of(accelerator)
    saved = [layout for layout, files in _LAYOUTS if any(checkpoint.glob(files))]
    is_fsdps = any(layout not in _ZERO for layout in saved)
    if not is_fsdps and any(any(checkpoint.glob(f"{name}*")) for name in ("model.", "model-", "pytorch_model.")):
        saved.append(_PLAIN)
    is_converted = (checkpoint / "latest_universal").is_file()  # by DeepSpeed's tool, for any stage
    if present in (None, *saved) or not saved or is_converted:
        return
    by = saved[0]
    if by == _PLAIN:
        problem = f"this training is {present}, and the checkpoint was saved {_PLAIN}, or with save_only_model=True"
        raise ResumeMismatch(checkpoint, [problem], f"resume it {_PLAIN}, or {_ANEW}")
    advice = f"train {by}, as the run that saved it"
    if present == _PLAIN:
        advice += f", {_STARTED}"
    raise ResumeMismatch(checkpoint, [f"it was saved {by}, and this training is {present}"], f"{advice}; or {_ANEW}")


def _layout_of(accelerator: Any) -> str | None:
    """How models are saved and loaded here; None where that is not known."""
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", None)
    if kind == "FSDP":
        form = accelerator.state.fsdp_plugin.state_dict_type
        return _FSDP.format(getattr(form, "name", form))
    if kind == "DEEPSPEED":
        return _ZERO[0 if accelerator.state.deepspeed_plugin.hf_ds_config.is_zero3() else 1]
    return None if kind == "MEGATRON_LM" else _PLAIN


def kinds_of(trained: Mapping[str, Any]) -> dict[str, str]:
    """The classes of optimizers and schedulers, whose names begin with what they are, without accelerate's wrappers."""
    return {name: type(getattr(one, name.partition(" ")[0], one)).__qualname__ for name, one in trained.items()}


def unlike_kinds(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """A sentence for each of another class, which takes the state of the one that was saved."""
    return [
        f"{name} was of the class {kind}, and is of {present[name]} now: make an {kind} to continue the run that was "
        "saved"
        for name, kind in saved.items()
        if present.get(name, kind) != kind
    ]


def unlike_tensors(
    models: Mapping[str, torch.nn.Module], saved: Iterable[str], *, only_lacking: bool = False
) -> list[str]:
    """What differs between the names of the tensors that were saved and those of ``models``, in at most two sentences.

    A model that takes part in its loading, by a hook or a method of its own, may take other names, and is skipped.

    Args:
        models: By what the names of their tensors begin with.
        only_lacking: Whether nothing is said of tensors that the models do not have.
    """
    names, found = set(saved), []
    lacking: list[str] = []
    gone: list[str] = []
    for prefix, model in models.items():
        if _loads_by_itself(model):
            continue
        known, kept = {prefix + name for name in _tensors(model)}, model.state_dict().keys()
        lacking += [prefix + name for name in module_tensors(model).keys() & kept if prefix + name not in names]
        gone += [name for name in names if name.startswith(prefix) and name not in known and not only_lacking]
    for those, but in (
        (lacking, "here, but not in the checkpoint"),
        (gone, "in the checkpoint, but not here"),
    ):
        if those:
            found.append(f"{few(sorted(those))}: {but}")
    return found


def unlike_shapes(model: torch.nn.Module, file: Path, prefix: str = "") -> list[str]:
    """A sentence for each tensor of a model that has another shape than in its safetensors ``file``, if that exists."""
    if not file.is_file() or _loads_by_itself(model):
        return []
    live, found = _tensors(model), []
    for adapter in getattr(model, "peft_config", {}):  # whose name PEFT leaves out in files
        live |= {name.replace(f".{adapter}.", "."): tensor for name, tensor in live.items()}
    for name, saved in read_header(file).items():
        tensor = live.get(_without_wrappers(name))
        if tensor is None or torch.nn.parameter.is_lazy(tensor) or "ds_tensor" in tensor.__dict__:  # ZeRO-3 has a part
            continue
        if tuple(tensor.shape) != saved.shape:
            shapes = f"{list(saved.shape)} in the checkpoint, and {list(tensor.shape)} here"
            found.append(f"{prefix}{_without_wrappers(name)} has the shape {shapes}")
    return found


def unlike_groups(optimizers: Mapping[str, Any], saved: Iterable[str]) -> list[str]:
    """A sentence for each of torch's optimizers whose groups have other numbers of parameters, settings or state.

    Args:
        saved: What the values of optimizers were called at the save.
    """
    saved = list(saved)
    counted = Counter((match[1], int(match[2])) for name in saved if (match := _GROUP.fullmatch(name)))
    settings, states = _by_owner(_SETTING, saved), _by_owner(_STATE, saved)
    found = []
    for name, wrapped in optimizers.items():
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if getattr(type(optimizer), "load_state_dict", None) is not torch.optim.Optimizer.load_state_dict:
            continue
        then = [count for (owner, _), count in sorted(counted.items()) if owner == name]
        now = [len(group["params"]) for group in optimizer.param_groups if group["params"]]
        if then and then != now:
            found.append(f"{name} has {_numbers(now)} parameters, and had {_numbers(then)} when it was saved")
        lacking = _lacking_settings(optimizer, settings.get(name, ())) or _lacking_state(
            optimizer, states.get(name, ())
        )
        if lacking:
            kind = type(optimizer).__qualname__
            found.append(f"{name} is of the class {kind}, which cannot step with what was saved: no {few(lacking)}")
    return found


def _lacking_settings(optimizer: Any, saved: Collection[str]) -> list[str]:
    """What the step of an optimizer of torch's reads in its groups, and neither has been saved nor does a load add."""
    kind: Any = type(optimizer)
    if not saved or not _is_torchs(kind):
        return []
    group: dict[str, Any] = {"params": [], **dict.fromkeys(saved)}
    like = object.__new__(kind)
    like.__setstate__({"defaults": dict(optimizer.defaults), "state": {}, "param_groups": [group]})
    # To the defaults a load adds what no group has.
    live = set(optimizer.defaults).intersection(*optimizer.param_groups)
    return [name for name in optimizer.defaults if name in live and name not in group]


def _lacking_state(optimizer: Any, saved: Collection[str]) -> list[str]:
    """What the step of an optimizer of torch's reads of the state of each parameter, and none has been saved with."""
    if not saved or not _is_torchs(type(optimizer)):
        return []
    lacking: list[str] = []
    kind: Any = type(optimizer)
    for dimensions in sorted({one.dim() for group in optimizer.param_groups for one in group["params"]}):
        lacking = [name for name in _state_names(kind, dimensions) if name not in saved]
        if not lacking:
            break
    return lacking


@functools.cache
def _state_names(kind: Any, dimensions: int) -> tuple[str, ...]:
    """What an optimizer of this class keeps of a parameter, whatever its settings; none where a step takes more."""
    parameter = torch.nn.Parameter(torch.zeros([1] * dimensions))
    parameter.grad = torch.zeros_like(parameter)
    try:
        one = kind([parameter])
        with torch.no_grad():
            inspect.unwrap(kind.step)(one)  # without the hooks of a program
    except (TypeError, ValueError, RuntimeError):
        return ()
    return tuple(one.state[parameter])


def _by_owner(pattern: re.Pattern[str], saved: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for match in filter(None, map(pattern.match, saved)):
        found.setdefault(match[1], set()).add(match[2])
    return found


def _numbers(groups: Sequence[int]) -> str:
    return f"one group of {groups[0]}" if len(groups) == 1 else f"groups of {few([str(one) for one in groups])}"


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each by all of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _loads_by_itself(model: torch.nn.Module) -> bool:
    """Whether other code than torch's decides which names and shapes a model takes."""
    return any(
        getattr(module, LOAD_HOOKS, None)
        or any(name in vars(kind) for name in LOADS for kind in type(module).__mro__ if not _is_torchs(kind))
        for module in model.modules()
    )


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _without_wrappers(name: str) -> str:
    while (prefix := next((one for one in _WRAPPERS if name.startswith(one)), None)) is not None:
        name = name.removeprefix(prefix)
    return name
