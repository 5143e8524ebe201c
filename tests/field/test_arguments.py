"""Arguments that changed between the save and the resume: each field has its grade, and a longer run may be exact."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.component import Event
from hf_lifecycle.hosts.trainer.resume import arguments
from hf_lifecycle.hosts.trainer.resume.arguments import Steering, capture_arguments, compare_arguments
from hf_lifecycle.hosts.trainer.resume.schedule import Schedule
from hf_lifecycle.hosts.trainer.resume.schedule_dry_run import DryRun
from hf_lifecycle.state.environment import Difference, Grade
from tests.field.limits import Limit
from tests.trainer.runs import Net, break_off, digests, new_trainer

NOTHING = Steering(evaluations=False, best=False, streamed=False)

LONGER = Limit(
    what="`max_steps` or `num_train_epochs` raised under a schedule that depends on it (linear, cosine)",
    when="at the resume",
    line="max_steps: … -> … (breaks exactness: the schedule would have set different learning rates until step …)",
    outcome="an error",
)
LONGER_UNKNOWN = Limit(
    what="`max_steps` or `num_train_epochs` changed under a schedule that looks at the trainer, the model or the data",
    when="at the resume",
    line="(breaks exactness: it is unknown whether the schedule (…) depends on it)",
    outcome="an error",
)
LONGER_EVALUATIONS = Limit(
    what="`max_steps` raised where evaluations steer training and come by a share of it (`eval_steps=0.25`)",
    when="at the resume",
    line="(breaks exactness: evaluations, on which training depends, would have been at other steps)",
    outcome="an error",
)
SHORTER = Limit(
    what="`max_steps` or `num_train_epochs` lowered to what is done already; arguments changed after the run ended",
    when="at the resume",
    line="not exact: no step is left to train (step … of …), so what differs is only reported: …",
)
READ_ELSEWHERE = Limit(
    what="`max_steps` raised, and a callback or the trainer's class reads it",
    when="at the resume",
    line=(
        "the run now has … steps instead of …, and … reads that number: if it uses it for more than display, the "
        "run differs from one that was started with … steps"
    ),
)

# ---- every field has a grade -----------------------------------------------------------------------------------------

# What TRL's trainers are given beside Trainer's arguments, and what decides the bits: data, losses, sampling. A field
# that is in neither this list nor the package's has not been looked at.
DECIDE_OF_TRL = frozenset(
    """
    activation_offloading assistant_only_loss base_model_attribute_name beta cache_implementation
    cast_lm_head_to_fp32 center_rewards_coefficient chat_template_kwargs chat_template_path completion_only_loss
    dataset_kwargs dataset_num_proc dataset_text_field delta disable_dropout discopop_tau ds3_gather_for_generation
    entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target eos_token epsilon epsilon_high
    f_alpha_divergence_coef f_divergence_type force_use_ref_model generation_batch_size generation_kwargs
    importance_sampling_level label_pad_token_id label_smoothing ld_alpha log_completions log_unique_prompts
    loss_type loss_weights mask_truncated_completions max_completion_length max_length max_prompt_length
    max_tool_calling_iterations min_p model_adapter_name model_init_kwargs multi_objective_aggregation
    normalize_advantages num_completions_to_print num_generations num_iterations off_policy_mask_threshold packing
    packing_strategy pad_to_multiple_of pad_token padding_free precompute_ref_batch_size precompute_ref_log_probs
    ref_adapter_name ref_model_init_kwargs ref_model_mixup_alpha ref_model_sync_steps reference_free
    repetition_penalty reward_clip_range reward_weights router_aux_loss_coef rpo_alpha sapo_temperature_neg
    sapo_temperature_pos scale_rewards shuffle_dataset steps_per_generation sync_ref_model temperature tools
    top_entropy_quantile top_k top_p transformers_continuous_batching_config truncation_mode trust_remote_code
    use_adaptive_entropy use_bias_correction_kl use_liger_loss use_logits_to_keep
    use_transformers_continuous_batching use_transformers_paged use_vllm use_weighting vespo_k_neg vespo_k_pos
    vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_guided_decoding_regex
    vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode
    vllm_model_impl vllm_structured_outputs_regex vllm_tensor_parallel_size
