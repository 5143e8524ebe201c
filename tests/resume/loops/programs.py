"""The loops that the cases are made of: each builds everything afresh, resumes, and trains to its end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..cases.tiny import Regressor, Rows
from . import data
from .harness import Tool

__all__ = ["plain", "prepared", "train_on"]

EPOCHS = 3


def prepared(tool: Tool, loader: Any, model: nn.Module | None = None) -> tuple[Any, Any, Any, Any]:
    """Model, optimizer, scheduler and loader as the accelerator prepares them."""
    model = Regressor() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
    return tool.accelerator.prepare(model, optimizer, scheduler, loader)


def train_on(tool: Tool, batch: Any, model: Any, optimizer: Any, scheduler: Any) -> torch.Tensor:
    """Forward, backward and step on one batch."""
    with tool.accelerator.accumulate(model):
        with tool.accelerator.autocast():
            loss = model(**batch)["loss"]
        tool.accelerator.backward(loss)
        if tool.accelerator.sync_gradients:
            tool.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss.detach()


def evaluate(tool: Tool, model: Any) -> float:
    """The loss on rows of their own, with dropout on: an evaluation that draws."""
    with tool.evaluating(), torch.no_grad():
        rows = Rows(8, seed=2)
        return float(model(rows.x, rows.labels)["loss"])


def plain(tool: Tool, options: Mapping[str, Any]) -> None:
    """One loader, one model; a save every ``every`` steps, one at each epoch's end, or both.

    Options: ``loader`` (makes it), ``model`` (makes it), ``every``, ``at_epoch_end``, ``evaluate_every`` (steps).
    """
    make_loader = options.get("loader", shuffled)
    make_model = options.get("model")
    model, optimizer, scheduler, loader = prepared(
        tool, make_loader(options), None if make_model is None else make_model()
    )
    every, evaluate_every = options.get("every", 4), options.get("evaluate_every", 0)
    tool.resume()
    for epoch in tool.epochs(EPOCHS):
        for batch in tool.batches(loader):
            loss = train_on(tool, batch, model, optimizer, scheduler)
            if tool.accelerator.sync_gradients:
                step = tool.steps
                if evaluate_every and step % evaluate_every == 0:
                    tool.logged(evaluation=evaluate(tool, model))
            tool.trained(batch, loss)
            if tool.accelerator.sync_gradients and every and tool.steps % every == 0:
                tool.save()
        if "stopping" in tool.objects and tool.objects["stopping"].step(evaluate(tool, model)):
            break
        if options.get("at_epoch_end"):
            tool.logged(evaluation=evaluate(tool, model))
            tool.save(epoch=epoch)


def shuffled(options: Mapping[str, Any]) -> DataLoader:
    """Rows in random order."""
    return DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=options.get("workers", 0))


def _loop(tool: Tool, every: int, trained: Any, *loaders: Any, at: Any = None, **named: Any) -> None:
    """Epochs over the batches of ``loaders``, or of the one that ``at(epoch)`` gives; a save every ``every`` steps."""
    tool.resume()
    for epoch in tool.epochs(EPOCHS):
        for loader in loaders if at is None else (at(epoch),):
            for batch in tool.batches(loader, **named):
                tool.trained(batch, trained(batch))
                if tool.accelerator.sync_gradients and tool.steps % every == 0:
                    tool.save()


def unprepared(tool: Tool, options: Mapping[str, Any]) -> None:
    model, optimizer, scheduler, _ = prepared(tool, shuffled(options))
    loader = data.augmented(options)
    _loop(tool, 4, lambda batch: train_on(tool, batch, model, optimizer, scheduler), loader)


def by_hand(tool: Tool, options: Mapping[str, Any]) -> None:
    """Two batches make a step, and accelerate is not told."""
    model, optimizer, scheduler, loader = prepared(tool, shuffled(options))
    tool.resume()
    for _ in tool.epochs(EPOCHS):
        for number, batch in enumerate(tool.batches(loader)):
            loss = model(**batch)["loss"]
            tool.accelerator.backward(loss / 2)
            tool.trained(batch, loss)
            if number % 2 == 1:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                tool.save()


def wide_state(tool: Tool, options: Mapping[str, Any]) -> None:
    """Weights in bf16, and a state of the optimizer that is kept in fp32."""
    model = Regressor().to(torch.bfloat16)
    model, optimizer, scheduler, loader = prepared(tool, shuffled(options), model)

    def train(batch: Any) -> torch.Tensor:
        loss = model(**{name: value.to(torch.bfloat16) for name, value in batch.items()})["loss"]
        tool.accelerator.backward(loss)
        optimizer.step()
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].float() + 1e-6
        scheduler.step()
        optimizer.zero_grad()
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)
            state["exp_avg_sq"] = state["exp_avg_sq"].to(torch.bfloat16)
        # Read by nothing but the proof: what load_state_dict narrows.
        for state in optimizer.state.values():
            state["trace"] = torch.full((2,), 1.0 / 3.0)
        return loss.detach()

    _loop(tool, 4, train, loader)


def adversarial(tool: Tool, options: Mapping[str, Any]) -> None:
    """A generator against a discriminator."""
    maker, judge = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 8)), nn.Linear(8, 1)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (maker, judge)]
    maker, judge, *optimizers, loader = tool.accelerator.prepare(maker, judge, *optimizers, shuffled(options))

    def train(batch: Any) -> torch.Tensor:
        made = maker(torch.randn(4, 4))
        loss = judge(made.detach()).mean() - judge(batch["x"]).mean()
        tool.accelerator.backward(loss)
        optimizers[1].step()
        optimizers[1].zero_grad()
        if tool.steps % 2 == 0:
            tool.accelerator.backward(-judge(maker(torch.randn(4, 4))).mean())
            optimizers[0].step()
            optimizers[0].zero_grad()
            optimizers[1].zero_grad()
        return loss.detach()

    _loop(tool, 4, train, loader)


def _two(tool: Tool, options: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    model, optimizer, scheduler, first = prepared(tool, shuffled(options))
    second = tool.accelerator.prepare(DataLoader(Rows(12, seed=5), batch_size=4, shuffle=True))
    return model, optimizer, scheduler, first, second


def one_after_another(tool: Tool, options: Mapping[str, Any]) -> None:
    """The first loader, the second, and the first again."""
    model, optimizer, scheduler, first, second = _two(tool, options)
    _loop(tool, 4, lambda batch: train_on(tool, batch, model, optimizer, scheduler), first, second, first)


def side_by_side(tool: Tool, options: Mapping[str, Any]) -> None:
    model, optimizer, scheduler, first, second = _two(tool, options)
    tool.resume()
    for epoch in tool.epochs(EPOCHS):
        for ours, theirs in zip(tool.batches(first), tool.batches(second), strict=False):
            both = {name: torch.cat([ours[name], theirs[name]]) for name in ours}
            tool.trained(both, train_on(tool, both, model, optimizer, scheduler))
            if tool.steps % 2 == 0:
                tool.save()
        tool.save(epoch=epoch)


def _forever(tool: Tool, loader: Any) -> Iterator[Any]:
    while True:
        yield from tool.batches(loader)


def refilled(tool: Tool, options: Mapping[str, Any]) -> None:
    """A second loader gives one batch to each of the first's, and begins anew when it is at its end."""
    model, optimizer, scheduler, first, second = _two(tool, options)
    tool.resume()
    for _ in tool.epochs(EPOCHS):
        theirs = _forever(tool, second)
        for ours in tool.batches(first):
            other = next(theirs)
            both = {name: torch.cat([ours[name], other[name]]) for name in ours}
            tool.trained(both, train_on(tool, both, model, optimizer, scheduler))
            if tool.steps % 4 == 0:
                tool.save()


