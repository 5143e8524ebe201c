"""``save(wait=False)``: the same files, of the moment of the save; nothing is torn, and what goes wrong is told."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hf_lifecycle import SaveFailed, latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import problems_of, staging_folder
from hf_lifecycle.errors import UnsafeStateError
from hf_lifecycle.hosts.accelerate.run import Run
from hf_lifecycle.hosts.accelerate.run_state.program import Program
from hf_lifecycle.saving.files.comparison import Comparison
from hf_lifecycle.saving.snapshots import async_capture as overlap
from hf_lifecycle.saving.snapshots.async_capture import SnapshotMemory
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from tests import preloaded
from tests.resume.cases.tiny import FEATURES, Regressor, Rows
from tests.resume.harness import BrokenOff
from tests.resume.loops.cases import CASES
from tests.resume.loops.harness import Arm, LoopCase, Tool, aligned, run_broken, run_unbroken
from tests.resume.outcome import Outcome, compare
from tests.saving.failing import fail_writes

from .tiny import Counter, Script, new_script

ROOT = Path(__file__).parent.parent.parent


class Tied(nn.Module):
    """Two names of one weight, a frozen part in bfloat16, and zeros that could be any of several."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, 1).to(torch.bfloat16).requires_grad_(False)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.bias)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += 1
        hidden = self.second(torch.tanh(self.first(x))).to(torch.bfloat16)
        return {"loss": nn.functional.mse_loss(self.frozen(hidden).squeeze(-1).float(), labels)}


def _groups(model: nn.Module) -> Any:
    weights = [one for one in model.parameters() if one.requires_grad and one.ndim > 1]
    return [{"params": weights}, {"params": [one for one in model.parameters() if one.requires_grad and one.ndim == 1]}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=3),
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "groups": lambda model: torch.optim.Adam(_groups(model), lr=0.01, amsgrad=True),
}


