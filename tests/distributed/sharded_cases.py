"""Trainings whose model is shared out over the ranks, by FSDP2 or DeepSpeed as Trainer and accelerate set them up.

accelerate takes an FSDP plugin on accelerators alone, and starts DeepSpeed there alone. Nothing else needs one: so
:func:`admit_on_cpu` and :func:`admit_engine_on_cpu` let it do so on CPUs too, and all that follows is Trainer's,
accelerate's, torch's and DeepSpeed's own code. On a GPU (``ACCELERATE_USE_CPU=false``) the same cases run there, and
nothing of accelerate is changed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from tests.resume.cases.streams import Stream
from tests.resume.cases.tiny import Regressor, regression
from tests.resume.harness import Attempt, Break, Case
from tests.resume.loops.harness import LoopCase
from tests.resume.loops.programs import plain

__all__ = [
    "ENGINES",
    "ENGINE_LOOPS",
    "LOOPS",
    "SHARDED",
    "Tokens",
    "engine",
    "engine_plugin",
    "gpt2",
    "normed",
    "plugin",
    "sharded",
    "zero_config",
]

_own_init = AcceleratorState.__init__


def _init(self: Any, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    _own_init(self, *given, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def on_cpu() -> bool:
    """Whether the cases run on CPUs."""
    return os.environ.get("ACCELERATE_USE_CPU", "true") == "true"


def admit_on_cpu() -> None:
    """Let ``Accelerator`` take an FSDP plugin on CPUs."""
    if on_cpu():
        AcceleratorState.__init__ = _init


def _on_gloo(self: Any, *_: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_CPU


def _take_cpu(self: Any) -> None:
    self.device = torch.device("cpu")


def admit_engine_on_cpu() -> None:
    """Let ``Accelerator`` start DeepSpeed on CPUs."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if on_cpu():
        os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="false")
        PartialState._prepare_backend = _on_gloo
        PartialState.set_device = _take_cpu


class Tokens(Dataset):
    """Rows of random tokens."""

    def __init__(self, rows: int = 32) -> None:
        self.ids = torch.randint(0, 32, (rows, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def gpt2() -> Any:
    """Two layers with dropout, input and output embedding tied."""
    torch.manual_seed(7)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, **tokens))


def normed() -> Regressor:
    """A network with BatchNorm."""
    torch.manual_seed(7)
    return Regressor(norm=True)


def sharded(run: Attempt, kind: str, *, model: Any = None, train: Any = None, **settings: Any) -> Trainer:
    """A trainer under FSDP2 that saves and evaluates every 2 steps; ``kind`` is accelerate's ``state_dict_type``."""
    admit_on_cpu()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what another case left
    defaults = {"max_steps": 7, "save_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    defaults |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}, "use_cpu": on_cpu()}
    callbacks = settings.pop("callbacks", None) or run.callbacks()
    if model is not None:
        return regression(run, model=model, train=train, callbacks=callbacks, **{**defaults, **settings})
    args = run.args(**{**defaults, **settings})
    return Trainer(gpt2(), args, train_dataset=Tokens(), eval_dataset=Tokens(8), callbacks=callbacks)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}


def _zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_adam": True,
    }


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a Trainer, whose own arguments say the rest."""
    names = ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
    return {**_zero(stage), **dict.fromkeys(names, "auto")}


def engine(run: Attempt, stage: int, *, config: Any = None, zero: Any = None, **settings: Any) -> Trainer:
    """The same under DeepSpeed with ZeRO of this stage; torch's optimizer, which needs nothing to be compiled.

    ``config``, ``zero``: more of DeepSpeed's configuration, and of its part about ZeRO.
    """
    admit_engine_on_cpu()
    config = {**zero_config(stage), **(config or {})}
    config["zero_optimization"].update(zero or {})
    defaults = {"max_steps": 7, "save_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    defaults |= {
        "deepspeed": config,
        "use_cpu": False,
        "optim": "adamw_torch",
        "gradient_accumulation_steps": 2,
    }
    callbacks = settings.pop("callbacks", None) or run.callbacks()
    args = run.args(**{**defaults, **settings})
    return Trainer(gpt2(), args, train_dataset=Tokens(64), eval_dataset=Tokens(8), callbacks=callbacks)


def zero(stage: int) -> Case:
    about = f"DeepSpeed, ZeRO-{stage}; gradient accumulation, best weights at the end"
    return Case(f"zero_{stage}", about, lambda run: engine(run, stage, **BEST), breaks=(Break(5),))


ENGINES = tuple(zero(stage) for stage in (1, 2, 3))

SHARDED = (
    Case(
        "fsdp_trainer",
        "FSDP2, each rank's part in files of its own; BatchNorm, best weights, passes that end amid an accumulation",
        lambda run: sharded(
            run,
            "SHARDED_STATE_DICT",
            model=normed(),
            train=Stream(40, noise="torch"),
            gradient_accumulation_steps=2,
            **{**BEST, "eval_strategy": "epoch", "save_strategy": "epoch"},
        ),
        breaks=(Break(5),),
    ),
    Case(
        "fsdp_trainer_full",
        "FSDP2 layer by layer, gathered into files of rank 0; best weights at the end",
        lambda run: sharded(run, "FULL_STATE_DICT", **BEST),
        breaks=(Break(5),),
    ),
)


def plugin(kind: str, **settings: Any) -> Any:
    """Arguments of an accelerator that shares models out."""

    def make() -> dict[str, Any]:
        from accelerate.utils import FullyShardedDataParallelPlugin

        admit_on_cpu()
        made = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, **settings)
        return {"cpu": on_cpu(), "fsdp_plugin": made}

    return make


LOOPS = (
    LoopCase("fsdp_loop", "FSDP2 in a loop, sharded", plain, accelerator=plugin("SHARDED_STATE_DICT")),
    LoopCase(
        "fsdp_loop_full",
        "FSDP2 in a loop with BatchNorm, gathered",
        plain,
        accelerator=plugin("FULL_STATE_DICT"),
        options={"model": normed},
    ),
)


def engine_plugin(stage: int) -> Any:
    """Arguments of an accelerator that starts DeepSpeed."""

    def make() -> dict[str, Any]:
        from accelerate.utils import DeepSpeedPlugin

        admit_engine_on_cpu()
        config = {**_zero(stage), "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
        return {"cpu": False, "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}

    return make


ENGINE_LOOPS = (LoopCase("zero_loop", "DeepSpeed in a loop, ZeRO-2", plain, accelerator=engine_plugin(2)),)