def changing_loader(tool: Tool, options: Mapping[str, Any]) -> None:
    """One loader in the first epoch, another one later."""
    model, optimizer, scheduler, first, second = _two(tool, options)
    train = lambda batch: train_on(tool, batch, model, optimizer, scheduler)  # noqa: E731
    _loop(tool, 4, train, at=lambda epoch: first if epoch == 0 else second)


def made_anew(tool: Tool, options: Mapping[str, Any]) -> None:
    """A loader that is made, and grows, with each epoch."""
    model, optimizer, scheduler, _ = prepared(tool, shuffled(options))

    def grown(epoch: int) -> Any:
        return tool.accelerator.prepare(DataLoader(Rows(16 + 4 * epoch), batch_size=4, shuffle=True))

    train = lambda batch: train_on(tool, batch, model, optimizer, scheduler)  # noqa: E731
    _loop(tool, 4, train, at=grown, name="growing")


def no_epochs(tool: Tool, options: Mapping[str, Any]) -> None:
    model, optimizer, scheduler, loader = prepared(tool, shuffled(options))
    tool.resume()
    while tool.steps < 16:
        for batch in tool.batches(loader):
            tool.trained(batch, train_on(tool, batch, model, optimizer, scheduler))
            if tool.steps % 4 == 0:
                tool.save()
            if tool.steps >= 16:
                break


