"""Trainings that do not depend on how many processes compute them: ``-m tests.distributed.elastic_script FOLDER PLAN``.

``PLAN`` is a JSON list of ``[kind, run, until, settings]``: train in the directory ``FOLDER/run`` (up to a colon), from
the newest checkpoint there, until step ``until`` (null: to its end). Each rank writes to ``FOLDER/rank-N.json``, by
run, what it has computed of each micro-batch, by its number among those of all ranks: digests of the batch, the loss
and the gradient.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as host_logging

from hf_lifecycle import LifecycleCallback, LifecycleError, TrainingStateManager, elastic_arguments, latest_checkpoint
from hf_lifecycle.checkpoint.inspection.receipt import read_receipts
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from hf_lifecycle.testing.attempts import forget_last_attempt
from tests.distributed.sharded_cases import admit_on_cpu, plugin
from tests.listening import listening
from tests.resume.cases.tiny import sentences, tokenizer
from tests.trainer.runs import BrokenOff, Rows, break_off, new_trainer

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ROWS, EACH = 80, 4  # of the data, and of a micro-batch

# What a dict or a list has would be carried over the break.
computed: SimpleQueue[tuple[str, str, list[torch.Tensor]]] = SimpleQueue()


class Noisy(nn.Module):
    """Draws from all three generators in its forward, and notes what it is given and what comes of it."""

    main_input_name = "x"  # of which Trainer counts the tokens

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        _note_gradients(self)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        _note_gradients(self)  # FSDP2 has gathered them: they are others than outside
        logits = self.layers(x).squeeze(-1)
        loss = nn.functional.mse_loss(logits, labels)
        if self.training:
            loss = loss * (1 + random.random() + np.random.random_sample() + torch.rand(()))
            computed.put((tensor_digest(torch.cat([x, labels[:, None]], 1)), tensor_digest(loss), []))
        return {"loss": loss, "logits": logits}


class Masked(BertForMaskedLM):
    """Notes the same of masked words, whose loss is a mean over those of a step."""

    def __init__(self) -> None:
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        super().__init__(BertConfig(vocab_size=64, max_position_embeddings=32, **shape))
        _note_gradients(self)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **more: Any) -> Any:
        found = super().forward(input_ids, labels=labels, **more)
        if self.training:
            computed.put((tensor_digest(torch.cat([input_ids, labels])), tensor_digest(found.loss), []))
        return found


def _note_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter._backward_hooks:
            parameter.register_hook(_note_gradient)


def _note_gradient(gradient: torch.Tensor) -> None:
    held = []
    while not computed.empty():
        held.append(computed.get())
    held[-1][2].append(gradient.clone())
    for one in held:
        computed.put(one)


class Augmented(Rows):
    """Rows with noise from all three generators."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _augmented(super().__getitem__(index))


class Streamed(IterableDataset):
    """The same rows as a stream."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = Rows(ROWS)
        return (_augmented(rows[index]) for index in range(ROWS))


def _augmented(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    noise = 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * np.random.random_sample()
    return row | {"x": row["x"] + noise}


def words() -> tuple[list[Any], Any]:
    """Sentences as tokens, and what masks some of them."""
    tokens = tokenizer()
    return [tokens(text) for text in sentences(ROWS)], DataCollatorForLanguageModeling(tokens, mlm_probability=0.4)


class Spoils(TrainerCallback):
    """Changes a weight on the last rank, after it was loaded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK == WORLD - 1:
            next(iter(kwargs["model"].parameters())).detach().to_local().add_(1.0)


class Collate:
    """Draws for a batch, also from a generator of its own."""

    def __init__(self, pause: float = 0.0) -> None:
        self.generator = np.random.default_rng(3)
        self.pause = pause

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        time.sleep(self.pause)
        x, labels = (torch.stack([row[key] for row in rows]) for key in ("x", "labels"))
        return {"x": x * (0.5 + torch.rand(len(rows), 1) + self.generator.random()), "labels": labels}


class Killed(TrainerCallback):
    """Kills this process a moment after the begin of a step, in whatever it does then; notes what it trains on."""

    def __init__(self, trace: Path, at: int, seconds: float) -> None:
        self.trace, self.at, self.seconds = trace, at, seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(state.global_step * args.gradient_accumulation_steps)

    def note(self, number: int) -> None:
        """Append the batches of a step, by their number among those of all ranks."""
        lines = []
        while not computed.empty():
            lines.append(computed.get()[0])
        with self.trace.open("a") as file:
            file.writelines(
                f"{(number - len(lines) + place) * WORLD + RANK} {line}\n" for place, line in enumerate(lines)
            )


def new_model(kind: type[nn.Module] = Noisy) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return kind()


