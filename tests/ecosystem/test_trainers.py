"""Adapters of PEFT, preference training of TRL and tables of datasets resume as they would have gone on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from resume.cases.tiny import Rows, regression, sentences, tokenizer
from resume.harness import Attempt, Case, missing_packages, run_broken, run_unbroken
from resume.outcome import compare
from transformers import DataCollatorForSeq2Seq, Trainer

from hf_lifecycle.errors import ResumeMismatch


def _adapters(run: Attempt, *, active: list[str], kind: type[Trainer] = Trainer) -> Trainer:
    """A language model with three adapters, of which those in ``active`` are trained."""
    from peft import LoraConfig, get_peft_model

    lora: dict[str, Any] = {"lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(_llama(), LoraConfig(r=4, **lora))
    for name, rank in (("second", 2), ("third", 3)):
        model.add_adapter(name, LoraConfig(r=rank, init_lora_weights=False, **lora))
    model.base_model.set_adapter(active)
    words = tokenizer()
    rows = [{"input_ids": words(text)["input_ids"], "labels": words(text)["input_ids"]} for text in sentences()]
    return kind(
        model=model,
        args=run.args(),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(words),
        callbacks=run.callbacks(),
    )


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=32, **shape, attention_dropout=0.2, max_position_embeddings=32, pad_token_id=0)
    return LlamaForCausalLM(config)


def _dpo(run: Attempt, *, adapter: bool = False, **settings: Any) -> Trainer:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    prompts, good, bad = (sentences(seed=seed) for seed in (3, 4, 5))
    return DPOTrainer(
        model=_llama(),
        ref_model=None if adapter else _llama(),
        args=run.args(DPOConfig, max_length=32, logging_steps=3, bf16=False, **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"]) if adapter else None,
        callbacks=run.callbacks(),
    )


def _sft_stream(run: Attempt) -> Trainer:
    """SFT with an adapter on a stream: tokenized in batches and packed by TRL."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    stream = Dataset.from_dict({"text": sentences(80)}).to_iterable_dataset(num_shards=2)
    return SFTTrainer(
        model=_llama(),
        args=run.args(SFTConfig, max_length=16, dataset_text_field="text", logging_steps=3, bf16=False),
        train_dataset=stream,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"]),
        callbacks=run.callbacks(),
    )


def _table(run: Attempt) -> Trainer:
    from datasets import Dataset

    rows = Rows()
    table = Dataset.from_dict({"x": rows.x.tolist(), "labels": rows.labels.tolist()})
    return regression(run, train=table.map(lambda row: {"x": [2 * value for value in row["x"]]}).with_format("torch"))


PEFT, TRL = ("peft",), ("trl", "peft", "datasets")
CASES = (
    Case(
        "adapters_second",
        "three adapters, the second is trained",
        lambda r: _adapters(r, active=["second"]),
        needs=PEFT,
    ),
    Case("adapters_default", "three adapters, the first", lambda r: _adapters(r, active=["default"]), needs=PEFT),
    Case("dpo", "DPO with a reference model", _dpo, needs=TRL),
    Case("dpo_lora", "DPO with an adapter, its base as the reference", lambda r: _dpo(r, adapter=True), needs=TRL),
    Case("dpo_precomputed", "DPO, reference precomputed", lambda r: _dpo(r, precompute_ref_log_probs=True), needs=TRL),
    Case("sft_stream", "SFT with an adapter on a stream", _sft_stream, needs=TRL),
    Case("table", "a datasets table that was mapped", _table, needs=("datasets",)),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_resumed_run_equals_unbroken_run(case: Case, tmp_path: Path) -> None:
    missing = missing_packages(case)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    unbroken = run_unbroken(case, tmp_path / "unbroken" / "run", "callback")
    resumed = run_broken(case, tmp_path / "broken" / "run", "callback")
    assert compare(unbroken, resumed) == []


class ActivatesBoth(Trainer):
    """Trainer activates one adapter when it resumes, before it makes the optimizer."""

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        self.model.base_model.set_adapter(["second", "default"])
        return super().create_optimizer(*given, **named)


@pytest.mark.slow
def test_several_adapters_that_are_trained_at_once_are_named_and_resume_where_a_subclass_activates_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer activates the first of them alone when it resumes, and the optimizer's state no longer fits."""

    def case(kind: type[Trainer]) -> Case:
        return Case("adapters_both", "two", lambda run: _adapters(run, active=["second", "default"], kind=kind))

    if missing_packages(CASES[0]):
        pytest.skip("needs peft")
    unbroken = run_unbroken(case(ActivatesBoth), tmp_path / "unbroken" / "run", "callback")
    assert compare(unbroken, run_broken(case(ActivatesBoth), tmp_path / "broken" / "run", "callback")) == []
    assert "trained at once" not in caplog.text
    with pytest.raises(ResumeMismatch, match="several adapters that are trained at once, Trainer activates one"):
        run_broken(case(Trainer), tmp_path / "run", "callback")
    assert "adapters default, second are trained at once" in caplog.text
