"""What a checkpoint holds is what was there at the save, whatever writes to tensors and whoever makes the files."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, ResumeMismatch
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.hosts.trainer.saves import small_files
from hf_lifecycle.hosts.trainer.saves.whole import DeferredSave
from hf_lifecycle.saving.snapshots.async_capture import SnapshotMemory
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.sample import Known, Sample
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from tests.field.limits import Limit
from tests.trainer.runs import Net, digests, new_trainer

COMPUTED = Limit(
    "a model whose `state_dict` is overridden or hooked, or that has a `save_pretrained` of its own: not saved in the "
    "background",
    "at a save",
    "no background saves: …: … overrides …",
)


class Perturbs(Trainer):
    """Moves all weights by ``.data`` for a step, and back, as adversarial training does."""

    def training_step(self, model: Any, *given: Any, **named: Any) -> Any:
        for one in model.parameters():
            one.data.add_(1)
        loss = super().training_step(model, *given, **named)
        for one in model.parameters():
            one.data.sub_(1)
        return loss


class Notes(TrainerCallback):
    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights[state.global_step] = {name: one.detach().clone() for name, one in model.named_parameters()}


def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that copies begins only when the optimizer's step waits for it, or after a while."""
    import time

    real = Snapshot.wait

    def wait(snapshot: Snapshot) -> None:
        time.sleep(0.05)
        real(snapshot)

    monkeypatch.setattr(Snapshot, "wait", wait)


def test_weights_perturbed_through_data_are_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _late(monkeypatch)
    notes = Notes()
    new_trainer(tmp_path, notes, LifecycleCallback(), kind=Perturbs, max_steps=12, max_grad_norm=0.0).train()
    found = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert len(found) >= 5
    for step in found:
        written = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(written[name], one) for name, one in notes.weights[step].items()), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128])
def test_write_that_moves_no_counter_is_found_in_the_copy_and_at_the_fence(dtype: torch.dtype) -> None:
    tensor, other = torch.zeros(1000).to(dtype), torch.full((7,), float("nan"))
    memory = SnapshotMemory()
    taken = memory.take([LiveTensor("a", tensor, False), LiveTensor("b", other, False)])
    tensor.data.fill_(1)
    assert taken.touched
    taken.fence()
    assert taken.torn == ["a"]
    assert not taken.settled
    again = memory.take([LiveTensor("a", tensor, False), LiveTensor("b", other, False)])  # at once from now on
    tensor.data.fill_(0)
    assert again.settled
    assert bool(again.named("a").all())


def test_write_that_is_put_back_before_the_fence_is_found_in_the_copy() -> None:
    tensor = torch.zeros(1000)
    taken = SnapshotMemory().take([LiveTensor("a", tensor, False)])
    tensor.data.fill_(1)
    taken.wait()  # the copy is made of what was never there at the save
    tensor.data.fill_(0)
    taken.fence()
    assert taken.torn == ["a"]
    assert not taken.settled


def test_samples_look_at_other_elements_each_time_and_lie_within_the_tensor() -> None:
    strided = torch.arange(400.0).reshape(20, 20)[3:9, ::2].t()
    seen = set()
    tensors, views = {"strided": strided, "one": torch.ones(()), "none": torch.ones(0)}, Known()
    for turn in range(2000):
        sample = Sample(tensors, turn, views)
        assert sample.changed() == []
        assert sample.unlike(tensors.__getitem__) == []
        (gathered,) = sample._before.values()
        seen.update(gathered.view(np.float32).tolist())
    assert len(seen) > 40


class Bank(nn.Module):
    """A frozen bank of which each forward writes a few rows through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.bank = nn.Parameter(torch.zeros(20_000, 4), requires_grad=False)
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        if self.training:
            rows = (torch.arange(len(x)) * 977 + int(self.at) * 31) % len(self.bank)
            self.bank.data[rows] = x
            self.at += 1
        return self.net(x, labels)


@pytest.mark.parametrize("background", [True, False])
def test_frozen_bank_written_by_rows_is_saved_as_it_is_and_resumes(background: bool, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return new_trainer(tmp_path, LifecycleCallback(async_save=background), model=Bank())

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert digests(resumed) == digests(whole)


class Averaged(Net):
    """Saves something else than its weights from the second save on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def state_dict(self, *given: Any, **named: Any) -> Any:
        return {name: one * self.scale for name, one in super().state_dict(*given, **named).items()}


def test_model_that_computes_its_state_is_saved_by_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Averaged()

    class Scales(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.scale = 0.5 if state.global_step == 4 else 1.0

    notes = Notes()
    new_trainer(tmp_path, Scales(), notes, LifecycleCallback(), model=model).train()
    COMPUTED.require_told(caplog.text)
    written = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(written[name], one * 0.5) for name, one in notes.weights[4].items())


