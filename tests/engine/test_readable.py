"""What a host cannot load is named before it loads: files of another kind, other tensors, other groups."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_lifecycle import ResumeMismatch
from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
from hf_lifecycle.checkpoint.files.statefile import write_tree
from hf_lifecycle.engine.readable import require_readable, unlike_groups, unlike_shapes, unlike_tensors
from hf_lifecycle.state.fingerprint import leaf_digests

FILES = {
    "plain": "model.safetensors",
    "sharded": "pytorch_model_fsdp_0/.metadata",
    "full": "pytorch_model_fsdp.bin",
    "zero 2": "global_step4/mp_rank_00_model_states.pt",
    "zero 3": "pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt",
}


def accelerator(kind: str) -> Any:
    """As much of one as is looked at."""
    form = {"sharded": "SHARDED_STATE_DICT", "full": "FULL_STATE_DICT"}.get(kind)
    engine = SimpleNamespace(hf_ds_config=SimpleNamespace(is_zero3=lambda: kind == "zero 3"))
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type=SimpleNamespace(name=form)))
    state.deepspeed_plugin = engine
    value = {"plain": "NO", "zero 2": "DEEPSPEED", "zero 3": "DEEPSPEED"}.get(kind, "FSDP")
    return SimpleNamespace(distributed_type=SimpleNamespace(value=value), state=state)


def checkpoint_with(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    rank_file(folder, 0).parent.mkdir(parents=True)
    write_tree(rank_file(folder, 0), {"step": 4}, kind=LOOP)
    return folder


@pytest.mark.parametrize("saved", FILES)
@pytest.mark.parametrize("present", FILES)
def test_files_of_another_kind_are_refused_and_both_kinds_are_named(saved: str, present: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_with(tmp_path, FILES[saved])
    if saved == present:
        require_readable(checkpoint, accelerator(present), kind=LOOP)
        return
    with pytest.raises(ResumeMismatch) as raised:
        require_readable(checkpoint, accelerator(present), kind=LOOP)
    said = str(raised.value)
    for kind, words in (
        ("sharded", "state_dict_type=SHARDED_STATE_DICT"),
        ("full", "state_dict_type=FULL_STATE_DICT"),
        ("zero 2", "DeepSpeed without ZeRO-3"),
        ("zero 3", "DeepSpeed with ZeRO-3"),
    ):
        assert (words in said) == (kind in (saved, present))
    assert ("or with save_only_model=True" in said) == (saved == "plain")
    assert ("torchrun or accelerate launch" in said) == (present == "plain")


def test_weights_that_stock_reads_are_not_refused(tmp_path: Path) -> None:
    """Trainer's model file beside an engine's; a checkpoint that was converted for any stage; one of stock's alone."""
    beside = checkpoint_with(tmp_path / "beside", FILES["zero 2"], FILES["plain"])
    require_readable(beside, accelerator("plain"), kind=LOOP)
    converted = checkpoint_with(tmp_path / "converted", FILES["zero 2"], "latest_universal")
    require_readable(converted, accelerator("zero 3"), kind=LOOP)
    stock = checkpoint_with(tmp_path / "stock", FILES["sharded"])
    rank_file(stock, 0).unlink()
    require_readable(stock, accelerator("full"), kind=LOOP)


class Renaming(torch.nn.Linear):
    """Takes other names than it has."""

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_tensors_that_one_side_lacks_are_named() -> None:
    small, large = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 2)
    large[1] = torch.nn.Linear(2, 2)
    assert unlike_tensors({"": small}, names_of(small)) == []
    assert unlike_tensors({"": large}, names_of(small)) == ["1.bias, 1.weight: here, but not in the checkpoint"]
    assert unlike_tensors({"": small}, names_of(large)) == ["1.bias, 1.weight: in the checkpoint, but not here"]


def test_tied_parameter_is_known_by_both_names_and_a_model_that_loads_by_itself_is_skipped() -> None:
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    saved = names_of(tied)
    tied[1].weight = tied[0].weight
    assert unlike_tensors({"": tied}, saved) == []
    assert unlike_tensors({"": torch.nn.Sequential(Renaming(2, 2))}, ["other"]) == []


def test_other_shapes_are_named_whatever_wraps_the_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"module.weight": torch.zeros(3, 2), "module.bias": torch.zeros(2)}, file)
    model = torch.nn.Linear(2, 2)
    expected = ["model 0.weight has the shape [3, 2] in the checkpoint, and [2, 2] here"]
    assert unlike_shapes(model, file, "model 0.") == expected
    assert unlike_shapes(torch.nn.LazyLinear(2), file) == []
    assert unlike_shapes(model, tmp_path / "none") == []