""".split()  # noqa: SIM905
)
# generation_config is written into the model's own, from which a trainer may generate while it trains.
DECIDE_OF_SEQ2SEQ = frozenset({"generation_config", "sortish_sampler"})

TABLES = {
    name: table for name, table in vars(arguments).items() if name.startswith("_") and isinstance(table, frozenset)
}


def _graded() -> frozenset[str]:
    return frozenset().union(*TABLES.values())


@pytest.mark.core
def test_every_argument_of_trainer_has_a_grade() -> None:
    assert {field.name for field in fields(TrainingArguments)} - _graded() == set()
    of_seq2seq = {field.name for field in fields(Seq2SeqTrainingArguments)}
    assert of_seq2seq - _graded() - DECIDE_OF_SEQ2SEQ == set()


@pytest.mark.core
@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "GRPOConfig", "RewardConfig", "RLOOConfig"])
def test_every_argument_of_trl_has_a_grade(name: str) -> None:
    kind = getattr(pytest.importorskip("trl"), name)
    assert {field.name for field in fields(kind)} - _graded() - DECIDE_OF_TRL == set()


def test_no_argument_has_two_grades() -> None:
    names = [name for table in TABLES.values() for name in table]
    assert sorted(names) == sorted(set(names))
    assert not _graded() & (DECIDE_OF_TRL | DECIDE_OF_SEQ2SEQ)


def _grades(one: TrainingArguments, other: TrainingArguments, steering: Steering = NOTHING) -> dict[str, Grade]:
    found = compare_arguments(capture_arguments(one), capture_arguments(other), type(other), steering)
    return {difference.name: difference.grade for difference in found}


def test_what_a_subclass_adds_breaks_exactness_whatever_it_is_called(tmp_path: Path) -> None:
    @dataclass
    class Own(TrainingArguments):
        beta: float = 0.1
        log_multimodal: bool = False
        eval_packing: bool = False

    one, other = Own(str(tmp_path)), Own(str(tmp_path), beta=0.2, log_multimodal=True, eval_packing=True)
    assert set(_grades(one, other).values()) == {Grade.BREAKS}


def test_what_is_set_on_the_arguments_breaks_exactness(tmp_path: Path) -> None:
    one, other = (TrainingArguments(str(tmp_path)) for _ in range(2))
    one.margin, other.margin = 0.5, 0.6  # type: ignore[attr-defined]
    assert _grades(one, other) == {"margin": Grade.BREAKS}


def test_of_trls_arguments_those_decide_that_do(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    plain: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    one, other = trl.SFTConfig(**plain), trl.SFTConfig(**plain, max_length=7, packing=True, eval_packing=False)
    assert _grades(one, other) == {
        "max_length": Grade.BREAKS,
        "packing": Grade.BREAKS,
        "eval_packing": Grade.HARMLESS,
    }
    steered = Steering(evaluations=True, best=False, streamed=False)
    assert _grades(one, other, steered)["eval_packing"] is Grade.BREAKS
    one, other = trl.SFTConfig(**plain, pad_token="<a>"), trl.SFTConfig(**plain, pad_token="<b>")
    assert _grades(one, other) == {"pad_token": Grade.BREAKS}


def test_what_is_called_a_token_is_compared_and_not_shown(tmp_path: Path) -> None:
    @dataclass
    class Own(TrainingArguments):
        data_token: str | None = None

    given = [Own(str(tmp_path), data_token=token, hub_token="hf_private") for token in (None, "s3cret", "other")]
    captured = json.dumps([capture_arguments(one) for one in given])
    assert "s3cret" not in captured
    assert "hf_private" not in captured
    assert _grades(given[0], given[1]) == _grades(given[1], given[2]) == {"data_token": Grade.BREAKS}


def test_arguments_are_not_changed_by_being_looked_at(tmp_path: Path) -> None:
    class Quantized:
        bits = 4

        def to_dict(self) -> dict[str, int]:
            return {"bits": self.bits}

    @dataclass
    class Own(TrainingArguments):
        model_init_kwargs: dict[str, Any] | None = None

    config = Quantized()
    args = Own(str(tmp_path), model_init_kwargs={"quantization_config": config})
    capture_arguments(args)
    assert args.model_init_kwargs == {"quantization_config": config}


@pytest.mark.parametrize(
    ("setting", "steering", "grade"),
    [
        ({"use_cache": True}, {}, Grade.BREAKS),
        ({"neftune_noise_alpha": 5.0}, {}, Grade.BREAKS),
        ({"data_seed": 5}, {}, Grade.BREAKS),
        ({"dataloader_drop_last": True}, {}, Grade.BREAKS),
        ({"fp16_full_eval": True}, {"evaluations": True}, Grade.HARMLESS),
        ({"dataloader_pin_memory": False}, {"streamed": True}, Grade.HARMLESS),
        ({"torch_empty_cache_steps": 2}, {}, Grade.HARMLESS),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {}, Grade.HARMLESS),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {"streamed": True}, Grade.BREAKS),
        ({"per_device_eval_batch_size": 3}, {}, Grade.HARMLESS),
        ({"per_device_eval_batch_size": 3}, {"evaluations": True}, Grade.BREAKS),
        ({"eval_strategy": "steps", "eval_steps": 3}, {}, Grade.HARMLESS),
        ({"eval_strategy": "steps", "eval_steps": 3}, {"evaluations": True}, Grade.BREAKS),
        ({"metric_for_best_model": "f1"}, {}, Grade.HARMLESS),
        ({"metric_for_best_model": "f1"}, {"evaluations": True}, Grade.BREAKS),
        ({"save_steps": 3}, {"evaluations": True}, Grade.HARMLESS),
        ({"save_steps": 3}, {"best": True}, Grade.BREAKS),
    ],
    ids=str,
)
def test_an_argument_has_the_grade_of_what_it_does_in_this_run(
    setting: dict[str, Any], steering: dict[str, bool], grade: Grade, tmp_path: Path
) -> None:
    one, other = (TrainingArguments(str(tmp_path), **given) for given in ({"use_cache": False}, setting))
    found = _grades(one, other, Steering(**{"evaluations": False, "best": False, "streamed": False, **steering}))
    assert {found[name] for name in setting} == {grade}


BY_STEPS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
PLATEAU: dict[str, Any] = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}


class Stopper(TrainerCallback):
    """Stops by a metric, as many people write it."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics["eval_loss"] < 0:
            control.should_training_stop = True


