"""The live tensors of a model are those that torch names, in its order."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForMaskedLM

from hf_lifecycle.saving.snapshots.live import live_tensors


def test_live_tensors_are_those_that_torch_names_tied_ones_and_empty_places_included() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    for model in (
        BertForMaskedLM(config),  # tied
        torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2, bias=False), torch.nn.Sequential()),
        torch.nn.Linear(2, 2),
    ):
        shared = torch.nn.ModuleDict({"first": model, "second": model})
        shared.register_module("none", None)
        shared.register_buffer("nothing", None)
        for one in (model, shared):
            named = [*one.named_parameters(remove_duplicate=False), *one.named_buffers(remove_duplicate=False)]
            found = list(live_tensors(one).items())
            assert [name for name, _ in found] == [name for name, _ in named]
            assert all(own is theirs for (_, own), (_, theirs) in zip(found, named, strict=True))