def test_hook_that_is_added_during_training_is_seen_at_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Hooks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 5:
                model.layers[0].register_state_dict_post_hook(lambda module, state, prefix, meta: None)

    new_trainer(tmp_path, Hooks(), LifecycleCallback()).train()
    assert caplog.text.count("no background saves") == 1
    assert "Linear (layers.0) has a hook on its state_dict" in caplog.text


def _language_model(kind: Any = None) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return (kind or GPT2LMHeadModel)(GPT2Config(**shape, bos_token_id=2, eos_token_id=3))


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(8) + index, "labels": torch.arange(8) + index}


def _with_its_own_class() -> Any:
    from transformers import GPT2LMHeadModel

    class Noted(GPT2LMHeadModel):  # type: ignore[misc]
        def save_pretrained(self, folder: str, **named: Any) -> None:
            super().save_pretrained(folder, **named)
            Path(folder, "note.txt").write_text(str(float(self.lm_head.weight.detach().sum())))

    return _language_model(Noted)


def _with_its_own_method() -> Any:
    model = _language_model()
    own = model.save_pretrained

    def save_pretrained(folder: str, **named: Any) -> None:
        own(folder, **named)
        Path(folder, "note.txt").write_text(str(float(model.lm_head.weight.detach().sum())))

    model.save_pretrained = save_pretrained
    return model


def _around_one_with_its_own_class() -> Any:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _with_its_own_class()

        def forward(self, **given: Any) -> Any:
            return self.inner(**given)

        def state_dict(self, *given: Any, **named: Any) -> Any:
            found = super().state_dict(*given, **named)
            return {name: one for name, one in found.items() if not name.endswith("lm_head.weight")}  # tied

    return Around()


@pytest.mark.parametrize("make", [_with_its_own_class, _with_its_own_method])
def test_model_with_a_save_pretrained_of_its_own_is_saved_by_it_each_time(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place, callbacks in ((tmp_path / "stock", []), (tmp_path / "run", [LifecycleCallback()])):
        mixed = torch.random.get_rng_state()
        new_trainer(place, *callbacks, model=make(), train=Tokens(), learning_rate=1e-1).train()
        torch.random.set_rng_state(mixed)
    assert "overrides save_pretrained" in caplog.text
    notes = [(tmp_path / "run" / f"checkpoint-{step}" / "note.txt").read_text() for step in (2, 4, 6)]
    assert len(set(notes)) == 3
    for step, note in zip((2, 4, 6), notes, strict=True):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        assert note == str(float(weights["transformer.wte.weight"].sum()))


def test_save_pretrained_within_the_model_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"train": Tokens(), "remove_unused_columns": False}
    new_trainer(tmp_path, LifecycleCallback(), model=_around_one_with_its_own_class(), **given).train()
    assert "Noted overrides save_pretrained" in caplog.text


class Alike(nn.Module):
    """Two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.last(self.second(self.first(x))).squeeze(-1)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


class SavesShared(Trainer):
    """Saves tied tensors, which safetensors refuses, once for each name."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, {name: one.clone() for name, one in self.model.state_dict().items()})


