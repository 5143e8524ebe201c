"""How a run begins again: where from, what is reported, and what is refused or warned of."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.files.additions import rank_file
from hf_lifecycle.errors import ResumeMismatch, StateFileError, StateMismatch, UnsafeStateError

from .runs import Rows, Stream, break_off, changed_state, digests, new_trainer, reseal, saved_run


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """What the package said since it was last asked, as (level, message)."""
    with caplog.at_level(logging.INFO, logger="hf_lifecycle"):

        def said(level: int) -> list[str]:
            return [
                record.getMessage()
                for record in caplog.records
                if record.name.startswith("hf_lifecycle") and record.levelno == level
            ]

        yield said


def resume(output_dir: Path, callback: LifecycleCallback | None = None, *, path: Any = True, **settings: Any) -> Any:
    trainer = new_trainer(output_dir, callback or LifecycleCallback(), **settings)
    trainer.train(resume_from_checkpoint=path)
    return trainer


def whole(output_dir: Path, **settings: Any) -> dict[str, str]:
    trainer = new_trainer(output_dir, LifecycleCallback(), **settings)
    trainer.train()
    return digests(trainer)


# Where from.


def test_resumes_from_what_train_was_given(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "a")
    assert digests(resume(tmp_path / "b", path=str(checkpoint))) == whole(tmp_path / "c")


def test_resumes_from_a_renamed_checkpoint_in_a_moved_directory(tmp_path: Path) -> None:
    shutil.move(saved_run(tmp_path / "a"), tmp_path / "kept")
    assert digests(resume(tmp_path / "b", path=str(tmp_path / "kept"))) == whole(tmp_path / "c")


def test_resumes_from_an_older_checkpoint_than_the_last(tmp_path: Path) -> None:
    saved_run(tmp_path / "a")
    assert digests(resume(tmp_path / "a", path=str(tmp_path / "a" / "checkpoint-2"))) == whole(tmp_path / "c")


def test_the_path_in_the_arguments_counts(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "a")
    trainer = new_trainer(tmp_path / "b", LifecycleCallback(), resume_from_checkpoint=str(checkpoint))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert digests(trainer) == whole(tmp_path / "c")


def test_resume_from_is_looked_at_first(tmp_path: Path, lines: Any) -> None:
    checkpoint = saved_run(tmp_path / "a")
    shutil.copytree(checkpoint, tmp_path / "copy")
    resume(tmp_path / "a", LifecycleCallback(resume_from=tmp_path / "copy"))
    assert any(f"resumed from {tmp_path / 'copy'} at step 4" in line for line in lines(logging.INFO))


def test_a_candidate_of_another_run_is_passed_over(tmp_path: Path) -> None:
    other, ours = saved_run(tmp_path / "other"), saved_run(tmp_path / "ours")
    trainer = resume(tmp_path / "b", LifecycleCallback(resume_from=other), path=str(ours))
    assert digests(trainer) == whole(tmp_path / "c")


def test_resume_from_without_resuming_is_an_error(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "a")
    with pytest.raises(ResumeMismatch, match="resume_from is given, but train"):
        new_trainer(tmp_path / "b", LifecycleCallback(resume_from=checkpoint)).train()


def test_the_state_of_another_save_is_refused(tmp_path: Path) -> None:
    other, ours = saved_run(tmp_path / "other"), saved_run(tmp_path / "ours")
    shutil.copy(rank_file(other, 0), rank_file(ours, 0))
    reseal(ours)
    with pytest.raises(ResumeMismatch, match="belongs to another save") as raised:
        resume(tmp_path / "ours")
    assert "checkpoint-2, which is intact" in str(raised.value)


def test_a_checkpoint_whose_state_was_deleted_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(saved_run(tmp_path) / "lifecycle")
    with pytest.raises(ResumeMismatch, match=r"that LifecycleCallback saved with step 4 was not found") as raised:
        resume(tmp_path)
    assert str(raised.value).count("rank-00000.safetensors: missing") == 1
    assert "checkpoint-2, which is intact; or pass LifecycleCallback(strict=False)" in str(raised.value)


def test_a_checkpoint_whose_state_was_deleted_is_warned_of_where_not_strict(tmp_path: Path, lines: Any) -> None:
    shutil.rmtree(saved_run(tmp_path) / "lifecycle")
    assert resume(tmp_path, LifecycleCallback(strict=False)).state.global_step == 6
    told = lines(logging.WARNING)
    assert any("was not found" in line for line in told)
    assert any("nothing that LifecycleCallback saved" in line for line in told)
    assert not any("strict=False" in line for line in told)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_state_file_is_named(tmp_path: Path, damage: str, strict: bool) -> None:
    file = rank_file(saved_run(tmp_path), 0)
    content = file.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, file)
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        file.write_bytes({"truncated": content[:-7], "flipped": flipped, "empty": b""}[damage])
    reseal(file.parent.parent)
    with pytest.raises(StateFileError, match=re.escape(str(file))):
        resume(tmp_path, LifecycleCallback(strict=strict))


def test_a_state_with_other_keys_is_refused_by_name(tmp_path: Path) -> None:
    with changed_state(saved_run(tmp_path)) as tree:
        del tree["parts"]["losses"]
    with pytest.raises(StateMismatch, match="losses"):
        resume(tmp_path)


def test_a_state_of_a_version_that_has_other_keys_names_the_version(tmp_path: Path) -> None:
    with changed_state(saved_run(tmp_path)) as tree:
        del tree["parts"]["losses"]
        tree["environment"]["hf-lifecycle"] = "0.0.7"
    with pytest.raises(ResumeMismatch, match=r"(?s)lifecycle 0\.0\.7 saved it.*losses.*install hf-lifecycle 0\.0\.7"):
        resume(tmp_path)


def test_a_state_of_version_0_1_resumes_exactly(tmp_path: Path) -> None:
    with changed_state(saved_run(tmp_path / "broken")) as tree:
        del tree["parts"]["due"]["rows"]
        del tree["parts"]["data_objects"]["loader"]["next"]
    assert digests(resume(tmp_path / "broken")) == whole(tmp_path / "whole")


# Beside stock Trainer.


def test_a_stock_checkpoint_is_gone_on_from_with_a_warning(tmp_path: Path, lines: Any) -> None:
    break_off(new_trainer(tmp_path))
    assert resume(tmp_path).state.global_step == 6
    assert any("nothing that LifecycleCallback saved" in line for line in lines(logging.WARNING))
    assert not any("resumed from" in line for line in lines(logging.INFO))


def test_from_the_next_save_on_a_run_that_began_without_us_is_exact(tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path), step=2)
    shutil.copytree(tmp_path, tmp_path.parent / "again")
    unbroken = resume(tmp_path)
    break_off(new_trainer(tmp_path.parent / "again", LifecycleCallback()), resume=True)
    assert digests(resume(tmp_path.parent / "again")) == digests(unbroken)


def test_what_stock_trainer_saved_after_it_resumed_from_us_is_not_taken_for_ours(tmp_path: Path, lines: Any) -> None:
    saved_run(tmp_path, step=2)
    break_off(new_trainer(tmp_path), resume=True)
    assert resume(tmp_path).state.global_step == 6
    assert any("nothing that LifecycleCallback saved" in line for line in lines(logging.WARNING))


def test_checkpoint_without_the_mark_of_its_save_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["hf_lifecycle"] = state["stateful_callbacks"]["TrainerControl"].pop("hf_lifecycle")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    reseal(checkpoint)
    with pytest.raises(ResumeMismatch, match="older version of hf_lifecycle"):
        resume(tmp_path)


def test_stock_trainer_resumes_our_checkpoints(tmp_path: Path) -> None:
    saved_run(tmp_path)
    stock = new_trainer(tmp_path)
    stock.train(resume_from_checkpoint=True)
    assert stock.state.global_step == 6


# What is said.


def test_one_line_says_what_was_restored_and_proved(tmp_path: Path, lines: Any) -> None:
    checkpoint = saved_run(tmp_path, step=4)
    resume(tmp_path)
    (line,) = [line for line in lines(logging.INFO) if "resumed from" in line]
    assert line.startswith(f"resumed from {checkpoint} at step 4: epoch 1, batch 0; exact; verified ")
    assert "; compared after loading: 4 model tensors, " in line
    assert "; differences: none; receipt: " in line
    assert not lines(logging.WARNING)


def test_a_fresh_run_says_nothing_of_resuming(tmp_path: Path, lines: Any) -> None:
    new_trainer(tmp_path, LifecycleCallback()).train()
    assert not any("resumed" in line for line in lines(logging.INFO))
    assert not lines(logging.WARNING)


HARMLESS: dict[str, dict[str, Any]] = {
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 3},
    "save_steps": {"save_steps": 3},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_difference_is_told_and_changes_no_weight(tmp_path: Path, lines: Any, name: str) -> None:
    saved_run(tmp_path / "a")
    resumed = resume(tmp_path / "a", **HARMLESS[name])
    (line,) = [line for line in lines(logging.INFO) if "resumed from" in line]
    assert re.search(rf"\b{name}: \S+ -> \S+ \(harmless\)", line)
    assert not lines(logging.WARNING)
    assert digests(resumed) == whole(tmp_path / "c")


BREAKING: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 0.5},
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "seed": {"seed": 1},
    "max_steps": {"max_steps": 7},
    "optim": {"optim": "sgd"},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "bf16": {"bf16": True},
    "rows of the training data": {"train": Rows(12)},
    "ignore_data_skip": {"ignore_data_skip": True},
}


@pytest.mark.parametrize("name", [name for name in BREAKING if name not in ("optim", "lr_scheduler_type")])
def test_what_breaks_exactness_is_an_error_or_a_warning(tmp_path: Path, lines: Any, name: str) -> None:
    saved_run(tmp_path)
    with pytest.raises(ResumeMismatch, match=rf"\b{name}\b") as raised:
        resume(tmp_path, **BREAKING[name])
    assert "strict=False" in str(raised.value)
    assert raised.value.checkpoint == tmp_path / "checkpoint-4"
    trainer = resume(tmp_path, LifecycleCallback(strict=False), **BREAKING[name])
    assert any("; not exact, see the warnings; " in line for line in lines(logging.INFO))
    assert trainer.state.global_step == trainer.args.max_steps
    assert any(re.search(rf"not exact: .*\b{name}\b", line) for line in lines(logging.WARNING))


@pytest.mark.parametrize("name", ["optim", "lr_scheduler_type"])
def test_another_optimizer_or_schedule_is_refused(tmp_path: Path, name: str) -> None:
    saved_run(tmp_path)
    with pytest.raises((ResumeMismatch, ValueError)):
        resume(tmp_path, **BREAKING[name])


def test_other_threads_break_exactness(tmp_path: Path) -> None:
    saved_run(tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        told = rf"cpu_threads: {threads} -> {threads + 1} \(breaks exactness: set OMP_NUM_THREADS={threads}\)"
        with pytest.raises(ResumeMismatch, match=told):
            resume(tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_other_numerical_switches_break_exactness(tmp_path: Path) -> None:
    saved_run(tmp_path)
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ResumeMismatch, match="float32_matmul_precision"):
            resume(tmp_path)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_another_version_breaks_exactness(tmp_path: Path) -> None:
    with changed_state(saved_run(tmp_path)) as tree:
        tree["environment"]["torch"] = "2.6.0"
    with pytest.raises(ResumeMismatch, match=r"torch: '2\.6\.0' -> "):
        resume(tmp_path)


@pytest.mark.parametrize("strict", [True, False])
def test_another_world_size_is_fatal(tmp_path: Path, strict: bool) -> None:
    with changed_state(saved_run(tmp_path)) as tree:
        tree["environment"]["world_size"] = 2
    with pytest.raises(ResumeMismatch, match="it was saved by 2 processes, and there are 1 now") as raised:
        resume(tmp_path, LifecycleCallback(strict=strict))
    assert "strict=False" not in str(raised.value)


def test_generators_that_this_machine_lacks_are_named(tmp_path: Path) -> None:
    with changed_state(saved_run(tmp_path)) as tree:
        tree["parts"]["randomness"]["cuda:0"] = torch.zeros(16, dtype=torch.uint8)
    if torch.accelerator.is_available():
        pytest.skip("there is such a device")
    with pytest.raises(ResumeMismatch, match="this machine has no cuda:0"):
        resume(tmp_path)


def test_workers_break_exactness_for_a_stream(tmp_path: Path) -> None:
    saved_run(tmp_path, train=Stream())
    with pytest.raises(ResumeMismatch, match=r"dataloader_num_workers: 0 -> 1 \(breaks exactness\)"):
        resume(tmp_path, train=Stream(), dataloader_num_workers=1)


def test_a_refused_resume_leaves_the_generators_as_they_were(tmp_path: Path) -> None:
    saved_run(tmp_path)
    trainer = new_trainer(tmp_path, LifecycleCallback(), seed=1)

    class Around(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.before = torch.get_rng_state()

    around = Around()
    trainer.callback_handler.callbacks.insert(0, around)
    with pytest.raises(ResumeMismatch, match="seed"):
        trainer.train(resume_from_checkpoint=True)
    assert torch.equal(torch.get_rng_state(), around.before)


def test_after_a_refusal_the_same_trainer_resumes_where_not_strict(tmp_path: Path) -> None:
    saved_run(tmp_path, train=Stream())
    callback = LifecycleCallback()
    trainer = new_trainer(tmp_path, callback, train=Stream(), max_grad_norm=0.1)
    with pytest.raises(ResumeMismatch, match="max_grad_norm"):
        trainer.train(resume_from_checkpoint=True)
    callback.strict = False
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_a_loader_that_cannot_be_controlled_is_named_before_training(tmp_path: Path, lines: Any) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    class Stateful(Trainer):
        def get_train_dataloader(self) -> Any:
            return torchdata.StatefulDataLoader(self.train_dataset, batch_size=4)

    new_trainer(tmp_path, LifecycleCallback(), kind=Stateful, max_steps=1).train()
    assert any("StatefulDataLoader" in line for line in lines(logging.WARNING))


def test_checkpoints_without_an_optimizer_are_named_before_training(tmp_path: Path, lines: Any) -> None:
    new_trainer(tmp_path, LifecycleCallback(), save_only_model=True, max_steps=1).train()
    assert any("save_only_model" in line for line in lines(logging.WARNING))


def test_a_generator_that_the_dataset_owns_is_named_before_training(
    tmp_path: Path, lines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="hf_lifecycle")
    data = Rows()
    data.rng = torch.Generator()  # type: ignore[attr-defined]
    new_trainer(tmp_path, LifecycleCallback(), train=data, max_steps=1).train()
    assert any("rng" in line for line in lines(logging.DEBUG))


# The user's own objects.


class Ema(nn.Module):
    """A mean of a parameter over the steps, kept by a callback."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))