class Printer(TrainerCallback):
    """Looks at a metric."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.last = metrics["eval_loss"]


@pytest.mark.parametrize(
    ("settings", "callback", "steers"),
    [
        (PLATEAU, lambda: None, True),
        ({"load_best_model_at_end": True}, lambda: None, True),
        ({"metric_for_best_model": "loss"}, lambda: EarlyStoppingCallback(9), True),
        ({}, Stopper, True),
        ({}, Printer, False),
        ({}, lambda: None, False),
    ],
)
def test_the_size_of_evaluation_batches_is_refused_where_evaluations_steer_training(
    settings: dict[str, Any], callback: Callable[[], TrainerCallback | None], steers: bool, tmp_path: Path
) -> None:
    def trainer(size: int) -> Trainer:
        others = [one for one in [callback()] if one is not None]
        given = {**BY_STEPS, **settings, "restore_callback_states_from_checkpoint": True}
        return new_trainer(tmp_path, *others, LifecycleCallback(), per_device_eval_batch_size=size, **given)

    break_off(trainer(2))
    if not steers:
        trainer(3).train(resume_from_checkpoint=True)
        return
    with pytest.raises(ResumeMismatch, match=r"per_device_eval_batch_size: 2 -> 3 \(breaks exactness\)"):
        trainer(3).train(resume_from_checkpoint=True)


def test_our_own_early_stopping_steers_too(tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(patience=5), per_device_eval_batch_size=2, **BY_STEPS))
    resumed = new_trainer(tmp_path, LifecycleCallback(patience=5), per_device_eval_batch_size=3, **BY_STEPS)
    with pytest.raises(ResumeMismatch, match="per_device_eval_batch_size"):
        resumed.train(resume_from_checkpoint=True)


CHANGED: dict[str, Any] = {
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 2.0,
    "learning_rate": 1e-3,
    "use_cache": True,
    "average_tokens_across_devices": False,
    "seed": 7,
    "data_seed": 8,
    "dataloader_drop_last": True,
    "warmup_steps": 3,
}


def test_a_message_about_many_arguments_is_at_most_ten_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback()))
    with pytest.raises(ResumeMismatch) as raised:
        new_trainer(tmp_path, LifecycleCallback(), **CHANGED).train(resume_from_checkpoint=True)
    assert 5 < len(str(raised.value).splitlines()) <= 10
    unproved = {"learning_rate"}  # under another warm-up, what the schedule makes of it is not known
    assert len(raised.value.problems) == len(CHANGED.keys() - (WITHOUT_EFFECT.keys() - unproved))
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(strict=False), **CHANGED).train(resume_from_checkpoint=True)
    told = [line for line in caplog.text.splitlines() if any(f"{name}:" in line for name in CHANGED) or "more" in line]
    assert 1 < len(told) <= 10
    assert max(map(len, told)) < 1000


# ---- a longer run ----------------------------------------------------------------------------------------------------

SchedulerOf = Callable[[torch.optim.Optimizer, int], Any]


class _Halving(LRScheduler):
    """A schedule of a user's class."""

    def get_lr(self) -> list[float]:
        return [rate * 0.5 ** (self.last_epoch // 2) for rate in self.base_lrs]


class _Decaying(LRScheduler):
    """Stays, and goes down in the last steps, of which it keeps the number of all."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: int, tail: int) -> None:
        self.total, self.tail = total, tail
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        left = min(1.0, (self.total - self.last_epoch) / self.tail)
        return [rate * left for rate in self.base_lrs]


class _Plain:
    """A schedule that has only what Trainer calls."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        self.optimizer = optimizer
        self.factor, self.steps = factor, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= self.factor

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.factor = state["steps"], state["factor"]


class _Asking(_Plain):
    """A schedule that asks its trainer."""

    def __init__(self, trainer: Trainer, ask: Callable[[Trainer], float]) -> None:
        super().__init__(trainer.optimizer, 1.0)
        self.trainer, self.ask = trainer, ask

    def step(self) -> None:
        self.factor = self.ask(self.trainer)
        super().step()


def _asking(ask: Callable[[Trainer], float]) -> type[Trainer]:
    class Scheduled(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = _Asking(self, ask)
            return self.lr_scheduler

    return Scheduled


class _Factor:
    """A factor that is an object."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, step: int) -> float:
        return 1 - step / self.total


def _noisy(step: int) -> float:
    return 1.0 + random.random()


def _scheduled(schedule: SchedulerOf) -> type[Trainer]:
    class Scheduled(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = schedule(optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
            return self.lr_scheduler

    return Scheduled


OWN: dict[str, tuple[SchedulerOf, bool]] = {
    "lambda": (lambda optimizer, total: LambdaLR(optimizer, lambda step: 0.9**step), True),
    "lambda by total": (lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 - step / total), False),
    "lambda with a tail": (lambda optimizer, total: LambdaLR(optimizer, lambda step: float(step < total - 1)), True),
    "partial": (lambda optimizer, total: LambdaLR(optimizer, partial(pow, 0.9)), True),
    "object": (lambda optimizer, total: LambdaLR(optimizer, _Factor(40)), True),
    "object by total": (lambda optimizer, total: LambdaLR(optimizer, _Factor(total)), False),
    "random": (lambda optimizer, total: LambdaLR(optimizer, _noisy), False),
    "raises": (
        lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 / (step - 2 + 2 * (total < 12)) if step else 1.0),
        False,
    ),
    "steps": (lambda optimizer, total: StepLR(optimizer, 2), True),
    "annealed": (lambda optimizer, total: CosineAnnealingLR(optimizer, 10), True),
    "annealed by total": (lambda optimizer, total: CosineAnnealingLR(optimizer, total), False),
    "one cycle": (lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=total), False),
    "in a row": (
        lambda optimizer, total: SequentialLR(optimizer, [StepLR(optimizer, 2), StepLR(optimizer, 1)], [3]),
        True,
    ),
    "in a row by total": (
        lambda optimizer, total: SequentialLR(optimizer, [StepLR(optimizer, 2), StepLR(optimizer, 1)], [total // 3]),
        False,
    ),
    "in a row of functions": (
        lambda optimizer, total: SequentialLR(
            optimizer, [LambdaLR(optimizer, lambda step: 1 - step / total), StepLR(optimizer, 1)], [5]
        ),
        False,
    ),
    "multiplied": (lambda optimizer, total: MultiplicativeLR(optimizer, lambda step: 0.9), True),
    "multiplied by total": (lambda optimizer, total: MultiplicativeLR(optimizer, lambda step: 1 - 1 / total), False),
    "cyclic": (lambda optimizer, total: CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2, cycle_momentum=False), True),
    "cyclic with momentum": (lambda optimizer, total: CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2), True),
    "cyclic by a function": (
        lambda optimizer, total: CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2, scale_fn=lambda x: 0.9**x),
        True,
    ),
    "cyclic by total": (lambda optimizer, total: CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=total // 3), False),
    "averaging": (lambda optimizer, total: SWALR(optimizer, 1e-3, anneal_epochs=3), True),
    "averaging by total": (lambda optimizer, total: SWALR(optimizer, 1e-3, anneal_epochs=total // 2), False),
    "chained": (
        lambda optimizer, total: ChainedScheduler([ExponentialLR(optimizer, 0.9), ConstantLR(optimizer, 0.5, 3)]),
        True,
    ),
    "chained by total": (
        lambda optimizer, total: ChainedScheduler([ExponentialLR(optimizer, 0.9), ConstantLR(optimizer, 0.5, total)]),
        False,
    ),
    "a class of one's own": (lambda optimizer, total: _Halving(optimizer), True),
    "its own by total": (lambda optimizer, total: _Decaying(optimizer, total, total), False),
    "its own with a tail": (lambda optimizer, total: _Decaying(optimizer, total, 2), True),
    "without a base class": (lambda optimizer, total: _Plain(optimizer, 0.9), True),
    "without a base class, by total": (lambda optimizer, total: _Plain(optimizer, 1 - 1 / total), False),
}

STEPS: dict[str, Any] = {"kind": _scheduled(OWN["a class of one's own"][0])}

BUILT_IN: dict[str, tuple[dict[str, Any], bool]] = {
    "linear": ({}, False),
    "cosine": ({"lr_scheduler_type": "cosine"}, False),
    "polynomial": ({"lr_scheduler_type": "polynomial"}, False),
    "constant": ({"lr_scheduler_type": "constant"}, True),
    "constant after warm-up": ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, True),
    "constant after warm-up by ratio": ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, False),
    "inverse root": ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2}, True),
    "linear within its warm-up": ({"warmup_steps": 5}, True),
    "stable before its decay": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}, "warmup_steps": 1},
        True,
    ),
    "plateau": ({**PLATEAU, **BY_STEPS}, True),
    "plateau by a share": ({**PLATEAU, **BY_STEPS, "eval_steps": 0.25}, False),
}


def _run(directory: Path, total: int, *, until: int | None = None, resume: bool = False, **settings: Any) -> Trainer:
    trainer = new_trainer(directory, LifecycleCallback(), **{"max_steps": total, **settings})
    if until is not None:
        return break_off(trainer, step=until)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _require_longer_run(
    directory: Path, caplog: pytest.LogCaptureFixture, *, exact: bool, until: int | None = 4, **settings: Any
) -> None:
    """A run of 6 steps, broken off at step 4 (or ended), is resumed with 12; and with as many begun at once."""
    _run(directory / "resumed", 6, until=until, **settings)
    caplog.clear()
    if not exact:
        with pytest.raises(ResumeMismatch, match=r"max_steps: 6 -> 12 \(breaks exactness: ") as refused:
            _run(directory / "resumed", 12, resume=True, **settings)
        assert len(refused.value.problems) == 1
        return
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        resumed = _run(directory / "resumed", 12, resume=True, **settings)
    assert sum("max_steps: 6 -> 12 (harmless: exact, " in line for line in caplog.text.splitlines()) == 1
    assert "not exact" not in caplog.text
    whole = _run(directory / "whole", 12, **settings)
    assert digests(resumed) == digests(whole)
    assert resumed.state.global_step == whole.state.global_step == 12


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_longer_run_is_exact_where_the_schedule_does_not_depend_on_its_length(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, exact = BUILT_IN[name]
    _require_longer_run(tmp_path, caplog, exact=exact, **settings)


@pytest.mark.parametrize("name", OWN)
def test_a_longer_run_under_a_schedule_of_ones_own(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schedule, exact = OWN[name]
    _require_longer_run(tmp_path, caplog, exact=exact, kind=_scheduled(schedule))


@pytest.mark.parametrize(
    ("ask", "exact"),
    [(lambda trainer: 1 - trainer.args.weight_decay, True), (lambda trainer: 1 - 1 / trainer.args.max_steps, False)],
    ids=["what stays", "the length"],
)
def test_a_longer_run_under_a_schedule_that_asks_the_arguments(
    ask: Callable[[Trainer], float], exact: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _require_longer_run(tmp_path, caplog, exact=exact, kind=_asking(ask), weight_decay=0.1)


def test_what_a_schedule_goes_on_with_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_tail: dict[str, Any] = {"kind": _scheduled(OWN["its own with a tail"][0])}
    _require_longer_run(tmp_path, caplog, exact=True, **with_tail)
    assert "the schedule continues with total=12 instead of 6)" in caplog.text
    annealed: dict[str, Any] = {"kind": _scheduled(OWN["annealed by total"][0])}
    _run(tmp_path / "annealed", 6, until=4, **annealed)
    with pytest.raises(
        ResumeMismatch, match="different learning rates until step 4; the checkpoint restores T_max=6\\)"
    ):
        _run(tmp_path / "annealed", 12, resume=True, **annealed)


def test_a_schedule_given_to_the_trainer_is_stepped_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Given(Trainer):
        def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
            super().__init__(model, args, optimizers=(optimizer, ExponentialLR(optimizer, 0.9)), **kwargs)

    _require_longer_run(tmp_path, caplog, exact=True, kind=Given)


def test_a_save_before_our_turn_counts_the_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Saver(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                self.trainer._save_checkpoint(self.trainer.model, None)

    def trainer(name: str, total: int) -> Trainer:
        saver = Saver()
        made = new_trainer(tmp_path / name, saver, LifecycleCallback(), max_steps=total, save_steps=100, **STEPS)
        saver.trainer = made
        return made

    break_off(trainer("resumed", 6))
    resumed = trainer("resumed", 12)
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        resumed.train(resume_from_checkpoint=True)
    assert "at step 3: " in caplog.text
    assert "harmless: exact, " in caplog.text
    whole = trainer("whole", 12)
    whole.train()
    assert digests(resumed) == digests(whole)


# ---- what comes back from the checkpoint -----------------------------------------------------------------------------

# What a resume of Trainer's ignores, since the optimizer's state has it.
WITHOUT_EFFECT: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
}
WITH_EFFECT: dict[str, Any] = {"max_grad_norm": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 3}
HOLDS_RATE: dict[str, dict[str, Any]] = {
    "polynomial": {"lr_scheduler_type": "polynomial"},
    "cosine with a lowest rate": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-4},
    },
}
NO_EFFECT = Limit(
    what="A changed `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2` or `adam_epsilon`, or such settings of "
    "an optimizer or a schedule given as `optimizers=` or made in a loop",
    when="at the resume",
    line=(
        "no effect: … -> …: the checkpoint restores the old values, as without this package, and the resume stays "
        "exact. To train with the new values, start a new run from these weights, or set them in "
        "optimizer.param_groups (…) or in the scheduler in a callback's on_epoch_begin"
    ),
)


def _resume_changed(
    tmp_path: Path, before: dict[str, Any], changed: dict[str, Any], *, strict: bool = True, new: Any = new_trainer
) -> bool:
    """Resume with ``changed`` arguments; whether the run ends as the one that was begun."""
    break_off(new(tmp_path / "resumed", LifecycleCallback(), **before), step=4)
    resumed = new(tmp_path / "resumed", LifecycleCallback(strict=strict), **{**before, **changed})
    resumed.train(resume_from_checkpoint=True)
    whole = new(tmp_path / "whole", LifecycleCallback(), **before)
    whole.train()
    return digests(resumed) == digests(whole)


@pytest.mark.parametrize("schedule", [name for name in BUILT_IN if name not in HOLDS_RATE])
def test_a_changed_learning_rate_has_no_effect_and_is_reported(
    schedule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _resume_changed(tmp_path, BUILT_IN[schedule][0], {"learning_rate": 1e-3})
    NO_EFFECT.require_told(caplog.text)
    assert "no effect: learning_rate 0.01 -> 0.001: " in caplog.text
    assert "not exact" not in caplog.text


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_of_the_optimizer_has_no_effect_and_is_reported(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _resume_changed(tmp_path, {}, {name: WITHOUT_EFFECT[name]})
    assert f"no effect: {name} " in caplog.text
    assert "not exact" not in caplog.text


@pytest.mark.parametrize("name", WITH_EFFECT)
def test_what_has_an_effect_is_refused(name: str, tmp_path: Path) -> None:
    assert not _resume_changed(tmp_path / "effect", {}, {name: WITH_EFFECT[name]}, strict=False)
    with pytest.raises(ResumeMismatch, match=rf"{name}: .* \(breaks exactness\)"):
        _resume_changed(tmp_path / "refused", {}, {name: WITH_EFFECT[name]})


@pytest.mark.parametrize("name", HOLDS_RATE)
def test_a_learning_rate_that_the_schedule_holds_is_refused(name: str, tmp_path: Path) -> None:
    changed = {"learning_rate": 1e-3}
    assert not _resume_changed(tmp_path / "effect", HOLDS_RATE[name], changed, strict=False)
    with pytest.raises(ResumeMismatch, match=r"learning_rate: 0.01 -> 0.001 \(breaks exactness\)"):
        _resume_changed(tmp_path / "refused", HOLDS_RATE[name], changed)


def test_an_argument_that_a_users_class_reads_is_refused(tmp_path: Path) -> None:
    class Penalized(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs)
            return loss + self.args.weight_decay * sum(one.square().sum() for one in model.parameters())

    with pytest.raises(ResumeMismatch, match=r"weight_decay: 0.0 -> 0.1 \(breaks exactness\)"):
        _resume_changed(tmp_path, {"kind": Penalized}, {"weight_decay": 0.1})


def test_settings_of_an_optimizer_of_the_users_have_no_effect_and_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def new(directory: Path, *callbacks: TrainerCallback, rate: float = 1e-2, decay: float = 0.0) -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
        schedule = StepLR(optimizer, 2, 0.5)
        return new_trainer(directory, *callbacks, model=model, with_trainer={"optimizers": (optimizer, schedule)})

    assert _resume_changed(tmp_path / "same", {}, {}, new=new)
    assert "no effect" not in caplog.text
    assert _resume_changed(tmp_path, {}, {"rate": 1e-3, "decay": 0.1}, new=new)
    assert "no effect: lr of the optimizer 0.01 -> 0.001, weight_decay of the optimizer 0.0 -> 0.1: " in caplog.text


HOLDS_NUMBERS = Limit(
    what="A changed number in the functions of a schedule (an argument of `functools.partial`, a variable)",
    when="at the resume",
    line="not exact: … of the scheduler was … when the run started, and is … now",
)


def _chained(optimizer: torch.optim.Optimizer, number: int) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=number), StepLR(optimizer, number)], [number])


SETTINGS_OF_SCHEDULES: dict[str, tuple[Any, str]] = {
    "step": (StepLR, "step_size of the scheduler 2 -> 3"),
    "chained": (
        _chained,
        "milestones of the scheduler [2] -> [3], schedulers[0].total_iters of the scheduler 2 -> 3, "
        "schedulers[1].step_size of the scheduler 2 -> 3",
    ),
    "plateau": (lambda one, number: ReduceLROnPlateau(one, patience=number), "patience of the scheduler 2 -> 3"),
    "partial": (lambda one, number: LambdaLR(one, partial(lambda step, by: 1 / (step + by), by=number)), "by"),
    "closure": (lambda one, number: LambdaLR(one, lambda step: 1 / (step + number)), "number"),
}


def _with_schedule(make: Any, number: int) -> Callable[..., Trainer]:
    def new(directory: Path, *callbacks: TrainerCallback, number: int = number) -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        given = {"optimizers": (optimizer, make(optimizer, number))}
        more = {"eval_strategy": "epoch", "metric_for_best_model": "loss"}
        return new_trainer(directory, *callbacks, model=model, with_trainer=given, **more)

    return new


@pytest.mark.parametrize("name", SETTINGS_OF_SCHEDULES)
def test_changed_settings_of_a_schedule_of_the_users_are_reported(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, told = SETTINGS_OF_SCHEDULES[name]
    assert _resume_changed(tmp_path / "same", {}, {}, new=_with_schedule(make, 2))
    assert caplog.text == ""
    is_same = _resume_changed(tmp_path / "changed", {}, {"number": 3}, new=_with_schedule(make, 2))
    if name in ("partial", "closure"):
        assert not is_same
        HOLDS_NUMBERS.require_told(caplog.text)
        assert f"functions[0].{told} of the scheduler was 2 when the run started, and is 3 now" in caplog.text
    else:
        assert is_same
        assert f"no effect: {told}: the checkpoint restores the old values" in caplog.text
        assert "not exact" not in caplog.text


@pytest.mark.parametrize("gives", ["nothing", "an error"])
def test_schedule_without_a_state_ends_no_training(gives: str, tmp_path: Path) -> None:
    class Plain:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.param_groups[0]["lr"] *= 0.5

        def get_last_lr(self) -> list[float]:
            return [group["lr"] for group in self.optimizer.param_groups]

    class Raising(Plain):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("not now")

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = {"optimizers": (optimizer, (Plain if gives == "nothing" else Raising)(optimizer))}
    trainer = new_trainer(tmp_path, LifecycleCallback(), model=model, with_trainer=given, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 6


def test_settings_of_an_optimizer_of_another_class_are_not_called_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def new(directory: Path, *callbacks: TrainerCallback, kind: Any = torch.optim.AdamW) -> Trainer:
        model = Net()
        given = {"optimizers": (kind(model.parameters(), lr=1e-2), None)}
        return new_trainer(directory, *callbacks, model=model, with_trainer=given)

    _resume_changed(tmp_path, {}, {"kind": torch.optim.Adam}, new=new)
    assert "optimizer was of the class AdamW, and is of Adam now" in caplog.text
    assert "exact." not in caplog.text
    with pytest.raises(ResumeMismatch, match=r"is of the class SGD, which cannot step with what was saved: no mom"):
        new(tmp_path / "resumed", LifecycleCallback(), kind=torch.optim.SGD).train(resume_from_checkpoint=True)


def test_groups_that_were_held_before_the_checkpoint_was_loaded_are_the_optimizers(tmp_path: Path) -> None:
    class Holding(_Plain):
        def __init__(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
            super().__init__(optimizer, factor)
            self.groups, self.first = optimizer.param_groups, optimizer.param_groups[0]

        def step(self) -> None:
            self.steps += 1
            for group in (self.first, *self.groups[1:]):
                group["lr"] *= self.factor

    assert _resume_changed(tmp_path, {"kind": _scheduled(lambda optimizer, total: Holding(optimizer, 0.5))}, {})


def test_a_callback_that_sets_the_optimizer_as_advised_takes_effect(tmp_path: Path) -> None:
    class Setter(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for group in kwargs["optimizer"].param_groups:
                group["weight_decay"], group["initial_lr"] = 0.5, 1e-3
            kwargs["lr_scheduler"].base_lrs = [1e-3] * 2

    break_off(new_trainer(tmp_path, LifecycleCallback()))
    resumed = new_trainer(tmp_path, Setter(), LifecycleCallback(), weight_decay=0.5, learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=True)
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.5, 0.5]
    assert resumed.state.log_history[-2]["learning_rate"] == 1e-3 * (1 / 6)


# ---- other ways to another length ------------------------------------------------------------------------------------

CONSTANT: dict[str, Any] = {"lr_scheduler_type": "constant"}


def _resumed_as(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    before: dict[str, Any],
    after: dict[str, Any],
    until: int | None = 4,
) -> str:
    """Resume ``before`` with ``after``, require the bits of a run begun with ``after``, and return what was logged."""
    before, after = ({**CONSTANT, **given} for given in (before, after))
    first = new_trainer(tmp_path / "resumed", LifecycleCallback(), **before)
    first.train() if until is None else break_off(first, step=until)
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        resumed = new_trainer(tmp_path / "resumed", LifecycleCallback(), **after)
        resumed.train(resume_from_checkpoint=True)
    whole = new_trainer(tmp_path / "whole", LifecycleCallback(), **after)
    whole.train()
    assert digests(resumed) == digests(whole)
    assert _rows(resumed) == _rows(whole)
    assert "not exact" not in caplog.text
    return caplog.text


def _rows(trainer: Trainer) -> list[dict[str, float]]:
    """The log, without what a clock measures."""
    return [
        {name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("before", "after", "until"),
    [
        ({"max_steps": 6}, {"max_steps": 12}, None),
        ({"max_steps": 8}, {"max_steps": 12}, None),
        ({"max_steps": 12}, {"max_steps": 8}, 6),
        ({"max_steps": 6, "logging_steps": 4}, {"max_steps": 12, "logging_steps": 4}, None),
        ({"max_steps": -1, "num_train_epochs": 2}, {"max_steps": -1, "num_train_epochs": 3}, 4),
        ({"max_steps": -1, "num_train_epochs": 2}, {"max_steps": -1, "num_train_epochs": 3}, None),
        ({"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": -1, "num_train_epochs": 3}, None),
        (
            {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "gradient_accumulation_steps": 2},
            {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "gradient_accumulation_steps": 2},
            None,
        ),
        ({"max_steps": 8, "num_train_epochs": 5}, {"max_steps": -1, "num_train_epochs": 2}, 4),
    ],
    ids=str,
)
def test_a_run_of_another_length_is_exact_whether_it_ended_or_was_broken_off(
    before: dict[str, Any], after: dict[str, Any], until: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "harmless: exact, " in _resumed_as(tmp_path, caplog, before, after, until)


def test_epochs_that_max_steps_overrides_are_no_other_run_under_any_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    linear = {"lr_scheduler_type": "linear"}
    before, after = {"max_steps": 8, "num_train_epochs": 5, **linear}, {"max_steps": 8, "num_train_epochs": 2, **linear}
    assert "num_train_epochs: 5 -> 2 (harmless: exact, " in _resumed_as(tmp_path, caplog, before, after)


LINEAR = {"lr_scheduler_type": "linear"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"max_steps": 12, **CONSTANT}, {"max_steps": 3, **CONSTANT}),
        ({"max_steps": 12, **LINEAR}, {"max_steps": 6, **LINEAR}),
        ({"max_steps": 12, **LINEAR}, {"max_steps": 5, **LINEAR}),
        ({"max_steps": -1, "num_train_epochs": 3, **LINEAR}, {"max_steps": -1, "num_train_epochs": 1, **LINEAR}),
    ],
    ids=str,
)
def test_a_length_that_is_done_already_trains_no_step_and_is_told(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = digests(break_off(new_trainer(tmp_path, LifecycleCallback(), **before), step=6))
    caplog.clear()
    resumed = new_trainer(tmp_path, LifecycleCallback(), **after)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert digests(resumed) == trained
    SHORTER.require_told(caplog.text)
    assert caplog.text.count("not exact") == 1


def test_what_differs_from_a_run_that_has_ended_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = new_trainer(tmp_path, LifecycleCallback())
    ended.train()
    caplog.clear()
    again = new_trainer(tmp_path, LifecycleCallback(), max_grad_norm=0.5)
    again.train(resume_from_checkpoint=True)
    assert digests(again) == digests(ended)
    SHORTER.require_told(caplog.text)


def test_a_length_that_other_differences_have_made_is_refused(tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 3, **CONSTANT}
    break_off(new_trainer(tmp_path, LifecycleCallback(), **epochs), step=6)
    with pytest.raises(ResumeMismatch, match="per_device_train_batch_size: 4 -> 8"):
        new_trainer(tmp_path, LifecycleCallback(), per_device_train_batch_size=8, **epochs).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize("continues", [True, False])
def test_a_program_that_trains_twice_in_one_directory_resumes(*, continues: bool, tmp_path: Path) -> None:
    """The second training has more steps: it is interrupted, and the program is run anew from its begin."""

    def program(directory: Path, *, resume: bool, until: int | None = None) -> Trainer:
        trainer = new_trainer(directory, LifecycleCallback(), max_steps=4, **CONSTANT)
        trainer.train(resume_from_checkpoint=resume)
        trainer = new_trainer(directory, LifecycleCallback(), max_steps=12, **CONSTANT)
        again = continues or resume
        if until is not None:
            return break_off(trainer, step=until, resume=again)
        trainer.train(resume_from_checkpoint=again)
        return trainer

    program(tmp_path / "resumed", resume=False, until=8)
    resumed = program(tmp_path / "resumed", resume=True)
    whole = program(tmp_path / "whole", resume=False)
    assert digests(resumed) == digests(whole)
    assert _rows(resumed) == _rows(whole)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_had_ended_is_made_longer_as_by_trainer_alone_and_the_longer_one_resumes_exactly(
    schedule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"lr_scheduler_type": schedule, "logging_steps": 1}

    def longer(directory: Path, *callbacks: Any) -> Trainer:
        new_trainer(directory, *callbacks, max_steps=4, **settings).train()
        return new_trainer(directory, *callbacks, max_steps=10, **settings)

    stock = longer(tmp_path / "stock")
    stock.train(resume_from_checkpoint=True)
    whole = longer(tmp_path / "whole", LifecycleCallback())
    whole.train(resume_from_checkpoint=True)
    rates = [[row["learning_rate"] for row in _rows(one) if "learning_rate" in row] for one in (stock, whole)]
    assert rates[0] == rates[1]
    assert (
        "not exact: the run had ended at step 4, and a new run continues from there, as with Trainer al" in caplog.text
    )
    assert "max_steps: 4 -> 10" in caplog.text
    break_off(longer(tmp_path / "resumed", LifecycleCallback()), step=7, resume=True)
    caplog.clear()
    resumed = new_trainer(tmp_path / "resumed", LifecycleCallback(), max_steps=10, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)
    assert "not exact" not in caplog.text


def test_a_run_that_had_ended_is_not_continued_over_other_differences(tmp_path: Path) -> None:
    new_trainer(tmp_path, LifecycleCallback(), max_steps=4).train()
    with pytest.raises(ResumeMismatch, match="max_grad_norm"):
        new_trainer(tmp_path, LifecycleCallback(), max_steps=8, max_grad_norm=0.5).train(resume_from_checkpoint=True)


def test_an_evaluation_that_only_the_end_brought_is_found_where_it_steers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**PLATEAU, **BY_STEPS, "eval_steps": 4, "save_steps": 4}
    new_trainer(tmp_path, LifecycleCallback(), max_steps=6, **settings).train()
    new_trainer(tmp_path, LifecycleCallback(), max_steps=12, **settings).train(resume_from_checkpoint=True)
    assert "not exact: the run had ended at step 6" in caplog.text
    assert "would have been at other steps" in caplog.text


def test_a_longer_run_can_be_made_longer_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_off(new_trainer(tmp_path / "resumed", LifecycleCallback(), max_steps=6, warmup_steps=8), step=4)
    again = new_trainer(tmp_path / "resumed", LifecycleCallback(), max_steps=10, warmup_steps=8)
    break_off(again, step=6, resume=True)
    resumed = new_trainer(tmp_path / "resumed", LifecycleCallback(), max_steps=12, warmup_steps=8)
    resumed.train(resume_from_checkpoint=True)
    whole = new_trainer(tmp_path / "whole", LifecycleCallback(), max_steps=12, warmup_steps=8)
    whole.train()
    assert digests(resumed) == digests(whole)
    for length in (10, 14):  # the eighth step's rate was set by a schedule of 12, on the way down
        break_off(new_trainer(tmp_path / str(length), LifecycleCallback(), max_steps=length, warmup_steps=3), step=6)
        with pytest.raises(ResumeMismatch, match="different learning rates until step 6"):
            new_trainer(tmp_path / str(length), LifecycleCallback(), max_steps=length + 2, warmup_steps=3).train(
                resume_from_checkpoint=True
            )


def test_what_went_on_under_another_schedule_is_not_exact_with_the_first_length(tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), max_steps=12), step=4)
    break_off(new_trainer(tmp_path, LifecycleCallback(strict=False), max_steps=20), step=8, resume=True)
    with pytest.raises(ResumeMismatch, match="different learning rates until step 8"):
        new_trainer(tmp_path, LifecycleCallback(), max_steps=12).train(resume_from_checkpoint=True)


def test_a_callback_added_late_cannot_tell_and_says_so(tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), max_steps=6, **CONSTANT))
    late = new_trainer(tmp_path, max_steps=12, **CONSTANT)
    late.add_callback(LifecycleCallback())
    with pytest.raises(ResumeMismatch, match="it is unknown whether the schedule \\(LambdaLR\\) depends on it"):
        late.train(resume_from_checkpoint=True)


def test_judging_the_schedule_moves_neither_it_nor_random_numbers(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = LambdaLR(optimizer, _noisy)
    args = TrainingArguments(str(tmp_path))
    state = TrainerState(max_steps=6)
    dry = DryRun.of(scheduler, optimizer)
    part = Schedule(None)
    event = Event(args, state, TrainerControl(), {"lr_scheduler": scheduler, "optimizer": optimizer})
    part.on_train_begin(event)
    for step in range(1, 4):
        optimizer.step()
        scheduler.step()
        state.global_step = step
        part.on_step_end(event)
    resumed = Schedule(dry)
    resumed.load_state_dict(part.state_dict())
    state.max_steps = 12
    before = random.getstate(), scheduler.state_dict()
    (judged,) = resumed.admit(
        [Difference("max_steps", 6, 12, Grade.BREAKS)], args, state, optimizer, scheduler, NOTHING, list
    )
    assert "different learning rates" in judged.why
    assert (random.getstate(), scheduler.state_dict()) == before


def test_learning_rate_has_no_effect_also_where_an_engine_loads_the_optimizer_before_the_schedule(
    tmp_path: Path,
) -> None:
    def made(rate: float) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate)
        return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 8)

    state, part, (optimizer, scheduler) = TrainerState(max_steps=8), Schedule(None), made(0.1)
    event = Event(TrainingArguments(str(tmp_path)), state, TrainerControl(), {})
    event.more.update(lr_scheduler=scheduler, optimizer=optimizer)
    part.on_train_begin(event)
    for step in range(1, 4):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        state.global_step = step
        part.on_step_end(event)
    again, schedule = made(0.5)
    again.load_state_dict(optimizer.state_dict())
    resumed = Schedule(DryRun.of(schedule, again))
    schedule.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(part.state_dict())
    assert resumed.keeps_rates(schedule, again)


class ReadsLength(TrainerCallback):
    """Weighs by how much is done."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weight = state.global_step / state.max_steps


def test_what_reads_the_length_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_off(new_trainer(tmp_path, ReadsLength(), LifecycleCallback(), **CONSTANT))
    new_trainer(tmp_path, ReadsLength(), LifecycleCallback(), max_steps=12, **CONSTANT).train(
        resume_from_checkpoint=True
    )
    READ_ELSEWHERE.require_told(caplog.text)
    assert "ReadsLength reads" in caplog.text


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        (LONGER, {}),
        (LONGER_UNKNOWN, {"kind": _asking(lambda trainer: float(trainer.model.training))}),
        (LONGER_EVALUATIONS, {**PLATEAU, **BY_STEPS, "eval_steps": 0.25}),
    ],
    ids=["linear", "asking", "evaluations"],
)
def test_limits_are_told(limit: Limit, settings: dict[str, Any], tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), **settings))
    with pytest.raises(ResumeMismatch) as raised:
        new_trainer(tmp_path, LifecycleCallback(), max_steps=12, **settings).train(resume_from_checkpoint=True)
    limit.require_told(str(raised.value))
