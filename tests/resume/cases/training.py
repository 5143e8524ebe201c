"""Cases of what a step does: dropout, accumulation, precision, losses, optimizers, schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..harness import Attempt, Break, Case
from .tiny import Regressor, Rows, bert, labelled_sentences, regression, tokenizer

__all__ = ["CASES"]


def _accumulation(run: Attempt) -> Trainer:
    return regression(run, train=Rows(32), gradient_accumulation_steps=2)


def _ragged(run: Attempt) -> Trainer:
    return regression(run, train=Rows(28), gradient_accumulation_steps=3)


def _classifier(run: Attempt, *, model: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    return Trainer(
        model=bert("BertForSequenceClassification", **(model or {})),
        args=run.args(**settings),
        train_dataset=labelled_sentences(),
        processing_class=tokenizer(),
        callbacks=run.callbacks(),
    )


def _random_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return nn.functional.mse_loss(outputs["logits"] + 0.1 * torch.randn_like(labels), labels)


class _MixingTrainer(Trainer):
    """Mixes each batch with itself in random order and proportion, as mixup does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        order, share = torch.randperm(len(inputs["x"])), torch.rand(())
        mixed = {name: share * value + (1 - share) * value[order] for name, value in inputs.items()}
        outputs = model(**mixed)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def _frozen(run: Attempt) -> Trainer:
    torch.manual_seed(7)
    model = Regressor(norm=True)
    model.layers[0].requires_grad_(False)
    return regression(run, model=model)


def _batch_norm(run: Attempt) -> Trainer:
    torch.manual_seed(7)
    return regression(run, model=Regressor(norm=True))


def _model_init(run: Attempt) -> Trainer:
    return Trainer(model_init=lambda: Regressor(), args=run.args(), train_dataset=Rows(), callbacks=run.callbacks())


def _own_optimizer(run: Attempt) -> Trainer:
    torch.manual_seed(7)
    model = Regressor()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=12)
    return regression(run, model=model, trainer={"optimizers": (optimizer, schedule)})


class Average:
    """An exponential moving average of a model's parameters."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.shadow = decay, {}  # type: float, dict[str, torch.Tensor]

    def update(self, model: nn.Module) -> None:
        for name, value in model.named_parameters():
            old = self.shadow.get(name, value.detach())
            self.shadow[name] = old * self.decay + value.detach() * (1 - self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.shadow = dict(state)


class _Averaging(TrainerCallback):
    def __init__(self, average: Average) -> None:
        self.average = average

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average.update(model)


def _ema(run: Attempt) -> Trainer:
    ema = run.watch("ema", Average())
    return regression(run, callbacks=[_Averaging(ema), *run.callbacks(objects={"ema": ema})])


def _settings(name: str, about: str, **settings: Any) -> Case:
    return Case(name, about, lambda run: regression(run, **settings))


def _plateau(run: Attempt) -> Trainer:
    return regression(
        run,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
    )


CASES = (
    Case("dropout", "dropout in the model", regression, core=True),
    Case("accumulation", "gradient accumulation", _accumulation),
    Case("accumulation_ragged", "gradient accumulation with a ragged last step", _ragged, core=True),
    Case(
        "accumulation_inside",
        "the same, interrupted between two micro-batches",
        _ragged,
        breaks=(Break(9, "on_substep_end", 2),),
    ),
    _settings("bf16", "bf16 autocast", bf16=True),
    Case(
        "gradient_checkpointing",
        "gradient checkpointing with dropout",
        lambda run: _classifier(run, gradient_checkpointing=True, model={"num_hidden_layers": 2}),
    ),
    Case("neftune", "NEFTune noise on the embeddings", lambda run: _classifier(run, neftune_noise_alpha=5.0)),
    Case("label_smoothing", "label smoothing", lambda run: _classifier(run, label_smoothing_factor=0.1)),
    Case(
        "random_loss",
        "compute_loss_func that draws random numbers",
        lambda run: regression(run, trainer={"compute_loss_func": _random_loss}),
    ),
    Case("mixup", "compute_loss that mixes the batch at random", lambda run: regression(run, kind=_MixingTrainer)),
    _settings("adamw_fused", "fused AdamW with weight decay", optim="adamw_torch_fused", weight_decay=0.1),
    _settings("sgd", "SGD with momentum", optim="sgd", optim_args="momentum=0.9"),
    _settings("adafactor", "Adafactor", optim="adafactor"),
    _settings("adagrad", "Adagrad", optim="adagrad"),
    Case("plateau", "reduce on plateau, evaluated between the saves", _plateau),
    _settings(
        "cosine_restarts",
        "cosine with restarts",
        lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs={"num_cycles": 3},
    ),
    _settings("warmup", "cosine with a warm-up, interrupted within it", lr_scheduler_type="cosine", warmup_steps=11),
    Case("own_optimizer", "the user's own optimizer and one-cycle schedule", _own_optimizer),
    _settings("auto_batch_size", "auto_find_batch_size", auto_find_batch_size=True),
    _settings("no_clipping", "no gradient clipping", max_grad_norm=0.0),
    Case("batch_norm", "BatchNorm buffers", _batch_norm),
    Case("frozen", "a frozen first layer", _frozen),
    Case("model_init", "model_init in place of a model", _model_init),
    Case("ema", "a moving average in a user's callback", _ema, core=True),
)
