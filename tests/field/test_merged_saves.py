"""LoRA that is merged only while a checkpoint is saved goes on unmerged, with the bits of the run without a break."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_lifecycle import LifecycleCallback
from tests.trainer.runs import Net, new_trainer, require_same_end


class MergedWhileSaving(Trainer):
    """Saves with the adapter merged."""

    def _save_checkpoint(self, *given: Any, **named: Any) -> Any:
        self.model.merge_adapter()
        try:
            return super()._save_checkpoint(*given, **named)
        finally:
            self.model.unmerge_adapter()


def _adapted() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(Net(), LoraConfig(r=2, target_modules=["layers.0"], init_lora_weights=False))


def test_adapter_that_is_merged_while_saving_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(folder: str) -> Trainer:
        settings: dict[str, Any] = {"label_names": ["labels"], "remove_unused_columns": False}
        return new_trainer(tmp_path / folder, LifecycleCallback(), model=_adapted(), kind=MergedWhileSaving, **settings)

    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        require_same_end(make)
    assert "not exact" not in caplog.text