class _Average:
    """An average of a model's weights; the model is bound when there is one."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def update(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            old = self.values.get(name, torch.zeros_like(value))
            self.values[name] = 0.9 * old + 0.1 * value.detach()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state)


def average() -> dict[str, Any]:
    return {"ema": _Average()}


def averaged(tool: Tool, options: Mapping[str, Any]) -> None:
    model, optimizer, scheduler, loader = prepared(tool, shuffled(options))

    def train(batch: Any) -> torch.Tensor:
        loss = train_on(tool, batch, model, optimizer, scheduler)
        tool.objects["ema"].update(model)
        return loss

    _loop(tool, 4, train, loader)


def draws_elsewhere(tool: Tool, options: Mapping[str, Any]) -> None:
    """Draws in every place of the loop, and lets what it drew in the epoch's body decide something."""
    model, optimizer, scheduler, loader = prepared(tool, data.augmented(options))
    tool.resume()
    torch.rand(3)
    for epoch in tool.epochs(EPOCHS):
        random.random()
        for batch in tool.batches(loader):
            factor = 1.0 + 0.1 * random.random()
            batch = {**batch, "x": batch["x"] * factor}
            tool.trained(batch, train_on(tool, batch, model, optimizer, scheduler))
            if tool.steps % 4 == 0:
                tool.save()
                torch.rand(2)
                np.random.rand()
        tool.logged(drawn=random.random())
        tool.save(epoch=epoch)
        random.random()


def stopping_on_ranks(tool: Tool, options: Mapping[str, Any]) -> None:
    """Evaluations within the epoch whose metric rises on rank 0 alone, so that patience runs out there alone."""
    model, optimizer, scheduler, loader = prepared(tool, shuffled(options))
    rank = tool.accelerator.process_index
    tool.resume()
    for _ in tool.epochs(8):
        for batch in tool.batches(loader):
            tool.trained(batch, train_on(tool, batch, model, optimizer, scheduler))
            metric = float(tool.steps) if rank == 0 else -float(tool.steps)
            if tool.steps % 5 == 0 and tool.objects["stopping"].step(metric if rank < 2 else None):
                tool.logged(stopped=tool.steps)
                break
            if tool.steps % 4 == 0:
                tool.save()


def scaled(tool: Tool, options: Mapping[str, Any]) -> None:
    """A gradient scaler, as mixed precision with fp16 has one; here on the CPU. Every fifth loss overflows."""
    tool.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    model, optimizer, scheduler, loader = prepared(tool, shuffled(options))

    def train(batch: Any) -> torch.Tensor:
        loss = model(**batch)["loss"]
        tool.accelerator.backward(loss * float("inf") if tool.steps % 5 == 4 else loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.detach()

    _loop(tool, 4, train, loader)