class WithReplacement(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return WeightedRandomSampler([1.0 + index % 3 for index in range(ROWS)], ROWS)


def train(place: Path, until: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Trainer."""
    how, batch = {"elastic": True, **settings.pop("callback", {})}, settings.pop("global_batch_size", 4 * EACH)
    if (files := settings.pop("sharded", None)) is not None:
        begin_sharded()
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": files}}
    kind = WithReplacement if settings.pop("replacement", False) else Trainer
    killed, pause = settings.pop("killed", None), settings.pop("pause", 0.0)
    data = Streamed() if settings.pop("stream", False) else Augmented(ROWS)
    model, collate = Noisy, Collate(pause)
    if settings.pop("words", False):
        model = Masked
        data, collate = words()
    callbacks = [] if settings.pop("stock", False) else [LifecycleCallback(**how)]
    callbacks = [Spoils(), *callbacks] if settings.pop("spoiled", False) else callbacks
    given = {"max_steps": 12, "save_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": EACH, **settings}
    if "gradient_accumulation_steps" not in settings:
        args = TrainingArguments(output_dir=str(place), use_cpu=True, per_device_train_batch_size=EACH)
        given["gradient_accumulation_steps"] = elastic_arguments(
            args, global_batch_size=batch
        ).gradient_accumulation_steps
    resume = latest_checkpoint(place) if callbacks else None
    begun = int(Path(resume).name.partition("-")[2]) if resume is not None else 0
    if killed is not None:
        rank, after, seconds = killed
        at = begun + after if rank == RANK else -1
        callbacks.append(Killed(place.parent / f"trace-{RANK}.txt", at, seconds))
    of_data = {"train": data, "with_trainer": {"data_collator": collate}}
    trainer = new_trainer(place, *callbacks, model=new_model(model), kind=kind, **of_data, **given)
    if until is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        break_off(trainer, step=until, resume=resume)
    accumulation = trainer.args.gradient_accumulation_steps
    rows = [[sorted(row), row["step"], row["epoch"], row.get("learning_rate")] for row in trainer.state.log_history]
    seen = {"rows": rows, "tokens": trainer.state.num_input_tokens_seen, "steps": trainer.state.global_step}
    return {**ended(trainer.model, begun, accumulation), "seen": seen}


def loop(place: Path, until: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """A custom training loop, with a prepared scheduler."""
    files = settings.get("sharded")
    if files is not None:
        begin_sharded()
    set_seed(1)
    accelerator = Accelerator(**({"cpu": True} if files is None else plugin(files)()))
    elastic_arguments(accelerator, global_batch_size=settings.get("global_batch_size", 4 * EACH), batch_size=EACH)
    model, rate = new_model(), settings.get("learning_rate", 0.0)
    given = {"collate_fn": Collate(), "num_workers": settings.get("workers", 0)}
    stream = settings.get("stream", False)
    loader = DataLoader(Streamed() if stream else Augmented(ROWS), EACH, shuffle=not stream, **given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    manager = TrainingStateManager(accelerator, place, elastic=True)
    manager.resume()
    begun, rates = manager.progress.step, []
    for _ in manager.epochs(3, max_steps=until or 12):
        for batch in manager.batches(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(scheduler.get_last_lr()[0])
                manager.save()
    manager.close()
    own = accelerator.unwrap_model(model)
    return {**ended(own, begun, accelerator.gradient_accumulation_steps), "rates": [begun, rates]}


def begin_sharded() -> None:
    """Let FSDP2 begin here, whatever was trained before; also where no launcher has started this process."""
    forget_last_attempt()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    admit_on_cpu()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= alone


def ended(model: Any, begun: int, accumulation: int) -> dict[str, Any]:
    """What this rank has computed, by number among all ranks, and the weights."""
    found, number = {}, begun * accumulation
    while not computed.empty():
        batch, loss, gradients = computed.get()
        flat = torch.cat([one.flatten() for one in gradients]) * accumulation  # the loss was divided by that
        found[number * WORLD + RANK] = [batch, loss, tensor_digest(flat)]
        number += 1
    tensors = {name: whole(tensor.detach()) for name, tensor in module_tensors(model).items()}
    weights = torch.cat([one.flatten() for one in tensors.values()])
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return {"computed": found, "weights": weights.tolist(), "digests": digests}


def whole(tensor: Any) -> torch.Tensor:
    """Gathered, if ranks have parts of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(folder: Path, plan: list[Any], said: list[str]) -> None:
    told: dict[str, Any] = {}
    for case, run, until, settings in plan:
        said.clear()
        while not computed.empty():
            computed.get()
        try:
            told[run] = {"loop": loop, "trainer": train}[case](folder / run.partition(":")[0], until, dict(settings))
        except (LifecycleError, BrokenOff) as error:
            told[run] = {"error": str(error)}
        told[run]["proved"] = [one["proved"] for one in read_receipts(folder / run.partition(":")[0])[-1:]]
        told[run]["said"] = [line for line in said if "not exact" in line]
    (folder / f"rank-{RANK}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    host_logging.set_verbosity_error()
    with listening() as said:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]), said)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
