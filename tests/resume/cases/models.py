"""Cases of trainers and models from elsewhere: sequence to sequence with generation, LoRA, TRL."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from ..harness import Attempt, Case
from .tiny import bert, labelled_sentences, sentences, tokenizer

__all__ = ["CASES"]


def _token_count(prediction: Any) -> dict[str, float]:
    return {"tokens": float((prediction.predictions > 0).sum())}


def _seq2seq(run: Attempt, **settings: Any) -> Trainer:
    words = tokenizer()
    torch.manual_seed(7)
    config = T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.generation_config.do_sample = True
    rows = [{**words(text), "labels": words(text)["input_ids"][::-1]} for text in sentences()]
    for row in rows:
        row.pop("token_type_ids", None)
    return Seq2SeqTrainer(
        model=model,
        args=run.args(
            Seq2SeqTrainingArguments,
            **{
                "predict_with_generate": True,
                "generation_max_length": 8,
                "eval_strategy": "steps",
                "eval_steps": 3,
                **settings,
            },
        ),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=DataCollatorForSeq2Seq(words, model=model),
        compute_metrics=_token_count,
        processing_class=words,
        callbacks=run.callbacks(),
    )


def _lora(run: Attempt) -> Trainer:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules=["query", "value"], task_type="SEQ_CLS")
    words = tokenizer()
    return Trainer(
        model=get_peft_model(bert("BertForSequenceClassification"), lora),
        args=run.args(),
        train_dataset=labelled_sentences(),
        processing_class=words,
        callbacks=run.callbacks(),
    )


def _sft(run: Attempt) -> Trainer:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(7)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=32, **shape, attention_dropout=0.2, max_position_embeddings=32, pad_token_id=0)
    return SFTTrainer(
        model=LlamaForCausalLM(config),
        args=run.args(SFTConfig, max_length=16, dataset_text_field="text", logging_steps=3, bf16=False),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        processing_class=tokenizer(),
        callbacks=run.callbacks(),
    )


CASES = (
    Case("seq2seq_generate", "Seq2SeqTrainer that samples in its evaluations", _seq2seq),
    Case("seq2seq_generate_2", "the same with 2 workers", lambda run: _seq2seq(run, dataloader_num_workers=2)),
    Case("lora", "PEFT LoRA with dropout", _lora, needs=("peft",)),
    Case("sft", "TRL SFTTrainer with dropout", _sft, needs=("trl", "peft", "datasets")),
)