def test_groups_of_other_sizes_are_named() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    one = torch.optim.SGD(parameters)
    two = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}])

    def names(sizes: list[int]) -> list[str]:
        every = [f"optimizer.param_groups.{g}.params.{n}" for g, size in enumerate(sizes) for n in range(size)]
        return [*every, *(f"optimizer.param_groups.0.{name}" for name in one.defaults)]

    assert unlike_groups({"optimizer": one}, names([3])) == []
    assert unlike_groups({"optimizer": two}, names([1, 2])) == []
    (said,) = unlike_groups({"optimizer": two}, names([3]))
    assert said == "optimizer has groups of 1, 2 parameters, and had one group of 3 when it was saved"
    assert unlike_groups({"optimizer": object()}, names([3])) == []


@pytest.mark.parametrize(
    ("saved", "present", "lacking"),
    [
        ("AdamW", "SGD", "momentum, dampening"),
        ("AdamW", "RMSprop", "alpha"),
        ("SGD", "AdamW", "betas, eps"),
        ("Adam", "AdamW", ""),
        ("AdamW", "Adam", ""),
        ("SGD", "SGD", ""),
    ],
)
def test_settings_that_a_step_reads_and_were_not_saved_are_named(saved: str, present: str, lacking: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    was, now = (getattr(torch.optim, kind)([parameter], lr=0.1) for kind in (saved, present))
    names = leaf_digests(was.state_dict(), "optimizer")
    said = f"optimizer is of the class {present}, which cannot step with what was saved: no {lacking}"
    assert unlike_groups({"optimizer": now}, names) == ([said] if lacking else [])
    older = [
        name for name in names if not name.endswith((".maximize", ".foreach", ".fused", ".decoupled_weight_decay"))
    ]  # torch adds them
    assert unlike_groups({"optimizer": was}, older) == []


@pytest.mark.parametrize(
    ("saved", "present", "lacking"),
    [
        ("Adam", "Adamax", "exp_inf"),
        ("NAdam", "RAdam", ""),
        ("RAdam", "NAdam", "momentum_decay"),  # a setting
        ("Adam", "SparseAdam", ""),
    ],
)
def test_state_that_a_step_reads_and_was_not_saved_is_named(saved: str, present: str, lacking: str) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (2, 2))]
    was, now = (getattr(torch.optim, kind)(parameters, lr=0.1) for kind in (saved, present))
    for one in parameters[1:]:  # the first is frozen
        one.grad = torch.ones_like(one)
    was.step()
    before = torch.get_rng_state()
    told = unlike_groups({"optimizer": now}, leaf_digests(was.state_dict(), "optimizer"))
    assert torch.equal(torch.get_rng_state(), before)
    said = f"optimizer is of the class {present}, which cannot step with what was saved: no {lacking}"
    assert told == ([said] if lacking else [])


OF_TORCH = [
    one for one in vars(torch.optim).values() if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)
]


@pytest.mark.parametrize("kind", [one for one in OF_TORCH if one is not torch.optim.Optimizer])
def test_optimizer_takes_what_one_of_its_class_has_saved(kind: Any) -> None:
    shape = (2, 2) if kind.__name__ == "Muon" else (2,)
    was, now = (kind([torch.nn.Parameter(torch.zeros(shape))], lr=0.1) for _ in range(2))
    for saving in (was, copy.deepcopy(was)):
        for loading in (now, copy.deepcopy(now)):  # a copy, as a load, adds to the defaults
            loading.load_state_dict(saving.state_dict())
            assert unlike_groups({"optimizer": loading}, leaf_digests(saving.state_dict(), "optimizer")) == []


@pytest.mark.parametrize("kind", [one for one in OF_TORCH if one.__name__ not in ("Optimizer", "LBFGS", "SparseAdam")])
@pytest.mark.parametrize("frozen", [0, 1])
def test_optimizer_takes_the_state_that_one_of_its_class_has_saved(kind: Any, frozen: int) -> None:
    shapes = ((2, 2), (3, 3)) if kind.__name__ == "Muon" else ((2,), (2, 2))
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    was = kind(parameters, lr=0.1)
    parameters[1 - frozen].grad = torch.ones_like(parameters[1 - frozen])
    was.step()
    assert unlike_groups({"optimizer": kind(parameters)}, leaf_digests(was.state_dict(), "optimizer")) == []
