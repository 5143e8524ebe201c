"""What each rank runs: sharded trainings of many kinds, interrupted and resumed, and loaded by the host alone.

Arguments: a folder for ``rank-N.json``, and names of kinds; ``-full`` behind one: with full state dicts. Of each kind
it tells the steps at which saves were captured, what differs, and what was warned of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from hf_lifecycle import latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.testing.attempts import BrokenOff
from tests.distributed.sharded_cases import Tokens, gpt2, plugin, sharded
from tests.distributed.shards_script import prepared, run_loop, trained
from tests.listening import listening
from tests.resume.harness import Attempt

IN_BLOCKS = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["GPT2Block"]}


class Uneven(nn.Module):
    """Parameters with 5, 3 and 1 rows, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        logits = self.layers(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


class Normed(torch.optim.Optimizer):
    """Its state is the same on all ranks: a plain tensor for each parameter, and a number."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                state = self.state[parameter]
                state["norms"] = state.get("norms", torch.zeros(2)) * 0.9 + torch.stack([whole.norm(), whole.sum()])
                state["step"] = state.get("step", 0) + 1
                parameter.sub_(parameter.grad, alpha=float(group["lr"] / (1 + state["norms"][0])))


def lora() -> Any:
    """Adapters in each block."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1))


def adamw(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in parameters if one.requires_grad], lr=1e-2)


# Activation checkpointing, mixed precision, and adapters; compiled, uneven and unsharded parameters, and an optimizer
# without state; offloaded and uneven parameters, and an optimizer whose state is not sharded.


def _adapters(kind: str) -> Any:
    settings = plugin(kind, activation_checkpointing=True, **IN_BLOCKS)()
    return prepared(lora(), adamw, {**settings, "mixed_precision": "bf16"}, Tokens())


def _compiled(kind: str) -> Any:
    model = Uneven()
    model.layers[0].requires_grad_(False)
    # torch loads no full state dict of an optimizer without a tensor.
    of_kind = adamw if kind.startswith("FULL") else lambda given: torch.optim.SGD(given, lr=1e-2)
    settings = plugin(kind, ignored_modules=[model.layers[0]])()
    return prepared(torch.compile(model, backend="eager"), of_kind, {**settings, "mixed_precision": "bf16"})


def _offloaded(kind: str) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    # There is no device for which memory could be pinned.
    return prepared(Uneven(), Normed, plugin(kind, cpu_offload=CPUOffloadPolicy(pin_memory=False))())


LOOPS: dict[str, Callable[[str], Any]] = {
    "adapters": _adapters,
    "compiled": _compiled,
    "offloaded": _offloaded,
}


def loop(name: str, folder: Path, kind: str) -> tuple[Path, list[str]]:
    """One run, one that is interrupted and resumed, and what accelerate alone loads of a save in the background."""
    prepare, at_6 = LOOPS[name], {}

    def note(step: int, model: Any, optimizer: Any) -> None:
        if step == 6:
            at_6.update(trained(model, optimizer))

    def interrupt(step: int, model: Any, optimizer: Any) -> None:
        if step == 7:
            raise BrokenOff

    whole = run_loop(folder / "whole", kind=kind, prepare=prepare, each_step=note)
    with contextlib.suppress(BrokenOff):
        run_loop(folder / "broken", kind=kind, prepare=prepare, each_step=interrupt)
    resumed = run_loop(folder / "broken", kind=kind, prepare=prepare, resumes=True)
    accelerator, model, optimizer, _ = prepare(kind)
    accelerator.register_for_checkpointing(Ignored())
    accelerator.load_state(str(folder / "whole" / "checkpoint-6"))
    return folder / "whole", [*_differs(resumed, whole), *_differs(trained(model, optimizer), at_6)]


class Ignored:
    """What the manager has saved beside accelerate's."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _differs(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    assert len(expected) > 10
    return [name for name in sorted(expected | found) if found.get(name) != expected.get(name)]


def trainer(name: str, folder: Path, kind: str) -> tuple[Path, list[str]]:
    """The same of Trainer, but for what stock loads."""

    def train(place: Path, until: int = 0) -> dict[str, str]:
        run = Attempt(place, "callback")
        more: dict[str, Any] = {"bf16": True, "eval_strategy": "no"}
        config = {"version": 2, "state_dict_type": kind, "activation_checkpointing": name != "trainer_adapters"}
        config |= {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
        if name == "trainer_compiled":
            more |= {"torch_compile": True, "torch_compile_backend": "eager"}
        one = sharded(run, kind, fsdp_config=config, fsdp="auto_wrap", **more)
        if "adapters" in name:
            one = type(one)(lora(), one.args, train_dataset=Tokens(), callbacks=run.callbacks())
        if until:
            one.add_callback(Interrupts(until))
        one.train(resume_from_checkpoint=latest_checkpoint(place))
        return trained(one.model, one.optimizer)

    if name == "trainer_adapters_checkpointed" and kind == "SHARDED_STATE_DICT":
        with contextlib.suppress(BrokenOff):
            train(folder / "whole", until=1)
        return folder / "whole", []
    whole = train(folder / "whole")
    with contextlib.suppress(BrokenOff):
        train(folder / "broken", until=5)
    return folder / "whole", _differs(train(folder / "broken"), whole)


class Interrupts(TrainerCallback):
    """Ends training after a step, as where a process ends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise BrokenOff


def main(folder: Path, names: list[str]) -> None:
    """Run the kinds, and write what was found."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    rank = int(os.environ["RANK"])
    for full_name in names:
        name, _, is_full = full_name.partition("-")
        with listening(logging.WARNING) as said:
            try:
                run = loop if name in LOOPS else trainer
                place, differs = run(name, folder / full_name, "FULL_STATE_DICT" if is_full else "SHARDED_STATE_DICT")
                steps = [one.facts["step"] for one in read_events(place) if one.event == "snapshot"]
                found[full_name] = [steps, differs, list(dict.fromkeys(said))]
            except Exception:  # noqa: BLE001 - it is told to the test
                found[full_name] = [*said, traceback.format_exc()]
                break
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end of the cases")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