class Ties(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.second.weight = model.first.weight


def test_weights_tied_amid_training_are_saved_as_stock_trainer_saves_them(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="share memory"):
        new_trainer(tmp_path / "stock", Ties(), model=Alike()).train()
    with pytest.raises(RuntimeError, match="share memory"):
        new_trainer(tmp_path, Ties(), LifecycleCallback(), model=Alike()).train()


def test_resume_of_tied_weights_into_a_model_that_does_not_tie_them_is_refused(tmp_path: Path) -> None:
    new_trainer(tmp_path, Ties(), LifecycleCallback(), model=Alike(), kind=SavesShared).train()
    resumed = new_trainer(tmp_path, LifecycleCallback(), model=Alike(), kind=SavesShared)
    with pytest.raises(ResumeMismatch, match="second\\.weight: here, but not in the checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_tokenizer_that_changes_is_written_as_it_is_at_each_save(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast, default_data_collator

    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[UNK]")

    class Pads(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                tokenizer.padding_side, tokenizer.model_max_length = "left", 77

    given = {"processing_class": tokenizer, "data_collator": default_data_collator}
    new_trainer(tmp_path, Pads(), LifecycleCallback(), with_trainer=given).train()
    found = [json.loads((tmp_path / f"checkpoint-{n}" / "tokenizer_config.json").read_text()) for n in (2, 4, 6)]
    assert [one["model_max_length"] == 77 for one in found] == [False, True, True]


class Processor:
    """Writes files that are made of what no comparison of its attributes finds."""

    written: ClassVar[dict[str, int]] = {"times": 0}

    def __init__(self) -> None:
        self.words = [f"word {number}" for number in range(3000)]
        self.deep: dict[str, Any] = {"a": {"b": {"c": {"d": {"e": 1}}}}}

    def save_pretrained(self, folder: str) -> None:
        self.written["times"] += 1
        content = {**vars(self), **self.written}  # as an image processor does
        (Path(folder) / "processor.json").write_text(json.dumps(content))

    def __call__(self, text: str) -> str:
        return text


def test_processor_writes_its_own_files_at_each_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_files, "_SOON", 60.0)  # however busy this machine is
    from transformers import default_data_collator

    processor, own = Processor(), vars(Processor)["save_pretrained"]

    class Changes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                processor.words[7] = "another"
                processor.deep["a"]["b"]["c"]["d"]["e"] = 2

    def saved(place: Path, *callbacks: TrainerCallback) -> list[Any]:
        nonlocal processor
        processor, processor.written["times"] = Processor(), 0
        given = {"processing_class": processor, "data_collator": default_data_collator}
        new_trainer(place, Changes(), *callbacks, with_trainer=given).train()
        assert vars(Processor)["save_pretrained"] is own
        return [json.loads((place / f"checkpoint-{n}" / "processor.json").read_text()) for n in (2, 4, 6)]

    assert saved(tmp_path / "run", LifecycleCallback()) == saved(tmp_path / "stock")
    assert "no background saves" not in caplog.text


def test_configuration_with_a_writer_of_its_own_is_written_by_trainer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Noted(GPT2Config):
        note = "first"

        def to_json_string(self, use_diff: bool = True) -> str:
            return json.dumps({**json.loads(super().to_json_string(use_diff)), "note": Noted.note})

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            Noted.note = f"after step {state.global_step}"

    shape: dict[str, Any] = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(Noted(**shape, bos_token_id=2, eos_token_id=3))
    new_trainer(tmp_path, Notes(), LifecycleCallback(), model=model, train=Tokens()).train()
    assert "the checkpoints are the same: Noted overrides to_json_string" in caplog.text
    found = [json.loads((tmp_path / f"checkpoint-{n}" / "config.json").read_text())["note"] for n in (2, 4, 6)]
    assert found == [f"after step {n}" for n in (2, 4, 6)]


def test_state_dict_that_is_replaced_on_torchs_class_is_left_to_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = nn.Module.state_dict

    @functools.wraps(own)
    def halved(self: nn.Module, *given: Any, **named: Any) -> Any:
        found = own(self, *given, **named)
        return {name: one / 2 for name, one in found.items()} if isinstance(self, Net) else found

    monkeypatch.setattr(nn.Module, "state_dict", halved)
    trainer = new_trainer(tmp_path, LifecycleCallback())
    trainer.train()
    assert "torch.nn.Module.state_dict was replaced" in caplog.text
    file = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    live = dict(trainer.model.named_parameters())
    assert all(torch.equal(file[name], one.detach() / 2) for name, one in live.items())


class Moving(LambdaLR):
    """A schedule that writes to a tensor of its state in place, at each of its steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.moved = torch.zeros(3)
        super().__init__(optimizer, lambda step: 1.0 / (1 + step))

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.moved += 1


def test_tensor_in_a_schedules_state_is_written_as_it_was_at_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, has_stepped = DeferredSave.write, threading.Event()

    def late(self: DeferredSave, *given: Any) -> None:
        assert has_stepped.wait(60)
        own(self, *given)

    class Lets(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:  # the schedule has stepped since the save of step 4
                has_stepped.set()

    monkeypatch.setattr(DeferredSave, "write", late)
    found = {}
    for name, in_background in (("background", True), ("Trainer", False)):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        callbacks = (Lets(), LifecycleCallback(async_save=in_background))
        pair = {"optimizers": (optimizer, Moving(optimizer))}
        new_trainer(tmp_path / name, *callbacks, model=model, with_trainer=pair).train()
        told = [event.facts["step"] for event in read_events(tmp_path / name) if event.event == "snapshot"]
        assert told == ([4, 6] if in_background else [])
        files = [tmp_path / name / f"checkpoint-{step}" / "scheduler.pt" for step in (4, 6)]
        found[name] = [torch.load(file, weights_only=True)["moved"].tolist() for file in files]
    assert found["background"] == found["Trainer"] == [[5.0] * 3, [7.0] * 3]  # it steps once when it is made
