"""Weights that Trainer loses on resume come back, whatever the architecture renames or splits when it saves.

The scan saves and loads a tiny model of every architecture that can be built; the training tests break off and resume
real runs. The resumed model begins with other weights than the run did, so that all of them have to come from the
checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, default_data_collator

from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.resume.repair import model_from_checkpoint

from .architecture_scan import Scan, differing, scan, stock_load
from .harness import Arm, Attempt, Break, Case, run_broken, run_unbroken
from .outcome import Outcome, compare
from .tiny_models import Architecture, CannotBuild, build, find_architectures, quiet
from .tiny_rows import rows_for

ARCHITECTURES = {architecture.name: architecture for architecture in find_architectures()}
SHARES, TRAINED = 6, 24  # parts of one loop over all, of which make test runs some
pytestmark = pytest.mark.xdist_group("architectures")  # by one process, which scans each once

# Stock Trainer loses tensors of each of these, in the newest version tested; the oldest does not rename all of them.
NAMED = ("vit", "mixtral", "qwen3_moe", "gpt_neox", "llava", "swin")
ALSO_LOST = ("beit", "deepseek_v2", "jamba", "minimax", "nemotron_h", "olmoe", "qwen2_vl")
NOT_LOST = ("bert", "gpt2", "llama", "resnet", "t5")

# What even the class's own from_pretrained cannot read back from what its save_pretrained wrote, and why.
UNREPAIRABLE = {
    "shieldgemma2": "Gemma3ForConditionalGeneration cannot read its own keys; ShieldGemma2ForImageClassification can",
}
# Trainer reads the checkpoint's config.json with the base class, which refuses the layer types of this one.
NOT_RESUMED_BY_TRAINER = ("deepseek_v4",)
BUILDABLE = 300  # of the oldest version; the newest has over 500


@functools.cache
def scanned(name: str) -> Scan:
    """The scan of one architecture, made once a process."""
    return scan(ARCHITECTURES[name])


def _case(name: str, *, settings: dict[str, Any] | None = None, change: Callable[..., Any] | None = None) -> Case:
    """Three steps, a save after the second, broken off there; ``change`` wraps the model (LoRA, say)."""
    architecture = ARCHITECTURES[name]
    defaults = {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}

    def make(run: Attempt) -> Trainer:
        model = build(architecture, seed=run.options.get("seed", 0))
        rows = rows_for(model, architecture.head)
        assert rows is not None, f"no rows to train {name} on"
        args = run.args(**{**defaults, "per_device_train_batch_size": 2, **(settings or {})})
        trained = model if change is None else change(model)
        return Trainer(trained, args, train_dataset=rows, eval_dataset=rows, callbacks=run.callbacks())

    return Case(name, "", make, breaks=(Break(step=2),), resumed_options={"seed": 1})


def _train(case: Case, folder: Path, arm: Arm) -> tuple[Outcome, Outcome]:
    with quiet():
        return run_unbroken(case, folder / "unbroken", arm), run_broken(case, folder / "broken", arm)


def _available(name: str) -> str:
    if name not in ARCHITECTURES:
        pytest.skip(f"this version of transformers has no {name}")
    return name


@pytest.mark.parametrize("share", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(1, SHARES))])
def test_every_architecture_that_loses_weights_is_repaired(share: int) -> None:
    built, unrepaired = 0, {}
    for name in sorted(ARCHITECTURES)[share::SHARES]:
        try:
            found = scanned(name)
        except CannotBuild:
            continue
        built += 1
        if found.unrepaired and name not in UNREPAIRABLE:
            unrepaired[name] = (found.unrepaired, found.cause)
    assert unrepaired == {}
    assert built * SHARES >= BUILDABLE


@pytest.mark.parametrize("name", NAMED)
def test_stock_loading_of_the_named_architectures_is_as_reported(name: str) -> None:
    found = scanned(_available(name))
    if not found.lost:
        pytest.skip("this version of transformers saves it under its own names")
    assert not found.unrepaired


def _exact_after_a_break(name: str, folder: Path) -> None:
    unbroken, resumed = _train(_case(_available(name)), folder, "callback")
    assert compare(unbroken, resumed) == []


@pytest.mark.core
def test_vit_resumes_exactly(tmp_path: Path) -> None:
    _exact_after_a_break("vit", tmp_path)


@pytest.mark.core
def test_mixtral_resumes_exactly(tmp_path: Path) -> None:
    _exact_after_a_break("mixtral", tmp_path)


@pytest.mark.core
def test_qwen3_moe_resumes_exactly(tmp_path: Path) -> None:
    _exact_after_a_break("qwen3_moe", tmp_path)


@pytest.mark.core
def test_gpt_neox_resumes_exactly(tmp_path: Path) -> None:
    _exact_after_a_break("gpt_neox", tmp_path)


@pytest.mark.core
def test_llava_resumes_exactly_with_images(tmp_path: Path) -> None:
    _exact_after_a_break("llava", tmp_path)


@pytest.mark.core
def test_swin_resumes_exactly(tmp_path: Path) -> None:
    _exact_after_a_break("swin", tmp_path)


@pytest.mark.parametrize("name", [*ALSO_LOST, *NOT_LOST])
def test_architecture_resumes_exactly(name: str, tmp_path: Path) -> None:
    _exact_after_a_break(name, tmp_path)


def _can_be_trained(name: str) -> bool:
    """Whether a tiny model of it computes a loss: many a tiny configuration builds a model that cannot run."""
    with quiet():
        model = build(ARCHITECTURES[name]).train()
        model.config.use_cache = False  # as Trainer has it
        try:
            rows = rows_for(model, ARCHITECTURES[name].head)
            loss = None if rows is None else model(**default_data_collator(rows[:2])).loss
        except Exception:  # noqa: BLE001 - each such model fails in a way of its own
            return False
    return loss is not None and loss.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(1, TRAINED))])
def test_every_losing_architecture_that_can_be_trained_resumes_exactly(share: int, tmp_path: Path) -> None:
    problems = {}
    for name in sorted(ARCHITECTURES)[share::TRAINED]:
        try:
            losing = name not in (*UNREPAIRABLE, *NOT_RESUMED_BY_TRAINER) and bool(scanned(name).lost)
        except CannotBuild:
            continue
        if losing and _can_be_trained(name):
            problems[name] = compare(*_train(_case(name), tmp_path / name, "callback"))
    assert {name: lines for name, lines in problems.items() if lines} == {}
    assert problems or share  # of the few in another part, it may be that none can be trained


@pytest.mark.parametrize("name", ["vit", "gpt_neox"])
def test_stock_trainer_does_not_end_with_the_same_weights(name: str, tmp_path: Path) -> None:
    if not scanned(name).lost:
        pytest.skip("this version of transformers saves it under its own names")
    unbroken, resumed = _train(_case(name), tmp_path, "stock")
    assert any(problem.startswith("weights:") for problem in compare(unbroken, resumed))


@pytest.mark.parametrize("name", ["bert", "vit", "mixtral"])
def test_training_is_deterministic_without_a_break(name: str, tmp_path: Path) -> None:
    with quiet():
        first, second = (run_unbroken(_case(name), tmp_path / str(number), "callback") for number in (1, 2))
    assert compare(first, second) == []


@pytest.mark.parametrize("name", ["vit", "gpt_neox"])
def test_best_model_at_end_has_the_bits_of_the_best_checkpoint(name: str, tmp_path: Path) -> None:
    # The greatest loss counts as the best, so that the best checkpoint is not the last.
    settings = {
        "max_steps": 4,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    made: list[PreTrainedModel] = []
    case = _case(name, settings=settings, change=lambda model: made.append(model) or model)
    with quiet():
        outcome = run_unbroken(case, tmp_path, "callback")
        best = tmp_path / outcome.parts["progress"]["best_checkpoint"]
        assert best.name != "checkpoint-4"
        expected = type(made[0]).from_pretrained(best)
    assert differing(expected, made[0]) == []


def test_lora_on_gpt_neox_resumes_exactly(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def with_lora(model: PreTrainedModel) -> Any:
        config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["query_key_value"], task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            return peft.get_peft_model(model, config)

    # The base weights are the user's to bring, the same each time; the adapter's come from the checkpoint.
    case = _case("gpt_neox", change=with_lora)
    same_base = Case(case.name, "", case.build, breaks=case.breaks)
    unbroken, resumed = _train(same_base, tmp_path, "callback")
    assert compare(unbroken, resumed) == []


@pytest.mark.parametrize("name", sorted(UNREPAIRABLE))
def test_what_cannot_be_repaired_is_refused_by_name(name: str, tmp_path: Path) -> None:
    try:
        found = scanned(_available(name))
    except CannotBuild as error:
        pytest.skip(str(error))
    if not found.unrepaired:
        pytest.skip("this version of transformers reads what it saves")
    if not _can_be_trained(name):
        pytest.skip("no loss can be computed with a tiny model of it")
    with pytest.raises(ResumeMismatch) as refused:
        _train(_case(name), tmp_path, "callback")
    told = "; ".join(refused.value.problems)
    shown = min(3, len(found.unrepaired))
    assert sum(tensor in told for tensor in found.unrepaired) >= shown
    assert len(found.unrepaired) == shown or f"{len(found.unrepaired) - shown} more differ" in told


@pytest.mark.parametrize("name", NOT_RESUMED_BY_TRAINER)
def test_trainer_itself_still_refuses_to_resume(name: str, tmp_path: Path) -> None:
    with pytest.raises(StrictDataclassError, match="layer_types"):
        _train(_case(_available(name)), tmp_path, "stock")


def test_repair_leaves_alone_what_was_not_lost(tmp_path: Path) -> None:
    with quiet():
        saved, other = build(ARCHITECTURES["vit"], seed=0), build(ARCHITECTURES["vit"], seed=1)
        saved.save_pretrained(tmp_path)
        kept = other.classifier.weight.detach().clone()
        assert model_from_checkpoint(other, tmp_path, ["vit.layernorm.weight"]) is None
    assert torch.equal(other.classifier.weight, kept)


def test_checkpoint_holds_every_tensor_under_some_name(tmp_path: Path) -> None:
    with quiet():
        model, other = build(ARCHITECTURES["vit"], seed=0), build(ARCHITECTURES["vit"], seed=1)
        model.save_pretrained(tmp_path)
        stock_load(other, tmp_path)
    held = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert held == sum(parameter.numel() for parameter in model.parameters())


def test_an_architecture_that_cannot_be_built_says_why() -> None:
    with pytest.raises(CannotBuild, match=r"parameters after shrinking|Error"):
        build(Architecture("timm_wrapper", "IMAGE_CLASSIFICATION", "TimmWrapperForImageClassification"))