def _simple(tool: Tool, options: Mapping[str, Any]) -> None:
    """Two epochs, a save every 2 steps; every optimizer may call the closure as often as it likes."""
    inner = options["model"]()
    model = torch.compile(inner, backend="eager") if options.get("compiled") else inner
    optimizer = OPTIMIZERS[options.get("optimizer", "groups")](inner)
    model, optimizer, loader = tool.accelerator.prepare(
        model, optimizer, DataLoader(Rows(), batch_size=4, shuffle=True)
    )
    tool.resume()
    for _ in tool.epochs(2):
        for batch in tool.batches(loader):

            def closure(batch: Any = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(**batch)["loss"]
                tool.accelerator.backward(loss)
                return loss.detach()

            optimizer.step(closure)
            tool.trained(batch, torch.zeros(()))
            if tool.steps % 2 == 0:
                tool.save()


def _own(name: str, **options: Any) -> LoopCase:
    return LoopCase(name, "", _simple, options={"model": Regressor, **options}, break_at=(7,))


KINDS = {case.name: case for case in CASES} | {
    case.name: case
    for case in (
        _own("tied", model=Tied),
        _own("compiled", compiled=True),
        *(_own(name, optimizer=name) for name in OPTIMIZERS),
    )
}


def content(checkpoint: Path) -> dict[str, bytes]:
    """Every file but the manifest, which tells the time."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    del files["lifecycle/manifest.json"]
    return {name: path.read_bytes() for name, path in files.items()}


def told(directory: Path, *names: str) -> list[tuple[str, Any]]:
    return [(one.event, one.facts["step"]) for one in read_events(directory) if one.event in names]


@pytest.fixture
def one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the program has the same name and the same code, which its files hold."""
    real = Run._agree
    monkeypatch.setattr(Program, "begin_pass", lambda *_: None)
    monkeypatch.setattr(Run, "_agree", lambda run, directory: (real(run, directory)[0], "f" * 32))


@pytest.mark.usefixtures("one_name")
@pytest.mark.parametrize(
    "name",
    [
        *("tied", "groups", "lbfgs", "plain sgd", "compiled", "norm", "unsaved_buffer", "gan", "scaler", "pure_bf16"),
        *("ema", "accumulation", "both_saves", "stateful", pytest.param("plain", marks=pytest.mark.core)),
    ],
)
def test_files_are_byte_for_byte_those_of_a_save_that_waits_and_the_loop_goes_on_exactly(
    name: str, tmp_path: Path
) -> None:
    case = KINDS[name]
    if case.needs:
        pytest.importorskip(case.needs[0])
    ended: dict[str, Outcome] = {}
    arms: tuple[Arm, ...] = ("manager", "background")
    for arm in arms:
        ended[arm] = run_unbroken(case, tmp_path / arm, arm)
    assert compare(ended["manager"], ended["background"]) == []
    kept = [sorted(path.name for path in (tmp_path / arm).glob("checkpoint-*")) for arm in arms]
    assert kept[0] == kept[1]
    steps = {step for _, step in told(tmp_path / "background", "written")}
    for checkpoint in kept[0]:
        ours, theirs = (content(tmp_path / arm / checkpoint) for arm in ("background", "manager"))
        assert ours.keys() == theirs.keys()
        assert [file for file in theirs if ours[file] != theirs[file]] == []
        assert problems_of(tmp_path / "background" / checkpoint, full=True) == []
        assert int(checkpoint.partition("-")[2]) in steps
    resumed = run_broken(case, tmp_path / "broken", "background", ended["manager"])
    assert compare(aligned(ended["manager"], resumed), resumed) == []


def test_files_are_the_same_where_the_path_has_letters_that_are_not_ascii(tmp_path: Path) -> None:
    def run(place: Path, *, wait: bool) -> dict[str, bytes]:
        train(new_run(place), wait=wait).manager.close()
        return content(place / "checkpoint-4")

    ours, theirs = run(tmp_path / "Läufe ☃", wait=False), run(tmp_path / "ждут", wait=True)
    assert ("written", 4) in told(tmp_path / "Läufe ☃", "written")
    assert all(ours[file] == theirs[file] for file in ("model.safetensors", "optimizer.bin"))


def test_saves_are_made_in_the_background_on_one_node_that_is_told_to_save_on_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_run(tmp_path)
    script.accelerator.project_configuration.save_on_each_node = True
    train(script, wait=False).manager.close()
    assert ("written", 4) in told(tmp_path, "written")
    assert "no background saves" not in caplog.text


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the writer's thread back, so that what comes right after a save always meets it."""
    real = Snapshot.wait

    def wait(snapshot: Snapshot) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
        real(snapshot)

    monkeypatch.setattr(Snapshot, "wait", wait)


def new_run(directory: Path, **settings: Any) -> Script:
    script = new_script(directory, objects={"counter": Counter(1)}, generators=11, **settings)
    script.manager.resume()
    return script


Then = Callable[[Script], object]


def at(step: int, then: Then) -> Then:
    """``then``, after the save of this step alone."""
    return lambda script: then(script) if script.manager.progress.step == step else None


def leave(script: Script) -> None:
    raise BrokenOff


def train(script: Script, then: Then = lambda script: None, *, wait: bool = False, epochs: int = 2) -> Script:
    """Save every 2 steps and call ``then`` right after; 6 steps an epoch."""
    for _ in script.manager.epochs(epochs):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            if script.manager.progress.step % 2 == 0:
                script.manager.save(wait=wait)
                then(script)
    return script


def _zero_parameter(script: Script) -> None:
    script.model.layers[0].weight = nn.Parameter(torch.zeros_like(script.model.layers[0].weight))


def _count(script: Script) -> None:
    run = script.manager._run
    assert run is not None
    run._objects["counter"].count = 99  # type: ignore[attr-defined]


AFTERWARDS: dict[str, Then] = {
    "group": lambda script: script.optimizer.param_groups[0].update(weight_decay=0.25),
    "random numbers": lambda script: torch.rand(5),
    "object": _count,
    "best metric": lambda script: script.manager.is_best(0.5),
    "parameter replaced": _zero_parameter,
    "state replaced": lambda script: script.optimizer.state.clear(),
    "buffer": lambda script: script.model.layers[1].running_mean.add_(1),
    "scheduler": lambda script: script.accelerator._schedulers[0].step(),
}


@pytest.mark.usefixtures("slowly", "one_name")
def test_what_changes_right_after_the_save_is_saved_as_it_was(tmp_path: Path) -> None:
    def up_to_4(directory: Path, *then: Then, wait: bool) -> dict[str, bytes]:
        script = new_run(directory, norm=True)
        script.accelerator.prepare(LambdaLR(script.optimizer, lambda step: 1 / (1 + step)))

        def last(script: Script) -> None:
            for one in then:
                one(script)
            leave(script)

        with pytest.raises(BrokenOff):
            train(script, at(4, last), wait=wait)
        script.manager.close()
        return content(directory / "checkpoint-4")

    theirs = up_to_4(tmp_path / "theirs", wait=True)
    # One at a time: what would show one of them could hide another. Those that need no step share a run.
    for number, (name, then) in enumerate(AFTERWARDS.items()):
        ours = up_to_4(tmp_path / str(number), then, wait=False)
        assert told(tmp_path / str(number), "written", "failed") == [("written", 4)], name
        assert [file for file in theirs if ours[file] != theirs[file]] == [], name


def _touch(script: Script) -> None:
    """Writes to a parameter what it has."""
    with torch.no_grad():
        script.model.layers[0].weight.mul_(1.0)


def _touch_state(script: Script) -> None:
    next(iter(script.optimizer.state.values()))["exp_avg"].mul_(1.0)


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("touch", [_touch, _touch_state])
def test_torn_snapshot_is_thrown_away_and_made_up_for_at_the_next_step_exactly(
    touch: Then, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calm = train(new_run(tmp_path / "calm"), wait=True)
    calm.manager.close()
    torn = train(new_run(tmp_path / "torn"), at(8, touch))
    torn.manager.close()
    assert torn.digests() == calm.digests()
    names = sorted(path.name for path in (tmp_path / "torn").glob("checkpoint-*"))
    assert names == sorted(f"checkpoint-{step}" for step in (2, 4, 6, 9, 10, 12))
    assert told(tmp_path / "torn", "failed") == [("failed", 8)]
    assert caplog.text.count("checkpoint-8: not saved: ") == 1
    assert list(staging_folder(tmp_path / "torn").iterdir()) == []
    for name in names:
        assert problems_of(tmp_path / "torn" / name, full=True) == []
    resumed = new_script(tmp_path / "again", objects={"counter": Counter(1)})
    resumed.manager.resume(tmp_path / "torn" / "checkpoint-9")
    train(resumed).manager.close()
    assert resumed.digests() == calm.digests()


@pytest.mark.usefixtures("slowly")
def test_snapshot_that_is_torn_at_an_epochs_end_is_made_up_for_there(tmp_path: Path) -> None:
    """In its last batch's body, or at its end; what follows draws, and writes to what is being copied."""

    def run(script: Script, *, wait: bool) -> Script:
        for epoch in script.manager.epochs(3):
            for batch in script.manager.batches(script.loader):
                script.train(batch)
                if script.manager.progress.step in (3, 6):
                    script.manager.save(wait=wait)
            if epoch == 1:
                script.manager.save(wait=wait)
            torch.rand(3)
            (_touch, _touch_state, _touch)[epoch](script)
        script.manager.close()
        return script

    calm = run(new_run(tmp_path / "calm"), wait=True)
    torn = run(new_run(tmp_path / "torn"), wait=False)
    assert torn.digests() == calm.digests()
    expected = [("saved", 3), ("failed", 6), ("saved", 6), ("failed", 12), ("saved", 12)]
    assert told(tmp_path / "torn", "failed", "saved") == expected
    for epoch, step in ((1, 6), (2, 12)):
        resumed = new_script(tmp_path / f"again-{step}", objects={"counter": Counter(1)})
        resumed.manager.resume(tmp_path / "torn" / f"checkpoint-{step}")
        assert resumed.manager.progress.epoch == epoch
        assert run(resumed, wait=True).digests() == calm.digests()


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("breaks", [False, True])
def test_snapshot_that_is_torn_at_the_end_of_a_loop_without_epochs_is_made_up_for(breaks: bool, tmp_path: Path) -> None:
    """At that end; where the loop was left by break, at the first step's end of the next one."""

    def run(directory: Path, *, wait: bool) -> Script:
        script = new_run(directory)
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            if script.manager.progress.step in (2, 6):
                script.manager.save(wait=wait)
                if script.manager.progress.step == 6:
                    _touch(script)
                    if breaks:
                        break
        if breaks:
            for batch in script.manager.batches(script.loader):
                script.train(batch)
        script.manager.close()
        return script

    calm = run(tmp_path / "calm", wait=True)
    torn = run(tmp_path / "torn", wait=False)
    assert torn.digests() == calm.digests()
    assert told(tmp_path / "torn", "failed", "saved") == [("saved", 2), ("failed", 6), ("saved", 7 if breaks else 6)]
    assert run(tmp_path / "torn", wait=True).digests() == calm.digests()


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("where", ["the end of the loop", "close"])
def test_torn_snapshot_that_cannot_be_made_up_for_is_an_error_at_the_end(where: str, tmp_path: Path) -> None:
    script = new_run(tmp_path)

    def go_through() -> None:
        for _ in script.manager.epochs(1):
            for batch in script.manager.batches(script.loader):
                script.train(batch)
                if script.manager.progress.step in (2, 6):
                    script.manager.save(wait=False)
            _touch(script)
            if where == "close":
                break
            script.accelerator.gradient_state._set_sync_gradients(False)  # gradients that are in no checkpoint

    said = r"checkpoint-6 was not saved: SnapshotTorn: .*layers.0.weight changed"
    if where == "close":
        go_through()
    else:
        with pytest.raises(SaveFailed, match=said):
            go_through()
    with contextlib.nullcontext() if where != "close" else pytest.raises(SaveFailed, match=said):
        script.manager.close()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.usefixtures("slowly")
def test_what_is_seen_to_change_between_a_save_and_the_next_step_is_copied_at_once(tmp_path: Path) -> None:
    train(new_run(tmp_path), _touch).manager.close()
    assert told(tmp_path, "failed", "saved") == [("saved", 2)]


SAID = r"checkpoint-4 was not saved: .*No space left.*model\.safetensors"


def test_loop_goes_on_while_the_first_save_is_compared_and_what_differs_is_accelerates_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on, real, compared = threading.Event(), Comparison.run, []

    def run(comparison: Comparison, folder: Path, digests: Mapping[str, str]) -> Any:
        assert trained_on.wait(30)
        compared.append(comparison.name)
        return real(comparison, folder, {**digests, "model 0.layers.0.weight": "another"})

    monkeypatch.setattr(Comparison, "run", run)
    script = new_script(tmp_path)
    for _ in script.manager.epochs(1):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            if script.manager.progress.step == 3:
                assert not (tmp_path / "checkpoint-2").exists()
                trained_on.set()
            if script.manager.progress.step % 2 == 0:
                script.manager.save(wait=False)
    script.manager.close()
    assert compared == ["model.safetensors"]
    assert told(tmp_path, "saved", "asked") == [("saved", 2), ("saved", 4), ("asked", 6)]
    assert [problems_of(tmp_path / f"checkpoint-{step}", full=True) for step in (2, 4, 6)] == [[]] * 3


@pytest.mark.parametrize("where", ["the end of the loop", "close", "resume"])
def test_failed_last_save_is_raised_at_the_end(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch)
    script = new_run(tmp_path)
    if where == "the end of the loop":
        with pytest.raises(SaveFailed, match=SAID):
            script.run(epochs=1, save_at=(2, 4), wait=False)
        assert "ended" not in [event.event for event in read_events(tmp_path)]
        script.manager.close()
        return
    with pytest.raises(BrokenOff):
        train(script, at(4, leave))
    with pytest.raises(SaveFailed, match=SAID):
        script.manager.close() if where == "close" else script.manager.resume()
    script.manager.close()
    new_run(tmp_path).manager.close()  # the directory is free


@pytest.mark.usefixtures("slowly")
def test_who_looks_for_checkpoints_finds_the_one_in_flight(tmp_path: Path) -> None:
    script = new_run(tmp_path, keep_last=1)
    with pytest.raises(BrokenOff):
        train(script, at(4, leave))
    assert (tmp_path / "checkpoint-4").is_dir()  # the exception has waited for it
    assert script.manager.resume() == tmp_path / "checkpoint-4"
    script.run(epochs=1)
    promised = script.manager.save(wait=False)
    assert not promised.exists()
    assert latest_checkpoint(tmp_path) == str(promised)
    promised = script.manager.save(wait=False)
    assert script.manager.resume() == promised
    train(script)
    script.manager.save()
    script.manager.close()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


@pytest.mark.usefixtures("slowly")
def test_loop_that_is_left_and_a_load_within_it_wait_for_what_is_in_flight(tmp_path: Path) -> None:
    script = new_run(tmp_path)
    for _ in script.manager.epochs(2):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            if script.manager.progress.step % 2 == 0:
                promised = script.manager.save(wait=False)
            if script.manager.progress.step == 4:
                break
        assert not promised.exists()  # the loop over epochs goes on
        break
    assert promised.is_dir()
    script.manager.save(wait=False)  # outside any loop: copied at once
    _touch(script)
    script.accelerator.load_state(str(tmp_path / "checkpoint-2"))
    assert problems_of(tmp_path / "checkpoint-4", full=True) == []
    assert told(tmp_path, "failed") == []
    script.manager.close()


BREAKS = """
import sys, time
from pathlib import Path
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from tests.accelerator.test_background import new_run, train

wait = Snapshot.wait
Snapshot.wait = lambda snapshot: (time.sleep(1), wait(snapshot))[1]
script = new_run(Path(sys.argv[1]), mirror=sys.argv[2])
train(script, epochs=1)
script.manager.is_best(0.5)
script.manager.save(wait=False)  # no loop is there to wait for it
raise RuntimeError("as scripts do")
"""


@pytest.mark.slow
def test_interpreter_that_ends_by_an_exception_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    place, mirror = tmp_path / "run", tmp_path / "mirror"
    command = [sys.executable, "-c", BREAKS, str(place), str(mirror)]
    ended = preloaded.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "RuntimeError: as scripts do" in ended.stderr
    assert ended.returncode == 1
    assert told(place, "failed") == []
    manifests = [(copy / "checkpoint-6" / "lifecycle" / "manifest.json").read_bytes() for copy in (place, mirror)]
    assert manifests[0] == manifests[1]
    for copy in (place, mirror):
        assert problems_of(copy / "checkpoint-6", full=True) == []


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files that each memory which is taken for snapshots is laid out like."""
    found: list[list[str]] = []
    real = SnapshotMemory._make_room

    def make_room(memory: SnapshotMemory, storages: Any, regions: Mapping[str, Any]) -> None:
        found.append(list(regions))
        real(memory, storages, regions)

    monkeypatch.setattr(SnapshotMemory, "_make_room", make_room)
    return found


FILES = ["model.safetensors", "optimizer.bin"]


def test_memory_of_snapshots_is_kept_through_a_programs_own_loop_over_epochs(
    tmp_path: Path, rooms: list[list[str]]
) -> None:
    script = new_run(tmp_path)
    for _ in range(3):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            if script.manager.progress.step % 2 == 0:
                script.manager.save(wait=False)
    script.manager.close()
    assert rooms == [FILES]


def test_memory_that_a_save_before_the_first_step_asked_for_is_made_anew_like_the_files(
    tmp_path: Path, rooms: list[list[str]]
) -> None:
    script = new_run(tmp_path)
    script.manager.save(wait=False)
    train(script, epochs=1).manager.close()
    assert rooms == [FILES, FILES]
    assert told(tmp_path, "saved", "written") == [("saved", 0), *(("written", step) for step in (2, 4, 6))]


def test_memory_that_is_made_anew_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rooms: list[list[str]]
) -> None:
    script = new_run(tmp_path)
    script.manager.save(wait=False)
    monkeypatch.setattr(overlap, "available_memory", lambda: 100)
    train(script, epochs=1).manager.close()
    assert len(rooms) == 1
    assert caplog.text.count("bytes of host memory, and 100 are free") == 1
    assert told(tmp_path, "saved") == [("saved", step) for step in (0, 2, 4, 6)]


def _foreign_hook(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: None)


def _little_memory(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "available_memory", lambda: 100)


def _computed(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        for name in state:
            state[name] = state[name].to(torch.bfloat16)

    script.model.register_state_dict_post_hook(halve)


def _compiled_in_parts(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.model.more = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])  # what is there twice is compiled by itself
    script.model = script.accelerator._models[0] = compile_regions(script.model, backend="eager")


def _odd_state(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.optimizer.param_groups[0]["odd"] = Counter


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        (_foreign_hook, "another save hook is registered"),
        (_little_memory, "bytes of host memory"),
        (_computed, "is not a tensor of the model"),
        (_compiled_in_parts, "the model Regressor is inside an unknown wrapper"),
        (_odd_state, "the state of optimizer 0 holds a builtins.type"),
    ],
)
def test_reason_why_saves_wait_is_said_once(
    why: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_run(tmp_path)
    why(script, monkeypatch)
    with caplog.at_level(logging.INFO):
        train(script, epochs=1).manager.close()
    assert caplog.text.count("save(wait=False) blocks until the checkpoint is written") == 1
    assert reason in caplog.text
    assert told(tmp_path, "saved") == [("saved", step) for step in (2, 4, 6)]
    assert problems_of(tmp_path / "checkpoint-6", full=True) == []


def test_what_is_trained_may_change(tmp_path: Path) -> None:
    def freeze(script: Script) -> None:
        script.model.layers[0].requires_grad_(False)

    script = new_run(tmp_path)
    train(script, at(6, freeze)).manager.close()
    assert told(tmp_path, "saved") == [("saved", 2), ("saved", 6)]
    resumed = new_script(tmp_path, objects={"counter": Counter(1)})
    resumed.model.layers[0].requires_grad_(False)
    assert resumed.manager.resume() == tmp_path / "checkpoint-12"
    assert resumed.digests() == script.digests()
    resumed.manager.close()


def test_object_that_cannot_be_stored_is_refused_where_it_is_saved(tmp_path: Path) -> None:
    script = new_run(tmp_path)
    run = script.manager._run
    assert run is not None

    def spoil(script: Script) -> None:
        run._objects["counter"].count = Counter  # type: ignore[attr-defined, union-attr]

    with pytest.raises(UnsafeStateError, match=r"objects\['counter'\]\['count'\]"):
        train(script, at(4, spoil))
    assert script.manager.progress.step == 6
    script.manager.close()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