class Averages(TrainerCallback):
    def __init__(self, ema: Ema) -> None:
        self.ema = ema

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.ema.mean.lerp_(model.layers[0].bias.detach(), 0.5)


class Plain:
    """A state of plain values."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def test_objects_are_restored_by_name(tmp_path: Path) -> None:
    unbroken, ema, plain = Ema(), Ema(), Plain(curve=[1, (2.5, None)], big=2**80)
    new_trainer(tmp_path / "whole", Averages(unbroken), LifecycleCallback(objects={"ema": unbroken})).train()
    broken = Ema()
    callback = LifecycleCallback(objects={"ema": broken, "plain": plain})
    break_off(new_trainer(tmp_path / "a", Averages(broken), callback))
    again = Plain()
    resumed = LifecycleCallback(objects={"plain": again, "ema": ema})
    new_trainer(tmp_path / "a", Averages(ema), resumed).train(resume_from_checkpoint=True)
    assert torch.equal(ema.mean, unbroken.mean)
    assert again.state == plain.state


@pytest.mark.parametrize(
    ("saved", "given", "told"),
    [
        ({}, {"ema": Ema()}, "'ema' has no saved state"),
        ({"ema": Ema()}, {}, "'ema' was saved, but is not given now"),
        ({"ema": Ema()}, {"eam": Ema()}, "'eam' has no saved state"),
    ],
)
def test_an_object_that_one_side_lacks_is_a_problem(
    tmp_path: Path, lines: Any, saved: Any, given: Any, told: str
) -> None:
    saved_run(tmp_path, callback=LifecycleCallback(objects=saved))
    with pytest.raises(ResumeMismatch, match=told):
        resume(tmp_path, LifecycleCallback(objects=given))
    resume(tmp_path, LifecycleCallback(objects=given, strict=False))
    assert any(told in line for line in lines(logging.WARNING))


def test_an_object_that_cannot_be_stored_is_refused_by_key_and_nothing_is_lost(tmp_path: Path) -> None:
    plain = Plain(rate=0.5)

    class Spoils(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                plain.state["fn"] = print

    trainer = new_trainer(tmp_path, Spoils(), LifecycleCallback(objects={"plain": plain}))
    with pytest.raises(UnsafeStateError, match=r"objects\['plain'\]\['fn'\]"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = Plain()
    callback = LifecycleCallback(objects={"plain": again})
    resumed = resume(tmp_path, callback, path=str(tmp_path / "checkpoint-2"))
    assert digests(resumed) == whole(tmp_path.parent / "whole")
