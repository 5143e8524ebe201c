"""Trainers of TRL that generate in advance, or whose reference model follows the policy, resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.state.fingerprint import leaf_digests
from tests.resume.cases.tiny import sentences, tokenizer
from tests.trainer.runs import break_off, digests, mix_generators

pytest.importorskip("trl")
pytest.importorskip("datasets")

_SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 1,
    "logging_steps": 2,
    "learning_rate": 1e-2,
}


def policy() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(7)
        shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, **shape, pad_token_id=0, bos_token_id=2, eos_token_id=2))


def policy_in(folder: Path) -> Any:
    """The same, from files, where the trainer looks for its reference."""
    from transformers import GPT2LMHeadModel

    policy().save_pretrained(folder.parent / "policy")
    return GPT2LMHeadModel.from_pretrained(folder.parent / "policy")


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(one))) for one in completions]


def grpo(folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    mix_generators()
    own = {"max_steps": 7, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    words = tokenizer()
    words.eos_token = words.pad_token
    return GRPOTrainer(
        model=policy_in(folder),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **{**_SETTINGS, **own, **settings}),
        train_dataset=Dataset.from_dict({"prompt": sentences(8)}),
        processing_class=words,
        callbacks=[LifecycleCallback()],
    )


def dpo(folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    mix_generators()
    prompts, good, bad = (sentences(8, seed=seed) for seed in (3, 4, 5))
    own = {"max_steps": 7, "per_device_train_batch_size": 4, "max_length": 32}
    return DPOTrainer(
        model=policy(),
        ref_model=policy(),
        args=DPOConfig(output_dir=str(folder), **{**_SETTINGS, **own, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad}),
        processing_class=tokenizer(),
        callbacks=[LifecycleCallback()],
    )


def outcome(trainer: Any) -> Any:
    clocks = ("runtime", "per_second", "step_time", "flos")
    rows = [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in trainer.state.log_history]
    reference = getattr(trainer, "ref_model", None)
    return digests(trainer), {} if reference is None else leaf_digests(reference.state_dict(), "reference"), rows


SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
KINDS = {
    "several iterations": (grpo, {"num_iterations": 3}),
    "several steps of a generation": (grpo, {"steps_per_generation": 3}),
    "accumulated, both": (grpo, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}),
    "reference that follows": (grpo, {**SYNC, "beta": 0.1, "num_iterations": 2}),
    "preferences, reference that follows": (dpo, SYNC),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_exactly_in_the_midst_of_a_generation(kind: str, tmp_path: Path) -> None:
    make, settings = KINDS[kind]
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    for step in (2, 5):
        break_off(make(tmp_path / str(step), **settings), at="on_step_end", step=step)
        resumed = make(tmp_path / str(step), **settings)
        resumed.train(resume_from_checkpoint=True)
        assert outcome(resumed) == outcome(whole)


class Anneals(TrainerCallback):
    """Sets an attribute that the trainer of TRL has set as it was made."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.beta *= 0.5


@pytest.mark.slow
def test_attribute_of_a_trainer_that_a_users_code_changes_resumes_exactly(tmp_path: Path) -> None:
    def make(name: str) -> Any:
        trainer, callback = dpo(tmp_path / name), Anneals()
        callback.trainer = trainer
        trainer.callback_handler.callbacks.insert(0, callback)
        return trainer

    whole = make("whole")
    whole.train()
    break_off(make("broken"), at="on_step_end", step=4)
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.beta, outcome(resumed)) == (whole.beta, outcome(whole))
